"""The memory of training, predicted from shapes: the same parts counted by hand, on real tensors, and by a GPU's meter."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import qwlib
from qwlib import QwlibError, schemes
from qwlib import __main__ as main
from qwlib.models import catalog, estimates
from qwlib.training import adapting, examples, loop, predicted, shapes
from qwlib.training.alive import Alive
from qwlib.training.settings import Settings

TOLERANCE = 0.1
SIZE = {"batch": 2, "length": 96, "device": "cpu"}
MEASURED = Path(predicted.__file__).with_name("h100.json")


@pytest.fixture(scope="module")
def of(shallow):
    """The estimate for the shallow model, with `SIZE` and other settings."""
    return lambda scheme="bf16", **settings: predicted.estimate(str(shallow), scheme, **SIZE | settings)


def test_storages_count_once_until_the_last_tensor_is_gone():
    old = torch.ones(100)
    with Alive([old], round_up=512) as alive:
        new = old * 1
        del new
        assert alive.now.total() == 0 < alive.most.total() == 512
        alive.kind = "mine"
        kept = torch.ones(200)
        view = kept.view(10, 20)[1:]
        old.add_(1)
        assert alive.now == {"known": 0, "activations": 0, "mine": 1024}
        del kept
        assert alive.now["mine"] == 1024
        alive.call(view, "yours")
        assert (alive.now["mine"], alive.now["yours"]) == (0, 1024)
        del view
        assert alive.now.total() == 0
        assert alive.most["mine"] == 1024
        alive.again()
        assert alive.most.total() == 0


def pairs(shallow) -> list[tuple[int, int]]:
    """(inputs, outputs) of the linear layers but for the head, from the configuration."""
    config = json.loads((shallow / "config.json").read_text())
    hidden, middle = config["hidden_size"], config["intermediate_size"]
    keys = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    layer = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden)]
    return config["num_hidden_layers"] * [*layer, (hidden, middle), (hidden, middle), (middle, hidden)]


def test_an_adapter_by_hand(of, shallow):
    wanted = 4 * sum(16 * (inputs + outputs) for inputs, outputs in pairs(shallow))
    found = of()
    assert found.adapter == found.all_gradients == wanted
    assert found.optimizer == pytest.approx(2 * wanted, rel=0.001)
    assert of(rank=8).adapter == wanted // 2
    assert found.weights == sum(estimates.breakdown(str(shallow), "bf16").values())
    assert found.total == sum(getattr(found, part) for part in found.told() if part not in ("all_gradients", "total"))


def test_what_autograd_keeps_is_what_it_keeps_of_real_tensors(shallow):
    """Real: by PyTorch's hooks for saved tensors, on a model with weights. Predicted: by storages that are alive, in shapes."""
    how, shape = Settings(), (2, 96)
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with qwlib.load(str(shallow), "bf16", device="cpu", engine="eager") as lm:
        model = adapting.adapted(lm, how).train()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            ids = torch.zeros(shape, dtype=torch.long)
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        held = {each.untyped_storage()._cdata for each in [*model.parameters(), *model.buffers()]}
        real = sum(each.untyped_storage().nbytes() for number, each in saved.items() if number not in held)
        del model, out
        saved.clear()
    model, _ = shapes.model_of(catalog.find(str(shallow)), schemes.find("bf16"), how, gpu=False)
    with Alive([*model.parameters(), *model.buffers()]) as alive, torch.device("meta"):
        out = model(input_ids=torch.zeros(shape, dtype=torch.long), use_cache=False).logits
        found = alive.now.total() - out.nbytes
    assert found == pytest.approx(real, rel=0.002)
    assert found != pytest.approx(real + ids.numel() * 4 * out.shape[-1] / 100, rel=0.002)


@pytest.mark.parametrize(
    ("scheme", "method"), [("bf16", "lora"), ("nf4-dq", "lora"), ("int8", "lora"), ("bf16", "dora"), ("fp32", "full")]
)
def test_a_step_takes_what_a_real_one_takes(scheme, method, of, shallow):
    """Counted the same way, over bitsandbytes' own layers and with the loss of the training loop."""
    how = Settings(method=method)
    row = examples.Tokens(list(range(96)), [examples.IGNORED] * 40 + list(range(40, 96)), 1)
    batch = {k: v for k, v in examples.batch([row, replace(row, ids=[7, *row.ids[1:]])], 0).items() if k != "lines"}
    with qwlib.load(str(shallow), scheme, device="cpu", engine="eager") as lm:
        model = adapting.adapted(lm, how).train()
        with Alive([*model.parameters(), *model.buffers()]) as alive:
            loop.loss(model, batch).backward()
        real = alive.most.total()
        del model
    found = of(scheme, method=method, learnt=56)
    found = found.gradients + found.activations + found.scores
    assert found == pytest.approx(real, rel=0.03)
    # the embedding's gradients are the largest part of full fine-tuning here, whatever the batch
    other = of(scheme, **({"method": "lora"} if method == "full" else {"method": method, "batch": 8}), learnt=56)
    assert other.gradients + other.activations + other.scores != pytest.approx(real, rel=0.03)


def test_more_rows_and_tokens_take_more(of):
    one, two = of(batch=1), of(batch=2)
    assert two.activations == pytest.approx(2 * one.activations, rel=0.01)
    assert two.scores == pytest.approx(2 * one.scores, rel=0.01)
    assert (two.weights, two.adapter) == (one.weights, one.adapter)
    lengths = [of(length=length).total for length in (32, 33, 64, 128, 256)]
    assert lengths == sorted(set(lengths))


def test_settings_change_the_parts_that_they_should(of):
    plain, again = of(length=256), of(length=256, recompute=True)
    assert again.activations < 0.6 * plain.activations
    assert again.scores == plain.scores
    assert of(dropout=0.1).activations > 1.1 * of().activations
    assert of(targets=("q_proj",)).activations < 0.7 * of().activations
    assert of(learnt=10).scores == pytest.approx(of(learnt=20).scores / 2, rel=0.05)
    assert of(accumulate=4).gradients == of().all_gradients > of().gradients
    assert of(method="dora").all_gradients > of(method="rslora").all_gradients == of().all_gradients
    assert of(learnt=20, shared=64).activations < 0.7 * of(learnt=20, shared=31).activations
    full = of("fp32", method="full")
    assert (full.adapter, full.all_gradients) == (0, pytest.approx(full.weights, rel=0.001))
    assert full.optimizer >= 2 * full.all_gradients


def test_optimizers_by_hand(of, shallow):
    gpu = {kind: of(optimizer=kind, device="cuda") for kind in ("adamw", "adamw-8bit", "paged")}
    numbers = gpu["adamw"].adapter // 4
    assert gpu["adamw"].optimizer == pytest.approx(8 * numbers, rel=0.01)
    sizes = [16 * side for pair in pairs(shallow) for side in pair]
    eight = sum(8 * n if n < 4096 else 2 * n + 2 * 4 * n / 256 for n in sizes)
    assert gpu["adamw-8bit"].optimizer == pytest.approx(eight, rel=0.05)
    # every matrix of rank 16 has fewer than 100,000 numbers, and of rank 1024 none has
    assert gpu["paged"].optimizer == pytest.approx(8 * numbers, rel=0.01)
    assert of(optimizer="paged", rank=1024, device="cuda").optimizer == 0
    assert of(optimizer="paged", rank=1024).optimizer > 0


def rows_of(*lengths, same=0):
    return [
        examples.Tokens([1] * same + [place + 2] * (n - same), [examples.IGNORED] * (n - 5) + [3] * 5, 1)
        for place, n in enumerate(lengths)
    ]


def test_the_longest_examples_of_a_run_are_its_batch(shallow):
    row, scheme = catalog.find(str(shallow)), schemes.find("bf16")

    def of_examples(rows, batch):
        return predicted.of_examples(row, scheme, Settings(), rows, batch, "cpu")

    assert of_examples(rows_of(20, 96, 30, 90), 2) == predicted.estimate(str(shallow), "bf16", **SIZE, learnt=10)
    assert of_examples(rows_of(20, 96), 8) == predicted.estimate(str(shallow), "bf16", **SIZE, learnt=10)
    shared = of_examples(rows_of(96, 96, same=64), 2)
    assert shared == predicted.estimate(str(shallow), "bf16", **SIZE, learnt=5, shared=64)
    assert shared.total < of_examples(rows_of(96, 96, same=16), 2).total


@pytest.mark.parametrize(
    ("scheme", "settings", "why"),
    [
        ("bf17", {}, "unknown scheme"),
        ("gguf-q4_0", {}, "can't be trained: choose"),
        ("bf16", {"method": "full"}, "it needs the scheme fp32"),
        ("bf16", {"targets": ("q_prj",)}, "did you mean q_proj"),
        ("bf16", {"speed": 1}, "settings are method"),
        ("bf16", {"length": 10**6}, "positions: longest can't be 1000000"),
        ("bf16", {"learnt": 0}, "learnt is a whole number"),
    ],
)
def test_what_can_t_be_predicted_is_told(scheme, settings, why, of):
    with pytest.raises(QwlibError, match=why):
        of(scheme, **settings)


def test_a_model_that_looks_at_values_is_told(of, monkeypatch):
    def looks(*_):
        raise RuntimeError("Tensor.item() cannot be called on meta tensors")

    monkeypatch.setattr(predicted, "_step", looks)
    with pytest.raises(QwlibError, match=r"can't be predicted from shapes \(RuntimeError: Tensor.item"):
        of()


def test_the_same_numbers_are_drawn_after_an_estimate(of):
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    of()
    assert torch.equal(torch.rand(2), wanted)


def metered() -> list[dict]:
    """The largest batch, one that is computed again, and another architecture."""
    rows = [each for each in json.loads(MEASURED.read_text(encoding="utf-8"))["rows"] if each["gpus"] == 1]
    return [rows[3], rows[4], rows[-1]]


@pytest.mark.parametrize("row", metered(), ids=lambda row: f"{row['model']}-{row['scheme']}-{row['batch']}")
def test_peaks_of_a_gpu_are_predicted(row):
    """Llama-3.1-8B and GPT-NeoX-20B on an H100; 478 of the 512 tokens were learnt."""
    told = predicted.estimate(
        row["model"],
        row["scheme"],
        batch=row["batch"],
        length=row["length"],
        learnt=478,
        device="cuda",
        recompute=row["recompute"],
    )
    assert told.total == pytest.approx(row["peak_bytes"], rel=TOLERANCE / 2)
    assert told.adapter == 4 * row["trained_parameters"]
    assert told.total - told.activations - told.scores != pytest.approx(row["peak_bytes"], rel=TOLERANCE / 2)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["bf16", "nf4-dq"])
def test_the_peak_of_a_run_on_a_cpu_is_predicted(scheme, shallow, tmp_path):
    """With an allocator that keeps no freed memory: the C library's heap has gaps of up to a third of the activations."""
    data = tmp_path / "words.jsonl"
    rows = [{"prompt": f"{n}?", "answer": "one two three four " * 60} for n in range(32)]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    program = f"""
import json, qwlib
settings = dict(batch=16, steps=3, every=3, validation=0, device="cpu")
_, told = qwlib.finetune({str(shallow)!r}, {scheme!r}, {str(data)!r}, {str(tmp_path / "out")!r}, **settings)
print(json.dumps(told["training"]))
"""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, env=env)
    told = json.loads(done.stdout.splitlines()[-1])
    if "peak_bytes" not in told:
        pytest.skip("the peak can't be metered here")
    assert told["predicted_bytes"]["total"] == pytest.approx(told["peak_bytes"], rel=TOLERANCE)


def test_the_command_line_prints_the_parts(shallow):
    done = CliRunner().invoke(main.app, ["finetune", str(shallow), "nf4-dq", "--estimate", "--batch=2", "--longest=64"])
    assert done.exit_code == 0
    found = predicted.estimate(str(shallow), "nf4-dq", batch=2, length=64)
    for part in ("weights", "adapter", "optimizer", "activations", "scores"):
        assert f"{getattr(found, part) / 1e9:.3f}" in done.stdout
    assert f"{found.total / 1e9:.3f}" in done.stdout
