"""Fine-tuning by LoRA, by QLoRA and in full: what moves, what stays, what is written, and what is refused."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear
from typer.testing import CliRunner

import qwlib
from qwlib import QwlibError
from qwlib import __main__ as main
from qwlib.backends import bnb as bnb_backend
from qwlib.backends import bnb_ends
from qwlib.measuring import record
from qwlib.training import examples, finetune, loop, runs
from qwlib.training.adapting import adapted
from qwlib.training.settings import Settings

COLOURS = ("red", "green", "blue", "yellow", "black", "white", "grey", "brown")
SHORT = {"steps": 4, "batch": 4, "rank": 4, "every": 2, "learning_rate": 3e-3, "validation": 0.25, "device": "cpu"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 examples with one answer for each colour."""
    path = tmp_path_factory.mktemp("data") / "colours.jsonl"
    rows = [
        {"prompt": f"{n} things are {name}. Which colour?", "answer": f"They are {name}."}
        for n in range(3)
        for name in COLOURS
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def made(shallow, data, tmp_path_factory):
    """Scheme → (folder, record) of a run of four steps."""
    found = {}

    def make(scheme: str, method: str = "lora"):
        if (scheme, method) not in found:
            out = tmp_path_factory.mktemp("out") / f"{scheme}-{method}"
            settings = SHORT | ({"every": 4} if method == "full" else {})  # its checkpoints are large
            found[scheme, method] = finetune.finetune(str(shallow), scheme, data, out, method=method, **settings)
        return found[scheme, method]

    return make


def scores(name, scheme, asked="1 things are red. Which colour?"):
    with qwlib.load(name, scheme, device="cpu") as lm:
        return lm.logits(lm.chat(asked))[0, -1].float()


@pytest.mark.parametrize("scheme", ["bf16", "nf4-dq", "int8", "nf4-all"])
def test_losses_fall_and_everything_is_written_down(scheme, made, shallow):
    folder, told = made(scheme)
    training = told["training"]
    losses = [each["loss"] for each in training["losses"]]
    assert len(losses) == training["steps"] == 4
    assert losses[-1] < losses[0]
    assert [each["step"] for each in training["validation_losses"]] == [2, 4]
    assert training["data"] | {"sha256": ""} == {
        "file": "colours.jsonl",
        "sha256": "",
        "examples": 18,
        "validation_examples": 6,
        "tokens": training["data"]["tokens"],
        "learnt_tokens": 24 * 5,  # "They are red." and the token that ends it
    }
    assert training["trained_modules"] == 3 * 7
    assert training["step_s"] > 0
    assert training["tok_s"] > 0
    parts = training["predicted_bytes"]
    held = told["memory"]["weights_bytes"] + told["memory"]["state_bytes"]
    assert parts["weights"] == pytest.approx(held, rel=0.001)
    assert parts["adapter"] == 4 * training["trained_parameters"]
    assert record.read(folder / runs.RECORD) == told
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
    ]
    assert not folder.with_name(f"{folder.name}.unfinished").exists()
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(shallow)


@pytest.mark.parametrize("scheme", ["bf16", "nf4-dq", "nf4-all"])
def test_an_adapter_is_loaded_over_the_scheme_that_it_was_trained_over(scheme, made, shallow):
    folder, _ = made(scheme)
    before, after = scores(str(shallow), scheme), scores(f"{shallow}+{folder}", scheme)
    assert not torch.allclose(before, after, atol=0.1)


@pytest.mark.slow
def test_plain_peft_in_a_new_process_gives_the_same_scores(made, shallow):
    folder, _ = made("bf16")
    program = f"""
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base = AutoModelForCausalLM.from_pretrained({str(shallow)!r}, dtype=torch.bfloat16)
model = PeftModel.from_pretrained(base, {str(folder)!r}, autocast_adapter_dtype=False).eval()
asked = [{{"role": "user", "content": "1 things are red. Which colour?"}}]
ids = AutoTokenizer.from_pretrained({str(shallow)!r}).apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
with torch.inference_mode():
    found = model(ids["input_ids"]).logits[0, -1].float()
torch.save(found, {str(folder.parent / "scores.pt")!r})
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    found = torch.load(folder.parent / "scores.pt")
    wanted = scores(f"{shallow}+{folder}", "bf16")
    assert (found - wanted).abs().max() < 0.15 < (found - scores(str(shallow), "bf16")).abs().max()


@pytest.mark.slow
def test_full_fine_tuning_writes_a_checkpoint(made, shallow):
    folder, told = made("fp32", "full")
    assert told["training"]["trained_parameters"] == told["model"]["parameters"]
    assert not torch.allclose(scores(str(shallow), "bf16"), scores(str(folder), "bf16"), atol=0.1)


def test_the_loop_by_hand_gives_the_same_losses(made, data, shallow):
    """torch's optimizer, transformers' own loss over all positions, and the order that Trainer draws."""
    _, told = made("fp32")
    how = Settings(**{key: value for key, value in SHORT.items() if key != "device"})
    kept, _ = examples.split(examples.read(data), how.validation, how.seed)
    with qwlib.load(str(shallow), "fp32", device="cpu") as lm:
        rows = examples.tokenized(lm, kept, how.longest)
        model = adapted(lm, how)
        model.train()
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(how.seed)).tolist()
        optimizer = torch.optim.AdamW(loop.trained(model).values(), how.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / how.steps)).item())
        )
        found = []
        for step in range(how.steps):
            drawn = [rows[place] for place in order[step * how.batch :][: how.batch]]
            given = examples.batch(drawn, lm.tokenizer.pad_token_id)
            loss = model(given["input_ids"], given["attention_mask"], labels=given["labels"]).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            found.append(loss.item())
    losses = [each["loss"] for each in told["training"]["losses"]]
    assert found == pytest.approx(losses, rel=1e-4)
    assert found != pytest.approx([losses[0], *losses[:3]], rel=1e-4)


@pytest.mark.parametrize("start", ["", "You are asked about numbers. Count well, and answer in few words only. " * 4])
def test_the_loss_and_its_gradients_are_those_of_all_positions(start, shallow):
    """Scores are computed at few of them only, and what all rows begin with is read once."""
    pairs = (("One?", "Two, three."), ("A longer question?", "Yes."), ("One more?", "No."))
    rows = [
        examples.Example([{"role": "user", "content": start + q}, {"role": "assistant", "content": a}], 1)
        for q, a in pairs
    ]
    with qwlib.load(str(shallow), "fp32", device="cpu") as lm:
        rows = examples.tokenized(lm, rows, 512)
        batch = {key: value for key, value in examples.batch(rows, 0).items() if key not in ("lines", "weights")}
        assert (loop._shared(batch["input_ids"]) >= loop.SHARED) == bool(start)
        read = []
        lm.model.get_input_embeddings().register_forward_hook(lambda _, given, __: read.append(given[0].numel()))
        lm.model.train()
        weight = lm.model.model.layers[0].self_attn.k_proj.weight

        def gradient(loss):
            return torch.autograd.grad(loss, weight)[0]

        whole = lm.model(**batch).loss
        wanted = gradient(whole)
        del read[:]
        found = loop.loss(lm.model, batch)
        got = gradient(found)
        assert sum(read) == batch["input_ids"].numel() if not start else sum(read) < 0.6 * batch["input_ids"].numel()
        weights = torch.linspace(0, 3, batch["labels"].numel()).view_as(batch["labels"])
        weighted = loop.loss(lm.model, batch | {"weights": weights})
        each = cross_entropy(lm.model(batch["input_ids"]).logits[:, :-1].mT, batch["labels"][:, 1:], reduction="none")
        counted = weights[:, 1:] * (batch["labels"][:, 1:] != examples.IGNORED)
        assert weighted.item() == pytest.approx(((each * counted).sum() / counted.sum()).item(), rel=1e-5)
        assert weighted.item() != pytest.approx(whole.item(), rel=1e-3)
        halved = loop.loss(lm.model, batch, tokens=2 * sum(row.learnt for row in rows))
        assert found.item() == pytest.approx(whole.item(), rel=1e-5)
        assert halved.item() == pytest.approx(whole.item() / 2, rel=1e-5)
        assert (got - wanted).norm() < 1e-4 * wanted.norm()
        other = gradient(loop.loss(lm.model, {key: value[:2] for key, value in batch.items()}))
        assert (other - wanted).norm() > 1e-2 * wanted.norm()


@pytest.mark.parametrize(
    ("columns", "kind", "nested"), [(128, "nf4", True), (128, "fp4", False), (96, "nf4", True)], ids=str
)
def test_gradients_go_through_4_bit_layers_as_through_their_weights_in_float32(columns, kind, nested):
    """96 columns are no whole block of 64: the layer that `load` mends."""
    torch.manual_seed(0)
    layer = bnb.nn.Linear4bit(
        columns, 64, bias=False, compute_dtype=torch.float32, quant_type=kind, compress_statistics=nested
    ).to("cpu")
    bnb_backend.mend(nn.ModuleList([layer]))
    dense = bnb_ends.dequantize_rows(layer.weight.data, layer.weight.quant_state, torch.arange(64)).float()

    def gradient(multiply):
        x = torch.randn(5, columns, generator=torch.Generator().manual_seed(1), requires_grad=True)
        (multiply(x) ** 2).sum().backward()
        return x.grad

    got, wanted = gradient(layer.train()), gradient(lambda x: linear(x, dense))
    other = gradient(lambda x: linear(x, dense * 1.002))
    assert (got - wanted).norm() < 1e-3 * wanted.norm() < (other - wanted).norm()


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_with_the_same_losses(made, data, shallow, tmp_path):
    program = f"""
import os, signal, transformers
from qwlib.training import finetune, loop
plain = loop.loss
def loss(*args, calls=[], **kwargs):
    calls.append(1)
    if len(calls) == 6:  # two steps, a validation of two batches, and the third step's
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*args, **kwargs)
loop.loss = loss
finetune.finetune({str(shallow)!r}, "bf16", {str(data)!r}, {str(tmp_path / "out")!r}, **{SHORT!r})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, env=os.environ)
    assert done.returncode == -signal.SIGKILL
    unfinished = tmp_path / "out.unfinished"
    assert (unfinished / "checkpoint-2").is_dir()
    with pytest.raises(QwlibError, match="holds an unfinished run of other settings"):
        finetune.finetune(str(shallow), "bf16", data, tmp_path / "out", **SHORT | {"rank": 8})
    half = unfinished / "checkpoint-3"  # what a kill while writing leaves
    half.mkdir()
    _, told = finetune.finetune(str(shallow), "bf16", data, tmp_path / "out", **SHORT)
    _, whole = made("bf16")
    assert told["training"]["resumed_at"] == 2
    for key in ("losses", "validation_losses", "weights_sha256"):
        assert told["training"][key] == whole["training"][key]
    assert not unfinished.exists()


def test_activations_that_are_computed_twice_change_nothing(made, data, shallow, tmp_path):
    _, told = finetune.finetune(str(shallow), "bf16", data, tmp_path / "out", recompute=True, **SHORT)
    assert told["training"]["losses"] == made("bf16")[1]["training"]["losses"]


def test_the_weights_with_the_lowest_validation_loss_are_kept(data, shallow, tmp_path):
    settings = SHORT | {"learning_rate": 0.1, "steps": 6, "every": 1, "patience": 2}
    _, told = finetune.finetune(str(shallow), "bf16", data, tmp_path / "out", **settings)
    checks = {each["step"]: each["loss"] for each in told["training"]["validation_losses"]}
    kept = told["training"]["kept_step"]
    assert checks[kept] == min(checks.values())
    assert told["training"]["steps"] == min(kept + 2, 6)


def test_a_loss_that_is_no_number_names_step_and_lines(data, shallow, tmp_path, monkeypatch):
    plain = loop.loss
    monkeypatch.setattr(loop, "loss", lambda *args, **kwargs: plain(*args, **kwargs) * float("nan"))
    with pytest.raises(
        QwlibError, match=r"step 1: the loss of lines \d+, \d+, \d+, \d+ is nan: lower the learning rate"
    ):
        finetune.finetune(str(shallow), "bf16", data, tmp_path / "out", **SHORT)


def test_a_validation_loss_that_is_no_number_names_the_step(data, shallow, tmp_path, monkeypatch):
    plain = loop.loss

    def spoilt(model, *args, **kwargs):
        return plain(model, *args, **kwargs) * (1 if model.training else float("nan"))

    monkeypatch.setattr(loop, "loss", spoilt)
    with pytest.raises(QwlibError, match="the validation loss is nan at step 2: lower the learning rate"):
        finetune.finetune(str(shallow), "bf16", data, tmp_path / "out", **SHORT)


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed")], ids=repr
)
def test_a_full_disk_says_what_to_do_and_nothing_is_lost(error, made, data, shallow, tmp_path, monkeypatch):
    import transformers

    saves, free = transformers.Trainer._save_checkpoint, shutil.disk_usage(tmp_path)

    def full(self, *args):
        if self.state.global_step == 4:
            raise error
        saves(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(transformers.Trainer, "_save_checkpoint", full)
        patch.setattr(shutil, "disk_usage", lambda _: free._replace(free=0))
        with pytest.raises(QwlibError, match="is full: make room and call again"):
            finetune.finetune(str(shallow), "bf16", data, tmp_path / "out", **SHORT)
    _, told = finetune.finetune(str(shallow), "bf16", data, tmp_path / "out", **SHORT)
    assert told["training"]["losses"] == made("bf16")[1]["training"]["losses"]


def test_a_run_whose_end_could_not_be_written_is_not_trained_on(made, data, shallow, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "_save", full)
        with pytest.raises(QwlibError, match="is full: make room and call again"):
            finetune.finetune(str(shallow), "bf16", data, tmp_path / "out", **SHORT)
    _, told = finetune.finetune(str(shallow), "bf16", data, tmp_path / "out", **SHORT)
    _, whole = made("bf16")
    assert told["training"]["resumed_at"] == 4
    for key in ("steps", "losses", "validation_losses", "weights_sha256"):
        assert told["training"][key] == whole["training"][key]


def test_a_folder_that_can_t_be_written_is_told(data, shallow, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(QwlibError, match="can't be written"):
        finetune.finetune(str(shallow), "bf16", data, tmp_path / "file" / "out", **SHORT)


def test_gradients_of_several_batches_make_one_step(made, data, shallow, tmp_path):
    settings = SHORT | {"batch": 2, "accumulate": 2}
    _, told = finetune.finetune(str(shallow), "bf16", data, tmp_path / "out", **settings)
    losses = [[each["loss"] for each in run["training"]["losses"]] for run in (told, made("bf16")[1])]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3)
    checks = [[each["loss"] for each in run["training"]["validation_losses"]] for run in (told, made("bf16")[1])]
    assert checks[0] == pytest.approx(checks[1], rel=2e-3)  # the mean over tokens, however they are batched


@pytest.mark.parametrize(
    ("settings", "count", "steps"),
    [
        ({"batch": 8}, 18, 3),
        ({"batch": 8, "epochs": 4}, 9, 8),
        ({"batch": 8, "accumulate": 2}, 18, 2),
        ({"batch": 8, "epochs": 0.5}, 18, 2),
        ({"batch": 8, "epochs": 9, "steps": 5}, 18, 5),
    ],
)
def test_steps_are_counted_by_passes(settings, count, steps):
    assert Settings(**settings).steps_over(count) == steps


def test_other_errors_come_out_as_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="something else"), runs._explained(tmp_path / "out"):
        raise RuntimeError("something else")


@pytest.mark.parametrize(
    ("scheme", "settings", "why"),
    [
        ("bf16", {"targets": ("q_prj",)}, "unknown target 'q_prj': did you mean q_proj"),
        ("bf16", {"method": "lara"}, "unknown method 'lara': did you mean lora"),
        ("bf16", {"method": "full"}, "it needs the scheme fp32"),
        ("bf16", {"rank": 0}, "rank is a whole number of at least 1"),
        ("bf16", {"learning_rate": 0}, "learning_rate must be more than 0"),
        ("bf16", {"validation": 1.0}, "validation is a share"),
        ("bf16", {"validation": 0.0, "patience": 1}, "patience needs validation"),
        ("bf16", {"validation": 0.01}, "24 examples can't be split"),
        ("bf16", {"speed": 3}, "settings are method, rank"),
        ("bf16", {"learning_rate": "1e-4"}, "learning_rate is a number, not '1e-4'"),
        ("bf16", {"targets": "q_proj"}, "targets are names of layers in a tuple"),
        ("fp16", {}, "can't be trained on a CPU in float16"),
        ("bf16", {"longest": 4}, "22 of 22 examples have more than 4 tokens"),
        ("hqq-4bit", {}, "hqq"),
        ("gguf-q4_k_m", {}, "is read from files"),
    ],
)
def test_what_can_t_be_trained_is_refused_in_one_line(scheme, settings, why, data, shallow, tmp_path):
    with pytest.raises(QwlibError, match=why) as told:
        finetune.finetune(str(shallow), scheme, data, tmp_path / "out", device="cpu", **settings)
    assert "\n" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_trains_and_says_what_happened(data, shallow, tmp_path):
    settings = [f"--{key.replace('_', '-')}={value}" for key, value in SHORT.items()]
    command = [
        "finetune",
        str(shallow),
        "bf16",
        "--data",
        str(data),
        "--out",
        str(tmp_path / "out"),
        "--target",
        "q_proj",
    ]
    done = CliRunner().invoke(main.app, [*command, *settings], catch_exceptions=False)
    assert done.exit_code == 0
    assert "parameters trained in 4 steps" in done.stdout
    told = record.read(tmp_path / "out" / runs.RECORD)["training"]
    assert told["trained_modules"] == 3
    assert f"losses: {told['losses'][0]['loss']:.3f} to {told['losses'][-1]['loss']:.3f}" in done.stdout
    with pytest.raises(QwlibError, match="name the examples with --data FILE"):
        CliRunner().invoke(main.app, command[:3], catch_exceptions=False)


def test_an_output_that_is_there_stays(data, shallow, tmp_path):
    with pytest.raises(QwlibError, match="is there already"):
        finetune.finetune(str(shallow), "bf16", data, tmp_path, device="cpu")


def test_a_fingerprint_sees_values_and_places():
    one = [torch.arange(10.0), torch.ones(3)]
    assert runs.fingerprint(one) == runs.fingerprint([each.clone() for each in one])
    swapped = torch.arange(10.0)
    swapped[[2, 3]] = swapped[[3, 2]]
    assert runs.fingerprint([swapped, one[1]]) != runs.fingerprint(one)
    assert runs.fingerprint([one[0], one[1].bfloat16()]) != runs.fingerprint(one)
