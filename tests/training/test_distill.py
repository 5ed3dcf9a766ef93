"""A student learns from its teacher: losses, what is written, how it is loaded, going on after a stop, texts, and errors."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import kl_div
from typer.testing import CliRunner

import qwlib
from qwlib import QwlibError, files
from qwlib import __main__ as main
from qwlib.measuring import record
from qwlib.models import artefacts, catalog, checkpoints, embedded
from qwlib.training import corpus, distill, forms, runs, student
from qwlib.training.settings import Settings

SHORT = {"rows": 96, "longest": 32, "batch": 8, "steps": 6, "every": 3, "validation": 0.1, "learning_rate": 1e-3}


WORDS = 4096  # of the vocabulary that are left, so that a step takes no second
LAYERS = 2


def cut(shallow, folder, layers: int):
    """The shallow model with fewer words and layers."""
    shutil.copytree(shallow, folder)
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": layers, "vocab_size": WORDS}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    kept = {name: w for name, w in weights.items() if not any(f"layers.{n}." in name for n in range(layers, 3))}
    embedding = next(name for name in kept if "embed" in name)
    kept[embedding] = kept[embedding][:WORDS].clone()
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def small(shallow, tmp_path_factory):
    return cut(shallow, tmp_path_factory.mktemp("small") / "model", LAYERS)


@pytest.fixture(scope="module")
def deep(shallow, tmp_path_factory):
    return cut(shallow, tmp_path_factory.mktemp("deep") / "model", 3)


@pytest.fixture(scope="module")
def small16(small):
    with qwlib.load(str(small), "bf16", device="cpu") as lm:
        yield lm


@pytest.fixture(scope="module")
def deep16(deep):
    with qwlib.load(str(deep), "bf16", device="cpu") as lm:
        yield lm


@pytest.fixture(scope="module")
def text(small16, tmp_path_factory):
    """A text of words that are left."""
    words = embedded.text().split()[:9000]
    ids = small16.tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(
        "".join(f" {word}" for word, each in zip(words, ids, strict=True) if max(each) < WORDS), encoding="utf-8"
    )
    return str(path)


@pytest.fixture(scope="module")
def made(small, text, tmp_path_factory):
    """Form → (folder, record) of a run of six steps."""
    found = {}

    def make(form: str):
        if form not in found:
            out = tmp_path_factory.mktemp("out") / form
            found[form] = distill.distill(str(small), form, out, data=[text], device="cpu", **SHORT)
        return found[form]

    return make


def losses(told: dict, kind: str = "losses") -> list[float]:
    return [each["loss"] for each in told["training"][kind]]


def test_the_divergence_falls_and_everything_is_written_down(made, small):
    folder, told = made("int2")
    checks = losses(told, "validation_losses")
    assert checks[-1] < 0.9 * checks[0]
    assert record.read(folder / runs.RECORD) == told
    training = told["training"]
    assert training["form"] == "int2"
    assert training["packed"] == {"levels": 4, "zeros": 0, "bits_per_weight": 2.25}
    assert (training["data"]["examples"], training["data"]["validation_examples"]) == (80, 8)
    assert training["data"]["tokens"] == 96 * 32
    scales = LAYERS * (576 * 576 * 2 + 576 * 192 * 2 + 576 * 1536 * 3) // 64
    assert training["trained_parameters"] == told["model"]["parameters"] + scales
    assert not folder.with_name("int2.unfinished").exists()


def test_saved_weights_have_as_few_values_as_the_form(made):
    folder, _ = made("int2")
    weights = load_file(folder / "model.safetensors")
    layers = [tensor for name, tensor in weights.items() if name.endswith("_proj.weight")]
    assert len(layers) == LAYERS * 7
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert {len(block.unique()) for tensor in layers for block in tensor.reshape(-1, 64)[:300]} <= {2, 3, 4}
    assert len(weights["model.embed_tokens.weight"][0].unique()) > 100


def measured(name: str, scheme: str, teacher, text: str) -> float:
    """The mean divergence on the rows that were held back, by `load` and `logits`."""
    ids = corpus.rows(teacher, text, SHORT["rows"], SHORT["longest"])
    how = Settings.of(validation=SHORT["validation"], batch=SHORT["batch"])
    held = torch.tensor([row.ids for row in distill._parts(distill._tokens([ids]), how)[1]])
    with qwlib.load(name, scheme, device="cpu") as lm:
        ours, theirs = (each.logits(held).float().flatten(0, 1).log_softmax(-1) for each in (lm, teacher))
    return kl_div(ours, theirs, log_target=True, reduction="batchmean").item()


@pytest.mark.parametrize(("form", "scheme"), [("int2", "bf16"), ("nf4-dq", "nf4-dq")])
def test_what_is_loaded_is_what_was_trained(form, scheme, made, small, small16, text):
    folder, told = made(form)
    kept = min(losses(told, "validation_losses"))
    assert measured(str(folder), scheme, small16, text) == pytest.approx(kept, rel=0.05)
    assert measured(str(small), "nf4", small16, text) != pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("form", ["2:4", "layers-2"])
def test_what_was_taken_out_stays_out(form, deep, deep16, text, tmp_path):
    folder, told = distill.distill(str(deep), form, tmp_path / "out", data=[text], device="cpu", **SHORT | {"steps": 3})
    checks = losses(told, "validation_losses")
    assert measured(str(folder), "bf16", deep16, text) == pytest.approx(min(checks), rel=0.05)
    weights = load_file(folder / "model.safetensors")
    layers = [tensor for name, tensor in weights.items() if name.endswith("_proj.weight")]
    if form == "2:4":
        assert told["training"]["packed"] == {"zeros": 0.5, "bits_per_weight": 9}
        assert all(((tensor != 0).reshape(-1, 4).sum(1) <= 2).all() for tensor in layers)
    else:
        assert len(layers) == 2 * 7
        assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 2
        assert "packed" not in told["training"]


def test_an_artefact_of_it_is_compared_with_the_model_that_it_was_made_from(made, small, tmp_path):
    folder, _ = made("nf4-dq")
    out = qwlib.quantize(str(folder), "nf4-dq", tmp_path / "artefact")
    source = artefacts.read(out)["source"]
    assert source["trained"] == "nf4-dq"
    plain = checkpoints.source(catalog.find(str(small)))
    assert artefacts.same(source, plain)
    # and it is another artefact than that of the model as it was
    assert source["files"] != checkpoints.source(catalog.find(str(made("int2")[0])))["files"]
    assert "files" not in plain


def test_a_run_that_was_stopped_goes_on_with_the_same_losses(made, small, text, tmp_path, monkeypatch):
    _, whole = made("int2")
    plain, count = student.divergence, []

    def stops(ours, theirs, temperature):
        count.append(ours.requires_grad)
        if sum(count) == 5:
            raise KeyboardInterrupt
        return plain(ours, theirs, temperature)

    call = {"data": [text], "device": "cpu", **SHORT}
    with monkeypatch.context() as patch:
        patch.setattr(student, "divergence", stops)
        with pytest.raises(KeyboardInterrupt):
            distill.distill(str(small), "int2", tmp_path / "out", **call)
    with pytest.raises(QwlibError, match="other settings"):
        distill.distill(str(small), "ternary", tmp_path / "out", **call)
    _, told = distill.distill(str(small), "int2", tmp_path / "out", **call)
    assert told["training"]["resumed_at"] == 3
    assert losses(told) == pytest.approx(losses(whole), rel=1e-4)
    assert losses(told) != pytest.approx(losses(whole)[::-1], rel=1e-4)
    assert told["training"]["weights_sha256"] == whole["training"]["weights_sha256"]


def test_divergence_is_that_of_its_definition():
    draw = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 3, 11, generator=draw), torch.randn(2, 3, 11, generator=draw)
    for temperature in (1.0, 2.0):
        p, q = ((each.double() / temperature).softmax(-1) for each in (theirs, ours))
        wanted = temperature**2 * (p * (p / q).log()).sum(-1).mean().item()
        assert student.divergence(ours, theirs, temperature).item() == pytest.approx(wanted, rel=1e-5)
        assert student.divergence(theirs, ours, temperature).item() != pytest.approx(wanted, rel=1e-3)


def test_own_words_begin_anywhere_and_are_made_once(shallow16, monkeypatch, tmp_path):
    monkeypatch.setattr(files, "cache_dir", lambda: tmp_path)
    found = corpus.rows(shallow16, "own", 4, 24, seed=3)
    assert found.shape == (4, 24)
    monkeypatch.setattr(corpus, "own_words", lambda *_: pytest.fail("they were there already"))
    assert torch.equal(corpus.rows(shallow16, "own", 4, 24, seed=3), found)
    assert len(found.unique()) > 8


def test_rows_are_cut_from_texts_in_their_order():
    streams = [[1, 2, 3], [4], [5, 6, 7, 8], [9]]
    assert corpus._cut(streams, 9, 2) == [[1, 2], [3, 4], [5, 6], [7, 8]]
    assert corpus._cut(iter(streams), 1, 3) == [[1, 2, 3]]


def test_docstrings_are_of_installed_packages_without_what_quality_is_measured_on(monkeypatch, tmp_path):
    for place, name, said in (
        ("a", "one.py", "One. "),
        ("a/pydoc_data", "topics.py", "Topics. "),
        ("b", "two.py", "Two. "),
    ):
        (tmp_path / place).mkdir(exist_ok=True)
        (tmp_path / place / name).write_text(f'"""{said * 60}"""\n\ndef f():\n    "short"\n', encoding="utf-8")
    (tmp_path / "b" / "broken.py").write_text('def """', encoding="utf-8")
    (tmp_path / "b" / "again.py").write_text(f'"""{"One. " * 60}"""', encoding="utf-8")
    monkeypatch.setattr(corpus.sysconfig, "get_path", lambda name: str(tmp_path))
    assert sorted(text[:3] for text in corpus.docstrings()) == ["One", "Two"]
    assert list(corpus.docstrings(1)) == list(corpus.docstrings(1))


def test_batches_are_whole():
    rows = distill._tokens([torch.arange(12 * 103).reshape(103, 12)])
    train, held = distill._parts(rows, Settings.of(validation=0.2, batch=8))
    assert (len(train), len(held)) == (80, 16)
    assert not {row.line for row in train} & {row.line for row in held}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"form": "int9"}, "int9"),
        ({"form": "layers-5"}, "keep from 2 to 1"),
        ({"data": []}, "name a source"),
        ({"data": ["no such file.txt"]}, "can't read the text"),
        ({"longest": 8000}, "less than 8000 tokens"),
        ({"rows": 4}, "too few rows"),
        ({"temperature": 0}, "temperature must be"),
        ({"model": "smollm2-guard"}, "merge"),
        ({"shard": True}, "shard"),
        ({"speed": 3}, "speed"),
    ],
)
def test_bad_input_is_told_in_one_line(change, said, small, text, tmp_path):
    call = {"model": str(small), "form": "int4", "data": [text], "device": "cpu", **SHORT} | change
    with pytest.raises(QwlibError, match=said) as raised:
        distill.distill(call.pop("model"), call.pop("form"), tmp_path / "out", **call)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_there_is_left_alone(tmp_path):
    with pytest.raises(QwlibError, match="name a new folder"):
        distill.distill("smollm2-135m", "int4", tmp_path)


def test_the_command_says_what_it_has_come_to(monkeypatch, made, tmp_path):
    asked = {}

    def distilled(model, form, out, **settings):
        asked.update(settings, form=form)
        return made("nf4-dq")

    monkeypatch.setattr(distill, "distill", distilled)
    call = ["distill", "smollm2-135m", "nf4-dq", "--steps", "7", "--data", "own", "--out", str(tmp_path / "x")]
    done = CliRunner().invoke(main.app, call)
    assert done.exit_code == 0, done.output
    assert "divergence from 16 bits" in done.output
    assert "4.13 bits" in done.output
    assert "--scheme nf4-dq" in done.output
    assert (asked["steps"], asked["data"], asked["form"]) == (7, ["own"], "nf4-dq")
    assert "learning_rate" not in asked


def test_the_record_of_an_h100_has_what_its_table_says():
    held = json.loads((files.Path(__file__).parents[2] / "results" / "h100_distilled.json").read_text())
    table = (files.Path(__file__).parents[2] / "docs" / "measured.md").read_text(encoding="utf-8").splitlines()
    for row in held["rows"]:
        form = forms.find(row["form"])
        assert row["bits_per_weight"] == pytest.approx(form.bits_per_weight(1000), abs=0.02)
        assert row.get("levels", 2) <= (form.levels or 2)
        for before, after in zip(row["before"], row["after"], strict=True):
            assert after["kld_mean"] < before["kld_mean"]
            up, error = after["ppl_ratio"] - 1, after["ppl_ratio_stderr"]
            wanted = f"{after['ppl']:.2f} ({100 * up:+.1f} ± {100 * error:.1f} %)"
            assert any(line.startswith(f"| {form.name} ") and wanted in line for line in table), wanted
