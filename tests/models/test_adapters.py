"""LoRA adapters over the embedded model and merged into it."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import qwlib
from qwlib import schemes
from qwlib.errors import QwlibError
from qwlib.loading import merging
from qwlib.measuring import worker
from qwlib.models import adapters, artefacts, catalog, checkpoints, embedded, estimates

IDS = torch.tensor([[504, 3575, 282, 4649, 314]])


def adapted(checkpoint, folder, alpha: int = 8):
    """(`folder` with a small random adapter, scores of the 32-bit model under it)."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    tuned = get_peft_model(base, config).eval()
    tuned.save_pretrained(folder)
    with torch.inference_mode():
        return folder, tuned(IDS).logits.log_softmax(-1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An adapter of the embedded model."""
    return adapted(embedded.checkpoint(), tmp_path_factory.mktemp("lora"))


def divergence(scores, wanted) -> float:
    """Mean KL divergence in nats a position."""
    ours = scores.float().cpu().log_softmax(-1)
    return float((wanted.exp() * (wanted - ours)).sum(-1).mean())


def test_it_is_found_in_the_root_or_in_the_sub_folder(made, tmp_path):
    inside = tmp_path / "repo" / "adapter"
    shutil.copytree(made[0], inside)
    row = catalog.find(f"smollm2-135m+{made[0]}")
    assert row.name == f"smollm2-135m+{made[0].name}"  # a path may name a person
    assert adapters.folder(row) is None
    over = catalog.Adapter(str(tmp_path / "repo"), None, "adapter")
    assert adapters.folder(replace(row, adapter=over)) == "adapter"
    assert adapters.folder(replace(row, adapter=replace(over, source=str(inside)))) is None  # the root comes first
    with pytest.raises(QwlibError, match=r"its adapter has no adapter_config\.json and adapter_model\.safetensors"):
        adapters.folder(replace(row, adapter=replace(over, folder="other")))
    (inside / "adapter_model.safetensors").rename(inside / "adapter_model.bin")
    with pytest.raises(QwlibError, match="its adapter has no"):  # a pickle is none
        adapters.folder(replace(row, adapter=over))


def test_merged_is_what_it_is_over_the_model(shallow, shallow16, tmp_path, monkeypatch):
    monkeypatch.setenv("QWLIB_CACHE", str(tmp_path / "cache"))
    made = adapted(shallow, tmp_path / "lora", alpha=48)
    name = f"{shallow}+{made[0]}"
    with qwlib.load(name, "fp32") as lm:
        assert divergence(lm.logits(IDS), made[1]) < 1e-4
    without = divergence(shallow16.logits(IDS), made[1])
    merged = merging.merge(name)
    assert merging.merge(name) == merged
    with qwlib.load(str(merged), "bf16") as lm:
        rounded = divergence(lm.logits(IDS), made[1])
    assert rounded < 0.05 < without
    artefact = merging.merge_then_quantize(name, "nf4")
    made_from = artefacts.read(artefact)["source"]
    assert made_from["name"] == f"{shallow.name}+{made[0].name}"
    assert artefacts.same(
        made_from, checkpoints.source(catalog.find(name))
    )  # so `bench` takes it as a row of this model
    assert not artefacts.same(made_from, checkpoints.source(catalog.find(str(shallow))))
    found = {}
    for row in (name, str(artefact)):
        with qwlib.load(row, "nf4") as lm:
            found[row] = divergence(lm.logits(IDS), made[1])
    assert rounded < min(found.values())
    assert max(found.values()) < without
    assert found[name] != found[str(artefact)]


def test_a_worker_measures_the_two_as_rows(made, tmp_path):
    job = {
        "model": f"smollm2-135m+{made[0]}",
        "scheme": "nf4",
        "prompt_tokens": 4,
        "new_tokens": 2,
        "runs": 1,
        "warmup": 0,
    }
    record = worker.spawn(job, tmp_path / "record.json")
    assert record["model"]["name"] == f"smollm2-135m+{made[0].name}"
    assert record["model"]["adapter"] == made[0].name
    assert str(made[0].parent) not in (tmp_path / "record.json").read_text()
    lora = sum(t.numel() for t in _tensors(made[0]))
    plain = estimates.estimate("smollm2-135m", "nf4")
    assert record["memory"]["weights_bytes"] == plain.weights_bytes + 2 * lora  # 16-bit beside the 4-bit weights
    assert record["memory"]["weights_bytes"] == estimates.estimate(job["model"], "nf4").weights_bytes
    apart = [estimates.held_bytes(name, "fp32") for name in ("nemoguard-8b", "llama-3.1-8b-instruct")]
    assert apart[0] - apart[1] == 4 * 16 * 32 * (2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336))
    assert (
        worker.fail(worker.complete(job), schemes.find(job["scheme"]), "why", tmp_path / "failed.json")["model"]["name"]
        == f"smollm2-135m+{made[0].name}"
    )


def _tensors(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors").values()


def test_an_adapter_is_never_left_out_silently(made, tmp_path):
    from safetensors.torch import load_file, save_file

    with (
        pytest.raises(QwlibError, match=r"llama\.cpp takes no adapter"),
        qwlib.load(f"smollm2-135m+{made[0]}", "gguf-q4_0"),
    ):
        pass
    for name in ("nemoguard-8b+owner/other", "smollm2-135m+"):
        with pytest.raises(QwlibError, match="it takes one, as model\\+adapter"):
            catalog.find(name)
    part = Path(shutil.copytree(made[0], tmp_path / "part"))
    weights = load_file(part / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[2:]), part / "adapter_model.safetensors")
    with pytest.raises(QwlibError, match="its adapter lacks some of its weights"), qwlib.load(f"smollm2-135m+{part}"):
        pass


def test_what_can_not_be_merged(made, tmp_path):
    with pytest.raises(QwlibError, match="has no adapter to merge: name it as model\\+adapter"):
        merging.merge("smollm2-135m")
    with pytest.raises(QwlibError, match="is there already: name a new folder"):
        merging.merge(f"smollm2-135m+{made[0]}", tmp_path)
    with pytest.raises(QwlibError, match="unknown model 'smollm'"):
        catalog.find(f"smollm+{made[0]}")
