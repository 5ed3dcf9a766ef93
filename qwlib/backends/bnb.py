"""bitsandbytes: the configuration that transformers takes, and ways around what bitsandbytes 0.50.2 gets wrong.

transformers replaces the linear layers while it loads. What is left for this file is the one call that multiplies by a 4-bit
weight on a GPU (`multiply`), the type that products are calculated in on a CPU, and these faults, each of which a test in
`tests/backends/test_bnb.py` watches (the second in `tests/lessons/test_fourbit.py`):

1. `Embedding4bit` with double quantization pairs a row's 8-bit scales with the second-level scales of other rows.
   `bnb_ends.StoredEmbedding` gathers both by the row's own block numbers.
2. On a CPU with AVX512-BF16, dequantizing is wrong where a block crosses a row, and packing demands rows of whole
   blocks and a multiple of 32 outputs. Such layers become `AnyShapeLinear4bit`, which follows the definition:
   right for every shape, and slower.
3. The first forward on a CPU repacks the weights in place. A tied embedding must not see that, so it shares the codes
   with the head but has a parameter and a quantization state of its own.
"""

import bitsandbytes as bnb
import torch
from torch import nn

from .. import schemes
from ..errors import QwlibError
from ..machine import arithmetic, processor
from ..models import estimates
from . import bnb_ends, hf


def fill(lm, source: str) -> None:
    """Load what `source` holds, quantized while it is loaded if it is not quantized yet."""
    if lm.saved:
        hf.read(lm, source)
    else:
        shapes = estimates.meta_model(lm.row)
        names = {id(module): name for name, module in shapes.named_modules()}
        embedding, head = shapes.get_input_embeddings(), shapes.get_output_embeddings()
        keep = [names[id(head)]] if id(head) in names else []
        wait = [names[id(embedding)], *keep] if _stores_ends(lm.scheme) else []
        settings = config(lm.scheme.linear, lm.dtype, keep)
        settings.llm_int8_enable_fp32_cpu_offload = bool(
            wait
        )  # else transformers refuses that a part waits on the host
        hf.read(lm, source, settings, hf.placed(shapes, lm.device, wait))
    finish(lm.model, lm.scheme, lm.dtype, lm.device)
    if not lm.saved:
        as_planned(lm, shapes)
    with bnb_ends.left_out():  # an adapter is loaded in it
        hf.finish(lm)
    lm.engine.kernel = choose_kernel(lm.model, lm.dtype, lm.kernel)
    if lm.arithmetic == torch.float32:
        multiply_in_float32(lm.model)


def as_planned(lm, shapes) -> None:
    """Raises QwlibError where a layer does not hold the bytes that the scheme plans for it.

    transformers replaces layers of the classes that it knows, and passes over others (Falcon's own linear layer) without a word.
    """
    plan = schemes.plan(shapes, lm.scheme)
    wanted = {n: estimates.stored_bytes(shapes.get_submodule(n).weight.shape, fmt)[0] for n, fmt in plan.items()}
    held = {name: getattr(getattr(module, "weight", None), "nbytes", None) for name, module in lm.model.named_modules()}
    if wrong := [name for name in wanted if held.get(name) != wanted[name]]:
        kind = type(lm.model.get_submodule(wrong[0])).__name__ if wrong[0] in held else "missing"
        raise QwlibError(
            f"{lm.row.name} can't be held in {lm.scheme.name}: {len(wrong)} of {len(plan)} layers are not quantized as planned, "
            f"{wrong[0]} ({kind}) first; load it in bf16"
        )


def _stores_ends(scheme) -> bool:
    return scheme.embedding != scheme.base


def config(fmt: str, dtype, keep: list[str]):
    """transformers' quantization configuration for linear layers stored as `fmt`; modules named in `keep` stay as they are."""
    from transformers import BitsAndBytesConfig

    if fmt == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=keep)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=fmt.removesuffix("-dq"),
        bnb_4bit_use_double_quant=fmt.endswith("-dq"),
        bnb_4bit_compute_dtype=dtype,  # the default is float32: slow, and nothing says so
        llm_int8_skip_modules=keep,
    )


def multiply(x, weight, bias=None):
    """x (… × columns) times a `Params4bit` (rows × columns) on a GPU, all in x's type, by bitsandbytes.

    It has a kernel of its own for few rows of x, and dequantizes the weight first for more.
    """
    return bnb.matmul_4bit(x, weight, bias=bias, quant_state=weight.quant_state)


class GpuLinear4bit(bnb.nn.Linear4bit):
    """A 4-bit linear layer on a GPU that goes through `multiply`."""

    def forward(self, x):
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return multiply(x.to(self.compute_dtype), self.weight, bias).to(x.dtype)


def choose_kernel(model, dtype, kernel: str | None = None) -> str:
    """Let 4-bit layers on a GPU be multiplied by qwlib's kernels where they can be, unless `kernel` is "bitsandbytes".

    What multiplies comes back, with the reason where a layer can't be; empty where there is no 4-bit layer on a GPU.

    Raises QwlibError where `kernel` is "qwlib" and no layer can be.
    """
    found = [module for module in model.modules() if isinstance(module, GpuLinear4bit)]
    if not found:
        if kernel == "qwlib":
            raise QwlibError("the model has no 4-bit layers on a GPU: load without kernel='qwlib'")
        return ""
    if kernel == "bitsandbytes":
        return "4-bit layers by bitsandbytes, asked for"
    from ..kernels import layers  # on a GPU alone

    reasons = layers.take(model, found, dtype)
    refused = sum(reasons.values())
    if kernel == "qwlib" and refused == len(found):
        raise QwlibError(f"{next(iter(reasons))}: load without kernel='qwlib'")
    told = ["4-bit layers by qwlib's kernels"] if refused < len(found) else []
    return ", ".join([*told, *(f"{count} by bitsandbytes ({why})" for why, count in reasons.items())])


class AnyShapeLinear4bit(bnb.nn.Linear4bit):
    """A 4-bit linear layer that dequantizes its whole weight by the definition, then multiplies."""

    def forward(self, x):
        rows = torch.arange(self.out_features, device=x.device)
        weight = bnb_ends.dequantize_rows(self.weight.data, self.weight.quant_state, rows).to(x.dtype)
        return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


def finish(model, scheme, dtype, device) -> None:
    """What is left to do once transformers has loaded and quantized the linear layers of `model`."""
    with torch.no_grad():
        if _stores_ends(scheme):
            bnb_ends.store_ends(model, scheme.embedding, scheme.head, dtype, device)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = dtype  # a 4-bit folder brings the type of the machine that saved it
    mend(model)


class Float32Linear4bit(bnb.nn.Linear4bit):
    """A 4-bit linear layer on a CPU without products of 16 bits: several rows in float32, few in what is faster."""

    def forward(self, x):
        several = x.shape[:-1].numel() >= arithmetic.ROWS
        self.compute_dtype = torch.float32 if several or few_rows_in_float32() else x.dtype
        return super().forward(x)


def few_rows_in_float32() -> bool:
    """Whether one row times a 4-bit layer is faster in float32 than in bfloat16: where bitsandbytes' loops have AVX2 alone.

    Without its kernel for AVX512-BF16, bitsandbytes dequantizes the layer for every product, which is most of the time that a
    token takes. With AVX512 it writes bfloat16 as fast as float32; with AVX2 it rounds numbers one by one, and float32 takes half
    the time (docs/measured.md). A rule and no measurement, because scores of one row have to be the same in every process.
    """
    return processor.capability() == "AVX2" and not bnb.functional.has_avx512bf16()


def multiply_in_float32(model) -> None:
    """Make the 4-bit layers of `model` `Float32Linear4bit`. Modules keep their names and weights, and files their 16-bit type."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = (
                False  # that kernel is chosen by the processor, whatever PyTorch may use of it
            )
        if type(module) is bnb.nn.Linear4bit:
            module.__class__ = Float32Linear4bit


def mend(model) -> int:
    """Give every 4-bit layer whose shape the CPU kernels get wrong a forward that is right; how many there were.

    On a GPU all get one that goes through `multiply`, and none counts.
    """
    mended = 0
    for module in model.modules():
        if type(module) is not bnb.nn.Linear4bit:
            continue
        if module.weight.device.type == "cuda":
            module.__class__ = GpuLinear4bit
        elif module.weight.device.type != "cpu":
            continue
        elif module.in_features % module.weight.blocksize or module.out_features % 32:
            module.__class__ = AnyShapeLinear4bit
            mended += 1
    return mended
