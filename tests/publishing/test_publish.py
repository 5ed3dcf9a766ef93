"""Publishing against the loopback Hub: there and back, what is refused, what breaks on the way, and a kill at any moment."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hubserver import Fault, Hub, card_errors
from huggingface_hub import HfApi, constants

import qwlib
from qwlib import __main__, files, schemes
from qwlib.backends import environment
from qwlib.errors import QwlibError
from qwlib.loading import fresh, quantizing
from qwlib.machine import arithmetic
from qwlib.models import artefacts, catalog, embedded
from qwlib.publishing import card, publish, remote

ME, OTHER = "hf_" + "M" * 34, "hf_" + "O" * 34
REPO = "me/model"
ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with Hub(tmp_path / "hub", {ME: "me", OTHER: "other"}) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        template = hub.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


def child(hub, tmp_path, token: str | None = ME) -> dict:
    """The surroundings of another process that takes `hub` for the Hub."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    return plain | settings | {"HF_HUB_DISABLE_TELEMETRY": "1"} | ({"HF_TOKEN": token} if token else {})


@pytest.fixture(scope="module")
def tiny(tiny_folder, tmp_path_factory):
    """A small artefact."""
    return quantizing.quantize(tiny_folder("llama"), "nf4", tmp_path_factory.mktemp("made") / "tiny")


@pytest.fixture
def copy(tiny, tmp_path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in tiny.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def quick(monkeypatch):
    """Scores without a process: the tests that use it are about the Hub, and files are compared all the same."""
    monkeypatch.setattr(fresh, "logits", lambda folder, scheme, ids: torch.ones(2))


def send(folder, **more):
    return publish.publish(folder, REPO, dry_run=False, token=more.pop("token", ME), **more)


# there and back


def blocks(text: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)


def says(code: str, hub, tmp_path, python: str = sys.executable) -> str:
    """What the lines of a card print in a process that can't have qwlib."""
    guard = "import sys\nsys.modules['qwlib'] = None\n"
    settings = child(hub, tmp_path)
    settings.pop("PYTHONPATH", None)
    done = subprocess.run([python, "-c", guard + code], env=settings, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_published_model_is_loaded_by_the_lines_on_its_card(hub, tmp_path, monkeypatch):
    folder = quantizing.quantize("smollm2-135m", "nf4-dq")
    done = send(folder)
    assert done.private
    assert "random" not in str(done)
    assert hub.repositories[REPO].private
    assert hub.repositories[REPO].head == done.commit
    text = hub.content(REPO, "README.md").decode()
    assert text == done.card
    assert card_errors(text) == []
    (code,) = blocks(text)
    code += "\nimport torch\ntorch.save(model(ids.input_ids).logits, 'out.pt')\n"
    assert "The capital of France is" in says(code, hub, tmp_path)
    monkeypatch.setattr(arithmetic, "choose", lambda dtype, device: (dtype, "as plain transformers does"))
    with qwlib.load(str(folder)) as lm:
        wanted = lm.logits(lm.encode("The capital of France is"))
    assert torch.equal(torch.load(tmp_path / "out.pt").to(wanted.dtype), wanted)
    ask = "from huggingface_hub import HfApi, errors\ntry:\n    HfApi(token={!r}).model_info({!r})\n"
    ask += "except errors.RepositoryNotFoundError:\n    print('nothing')\n"
    stranger = says(ask.format(OTHER, REPO), hub, tmp_path)
    assert stranger.strip() == "nothing"
    sent, commits = hub.sent, len(hub.repositories[REPO].commits)
    monkeypatch.setattr(fresh, "logits", lambda folder, scheme, ids: torch.ones(2))  # what it says was shown above
    assert {file.what for file in send(folder).files} == {"same"}
    assert (hub.sent, len(hub.repositories[REPO].commits)) == (sent, commits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scheme", "package"), [("gguf-q4_0", "llama_cpp"), ("gptq-4bit", "gptqmodel"), ("onnx-int4", "onnxruntime_genai")]
)
def test_files_of_other_backends_are_loaded_by_the_lines_on_their_card(scheme, package, hub, tmp_path):
    row = schemes.find(scheme)
    python, why = environment.where(row.maker)
    if python is None:
        pytest.skip(why)
    send(quantizing.quantize("smollm2-135m", scheme))
    (code,) = blocks(hub.content(REPO, "README.md").decode())
    said = says(code, hub, tmp_path, str(python))
    assert len(said.strip()) > 3, said


def test_a_loaded_model_is_saved_compared_and_published(hub):
    with qwlib.load("smollm2-135m", "int8") as lm:
        done = send(lm)
    manifest = json.loads(hub.content(REPO, "qwlib.json"))
    assert manifest["scheme"] == "int8"
    assert "8-bit" in done.card
    assert {file.what for file in done.files} == {"new"}


def test_who_is_asking(hub, monkeypatch):
    assert publish.who(ME) == ("me", "a token of me")
    assert publish.who("hf_" + "X" * 34)[0] is None
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    name, why = publish.who()
    assert name is None
    assert "HF_TOKEN" in why


def test_nothing_is_sent_in_a_dry_run(hub, tiny, quick, monkeypatch):
    done = publish.publish(tiny, REPO, token=ME)
    assert done.commit is None
    assert not hub.repositories
    assert {method for method, _, _ in hub.seen} <= {"GET", "HEAD"}
    assert "a dry run" in str(done)
    assert "its weights are random" in str(done)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    seen = len(hub.seen)
    done = publish.publish(tiny, REPO)
    assert len(hub.seen) == seen
    assert "no token" in str(done)
    with pytest.raises(QwlibError, match="needs a token that may write"):
        publish.publish(tiny, REPO, dry_run=False)


def test_by_the_command_line_and_no_word_of_the_token(hub, tiny, tmp_path, monkeypatch, capfd):
    """Sent by a process of its own; what is not sent, by the same function in this one."""
    call = ["-m", "qwlib", "publish", str(tiny), REPO, "--records", str(tmp_path)]

    def run(token, *more):
        monkeypatch.setenv("HF_TOKEN", token)
        monkeypatch.setattr(sys, "argv", ["qwlib", *call[2:], *more])
        with monkeypatch.context() as patch:
            patch.setattr(fresh, "logits", lambda folder, scheme, ids: torch.ones(2))
            with pytest.raises(SystemExit) as end:
                __main__.main()
        return end.value.code, capfd.readouterr()

    code, dry = run(ME)
    assert code == 0, dry.err
    assert "nothing was sent" in dry.out
    assert not hub.repositories
    sent = [sys.executable, *call, "--yes"]
    done = subprocess.run(sent, env=child(hub, tmp_path), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "found alike" in done.stdout
    code, wrong = run("hf_" + "X" * 34, "--yes")
    assert code == 2
    assert "does not know this token" in wrong.err
    everything = dry.out + dry.err + done.stdout + done.stderr + wrong.out + wrong.err
    assert ME not in everything
    assert "X" * 34 not in everything
    assert all(
        ME.encode() not in path.read_bytes()
        for path in (*(tmp_path / "home").rglob("*"), *hub.blobs.iterdir())
        if path.is_file()
    )


@pytest.mark.slow
def test_the_notebook_pushes(hub, tmp_path):
    call = [sys.executable, "-m", "qwlib", "run", "notebooks/06_publish.ipynb", "--out", str(tmp_path / "runs")]
    done = subprocess.run(
        [*call, "--set", f"REPO={REPO}", "--set", "BLOCKS=1"],
        env=child(hub, tmp_path),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    written = json.loads(next((tmp_path / "runs").glob("*/06_publish/record.json")).read_text())
    assert written["notes"] == [f"published as {hub.repositories[REPO].head}"]
    text = hub.content(REPO, "README.md").decode()
    assert "I made this to learn how publishing works." in text
    assert "model-index" in text
    assert ME not in (tmp_path / "runs" / "latest" / "06_publish.ipynb").read_text()


# what is refused


def test_only_whole_artefacts_are_published(copy, tiny_folder, quick, tmp_path):
    def refused(folder, message):
        with pytest.raises(QwlibError, match=message):
            publish.publish(folder, REPO)

    publish.check(copy)
    refused(tiny_folder("llama"), "has no qwlib.json")
    refused(tmp_path / "nowhere", "no such folder")
    for name in ("notes.md", "weights.pkl", ".env", "sub/model.safetensors", "LICENSES/secret", "LICENSE.pkl"):
        stray = copy / name
        stray.parent.mkdir(exist_ok=True)
        stray.write_text("x")
        refused(copy, f"{name} in .* is not in its manifest")
        stray.unlink()
    (copy / "LICENSE").write_text("terms")
    publish.check(copy)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    refused(copy, r"config\.json in .* instead of")
    with pytest.raises(QwlibError, match="name it as OWNER/NAME"):
        publish.publish(copy, "model")


@pytest.mark.parametrize(
    "name",
    [
        "model",
        "a/b/c",
        "me/a--b",
        "me/a..b",
        "me/.a",
        "me/a.",
        "me/-a",
        "me/a.git",
        "me/" + "x" * 97,
        "me/modèle",
        "",
        None,
    ],
)
def test_names_that_the_hub_would_refuse_are_refused_in_a_dry_run(name, tmp_path):
    with pytest.raises(QwlibError, match=r"name it as OWNER/NAME|takes no such name") as caught:
        publish.publish(tmp_path, name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("wrong", [{"private": "false"}, {"private": 0}, {"private": None}, {"dry_run": "no"}])
def test_public_or_not_is_never_guessed(wrong, tmp_path):
    with pytest.raises(QwlibError, match="is True or False, not"):
        publish.publish(tmp_path, REPO, **wrong)


HEADS = [
    "---\nlanguage: en\n---",
    "\n---\nlanguage: en\n---\nmine\n",
    "---\r\nlanguage: en\r\n---\r\nmine",
    "---\rlanguage: en\r---\nx",
]
HEADS += [
    "---\nlanguage: en\n---  \nmine",
    "--- \nlanguage: en\n---\nmine",
    "---\nlanguage: en\n----\nmine",
    "mine\n---\nlanguage: en\n---\n",
]


@pytest.mark.parametrize("text", HEADS)
def test_the_head_of_a_card_is_what_the_hub_reads_as_such(text):
    from huggingface_hub import ModelCard

    theirs = ModelCard(text, ignore_metadata_errors=True)
    assert card.own_metadata(text) == theirs.data.to_dict()
    assert ("language" in card.own_words(text)) is not bool(theirs.data.to_dict())


def test_a_token_in_a_file_is_found(copy, quick):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"note": ME}))
    manifest = artefacts.read(copy)
    artefacts.seal(copy, source=manifest["source"], scheme=manifest["scheme"], dtype=manifest["dtype"])
    with pytest.raises(QwlibError, match=r"config\.json in .* holds a token") as caught:
        publish.publish(copy, REPO)
    assert ME not in str(caught.value)


def test_only_quantized_trained_weights(lm, tiny_folder):
    with pytest.raises(QwlibError, match="quantizes nothing"):
        publish.publish(lm, REPO)
    for scheme, weights in (
        ("bf16", "trained"),
        ("nf4", "random"),
    ):  # the folder says itself that its weights are random
        with (
            qwlib.load(tiny_folder("llama"), scheme, weights=weights) as tiny,
            pytest.raises(QwlibError, match="has random weights"),
        ):
            publish.publish(tiny, REPO)


@pytest.mark.parametrize(("scheme", "why"), [("nf4-all", "save nf4-dq instead"), ("nf4-mixed", "save nf4-dq instead")])
def test_schemes_that_can_not_be_saved(scheme, why, tiny_folder):
    with qwlib.load(tiny_folder("llama"), scheme) as tiny:
        tiny.weights = "trained"
        with pytest.raises(QwlibError, match=why):
            publish.publish(tiny, REPO)


def manifest_of(name: str, **source) -> dict:
    made = {
        "scheme": "nf4",
        "dtype": "bfloat16",
        "tools": {},
        "files": {"model.safetensors": {"bytes": 5, "sha256": "0"}},
    }
    known = catalog.MODELS.get(name)
    if known and known.source and not source:
        source = {"repository": known.source, "revision": known.revision}
    return made | {"source": {"name": name} | source}


def test_licences_go_along_and_bind(tmp_path):
    def public(name, repo="me/model", **source):
        return publish.licence(tmp_path, manifest_of(name, **source), repo, False)

    def refused(message, *names, **source):
        with pytest.raises(QwlibError, match=message):
            public(*names, **source)

    assert public("phi-3-mini") == []
    refused("is not known here: publish it privately", "my-own")
    refused("is not known here", "smollm2-135m", sha256="another file's")
    assert public("smollm2-guard", sha256=embedded.sha256("smollm2-135m"), adapter="merged into it") == []
    refused("is not known here", "smollm2-guard", sha256="another file's")
    refused("is not known here", "phi-3-mini", sha256="of a folder that only bears the name")
    refused("is not known here", "phi-3-mini", repository="somebody/else")
    over = {"repository": catalog.MODELS["phi-3-mini"].source, "adapter": "evil/lora@main"}
    refused("is not known here", "phi-3-mini+evil/lora", **over)
    (tmp_path / "LICENSE").write_text("")  # an empty one is none
    refused("not found to allow public copies", "qwen2.5-3b")
    refused("asks for a name that begins with Llama and a copy of it in a file LICENSE", "llama-3.1-8b")
    private = publish.licence(tmp_path, manifest_of("llama-3.1-8b"), REPO, True)
    assert ["is gated" in private[0], "begins with Llama" in private[1]] == [True, True]
    (tmp_path / "LICENSE").write_text("the whole text")
    refused("asks for a name that begins with Llama$|begins with Llama where", "llama-3.1-8b")
    assert len(public("llama-3.1-8b", "me/Llama-3.1-8B-nf4")) == 1  # gated, which a reader is told
    assert len(public("any", "me/Llama-x", repository="meta-llama/Llama-3.1-8B")) == 1
    content = publish.files_of(tmp_path, manifest_of("llama-3.1-8b"))
    assert "Meta Platforms" in content["NOTICE"].decode()
    assert content["LICENSE"] == tmp_path / "LICENSE"
    (tmp_path / "NOTICE.md").write_text("mine")
    assert "NOTICE" not in publish.files_of(tmp_path, manifest_of("llama-3.1-8b"))


def test_what_is_there_already(hub, tiny, quick):
    api = HfApi(endpoint=hub.address, token=ME)
    api.create_repo(REPO, private=False)
    with pytest.raises(QwlibError, match="is there and public, not private"):
        send(tiny)
    api.create_repo("me/other", private=True)
    api.upload_file(repo_id="me/other", path_or_fileobj=b"w" * 50, path_in_repo="model-00001.safetensors")
    with pytest.raises(QwlibError, match=r"holds model-00001\.safetensors, which is not of this artefact"):
        publish.publish(tiny, "me/other", dry_run=False, token=ME)
    api.create_repo("me/whole", private=True)
    for name in ("config.json", "model.safetensors"):
        api.upload_file(repo_id="me/whole", path_or_fileobj=b"mine", path_in_repo=name)
    with pytest.raises(QwlibError, match=r"holds another .*, which qwlib did not put there"):
        publish.publish(tiny, "me/whole", dry_run=False, token=ME)
    assert hub.content("me/whole", "model.safetensors") == b"mine"
    api.upload_file(repo_id="me/other", path_or_fileobj=b"*.json", path_in_repo=".gitignore")
    with pytest.raises(QwlibError, match=r"has a \.gitignore"):
        publish.publish(tiny, "me/other", dry_run=False, token=ME)
    hub.gated.add("me/gated")
    with pytest.raises(QwlibError, match="may not write to me/gated, or not read it"):
        publish.publish(tiny, "me/gated", dry_run=False, token=ME)
    with pytest.raises(QwlibError, match=r"may not write|check the owner"):
        publish.publish(tiny, "other/model", dry_run=False, token=ME)


def test_an_authors_words_and_files_stay(hub, copy, quick):
    api = HfApi(endpoint=hub.address, token=ME)
    send(copy)
    publish.words(REPO, "What I use it *for*.", ME)
    api.upload_file(repo_id=REPO, path_or_fileobj=b"png", path_in_repo="picture.png")
    done = send(copy)
    assert {f.what for f in done.files} == {"same"}
    publish.words(REPO, f"my key is {ME}", ME)
    with pytest.raises(QwlibError, match="would hold a token"):
        send(copy)
    publish.words(REPO, "What I use it *for*.", ME)
    assert "What I use it *for*." in hub.content(REPO, "README.md").decode()
    assert hub.content(REPO, "picture.png") == b"png"
    assert card.own_words("---\nlicense: mit\n---\n# Mine\n\ntext\n") == "# Mine\n\ntext"
    # another artefact of the same name: what only the earlier one had goes
    config = copy / "generation_config.json"
    config.unlink()
    manifest = artefacts.read(copy)
    artefacts.seal(copy, source=manifest["source"], scheme=manifest["scheme"], dtype=manifest["dtype"])
    done = send(copy)
    assert {f.name: f.what for f in done.files if f.what != "same"} == {
        "generation_config.json": "gone",
        "qwlib.json": "changed",
    }
    assert "generation_config.json" not in hub.repositories[REPO].files


# the card


def record_of(manifest: dict, **more) -> dict:
    from qwlib.measuring.describing import describe_artefact

    part = {"p50": 0.05, "p90": 0.06, "p95": 0.07, "n": 5}
    return {
        "created": "2026-11-20T10:00:00+00:00",
        "scheme": {"name": manifest["scheme"]},
        "artefact": describe_artefact(manifest),
        "env": {"device": "A card", "cpu": "A | processor", "packages": {"torch": "9.9"}},
        "memory": {"weights_bytes": 1_230_000_000, "state_bytes": 4_000_000},
        "speed": {
            "batch": 1,
            "prompt_tokens": 64,
            "new_tokens": 64,
            "engine": "some engine",
            "decode_tok_s": 77.77,
            "ttft_s": part,
        },
        "quality": {
            "protocol": "gptq-512",
            "text": "a text",
            "text_sha256": "ab" * 32,
            "tokens": 1234,
            "ppl": 9.87654,
            "ppl_stderr": 0.1,
            "kld": {
                "reference": "bf16",
                "mean": 0.12345,
                "stderr": 0.001,
                "top1": 0.9,
                "ppl_ratio": 1.11,
                "ppl_ratio_stderr": 0.01,
            },
        },
    } | more


def test_a_card_says_what_was_measured_and_nothing_else(tiny):
    manifest = artefacts.read(tiny)
    empty = card.write(REPO, tiny, manifest, [])
    assert "Nothing has been measured yet." in empty
    assert "model-index" not in empty
    there = f"---\nlanguage: en\nlicense: mit\n---\n# Old\n{card.OWN[0]}\nMy words | <b>\n{card.OWN[1]}\n"
    text = card.write(REPO, tiny, manifest, [record_of(manifest)], there)
    assert "language: en" in text
    assert "license: mit" not in text
    assert card_errors(text) == card_errors(empty) == []
    for told in (
        "77.8 tokens/s",
        "50 ms",
        "9.88 ± 0.10",
        "+11.0 ± 1.0 %",
        "0.1235 ± 0.0010",
        "top-1 agreement with bf16 | 90.0 %",
        "weights in memory, scales included | 1.234 GB",
        "A card",
        "torch 9.9",
    ):
        assert told in text
    assert "value: 9.8765" in text
    assert card.own_words(text) == "My words | <b>"
    assert card.own_words(f"x{card.OWN[0]}\nmine, but no end") == "mine, but no end"
    forged = f"mine\n{card.OWN[0]}\n{card.OWN[1]}\nmine too"
    assert card.own_words(card.write(REPO, tiny, manifest, [], f"{card.OWN[0]}\n{forged}\n{card.OWN[1]}")) == forged
    evil = f"a{card.OWN[0]}|`b`<script>\n# c"
    named = card.write(REPO, tiny, manifest | {"source": {"name": evil}}, [], f"{card.OWN[0]}\nmine\n{card.OWN[1]}")
    measured = card.write(
        REPO, tiny, manifest, [record_of(manifest, quality=record_of(manifest)["quality"] | {"text": evil})]
    )
    for each in (named, measured):
        assert each.count(card.OWN[0]) == 1
        assert "<script>" not in each
        assert "\n# c" not in each
        assert card_errors(each) == []
    assert card.own_words(named) == "mine"
    with pytest.raises(QwlibError, match="can't be read"):
        card.write(REPO, tiny, manifest, [], "---\n: : :\n- [\n---\n")
    other = record_of(manifest | {"seconds": 5.5})
    assert card.matching(manifest, [other, record_of(manifest), record_of(manifest, failure={"reason": "x"})]) == [
        record_of(manifest)
    ]
    with pytest.raises(QwlibError, match="did not measure"):
        card.write(REPO, tiny, manifest, [other])


@pytest.mark.parametrize(
    "model", ["llama-3.1-8b", "nemoguard-8b", "gemma-2-2b", "qwen2.5-3b", "phi-3-mini", "opt-350m", "elsewhere"]
)
def test_metadata_are_valid_for_every_licence(model, tmp_path):
    text = card.write(REPO, tmp_path, manifest_of(model), [])
    assert card_errors(text) == []
    assert ("Built with Llama" in text) is (model in ("llama-3.1-8b", "nemoguard-8b"))
    assert ("base_model_relation: quantized" in text) is (model != "elsewhere")


@pytest.mark.parametrize(
    "scheme", [s for s in schemes.SCHEMES.values() if s.maker or (not s.unsavable and s.bits_per_weight < 16)]
)
def test_every_scheme_that_can_be_saved_has_lines(scheme, tmp_path):
    text = card.write(REPO, tmp_path, manifest_of("phi-3-mini") | {"scheme": scheme.name}, [])
    (code,) = blocks(text)
    compile(code, "card", "exec")
    assert REPO in code
    assert card_errors(text) == []


@pytest.mark.hub
@pytest.mark.parametrize(
    "model", ["llama-3.1-8b", "nemoguard-8b", "gemma-2-2b", "qwen2.5-3b", "phi-3-mini", "opt-350m", "elsewhere"]
)
def test_the_hub_itself_takes_the_card(model, tmp_path):
    from huggingface_hub import ModelCard

    manifest = manifest_of(model)
    ModelCard(card.write(REPO, tmp_path, manifest, [record_of(manifest)])).validate()


# what breaks on the way

FAULTS = {
    "POST /api/repos/create": [
        (403, {}, "may not write"),
        (500, {}, r"is not published: the Hub failed \(500\)"),
    ],
    "POST /api/models/me/model/preupload": [
        (429, {"Retry-After": "77"}, r"wait 77 s \(429\)"),
        (404, {}, "may not see it"),
    ],
    "PUT /lfs/": [
        (403, {"X-Error-Message": "Private storage limit reached"}, "no room"),
        (500, {}, "broke off|failed"),
    ],
    "POST /api/models/me/model/commit": [
        (412, {}, "somebody else changed"),
        (503, {}, r"failed \(503\)"),
        (401, {}, "does not know this token"),
        (409, {}, "conflicts with something else"),
    ],
}


@pytest.mark.parametrize(
    ("match", "status", "headers", "message"), [(m, *rest) for m, each in FAULTS.items() for rest in each]
)
def test_one_line_and_the_next_run_finishes(match, status, headers, message, hub, tiny, quick, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the client's own pauses between attempts
    hub.faults.append(Fault(match, status=status, headers=headers, times=20))
    with pytest.raises(QwlibError, match=message) as caught:
        send(tiny)
    assert "\n" not in str(caught.value)
    assert not hub.repositories.get(REPO) or not hub.repositories[REPO].files
    hub.faults.clear()
    sent = hub.sent
    done = send(tiny)
    assert {f.what for f in done.files} == {"new"}
    weights = (tiny / "model.safetensors").stat().st_size
    assert hub.sent - sent == (0 if sent >= weights else hub.sent)
    assert hub.repositories[REPO].head == done.commit


def test_what_carries_bytes_may_fail_in_ways_of_its_own():
    for error in (RuntimeError("Data processing error: S3\nat line 5"), OSError(28, "No space left on device")):
        with pytest.raises(
            QwlibError, match=r"^me/model is not published: the way to the Hub broke off \(.*\), run the same command"
        ) as caught:
            with remote.told(REPO):
                raise error
        assert "\n" not in str(caught.value)
    with pytest.raises(KeyError), remote.told(REPO):
        raise KeyError("a mistake of ours")


def test_names_that_the_hub_does_not_take(hub, tiny, quick):
    with pytest.raises(QwlibError, match="takes no such name"):
        publish.publish(tiny, "me/..two--dashes", token=ME)


def test_a_repository_that_appears_meanwhile_is_not_written_to(hub, tiny, quick, monkeypatch):
    look = remote.Remote.look

    def slow(self, private):
        known = look(self, private)
        hub.fill(REPO, {"theirs.txt": b"public"})
        return known

    monkeypatch.setattr(remote.Remote, "look", slow)
    with pytest.raises(QwlibError, match="conflicts with something else"):
        send(tiny)
    assert list(hub.repositories[REPO].files) == ["theirs.txt"]


def test_a_commit_whose_answer_was_lost_is_told_as_such(hub, tiny, quick, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    hub.faults[:] = [Fault("POST /api/models/me/model/commit", lost=True)]
    with pytest.raises(QwlibError, match="was changed, but not checked: run the same command again"):
        send(tiny)
    assert {f.what for f in send(tiny).files} == {"same"}


def test_words_of_the_hub_that_mislead():
    said = remote.refused(REPO, 429, "you hit the quota of 1000 api requests", {"Retry-After": "60"})
    assert said.startswith("the Hub asks to wait 60 s (429)")
    for error, line in [
        (ConnectionError("Network error: HTTP status client error (403 Forbidden) for url x"), "may not write"),
        (ConnectionError("gone"), "the connection broke off"),
        (ValueError("LFS batch API returned errors: storage limit reached\n"), "no room"),
        (json.JSONDecodeError("Expecting value", "<html>", 0), "the way to the Hub broke off"),
    ]:
        assert line in remote.explained(REPO, error)
        assert "\n" not in remote.explained(REPO, error)


def test_cut_damaged_and_slow(hub, tiny, quick, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    for fault in (
        Fault("PUT /lfs/", corrupt=True, times=9),
        Fault("PUT /lfs/", cut=True, times=9),
        Fault("POST /api/models/me/model/commit", cut=True, times=9),
    ):
        hub.faults[:] = [fault]
        with pytest.raises(QwlibError, match=r"broke off|refused|failed"):
            send(tiny)
        assert not hub.repositories[REPO].files
    hub.faults[:] = []
    send(tiny)


def test_what_came_down_different_is_not_called_published(hub, tiny, quick):
    done = send(tiny)
    repository = hub.repositories[REPO]
    repository.files["config.json"] = hub.keep(b"{}")
    there = remote.Remote(REPO, ME)
    manifest = artefacts.read(tiny)
    content = publish.files_of(tiny, manifest) | {"README.md": done.card.encode()}
    with pytest.raises(QwlibError, match=r"holds something else than was sent \(config\.json\)"):
        there.prove("main", content, manifest, torch.zeros(1), torch.ones(2), None)
    repository.files["config.json"] = hub.keep((tiny / "config.json").read_bytes())
    there.prove("main", content, manifest, torch.zeros(1), torch.ones(2), None)
    with pytest.raises(QwlibError, match="its scores differ"):
        there.prove("main", content, manifest, torch.zeros(1), torch.zeros(2), lambda: torch.zeros(2))
    with pytest.raises(QwlibError, match="is there and private, not public"):
        there.prove("main", content, manifest, torch.zeros(1), torch.ones(2), None, private=False)


def test_scores_may_differ_by_their_own_noise_only():
    one, near, far = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.001]), torch.tensor([1.0, 2.1])
    assert remote.alike(one, one.clone(), None)
    assert remote.alike(one, near, lambda: torch.tensor([1.001, 2.0]))
    assert not remote.alike(one, far, lambda: torch.tensor([1.001, 2.0]))
    assert not remote.alike(one, near, lambda: one)
    assert not remote.alike(one, torch.ones(3), lambda: one)
    assert not remote.alike(one, torch.tensor([1.0, torch.nan]), lambda: near)


SENDS = """
import sys, pathlib
from qwlib import artefacts, card, publish
from qwlib.publishing.remote import Remote
folder, repository = pathlib.Path(sys.argv[1]), sys.argv[2]
manifest = publish.check(folder)
remote = Remote(repository, None)
known = remote.look(True)
content = publish.files_of(folder, manifest)
content["README.md"] = card.write(repository, folder, manifest, [], known.card).encode()
print("ready", flush=True)
remote.send(content, publish.planned(content, known), known, True)
print("done", flush=True)
"""


@pytest.mark.slow
def test_ten_kills_leave_nothing_or_all_and_the_next_run_finishes(hub, tiny, tmp_path):
    draw = random.Random(7)
    whole = {name: files.sha256(tiny / name) for name in (*artefacts.read(tiny)["files"], "qwlib.json")}
    outcomes = []
    for number in range(10):
        repository = f"me/kill{number}"
        call = [sys.executable, "-c", SENDS, str(tiny), repository]
        hub.faults[:] = [
            Fault(f"{method} {path}", wait=0.15, times=99) for method, path in (("PUT", "/lfs"), ("POST", "/"))
        ]
        for blob in hub.blobs.iterdir():
            blob.unlink()
        for name in list(hub.repositories):
            del hub.repositories[name]
        process = subprocess.Popen(call, env=child(hub, tmp_path), cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(draw.uniform(0, 1.6))
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(0.4)  # what was on its way arrives
        held = dict(hub.repositories[repository].files) if repository in hub.repositories else {}
        assert not held or whole.items() <= held.items()
        outcomes.append(bool(held))
        hub.faults[:] = []
        again = subprocess.run(call, env=child(hub, tmp_path), cwd=ROOT, capture_output=True, text=True)
        assert again.stdout.endswith("done\n"), again.stderr[-2000:]
        assert whole.items() <= hub.repositories[repository].files.items()
        assert hub.repositories[repository].private
    assert not all(outcomes)  # some came before the end
