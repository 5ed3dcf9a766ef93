"""A model as it is trained, in shapes alone: on PyTorch's meta device, with the adapter that peft makes, and no data.

Two parts have no code for the meta device, and stand-ins take their places. They allocate and keep for the backward pass what the
real ones do: bitsandbytes' 4-bit and 8-bit layers, and PyTorch's attention kernel, which keeps its inputs, its output, and a
number for each row of scores, but no scores.

What it leaves out: embeddings in 4 or 8 bits are looked up as in 16 bits.
"""

import copy
from types import SimpleNamespace

import bitsandbytes as bnb
import torch
from torch import nn
from torch.nn.functional import linear

from .. import schemes
from ..models import catalog, estimates
from .adapting import adapted
from .settings import Settings

ATTENTION = "qwlib-shapes"  # our name for `attention` among transformers' kinds


def model_of(row: catalog.Model, scheme: schemes.Scheme, how: Settings, gpu: bool):
    """(model on the meta device, as it is trained; its output head within it).

    Raises QwlibError for a target that the model has not.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, attention)
    model = copy.deepcopy(estimates.meta_model(row, scheme.base))
    if model._supports_sdpa:
        model.set_attn_implementation(ATTENTION)
    replace(model, scheme, gpu)
    head = model.get_output_embeddings()
    with torch.random.fork_rng(devices=[]):
        model = adapted(SimpleNamespace(model=model, device=torch.device("meta")), how)
    if how.recompute:
        # transformers 5.23 calls it so
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False, "preserve_rng_state": False})
    return model.train(), head


def replace(model, scheme: schemes.Scheme, gpu: bool) -> None:
    """Put stand-ins where `scheme` has bitsandbytes' layers."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for name, fmt in schemes.plan(model, scheme).items():
        old = model.get_submodule(name)
        if fmt == scheme.base or old is embedding:
            continue
        # transformers' Conv1D has its weight the other way round
        outputs, inputs = old.weight.shape if isinstance(old, nn.Linear) else old.weight.shape[::-1]
        with torch.device("meta"):
            new = (EightBits if fmt == "int8" else FourBits)(inputs, outputs, old.bias is not None)
        new.weight = nn.Parameter(old.weight.new_empty(outputs, inputs), requires_grad=False)
        new.weight.quant_type, new.weight.compress_statistics = "nf4", True  # peft asks for them
        new.bias = old.bias
        # bnb_ends.StoredHead multiplies by a plain tensor of the codes, and so does bnb.AnyShapeLinear4bit on a CPU
        odd = fmt != "int8" and not gpu and (inputs % schemes.BLOCK or outputs % 32)
        new.keeps_weight = bool(odd or (fmt == "int8" and gpu and old is head))
        model.set_submodule(name, new)
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        setattr(model, flag, scheme.backend == "bitsandbytes" and (scheme.linear == "int8") == flag.endswith("8bit"))


class Product(torch.autograd.Function):
    """An input (… × columns) times a frozen weight, which is dequantized in the forward pass and again in the backward pass.

    bitsandbytes' function for 8 bits keeps its input for the backward pass, the one for 4 bits does not.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, keeps_input: bool):
        ctx.weight, ctx.kept = weight, x if keeps_input and ctx.needs_input_grad[0] else None
        return linear(x, torch.empty_like(weight, dtype=x.dtype), bias)

    @staticmethod
    def backward(ctx, gradient):
        return gradient @ torch.empty_like(ctx.weight, dtype=gradient.dtype), None, None, None


def _multiplied(layer, x, keeps_input: bool):
    if layer.keeps_weight:
        return linear(x, torch.empty_like(layer.weight, dtype=x.dtype), layer.bias)
    return Product.apply(x, layer.weight, layer.bias, keeps_input)


class FourBits(bnb.nn.Linear4bit):
    """The stand-in of a 4-bit layer. Its `weight` has the shape and type of the dequantized one."""

    def forward(self, x):
        return _multiplied(self, x, False)


class EightBits(bnb.nn.Linear8bitLt):
    """The stand-in of an 8-bit layer."""

    def __init__(self, inputs: int, outputs: int, bias: bool):
        super().__init__(inputs, outputs, bias, has_fp16_weights=False, threshold=6.0)

    def forward(self, x):
        return _multiplied(self, x, True)


def attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **_):
    """What PyTorch's flash attention gives and keeps: (output, None), the output as batch × tokens × heads × dimensions.

    With fewer queries than keys there is a mask. Then transformers repeats keys and values for every head that shares them.
    """
    whole = query.shape[2] == key.shape[2]
    if not whole:
        groups = getattr(module, "num_key_value_groups", 1)
        key, value = (each.repeat_interleave(groups, 1) if groups > 1 else each for each in (key, value))
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out = flash(query, key, value, dropout, whole, scale=scaling)[0]
    return out.transpose(1, 2).contiguous(), None
