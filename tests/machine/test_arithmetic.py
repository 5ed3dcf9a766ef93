"""Products in float32 where a processor has no 16-bit ones: which, to what accuracy, and that nothing else changes."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional
from torch.overrides import _get_current_function_mode_stack

import qwlib
from qwlib.backends import bnb, bnb_ends
from qwlib.errors import QwlibError
from qwlib.machine import arithmetic, memory, processor
from qwlib.models import estimates

CPU = torch.device("cpu")
LINEAR = 3 * 7 + 1  # products of the shallow model with a weight, the head's among them


@pytest.fixture
def measured(monkeypatch):
    """A function: seconds of the product in the weights' type and in float32 → as on a processor that measures so."""

    def pretend(own: float, single: float) -> None:
        monkeypatch.setattr(processor, "capability", lambda: "AVX512")
        monkeypatch.setattr(arithmetic, "seconds", lambda dtype: (own, single))

    return pretend


@pytest.fixture
def single(measured):
    """As on a processor whose 16-bit products are slow."""
    measured(7.0, 1.0)


@pytest.fixture
def products(monkeypatch):
    """The shapes of every product that was calculated by `arithmetic.linear`: (rows, columns, outputs)."""
    seen, plain = [], arithmetic.linear

    def counted(x, weight, bias=None):
        seen.append((x.shape[:-1].numel(), x.shape[-1], len(weight)))
        return plain(x, weight, bias)

    monkeypatch.setattr(arithmetic, "linear", counted)
    return seen


def exact(x, weight, bias=None):
    """The product in float64."""
    return functional.linear(x.double(), weight.double(), None if bias is None else bias.double())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outputs", [1, 5, 1 + (arithmetic.SLICE // 192), 3 * (arithmetic.SLICE // 192)])
def test_a_product_in_slices_is_the_exact_one_rounded_once(dtype, outputs):
    torch.manual_seed(outputs)
    x, weight = torch.randn(2, 7, 192).to(dtype), (0.05 * torch.randn(outputs, 192)).to(dtype)
    bias = torch.randn(outputs).to(dtype)
    for with_bias in (None, bias):
        got, wanted = arithmetic.linear(x, weight, with_bias), exact(x, weight, with_bias)
        assert got.dtype is dtype
        assert got.shape == wanted.shape
        # half a step of the type, and what float32 sums may add near zero
        allowed = torch.finfo(dtype).eps / 2 * wanted.abs() + 1e-5
        assert ((got.double() - wanted).abs() <= allowed).all()
    halves = [exact(x[..., part], weight[:, part], bias).to(dtype) for part in (slice(96), slice(96, None))]
    again = exact(x, weight, 2 * bias)  # two products that are rounded, and added in 16 bits
    assert not ((sum(halves).double() - again).abs() <= torch.finfo(dtype).eps / 2 * again.abs() + 1e-5).all()


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_are_the_exact_ones_rounded_once(frozen):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 16, 192).bfloat16(), (0.05 * torch.randn(2 + arithmetic.SLICE // 192, 192)).bfloat16()
    bias, back = torch.randn(len(weight)).bfloat16(), torch.randn(2, 16, len(weight)).bfloat16()
    leaves = [x.requires_grad_(), *(each.requires_grad_(not frozen) for each in (weight, bias))]
    with arithmetic.Float32Products():
        out = functional.linear(*leaves)
    assert out.dtype is torch.bfloat16
    out.backward(back)
    twins = [each.detach().double().requires_grad_(each.requires_grad) for each in leaves]
    functional.linear(*twins).backward(back.double())
    for leaf, twin in zip(leaves, twins, strict=True):
        assert (leaf.grad is None) == (twin.grad is None)
        if twin.grad is not None:
            assert leaf.grad.dtype is torch.bfloat16
            allowed = torch.finfo(torch.bfloat16).eps / 2 * twin.grad.abs() + 1e-4
            assert ((leaf.grad.double() - twin.grad).abs() <= allowed).all()
            assert not ((leaf.grad.double() * 1.01 - twin.grad).abs() <= allowed).all()


@pytest.mark.parametrize(("own", "wide", "wanted"), [(0.003, 0.001, torch.float32), (0.001, 0.003, torch.bfloat16)])
def test_what_is_chosen_follows_what_was_measured(measured, own, wide, wanted):
    measured(own, wide)
    got, why = arithmetic.choose(torch.bfloat16, CPU)
    assert got is wanted
    assert f"{1e3 * own:.2g} ms in bfloat16 and {1e3 * wide:.2g} ms in float32" in why
    assert arithmetic.choose(torch.bfloat16, torch.device("cuda", 0)) == (torch.bfloat16, "the type of the weights")
    assert arithmetic.choose(torch.float32, CPU)[0] is torch.float32


@pytest.mark.parametrize("capability", processor.BF16)
def test_a_processor_that_multiplies_bfloat16_keeps_it_whatever_is_measured_beside_other_work(
    single, monkeypatch, capability
):
    monkeypatch.setattr(processor, "capability", lambda: capability)
    got, why = arithmetic.choose(torch.bfloat16, CPU)
    assert got is torch.bfloat16
    assert why == f"{capability} has instructions for it"
    assert arithmetic.choose(torch.float16, CPU)[0] is torch.float32  # there are none for that type: measured


def test_a_model_reads_several_tokens_in_float32_and_one_as_before(single, products, shallow):
    with qwlib.load(str(shallow), "bf16", device="cpu") as lm:
        assert lm.arithmetic is torch.float32
        assert lm.dtype is torch.bfloat16
        many = torch.arange(5, 5 + arithmetic.ROWS)[None]
        scores = lm.logits(many)
        assert scores.dtype is torch.bfloat16
        assert len(products) == LINEAR
        assert {rows for rows, *_ in products} == {arithmetic.ROWS}
        products.clear()
        lm.logits(many[:, : arithmetic.ROWS - 1])
        assert products == []
        lm.stream(many, new_tokens=3)  # the prompt, then a token at a time; the head reads the prompt's last only
        assert len(products) == LINEAR - 1
        products.clear()
        lm.stream(many.T.contiguous(), new_tokens=2)  # a batch: every step has several rows
        assert len(products) == 2 * LINEAR
        lm.model.train()
        products.clear()
        lm.model(many).logits.sum().backward()
        assert len(products) == LINEAR
        products.clear()
        wanted = lm.model.model.layers[0].mlp.up_proj.weight.grad.clone()
        lm.model.zero_grad()
        lm.model.gradient_checkpointing_enable()  # the layers are called again in the backward pass, without the model
        lm.model(many).logits.sum().backward()
        assert len(products) == 2 * LINEAR - 1
        assert torch.equal(lm.model.model.layers[0].mlp.up_proj.weight.grad, wanted)
        assert _get_current_function_mode_stack() == []


def test_nothing_but_two_hooks_changes_in_the_model(shallow16, shallow, single):
    with qwlib.load(str(shallow), "bf16", device="cpu") as slow:
        kept, plain = slow.model, shallow16.model
        assert [type(module) for module in kept.modules()] == [type(module) for module in plain.modules()]
        assert list(kept.state_dict()) == list(plain.state_dict())
        assert slow.memory["weights_bytes"] == shallow16.memory["weights_bytes"]
        hooked = [module for module in kept.modules() if module._forward_hooks or module._forward_pre_hooks]
        assert hooked == [kept]
        ids = torch.arange(5, 25)[None]
        slow.logits(ids)
        assert memory.measure(kept) == {key: shallow16.memory[key] for key in ("weights_bytes", "state_bytes")}
        twin = copy.deepcopy(kept)  # hooks are part of a copy
        with torch.inference_mode():
            assert torch.equal(twin(ids).logits, kept(ids).logits)
        del kept, twin, hooked
        left = slow.model
        slow.engine.close()
        assert not left._forward_hooks
        assert not left._forward_pre_hooks
        slow.model = left = None


def test_a_call_that_fails_leaves_nothing_behind(single, shallow):
    with qwlib.load(str(shallow), "bf16", device="cpu") as lm, torch.inference_mode():
        last = lm.model.model.layers[-1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lm.model(torch.arange(5, 25)[None])
        last.remove()
        assert _get_current_function_mode_stack() == []
        with pytest.raises(QwlibError):
            lm.logits([[10**6] * 20])
        assert _get_current_function_mode_stack() == []


def test_scores_are_those_of_16_bit_products_but_for_rounding(single, shallow, shallow32, monkeypatch):
    ids = shallow32.encode("Quantization maps many values to few. " * 8)
    with qwlib.load(str(shallow), "bf16", device="cpu") as slow:
        got = slow.logits(ids).double().log_softmax(-1)
    monkeypatch.undo()
    with qwlib.load(str(shallow), "nf4", device="cpu") as four:
        wanted, other = (each.logits(ids).cpu().double().log_softmax(-1) for each in (shallow32, four))
    kld = (wanted.exp() * (wanted - got)).sum(-1).mean().item()
    assert kld < 2e-3
    assert (wanted.exp() * (wanted - other)).sum(-1).mean().item() > 20 * 2e-3


@pytest.mark.parametrize("few", [True, False])
def test_4_bit_layers_are_dequantized_to_float32(single, products, few, monkeypatch, shallow):
    import bitsandbytes

    monkeypatch.setattr(bnb, "few_rows_in_float32", lambda: few)

    with qwlib.load(str(shallow), "nf4-dq", device="cpu") as lm:
        layers = [module for module in lm.model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]
        before = [layer.weight.data.clone() for layer in layers]
        lm.logits(torch.arange(5, 25)[None])
        assert {layer.compute_dtype for layer in layers} == {torch.float32}
        lm.logits([[5]])
        assert {layer.compute_dtype for layer in layers} == {torch.float32 if few else torch.bfloat16}
        saved = lm.model.config.quantization_config  # is for whoever loads it, on a GPU perhaps
        assert saved.bnb_4bit_compute_dtype is torch.bfloat16
        assert all(map(torch.equal, before, (layer.weight.data for layer in layers)))  # not repacked for a bf16 kernel
        assert products == [(20, 576, 49_152)]  # the head, which stays 16-bit
        layer, x = layers[0], torch.randn(arithmetic.ROWS, 576).bfloat16()
        with torch.inference_mode():
            got = layer(x)
        state = copy.copy(layer.weight.quant_state)
        state.dtype = torch.float32
        weight = bnb_ends.dequantize_rows(layer.weight.data, state, torch.arange(layer.out_features))
        wanted = exact(x, weight)
        assert got.dtype is torch.bfloat16
        allowed = torch.finfo(torch.bfloat16).eps / 2 * wanted.abs() + 1e-5
        assert ((got.double() - wanted).abs() <= allowed).all()
        assert not ((exact(x, weight.bfloat16()) - wanted).abs() <= 1e-5).all()  # as if it were dequantized to bfloat16


def test_few_rows_follow_what_bitsandbytes_has(monkeypatch):
    for capability, avx512, wanted in (("AVX2", False, True), ("AVX2", True, False), ("AVX512", False, False)):
        monkeypatch.setattr(processor, "capability", lambda capability=capability: capability)
        monkeypatch.setattr(bnb.bnb.functional, "has_avx512bf16", lambda avx512=avx512: avx512)
        assert bnb.few_rows_in_float32() is wanted


@pytest.mark.parametrize("kind", ["matmul", "@", "bmm", "addmm", "baddbmm", "named"])
def test_products_of_two_tensors_are_calculated_in_float32_too(kind):
    torch.manual_seed(0)
    rows = arithmetic.ROWS
    a, b, c = (torch.randn(3, *shape).bfloat16() for shape in ((rows, 300), (300, 11), (rows, 11)))
    calls = {
        "matmul": lambda a, b, c: torch.matmul(a, b),
        "@": lambda a, b, c: a @ b,
        "bmm": lambda a, b, c: a.bmm(b),
        "addmm": lambda a, b, c: torch.addmm(c[0], a[0], b[0]),
        "baddbmm": lambda a, b, c: torch.baddbmm(c, a, b, beta=0.5),
        "named": lambda a, b, c: c.baddbmm(batch1=a, batch2=b, beta=0.5, alpha=2.0),
    }
    with arithmetic.Float32Products():
        got, few = calls[kind](a, b, c), calls[kind](a[:, :1], b, c[:, :1])
    assert got.dtype is few.dtype is torch.bfloat16
    assert torch.equal(got, calls[kind](a.float(), b.float(), c.float()).bfloat16())
    assert torch.equal(few, calls[kind](a[:, :1], b, c[:, :1]))


def test_other_models_are_read_in_float32(single, products, tiny_folder):
    """Phi-3 joins its projections, OPT has biases, Gemma scales its embedding: what they multiply is found as it is called."""
    for kind in ("opt", "phi3", "gemma2"):
        products.clear()
        with qwlib.load(tiny_folder(kind), "bf16", device="cpu") as tiny:
            named = estimates.meta_model(tiny.row).named_modules()
            wanted = sum(isinstance(module, torch.nn.Linear) for _, module in named)
            tiny.logits(torch.arange(5, 25)[None])
            assert len(products) == wanted, kind


def test_an_adapter_is_read_in_float32(single, products, shallow, tmp_path):
    from peft import LoraConfig, get_peft_model

    with qwlib.load(str(shallow), "bf16", device="cpu") as base:
        made = get_peft_model(base.model, LoraConfig(r=4, target_modules=["q_proj"]))
        made.save_pretrained(tmp_path)
        made.unload()
        del made
    with qwlib.load(f"{shallow}+{tmp_path}", "bf16", device="cpu") as over:
        products.clear()
        over.logits(torch.arange(5, 25)[None])
        assert len(products) == LINEAR + 2 * 3
        products.clear()
        over.stream(torch.arange(5, 25)[None], new_tokens=2)
        assert len(products) == LINEAR + 2 * 3 - 1


SLOW = """
import sys, time, torch, qwlib
from qwlib.machine import arithmetic
with qwlib.load(sys.argv[1], "bf16") as lm:
    ids, took = torch.randint(5, 1000, (1, 128)), {}
    for _ in range(3):
        for rows in (10**9, arithmetic.ROWS):
            arithmetic.ROWS = rows
            began = time.perf_counter()
            lm.logits(ids, last=1)
            took.setdefault(rows, []).append(time.perf_counter() - began)
    print(lm.arithmetic, min(took[10**9]) / min(took[arithmetic.ROWS]))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU would be used")
def test_a_processor_with_avx2_alone_reads_much_faster_so(shallow):
    """Both ways in one process, in turn: how many times as fast a prompt is read in float32."""
    slow = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
    call = [sys.executable, "-c", SLOW, str(shallow)]
    done = subprocess.run(call, capture_output=True, text=True, env=os.environ | slow, check=True)
    dtype, faster = done.stdout.split()
    assert dtype == "torch.float32"
    assert float(faster) > 1.5
