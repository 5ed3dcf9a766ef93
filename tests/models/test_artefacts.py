"""A folder that is what it says, and refused once it is not."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import qwlib
from qwlib import files
from qwlib.backends import hf
from qwlib.errors import QwlibError
from qwlib.loading import quantizing
from qwlib.measuring import bench, describing, worker
from qwlib.models import artefacts, catalog, checkpoints
from qwlib.publishing import publish


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
    assert manifest["source"]["name"] == Path(model).name
    assert len(manifest["source"]["sha256"]) == 64
    assert manifest["tools"]["bitsandbytes"]
    assert manifest["dtype"] == "bfloat16"
    on_disk = {p.name: p.stat().st_size for p in folder.iterdir() if p.name != artefacts.MANIFEST}
    assert {name: file["bytes"] for name, file in manifest["files"].items()} == on_disk
    for name, file in manifest["files"].items():
        assert file["sha256"] == files.sha256(folder / name)


def test_two_who_ask_at_once_quantize_once(made, tmp_path, monkeypatch):
    begun, plain = [], quantizing._make
    monkeypatch.setattr(quantizing, "_make", lambda *args: (begun.append(args), plain(*args)))
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(quantizing.quantize, made[0], "nf4", tmp_path / "both") for _ in range(2)]
    assert [each.result() for each in asked] == [tmp_path / "both"] * 2
    assert len(begun) == 1


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


def test_templates_beside_the_default_one_come_along(made, tmp_path):
    """transformers writes them into a sub-folder, a file each."""
    source, message = Path(shutil.copytree(made[0], tmp_path / "source")), [{"role": "user", "content": "hello"}]
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.chat_template = {
        "default": "{{ messages[0]['content'] }}",
        "tool_use": "TOOLS {{ messages[0]['content'] }}",
    }
    tokenizer.save_pretrained(source)
    folder = quantizing.quantize(str(source), "nf4", tmp_path / "artefact")
    (copied := tmp_path / "copied").mkdir()
    hf.copy_texts(folder, copied)  # what makers do that write weights alone
    for place in (folder, copied):
        again = AutoTokenizer.from_pretrained(place)
        assert again.chat_template == tokenizer.chat_template
        assert again.apply_chat_template(message, chat_template="tool_use", tokenize=False) == "TOOLS hello"
    named = folder / "additional_chat_templates" / "tool_use.jinja"
    assert publish.check(folder)["files"][named.relative_to(folder).as_posix()]["bytes"] == named.stat().st_size
    one = checkpoints.source(catalog.find(str(source)))
    (source / named.relative_to(folder)).write_text("another")
    assert checkpoints.source(catalog.find(str(source))) != one
    named.write_text("TOOLS")
    with pytest.raises(QwlibError, match=r"additional_chat_templates/tool_use.jinja in .* has 5 bytes instead of"):
        artefacts.verify(folder)


@pytest.mark.parametrize(
    "name", ["../secret.json", "additional_chat_templates/../x.jinja", "other/x.jinja", "a\\b.json"]
)
def test_a_manifest_names_no_file_elsewhere(copy, name):
    manifest = json.loads((copy / artefacts.MANIFEST).read_text())
    manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    (copy / artefacts.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(QwlibError, match="is damaged"):
        artefacts.verify(copy)


def test_the_same_request_finds_it_again(made, monkeypatch):
    model, folder = made
    monkeypatch.setattr(quantizing, "load", None)  # calling it would raise
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
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_damaged_file_is_refused_by_name(copy, harm, message, name):
    harm(copy / name)
    with pytest.raises(QwlibError, match=f"^{name} in .*{message}"):
        artefacts.verify(copy)
    with pytest.raises(QwlibError, match=f"^{name} in .*{message}|it has no {name}"), qwlib.load(copy):
        pass


def test_a_manifest_that_points_outside_is_refused(copy):
    for name in ("../secret", "/etc/hostname"):
        manifest = json.loads((copy / artefacts.MANIFEST).read_text())
        manifest["files"][name] = {"bytes": 1, "sha256": "0"}
        (copy / artefacts.MANIFEST).write_text(json.dumps(manifest))
        with pytest.raises(QwlibError, match="damaged"):
            artefacts.verify(copy)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"schema": 1, "scheme": "nf4", "source": {}, "files": {}}', "null"]
)
def test_a_damaged_manifest_is_refused(copy, text):
    (copy / artefacts.MANIFEST).write_text(text)
    with pytest.raises(QwlibError, match="damaged"):
        artefacts.verify(copy)


@pytest.mark.parametrize("change", [{"schema": 2}, {"scheme": "nf3"}, {"schema": 2, "files": []}])
def test_a_manifest_of_the_future_is_refused(copy, change):
    manifest = json.loads((copy / artefacts.MANIFEST).read_text())
    (copy / artefacts.MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(QwlibError, match="newer qwlib"):
        artefacts.verify(copy)


@pytest.mark.parametrize("change", [{"files": {}}, {"source": {"name": "x", "revision": None}}, {"dtype": 16}])
def test_a_manifest_that_says_too_little_is_refused(copy, change):
    manifest = json.loads((copy / artefacts.MANIFEST).read_text())
    (copy / artefacts.MANIFEST).write_text(json.dumps(manifest | change))
    with pytest.raises(QwlibError, match="damaged"):
        artefacts.verify(copy)


@pytest.mark.parametrize("name", ["adapter_config.json", "extra.safetensors", "other.jinja"])
def test_a_file_that_came_later_is_refused(copy, name):
    (copy / name).write_text("{}")
    with pytest.raises(QwlibError, match=f"^{name} in .* is not in its manifest"):
        artefacts.verify(copy)
    (copy / name).unlink()
    (copy / "README.md").write_text("a card may be added")
    assert artefacts.verify(copy)


def test_the_source_is_its_files_and_not_its_name(made, tmp_path):
    before = checkpoints.source(catalog.find(made[0]))
    moved = Path(shutil.copytree(made[0], tmp_path / "moved"))
    assert artefacts.same(checkpoints.source(catalog.find(str(moved))), before)
    for name in ("config.json", "tokenizer_config.json"):
        (moved / name).write_text((moved / name).read_text() + " ")
        changed = checkpoints.source(catalog.find(str(moved)))
        assert not artefacts.same(changed, before)
        before = changed
    pinned = checkpoints.source(catalog.find("qwen2.5-3b"))
    assert pinned["name"] == "qwen2.5-3b"
    assert pinned["repository"] == "Qwen/Qwen2.5-3B-Instruct"
    assert not artefacts.same(pinned, pinned | {"revision": "0"})


def test_an_empty_folder_and_home_are_fine_places(made, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "empty").mkdir()
    assert quantizing.quantize(made[0], "nf4", Path("~/empty")) == tmp_path / "empty"
    assert artefacts.verify(tmp_path / "empty")
    assert (tmp_path / "empty").stat().st_mode & 0o777 == 0o755


def test_a_place_that_can_not_be_written_is_told_in_a_line(made, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(QwlibError, match="file/x can't be written"):
        quantizing.quantize(made[0], "nf4", tmp_path / "file" / "x")


def test_an_interrupted_quantization_leaves_nothing(made, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(artefacts, "seal", stop)
    with pytest.raises(KeyboardInterrupt):
        quantizing.quantize(made[0], "nf4", tmp_path / "half")
    assert not list(tmp_path.iterdir())


def test_logs_of_makers_stay_out(tiny_folder, tmp_path, monkeypatch):
    save = qwlib.Lm.save

    def talkative(lm, folder):
        save(lm, folder)
        (folder / "quant_log.csv").write_text("layer,loss")
        (folder / "logs").mkdir()

    monkeypatch.setattr(qwlib.Lm, "save", talkative)
    made = quantizing.quantize(tiny_folder("llama"), "nf4", tmp_path / "made")
    assert {path.name for path in made.iterdir()} == {*artefacts.read(made)["files"], "qwlib.json"}


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
    with pytest.raises(QwlibError, match="bf16 quantizes nothing"):
        quantizing.quantize(made[0], "bf16", tmp_path / "x")
    with pytest.raises(QwlibError, match="nemoguard-8b is an adapter"):
        quantizing.quantize("nemoguard-8b", "nf4", tmp_path / "x")
    foreign = Path(shutil.copytree(made[1], tmp_path / "foreign"))
    (foreign / artefacts.MANIFEST).unlink()
    with pytest.raises(QwlibError, match="is nf4-dq already"):
        quantizing.quantize(str(foreign), "nf4-dq", tmp_path / "x")
    with pytest.raises(QwlibError, match="was saved as nf4-dq"), qwlib.load(made[1], "fp4"):
        pass


def test_a_record_names_what_the_artefact_was_made_from(made, copy):
    with qwlib.load(made[1]) as lm:
        part = describing.describe_model(lm, 1)
    assert part["artefact"] == "qwlib"
    assert part | checkpoints.source(catalog.find(made[0])) == part
    assert part["source"] == "a local folder"
    (copy / artefacts.MANIFEST).unlink()
    with qwlib.load(copy) as lm:
        part = describing.describe_model(lm, 1)
    assert (part["name"], part["artefact"]) == ("copy", "foreign")
    with qwlib.load(made[0], "bf16") as lm:
        assert "artefact" not in describing.describe_model(lm, 1)


@pytest.fixture
def jobs(monkeypatch):
    """The jobs that would be spawned, and where their records would go."""
    seen = []
    monkeypatch.setattr(
        worker, "measured", lambda job, scheme, path, **_: seen.append((job["model"], job["scheme"], path.name)) or {}
    )
    return seen


def rows(*names: str) -> list[str]:
    """The schemes and folders that a comparison of the embedded model would measure."""
    model = catalog.find("smollm2-135m")
    return [scheme.name if row is model else row.address for row, scheme in bench.targets(model, list(names))]


def test_bench_takes_folders_beside_schemes(made, copy, tmp_path, jobs, monkeypatch):
    monkeypatch.chdir(tmp_path)
    twin = shutil.copytree(copy, tmp_path / "other" / "copy")
    list(bench.bench(made[0], ["int8", str(made[1]), "./copy", "other/copy"], tmp_path))
    folders = [made[1], copy, twin]
    assert [job[:2] for job in jobs] == [(made[0], "bf16"), (made[0], "int8"), *((str(f), "nf4-dq") for f in folders)]
    assert len({job[2] for job in jobs}) == 5
    assert rows(*rows("./copy")) == ["bf16", str(copy)]


def test_a_folder_named_like_a_scheme_is_meant_by_its_path(made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(made[1], tmp_path / "int8")
    assert rows("./int8", "int8") == ["bf16", str(tmp_path / "int8"), "int8"]


def test_bench_refuses_what_can_not_be_a_row(made, copy, tmp_path, jobs, tiny_folder):
    with pytest.raises(QwlibError, match="holds a 16-bit model"):
        rows(made[0])
    with pytest.raises(QwlibError, match="no such folder: runs/missing"):
        rows("runs/missing")
    with pytest.raises(QwlibError, match=r"was made from .*, and not from"):
        list(bench.bench(tiny_folder("qwen2"), [str(made[1])], tmp_path))
    with pytest.raises(QwlibError, match="random weights have no folders"):
        list(bench.bench(made[0], [str(made[1])], tmp_path, weights="random"))
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 3}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / artefacts.MANIFEST).unlink()
    with pytest.raises(QwlibError, match="was saved as 3-bit gptq, which nothing here runs"):
        rows(str(copy))
    with pytest.raises(QwlibError, match="was saved as 3-bit gptq, which nothing here runs"), qwlib.load(copy):
        pass
    assert not jobs


def test_a_worker_measures_an_artefact(made, tmp_path):
    job = {"model": str(made[1]), "scheme": "nf4-dq", "prompt_tokens": 4, "new_tokens": 2, "runs": 1, "warmup": 0}
    found = worker.spawn(job, tmp_path / "record.json")
    assert found["model"]["artefact"] == "qwlib"
    assert found["model"]["name"] == Path(made[0]).name
    assert str(made[1].parent) not in json.dumps(found)
