"""A folder that is what it says, and refused once it is not."""

import json
import shutil

import pytest
import torch

import qwlib
from qwlib import artefacts, bench, catalog, files, quantizing, worker
from qwlib.errors import QwlibError


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_folder):
    """(16-bit model, artefact in nf4-dq), both tiny."""
    model = tiny_folder("llama")
    return model, quantizing.quantize(model, "nf4-dq", tmp_path_factory.mktemp("made") / "artefact")


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made[1], tmp_path / "copy")


def test_the_manifest_tells_what_it_is(made):
    model, folder = made
    manifest = artefacts.verify(folder)
    assert manifest["scheme"] == "nf4-dq"
    assert manifest["source"] == artefacts.source(catalog.find(model))
    assert manifest["tools"]["bitsandbytes"]
    on_disk = {p.name: p.stat().st_size for p in folder.iterdir() if p.name != artefacts.MANIFEST}
    assert {name: file["bytes"] for name, file in manifest["files"].items()} == on_disk
    for name, file in manifest["files"].items():
        assert file["sha256"] == files.sha256(folder / name)


def test_it_opens_as_the_model_that_was_quantized(made):
    model, folder = made
    ids = torch.randint(0, 1000, (2, 9))
    with qwlib.load(model, "nf4-dq") as lm:
        expected = lm.logits(ids)
    with qwlib.load(folder) as lm:  # the folder knows its scheme
        assert lm.scheme.name == "nf4-dq"
        assert torch.equal(lm.logits(ids), expected)
    with qwlib.load(model) as lm:
        assert lm.scheme.name == "bf16"


def test_the_same_request_finds_it_again(made, monkeypatch):
    model, folder = made
    monkeypatch.setattr(quantizing.loading, "load", None)  # calling it would raise
    assert quantizing.quantize(model, "nf4-dq", folder) == folder


def test_without_a_name_it_stands_in_the_cache(made, monkeypatch, tmp_path):
    monkeypatch.setenv("QWLIB_CACHE", str(tmp_path))
    first = quantizing.quantize(made[0], "int8")
    assert first.is_relative_to(tmp_path / "artefacts")
    stamp = (first / artefacts.MANIFEST).stat().st_mtime_ns
    assert quantizing.quantize(made[0], "int8") == first
    assert (first / artefacts.MANIFEST).stat().st_mtime_ns == stamp


def test_another_request_does_not_overwrite_it(made, tmp_path):
    model, folder = made
    before = (folder / artefacts.MANIFEST).read_text()
    with pytest.raises(QwlibError, match="holds something else"):
        quantizing.quantize(model, "fp4", folder)
    assert (folder / artefacts.MANIFEST).read_text() == before
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(QwlibError, match="holds something else"):
        quantizing.quantize(model, "nf4", tmp_path)
    assert (tmp_path / "letter.txt").read_text() == "dear"


def _cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def _change(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("harm", "message"),
    [(_cut, "bytes instead of"), (_change, "was changed"), (lambda file: file.unlink(), "is missing")],
)
@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_refused_by_name(copy, harm, message, name):
    harm(copy / name)
    with pytest.raises(QwlibError, match=f"^{name} in .*{message}"):
        artefacts.verify(copy)
    with pytest.raises(QwlibError, match=f"^{name} in .*{message}"), qwlib.load(copy):
        pass


def test_a_manifest_that_points_outside_is_refused(copy):
    for name in ("../secret", "/etc/hostname"):
        manifest = json.loads((copy / artefacts.MANIFEST).read_text())
        manifest["files"] = {name: {"bytes": 1, "sha256": "0"}}
        (copy / artefacts.MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(QwlibError, match="outside its folder"):
            artefacts.verify(copy)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"schema": 1, "scheme": "nf4", "source": {}, "files": {}}', "null"]
)
def test_a_damaged_manifest_is_refused(copy, text):
    (copy / artefacts.MANIFEST).write_text(text)
    with pytest.raises(QwlibError, match="damaged"):
        artefacts.verify(copy)


def test_a_manifest_of_the_future_is_refused(copy):
    manifest = json.loads((copy / artefacts.MANIFEST).read_text())
    (copy / artefacts.MANIFEST).write_text(json.dumps(manifest | {"schema": 2}))
    with pytest.raises(QwlibError, match="newer qwlib"):
        artefacts.verify(copy)


def test_an_interrupted_quantization_leaves_nothing(made, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(artefacts, "seal", stop)
    with pytest.raises(KeyboardInterrupt):
        quantizing.quantize(made[0], "nf4", tmp_path / "half")
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_told_beforehand(made, tmp_path, monkeypatch):
    monkeypatch.setattr(quantizing.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(QwlibError, match="GB on disk"):
        quantizing.quantize(made[0], "nf4", tmp_path / "big")
    assert not list(tmp_path.iterdir())


def test_what_can_not_be_saved_and_what_is_quantized_already(made, tmp_path):
    with pytest.raises(QwlibError, match="save nf4-dq instead of nf4-all"):
        quantizing.quantize(made[0], "nf4-all", tmp_path / "x")
    with pytest.raises(QwlibError, match="is nf4-dq already"):
        quantizing.quantize(str(made[1]), "nf4", tmp_path / "x")
    with pytest.raises(QwlibError, match="was saved as nf4-dq"), qwlib.load(made[1], "fp4"):
        pass


def test_a_record_names_what_the_artefact_was_made_from(made, copy):
    with qwlib.load(made[1]) as lm:
        part = worker.describe_model(lm, 1)
    assert part["artefact"] == "qwlib"
    assert part | artefacts.source(catalog.find(made[0])) == part
    (copy / artefacts.MANIFEST).unlink()
    with qwlib.load(copy) as lm:
        part = worker.describe_model(lm, 1)
    assert (part["name"], part["artefact"]) == ("copy", "foreign")
    with qwlib.load(made[0], "bf16") as lm:
        assert "artefact" not in worker.describe_model(lm, 1)


def test_bench_takes_folders_beside_schemes(made, tmp_path, monkeypatch):
    jobs = []
    monkeypatch.setattr(worker, "spawn", lambda job, path: jobs.append((job["model"], job["scheme"], path.name)) or {})
    list(bench.rows(made[0], ["int8", str(made[1])], tmp_path))
    assert [job[:2] for job in jobs] == [(made[0], "bf16"), (made[0], "int8"), (str(made[1]), "nf4-dq")]
    assert len({job[2] for job in jobs}) == 3
    with pytest.raises(QwlibError, match="holds a 16-bit model"):
        bench.names([made[0]])
