import gc
import os
import re
import warnings

import pytest
import torch

import qwlib
from qwlib import schemes
from qwlib.errors import QwlibError
from qwlib.machine import arithmetic, devices, memory

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def close(a, b) -> float:
    return (a.float() - b.float()).abs().max().item()


def test_a_padded_batch_equals_its_rows(lm32):
    """In float32, where the two ways of computing differ by rounding alone."""
    questions = ["Name a colour.", "What is the capital of France, and which river flows through it?"]
    rows = [lm32.chat(q) for q in questions]
    batch = lm32.chat(*questions)
    assert (batch[0] == -1).sum() == rows[1].shape[1] - rows[0].shape[1] > 0
    together = lm32.stream(batch, new_tokens=12)
    for i, row in enumerate(rows):
        assert torch.equal(together[i], lm32.stream(row, new_tokens=12)[0])
    alone = lm32.logits(rows[0])[0]
    assert close(lm32.logits(batch)[0, -rows[0].shape[1] :], alone) < 1e-3
    right = torch.cat([rows[0], torch.full((1, 9), -1)], dim=1)
    assert close(lm32.logits(right)[0, -1], alone[-1]) > 1  # what padding on the right would give


def test_exactly_as_many_tokens_come_as_were_asked_for(lm):
    ids = lm.chat("Say only: yes")
    seen = []
    out = lm.stream(ids, new_tokens=30, on_token=seen.append)
    assert out.shape == (1, 30)
    assert torch.equal(torch.stack(seen, dim=1), out)
    stopped = lm.stream(ids, new_tokens=30, stop_at_eos=True)
    assert stopped.shape[1] < 30
    assert stopped[0, -1] == lm.model.generation_config.eos_token_id


def test_logits_are_the_models_own(lm):
    ids = lm.encode("The quick brown fox")
    with torch.inference_mode():
        assert torch.equal(lm.logits(ids), lm.model(ids.to(lm.device)).logits)


def test_bad_ids_are_refused(lm):
    with pytest.raises(QwlibError, match="at least one token"):
        lm.logits([[]])
    with pytest.raises(QwlibError, match="outside the model's 49152 words"):
        lm.stream([[49152]], new_tokens=1)


@pytest.mark.parametrize(
    ("capability", "dtype", "why"),
    [
        ((7, 5), torch.float16, "7.5 only emulates"),
        ((8, 0), torch.bfloat16, "8.0 has"),
        ((9, 0), torch.bfloat16, "9.0 has"),
    ],
)
def test_bfloat16_only_where_the_gpu_has_it(capability, dtype, why):
    """A T4 is 7.5, and `torch.cuda.is_bf16_supported()` says yes to it."""
    got, reason = devices.pick_dtype(schemes.find("nf4"), GPU, capability)
    assert got is dtype
    assert why in reason


def test_schemes_that_name_a_type_get_it():
    assert devices.pick_dtype(schemes.find("fp32"), GPU, (9, 0))[0] is torch.float32
    assert devices.pick_dtype(schemes.find("fp16"), CPU)[0] is torch.float16
    assert devices.pick_dtype(schemes.find("nf4"), CPU)[0] is torch.bfloat16


def test_choices_come_with_reasons(lm):
    assert lm.device_reason
    assert lm.dtype_reason
    assert lm.dtype is torch.bfloat16
    assert next(lm.model.parameters()).dtype is torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("smolm2", "bf16"), "did you mean smollm2-135m"),
        (("smollm2-135m", "nf5"), "did you mean"),
        (
            ("llama-3.1-8b", "nf4"),
            "gated: accept its licence at https://huggingface.co/meta-llama/Llama-3.1-8B and set",
        ),
    ],
)
def test_user_mistakes_are_one_line(arguments, message, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(QwlibError, match=message) as caught, qwlib.load(*arguments):
        pass
    assert "\n" not in str(caught.value)


def test_a_gpu_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(QwlibError, match="PyTorch sees none"), qwlib.load("smollm2-135m", device="cuda"):
        pass


def test_too_little_memory_is_told_before_loading(monkeypatch, shallow):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100_000_000)
    with pytest.raises(QwlibError, match=r"takes 0\.3 GB and cpu has 0\.1 GB free: choose a scheme with fewer bits"):
        with qwlib.load("smollm2-135m", "bf16", device="cpu"):
            pass
    monkeypatch.setattr(memory, "free_bytes", lambda device: 50_000_000)
    with pytest.raises(QwlibError, match=r"takes 0\.1 GB"), qwlib.load(str(shallow), "bf16", device="cpu"):
        pass
    with qwlib.load(str(shallow), "nf4-all", device="cpu"):  # 0.02 GB
        pass


def test_a_missing_package_is_told(monkeypatch):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "bitsandbytes" else real(name))
    with pytest.raises(QwlibError, match="pip install bitsandbytes"), qwlib.load("smollm2-135m", "nf4"):
        pass


def test_a_scheme_that_is_read_from_files_says_how_to_make_them():
    with pytest.raises(QwlibError, match="quantize --scheme gguf-q4_k_m"), qwlib.load("smollm2-135m", "gguf-q4_k_m"):
        pass
    with pytest.raises(QwlibError, match="read from files"), qwlib.load("llama-3.1-8b", "gptq-4bit", weights="random"):
        pass


def test_a_scheme_for_gpus_is_refused_on_a_cpu(monkeypatch):
    from qwlib.backends import Backend

    monkeypatch.setattr(Backend, "available", lambda self: (True, "installed"))
    with (
        pytest.raises(QwlibError, match="torchao-int4 needs a GPU"),
        qwlib.load("smollm2-135m", "torchao-int4", device="cpu"),
    ):
        pass


def test_a_folder_without_weights_is_told(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(QwlibError, match="can't be loaded"), qwlib.load(str(tmp_path)):
        pass


def test_pickles_and_foreign_code_are_refused(tmp_path, tiny_folder, monkeypatch):
    import shutil

    from safetensors.torch import load_file

    shutil.copytree(tiny_folder("llama"), tmp_path / "m")
    weights = {}
    for file in (tmp_path / "m").glob("*.safetensors*"):
        weights |= load_file(file) if file.suffix == ".safetensors" else {}
        file.unlink()
    torch.save(weights, tmp_path / "m" / "pytorch_model.bin")
    with (
        pytest.raises(QwlibError, match=r"in pytorch_model.bin, a pickle, which can run code"),
        qwlib.load(str(tmp_path / "m")),
    ):
        pass
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run foreign code"))
    (tmp_path / "config.json").write_text('{"model_type": "mine", "auto_map": {"AutoConfig": "code.Mine"}}')
    (tmp_path / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(QwlibError, match="can't be loaded"), qwlib.load(str(tmp_path)):
        pass


def test_a_cut_checkpoint_is_one_line(tmp_path, tiny_folder):
    import shutil

    shutil.copytree(tiny_folder("llama"), tmp_path / "m")
    file = next((tmp_path / "m").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    with (
        pytest.raises(QwlibError, match="is cut short, or no safetensors") as caught,
        qwlib.load(str(tmp_path / "m")),
    ):
        pass
    assert "\n" not in str(caught.value)


def test_a_model_without_its_tokenizer_is_refused(tmp_path, tiny_folder):
    import shutil

    shutil.copytree(tiny_folder("llama"), tmp_path / "m", ignore=shutil.ignore_patterns("*token*"))
    with pytest.raises(QwlibError, match=r"no tokenizer|can't be loaded"), qwlib.load(str(tmp_path / "m")):
        pass


def test_requests_end_where_the_positions_do(tiny_folder):
    with qwlib.load(tiny_folder("opt"), "bf16") as tiny:
        tiny.stream([[5] * 250], new_tokens=6)
        with pytest.raises(QwlibError, match="250 \\+ 7 tokens are more than the model's 256 positions"):
            tiny.stream([[5] * 250], new_tokens=7)


@pytest.mark.parametrize("kind", ["opt", "gemma2", "gpt_neox", "phi3"])
def test_padding_is_unseen_in_every_architecture(tiny_folder, kind):
    with qwlib.load(tiny_folder(kind), "fp32") as tiny:
        short, long = [5, 6, 7], list(range(10, 22))
        both = tiny.logits([[-1] * 9 + short, long])
        assert close(both[0, -3:], tiny.logits([short])[0]) < 1e-4
        assert close(both[1], tiny.logits([long])[0]) < 1e-4
        assert close(tiny.logits([[9] * 9 + short])[0, -3:], tiny.logits([short])[0]) > 1e-4


def test_a_t4_computes_in_float16(monkeypatch, shallow):
    """The faked compute capability reaches the layers."""
    reason = "compute capability 7.5 only emulates bfloat16"
    monkeypatch.setattr(devices, "pick_dtype", lambda scheme, device: (torch.float16, reason))
    monkeypatch.setattr(arithmetic, "choose", lambda dtype, device: (dtype, "as on a GPU"))
    with qwlib.load(str(shallow), "nf4") as one:
        layer = one.model.model.layers[0].mlp.up_proj
        assert layer.compute_dtype is torch.float16
        assert one.model.get_input_embeddings().weight.dtype is torch.float16
        assert one.dtype_reason == reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="about weights on the host")
def test_no_weight_lies_in_the_mapped_file(tmp_path, shallow):
    """Else resident memory would say too little, and a saved 4-bit checkpoint would seem to load for nothing."""

    def mapped(folder) -> bool:
        with open("/proc/self/maps") as file:
            return any(str(folder) in line and ".safetensors" in line for line in file)

    for scheme in ("nf4-dq", "int8"):
        with qwlib.load(str(shallow), scheme) as one:
            one.save(tmp_path / scheme)
        with qwlib.load(str(tmp_path / scheme), scheme):
            gc.collect()
            assert not mapped(tmp_path)


def test_an_error_is_not_blamed_on_a_variable(tiny_folder):
    def fail():
        with qwlib.load(tiny_folder("llama")) as tiny:
            tiny.stream([[1]], new_tokens=2, on_token=lambda token: 1 / 0)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ZeroDivisionError):
            fail()


def test_the_hub_out_of_reach_is_told(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(QwlibError, match=r"can't be fetched from the Hub") as caught, qwlib.load("qwen2.5-3b", "nf4"):
        pass
    assert "\n" not in str(caught.value)


def test_what_was_saved_in_4_bits_loads_in_4_bits_only(tmp_path, shallow, repacks):
    with qwlib.load(str(shallow), "nf4-dq") as four:
        ids = four.chat("Name a colour.")
        four.save(tmp_path)
        bytes_held, scores = four.memory["weights_bytes"] + four.memory["state_bytes"], four.logits(ids)
        if repacks and four.device.type == "cpu":
            with pytest.raises(QwlibError, match="before its first forward"):
                four.save(tmp_path)
    with qwlib.load(str(tmp_path), "nf4-dq") as again:
        assert again.scheme.name == "nf4-dq"
        assert again.memory["weights_bytes"] + again.memory["state_bytes"] == bytes_held
        assert torch.equal(again.logits(ids), scores)
    with pytest.raises(QwlibError, match="was saved as nf4-dq"), qwlib.load(str(tmp_path), "bf16"):
        pass


def test_random_weights_have_the_shape_and_no_quality(tiny_folder):
    from qwlib.measuring import quality

    with qwlib.load(tiny_folder("opt"), "nf4") as tiny:  # the folder says that its weights are random
        assert tiny.weights == "random"
        out = tiny.stream([[5, 6, 7]], new_tokens=4)
        assert out.shape == (1, 4)
        with pytest.raises(QwlibError, match="no quality"):
            quality.perplexity(tiny, "text")
    with pytest.raises(QwlibError, match="'trained' or 'random'"), qwlib.load("smollm2-135m", weights="rnd"):
        pass


def test_an_adapter_is_put_over_its_base(tmp_path, shallow, shallow32):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from qwlib.models import catalog

    base = AutoModelForCausalLM.from_pretrained(shallow, dtype=torch.float32)
    tuned = get_peft_model(base, LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "sub")
    row = catalog.Model("adapted", str(shallow), adapter=catalog.Adapter(str(tmp_path), None, "sub"))
    ids = shallow32.encode("The capital of France is")
    with torch.inference_mode():
        wanted = tuned(ids).logits.to(shallow32.device)
    with qwlib.load(row, "fp32") as adapted:
        assert close(adapted.logits(ids), wanted) < 0.01
    assert close(shallow32.logits(ids), wanted) > 1


def test_a_reference_kept_outside_is_told(shallow):
    with pytest.warns(UserWarning, match="still referenced outside"), qwlib.load(str(shallow)) as one:
        kept = one.model
    assert one.model is None
    del kept
    gc.collect()


def test_nothing_is_logged_or_warned(shallow, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for scheme in ("int8", "nf4"):
            with qwlib.load(str(shallow), scheme) as one:
                one.stream(one.chat("Hello"), new_tokens=3)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["bf16", "nf4-dq", "nf4-all"])
def test_twenty_loads_leave_nothing_behind(scheme):
    """Resident memory (on a GPU, allocated memory) after 20 more loads and forwards, against after the first four."""
    device, _ = devices.pick_device()

    def growth():
        return (memory.used_bytes(device) - start) / start

    for n in range(24):
        with qwlib.load("smollm2-135m", scheme) as one:
            one.stream([[1, 2, 3]], new_tokens=2)
        memory.give_back()
        if n == 3:
            start = max(memory.used_bytes(device), 1)
    assert growth() < 0.02
    leak = [torch.ones(int(start * 0.0015), dtype=torch.uint8, device=device) for _ in range(20)]  # 0.15 % a load
    assert growth() > 0.02, len(leak)


def test_no_token_is_ever_shown(monkeypatch, capfd):
    secret = "hf_" + "a" * 34
    monkeypatch.setenv("HF_TOKEN", secret)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(QwlibError) as caught, qwlib.load("llama-3.1-8b", "nf4-dq"):
        pass
    assert secret not in str(caught.value) + "".join(capfd.readouterr())
    assert os.environ["HF_TOKEN"] == secret


def test_an_incomplete_checkpoint_is_refused(tmp_path, tiny_folder):
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(tiny_folder("llama"), tmp_path / "m")
    file = next((tmp_path / "m").glob("*.safetensors"))
    weights = load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in weights.items() if k != name}, file, metadata={"format": "pt"})
    with pytest.raises(QwlibError, match=f"lacks 1 of its weights, {name}"), qwlib.load(str(tmp_path / "m")):
        pass
    save_file(weights | {name: weights[name][:-1]}, file, metadata={"format": "pt"})
    with pytest.raises(QwlibError, match=f"lacks 1 of its weights, {name}"), qwlib.load(str(tmp_path / "m")):
        pass


def test_ipython_forgets_what_a_cell_showed(tmp_path):
    """In a shell of its own: a model shown by a cell is let go, and `_` goes on working."""
    import subprocess
    import sys

    code = """
import warnings
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
warnings.simplefilter("error")
run = lambda text: shell.run_cell(text, store_history=True).raise_error()
run("import contextlib, weakref, qwlib; stack = contextlib.ExitStack()")
run("lm = stack.enter_context(qwlib.load('smollm2-135m')); watch = weakref.ref(lm.model)")
run("lm.model")
run("assert _ is lm.model and Out")
run("stack.close()")
run("assert watch() is None, 'still held'")
run("6 * 7")
run("assert _ == 42")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-2000:]


@pytest.mark.parametrize(
    ("scheme", "kernel", "why"),
    [
        ("nf4", "mine", "kernel must be 'qwlib', 'bitsandbytes' or left out, not 'mine'"),
        (
            "bf16",
            "bitsandbytes",
            "kernel='bitsandbytes' is for 4-bit schemes of bitsandbytes, not for bf16: leave it out",
        ),
        ("bf16", "qwlib", "kernel='qwlib' is for 4-bit schemes of bitsandbytes, not for bf16: leave it out"),
        ("nf4", "qwlib", "kernel='qwlib' needs a GPU: leave it out"),
    ],
)
def test_a_kernel_that_can_t_be_had_is_refused_before_anything_is_read(scheme, kernel, why, tiny_folder):
    with (
        pytest.raises(QwlibError, match=re.escape(why)),
        qwlib.load(tiny_folder("llama"), scheme, device="cpu", kernel=kernel),
    ):
        pytest.fail("it was loaded")
