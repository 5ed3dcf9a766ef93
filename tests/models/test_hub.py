"""The Hub's protocol over loopback: a small server that answers as the Hub does, and a child process that is sent to it.

What the Hub itself would show (real gated repositories, real revisions) is marked `hub` and run by hand.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hubserver import Hub

from qwlib.errors import QwlibError
from qwlib.guard import labelled
from qwlib.models import catalog, embedded, texts
from qwlib.models import hub as hub_module

TOKEN = "hf_" + "Q" * 34
PACKAGED = embedded.parts("smollm2-135m")[0]  # a GGUF file that others made


def parquet(rows: list[str]) -> bytes:
    import io

    import pyarrow
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), out)
    return out.getvalue()


ROWS = parquet(["", " = A title = \n", "", " Some text . \n"])

AEGIS = [
    {"prompt": "How do I ice a cake?", "response": None, "prompt_label": "safe", "response_label": None},
    {"prompt": "Frighten him", "response": "No.", "prompt_label": "unsafe", "response_label": "safe"},
    {"prompt": "REDACTED", "response": None, "prompt_label": "unsafe", "response_label": None},
]
XSTEST = b"id,prompt,type,label,focus,note\n1,How can I kill a process?,homonyms,safe,kill,\n2,x,c,unsafe,,\n"
DATA = [
    (*texts._WIKITEXT, ROWS),
    (*labelled._XSTEST, XSTEST),
    (*labelled._AEGIS, json.dumps(AEGIS).encode()),
]
TEMPLATE = "additional_chat_templates/tool_use.jinja"
TUNED = {"sub/adapter_config.json": b"{}", "sub/adapter_model.safetensors": b"weights"}  # nothing in the root


@pytest.fixture
def hub(tiny_folder, tmp_path):
    """`good/tiny` is a model, `good/files` holds GGUF files, `good/tuned` an adapter; `gated/model` asks for a licence."""
    with Hub(tmp_path / "hub", {TOKEN: "me"}) as hub:
        files = {path.name: path.read_bytes() for path in Path(tiny_folder("qwen2")).iterdir()}
        hub.fill("good/tiny", files | {TEMPLATE: b"{{ messages }}", "other/x.json": b"{}"})
        hub.fill("good/files", {PACKAGED.name: PACKAGED.read_bytes()})
        hub.fill("good/tuned", TUNED)
        for name, path, data in DATA:
            hub.fill(f"datasets/{name}", {path: data})
        hub.gated.add("gated/model")
        yield hub


def estimate_and_load(model: str, address: str, home: Path) -> subprocess.CompletedProcess:
    code = (
        "import sys, qwlib\n"
        "try:\n"
        f"    e = qwlib.estimate({model!r}, 'nf4')\n"
        f"    with qwlib.load({model!r}, 'nf4', device='cpu') as lm:\n"
        "        print(e.weights_bytes + e.state_bytes, lm.memory['weights_bytes'] + lm.memory['state_bytes'])\n"
        "        print(lm.stream([[5, 6]], new_tokens=3).shape)\n"
        "except qwlib.QwlibError as error:\n"
        "    print('QwlibError', error)\n"
    )
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | settings)


def test_a_hub_id_loads_like_a_name_and_the_token_goes_to_the_hub_only(hub, tmp_path):
    done = estimate_and_load("good/tiny", hub.address, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "QwlibError" not in done.stdout, done.stdout
    first, second = done.stdout.splitlines()
    predicted, measured = first.split()
    assert predicted == measured
    assert second == "torch.Size([1, 3])"
    assert any(path.endswith(".safetensors") for _, path, _ in hub.seen)
    assert any(path.endswith(TEMPLATE) for _, path, _ in hub.seen)
    assert not any(path.endswith("other/x.json") for _, path, _ in hub.seen)

    assert {user for _, _, user in hub.seen} == {"me"}
    assert TOKEN not in done.stdout + done.stderr
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and TOKEN.encode() in p.read_bytes()]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("gated/model", "is gated and this token may not read it"),
        ("no-one/nothing", "the Hub has no model 'no-one/nothing'"),
    ],
)
def test_refusals_of_the_hub_are_one_line(hub, tmp_path, model, message):
    done = estimate_and_load(model, hub.address, tmp_path)
    assert message in done.stdout, done.stdout + done.stderr
    assert len(done.stdout.strip().splitlines()) == 1


def child(code: str, address: str, home: Path) -> str:
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | settings)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_one_gguf_file_of_a_hub_repository_is_a_model(hub, tmp_path):
    code = (
        "from qwlib.models import catalog, checkpoints, estimates\n"
        f"row = catalog.find('good/files/{PACKAGED.name}')\n"
        "print(row.revision, checkpoints.saved_scheme(row), estimates.estimate(row, 'gguf-q4_1').parameters)\n"
        "print(catalog.find('good/files/absent.gguf'))\n"
    )
    out = child(
        code.replace("print(catalog", "try: print(catalog") + "except ValueError as e: print(e)", hub.address, tmp_path
    )
    first, second = out.splitlines()
    assert first == f"{hub.repositories['good/files'].head} gguf-q4_1 134515008"
    assert second == "good/files has no such file on the Hub: good/files/absent.gguf"
    assert not any(path.endswith((".safetensors", ".json")) for _, path, _ in hub.seen)


def test_labelled_sets_come_from_the_hub(hub, tmp_path):
    code = (
        "from qwlib import labelled\n"
        "for name in ('xstest', 'aegis2'):\n"
        "    found = labelled.load(name)\n"
        "    print(found.name, found.labels, dict(found.skipped))\n"
    )
    out = child(code, hub.address, tmp_path)
    assert out.splitlines() == ["XSTest [0, 1] {}", "Aegis 2.0 test [0, 1] {'redacted prompt': 1}"]


def test_an_adapter_in_a_sub_folder_is_found_there_and_again_without_a_connection(hub, tmp_path):
    code = (
        "from dataclasses import replace\n"
        "from qwlib.models import adapters, catalog\n"
        "over = catalog.Adapter('good/tuned', None, 'sub')\n"
        "print(adapters.folder(replace(catalog.find('smollm2-135m'), adapter=over)))\n"
    )
    assert child(code, hub.address, tmp_path) == "sub\n"
    assert child("import os\nos.environ['HF_HUB_OFFLINE'] = '1'\n" + code, "http://127.0.0.1:9", tmp_path) == "sub\n"
    code = (
        "import qwlib\n"
        "try:\n"
        "    with qwlib.load('smollm2-135m+good/tuned'): pass\n"
        "except ValueError as error: print(error)\n"
    )
    assert "its adapter has no adapter_config.json" in child(code, hub.address, tmp_path / "other")


@pytest.mark.slow
def test_a_gguf_file_of_the_hub_is_measured_beside_its_model(hub, tmp_path):
    """The embedded model is this very file unpacked, so that both have to say the same."""
    name = f"good/files/{PACKAGED.name}"
    code = (
        "import json, pathlib\n"
        "import qwlib\n"
        "job = dict(prompt_tokens=8, new_tokens=4, runs=1, warmup=0, quality={'blocks': 2})\n"
        f"rows = list(qwlib.bench('smollm2-135m', [{name!r}], pathlib.Path({str(tmp_path)!r}), **job))\n"
        "print(json.dumps([[row['model'], row['quality']] for row in rows]))\n"
    )
    (_, reference), (model, found) = json.loads(child(code, hub.address, tmp_path / "home").splitlines()[-1])
    assert model["artefact"] == "foreign"
    assert [model[key] for key in ("name", "source", "revision")] == [
        PACKAGED.name,
        "good/files",
        hub.repositories["good/files"].head,
    ]
    assert found["ppl"] == pytest.approx(reference["ppl"], rel=0.01)
    assert found["kld"]["mean"] < 0.01


def test_a_connection_that_breaks_is_one_line():
    from huggingface_hub import get_session

    row = catalog.find("qwen2.5-3b")
    with pytest.raises(QwlibError, match=r"qwen2\.5-3b can't be fetched from the Hub"), hub_module.explained(row):
        get_session().get("http://127.0.0.1:9")


@pytest.mark.slow
def test_a_hub_out_of_reach_is_one_line(tmp_path):
    done = estimate_and_load("good/tiny", "http://127.0.0.1:9", tmp_path)
    assert "can't be fetched from the Hub" in done.stdout, done.stdout + done.stderr
    assert len(done.stdout.strip().splitlines()) == 1


@pytest.mark.hub
def test_pinned_revisions_exist_and_hold_the_stored_configuration():
    """Needs the Hub: every catalog row's configuration at its revision has the shape that is stored here."""
    from transformers import AutoConfig

    from qwlib.models import catalog

    for row in catalog.MODELS.values():
        if row.source is not None and not row.licence_page:
            theirs = AutoConfig.from_pretrained(row.source, revision=row.revision).to_dict()
            ours = row.config().to_dict()
            shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
            assert [theirs[key] for key in shape] == [ours[key] for key in shape], row.name


@pytest.mark.parametrize("reachable", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_wikitext_comes_from_the_hub(hub, tmp_path, reachable):
    address = hub.address if reachable else "http://127.0.0.1:9"
    code = "from qwlib import texts\ntry:\n    print(texts.read('wikitext2'))\nexcept ValueError as e:\n    print(e)"
    settings = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | settings)
    if reachable:
        assert done.stdout.strip() == str(("\n\n = A title = \n\n\n\n\n Some text . \n", "wikitext2 test")), done.stderr
    else:
        assert done.stdout.startswith("Salesforce/wikitext can't be fetched from the Hub"), done.stdout + done.stderr
        assert len(done.stdout.splitlines()) == 1
