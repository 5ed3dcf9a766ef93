"""Every backend that runs on a CPU, for real, in the environment that `make backends` builds."""

import json
import shutil

import pytest
import torch

import qwlib
from qwlib import schemes
from qwlib.backends import environment
from qwlib.errors import QwlibError
from qwlib.loading import fresh, quantizing
from qwlib.measuring import bench, worker
from qwlib.models import artefacts, embedded, estimates

pytestmark = pytest.mark.slow
MODEL = "smollm2-135m"
# scheme → (bytes of its weights over 16-bit's, perplexity over 16-bit's), loosely: broken formats are far outside
MADE = {
    "gguf-q8_0": ((0.50, 0.56), (0.98, 1.03)),
    "gguf-q4_k_m": ((0.36, 0.42), (1.01, 1.20)),
    "gptq-4bit": ((0.40, 0.45), (1.05, 1.35)),
    "autoround-4bit": ((0.40, 0.45), (1.05, 1.30)),
    "onnx-int4": ((0.30, 0.35), (1.15, 1.60)),
}
LOADED = {"hqq-4bit": ((0.41, 0.46), (1.05, 1.40)), "torchao-int8": ((0.58, 0.63), (0.98, 1.03))}


@pytest.fixture(scope="module", autouse=True)
def there():
    missing = {s: environment.where(schemes.find(s).backend)[1] for s in (*MADE, *LOADED)}
    missing = {s: why for s, why in missing.items() if why not in (environment.HERE, environment.place().name)}
    if missing:
        pytest.fail(f"run `make backends` first: {missing}")


@pytest.fixture(scope="module")
def ids(lm):
    return lm.encode(embedded.text()[:12_000])[:, :2048].reshape(4, 512)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """The records of all of them, from one bench; artefacts land in the cache, where `make run` finds them."""
    job = {"prompt_tokens": 16, "new_tokens": 8, "runs": 1, "ask": "What is the capital of France?"}
    job["quality"] = {"protocol": "gptq-512", "blocks": 8}
    found = bench.bench(MODEL, [*MADE, *LOADED], tmp_path_factory.mktemp("rows"), **job)
    return {row["scheme"]["name"]: row for row in found}


@pytest.mark.parametrize("scheme", [*MADE, *LOADED])
def test_a_row_has_all_its_figures(rows, scheme):
    row, reference = rows[scheme], rows["bf16"]
    assert "failure" not in row, row["failure"]
    held = [r["memory"]["weights_bytes"] + r["memory"]["state_bytes"] for r in (row, reference)]
    (least, most), (better, worse) = (MADE | LOADED)[scheme]
    assert least < held[0] / held[1] < most
    kld = row["quality"]["kld"]
    assert better < kld["ppl_ratio"] < worse
    assert kld["mean"] > 3 * kld["noise_floor"]
    assert kld["top1"] > 0.6
    assert row["quality"]["text_sha256"] == reference["quality"]["text_sha256"]
    assert row["speed"]["decode_tok_s"] > 0
    assert row["memory"]["load_peak_bytes"] > 0
    assert len(row["answer"]["text"]) > 3
    if scheme in MADE:
        calibration = row["artefact"].get("calibration")
        assert bool(calibration) == schemes.find(scheme).calibrated
        assert row["artefact"]["file_bytes"] == pytest.approx(held[0], rel=0.03)
        assert {"gguf": "llama-cpp-python", "gptq": "gptqmodel", "auto": "auto-round", "onnx": "onnxruntime-genai"}[
            scheme[:4]
        ] in row["artefact"]["tools"]


def test_schemes_rank_as_their_bits_do(rows):
    kld = {scheme: rows[scheme]["quality"]["kld"]["mean"] for scheme in (*MADE, *LOADED)}
    eight = max(kld["gguf-q8_0"], kld["torchao-int8"])
    assert eight < min(kld[s] for s in kld if s not in ("gguf-q8_0", "torchao-int8")) / 4
    assert kld["autoround-4bit"] < kld["onnx-int4"]
    assert kld["gptq-4bit"] < kld["onnx-int4"]


@pytest.mark.parametrize("scheme", MADE)
def test_a_file_gives_the_same_numbers_in_every_fresh_process(rows, scheme, ids):
    folder = quantizing.quantize(MODEL, scheme)  # found, not made again
    one, two = (fresh.logits(folder, scheme, ids[:1, :64]) for _ in range(2))
    assert torch.equal(one, two)
    assert one.isfinite().all()


def test_16_bits_in_llama_cpp_are_16_bits_in_transformers(ids):
    """The same weights: against float32 arithmetic they agree; bf16 arithmetic differs from itself by more than that."""
    theirs = fresh.logits(quantizing.quantize(MODEL, "gguf-bf16"), "gguf-bf16", ids)
    with qwlib.load(MODEL, "fp32", device="cpu") as lm:
        exact = lm.logits(ids)
    with qwlib.load(MODEL, "bf16", device="cpu") as lm:
        rounded = lm.logits(ids).float()

    def ppl(scores):
        flat = scores[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(flat, ids[:, 1:].flatten()).exp().item()

    def top1(a, b):
        return (a.argmax(-1) == b.argmax(-1)).float().mean().item()

    assert top1(theirs, exact) >= 0.99
    assert top1(theirs.roll(1, 1), exact) < 0.5
    assert top1(theirs, rounded) > top1(exact, rounded) - 0.005
    assert ppl(theirs) == pytest.approx(ppl(exact), rel=0.005)
    assert ppl(theirs) == pytest.approx(ppl(rounded), rel=0.005)
    assert ppl(theirs.roll(1, 1)) != pytest.approx(ppl(exact), rel=0.005)


def test_what_others_quantized_opens_and_is_marked(rows, tmp_path):
    job = {"prompt_tokens": 4, "new_tokens": 2, "runs": 1, "warmup": 0}
    folder = tmp_path / "theirs"
    shutil.copytree(quantizing.quantize(MODEL, "gptq-4bit"), folder)
    (folder / artefacts.MANIFEST).unlink()
    found = worker.spawn({"model": str(folder), "scheme": "gptq-4bit", **job}, tmp_path / "gptq.json")
    assert found["model"]["artefact"] == "foreign"
    assert found["model"]["name"] == "theirs"
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(quantizing.quantize(MODEL, "gguf-q4_k_m") / "model.gguf", bare / "some.gguf")
    found = worker.spawn({"model": str(bare), "scheme": "gguf-q4_k_m", **job}, tmp_path / "gguf.json")
    assert found["model"]["artefact"] == "foreign"
    assert found["model"]["parameters"] == estimates.estimate(MODEL).parameters
    (_, named) = bench.bench(MODEL, [str(bare / "some.gguf")], tmp_path, **job)
    assert (named["model"]["name"], named["memory"]["weights_bytes"]) == ("some", found["memory"]["weights_bytes"])
    with pytest.raises(QwlibError, match="was saved as gguf-q4_k_m"), qwlib.load(bare, "bf16"):
        pass


def test_a_gguf_file_that_is_no_model_is_told(tmp_path):

    for name, fill in {"short": lambda p: p.write_bytes(b"GGUF\x03\0\0\0"), "other": _mystery}.items():
        (tmp_path / name).mkdir()
        fill(tmp_path / name / "model.gguf")
    with pytest.raises(QwlibError, match="is no whole GGUF file"), qwlib.load(tmp_path / "short"):
        pass
    made = worker.spawn({"model": str(tmp_path / "other"), "scheme": "gguf-q4_0"}, tmp_path / "record.json")
    assert "mystery" in made["failure"]["reason"]
    shutil.copy(tmp_path / "other" / "model.gguf", tmp_path / "other" / "second.gguf")
    with pytest.raises(QwlibError, match="holds 2 GGUF files"), qwlib.load(tmp_path / "other"):
        pass


def _mystery(path):
    import gguf
    import numpy

    writer = gguf.GGUFWriter(path, "mystery")
    writer.add_file_type(2)
    writer.add_tensor("token_embd.weight", numpy.zeros((4, 32), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_model_is_not_measured_on_what_it_was_calibrated_on(rows, tmp_path):
    from qwlib.loading import calibration

    folder = quantizing.quantize(MODEL, "gptq-4bit")
    text = tmp_path / "same.txt"
    text.write_text(calibration.docstrings(), encoding="utf-8")
    job = {"model": str(folder), "scheme": "gptq-4bit", "quality": {"text": str(text), "blocks": 1}}
    assert "was calibrated on" in worker.spawn(job, tmp_path / "r.json")["failure"]["reason"]


def test_a_changed_file_is_refused_by_its_name(rows, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(quantizing.quantize(MODEL, "onnx-int4"), folder)
    with open(folder / "model.onnx.data", "r+b") as file:
        file.seek(1000)
        file.write(b"changed")
    found = worker.spawn({"model": str(folder), "scheme": "onnx-int4"}, tmp_path / "r.json")
    assert "model.onnx.data in" in found["failure"]["reason"]
    assert "was changed" in found["failure"]["reason"]
    manifest = json.loads((folder / artefacts.MANIFEST).read_text())
    assert "calibration" not in manifest
