"""bitsandbytes: the configuration that transformers takes, and ways around what bitsandbytes 0.50.2 gets wrong.

transformers replaces the linear layers while it loads. What is left for this file is the embedding and the head (for
schemes that store them too), and these faults, each of which a test in `tests/test_bnb.py` watches (the
second in `tests/test_fourbit.py`):

1. `Embedding4bit` with double quantization pairs a row's 8-bit scales with the second-level scales of other rows.
   `StoredEmbedding` gathers both by the row's own block numbers.
2. On a CPU with AVX512-BF16, dequantizing is wrong where a block crosses a row, and packing demands rows of whole
   blocks and a multiple of 32 outputs. Such layers become `AnyShapeLinear4bit`, which follows the definition:
   right for every shape, and slower.
3. The first forward on a CPU repacks the weights in place. A tied embedding must not see that, so it shares the codes
   with the head but has a parameter and a quantization state of its own.
"""

import copy

import bitsandbytes as bnb
import torch
from torch import nn

from .. import estimates, schemes
from ..errors import QwlibError
from . import hf


def fill(lm, source: str) -> None:
    """Load what `source` holds, quantized while it is loaded if it is not quantized yet."""
    hf.read(lm, source, None if lm.saved else _wanted(lm))
    finish(lm.model, lm.scheme, lm.dtype)
    hf.finish(lm)


def _wanted(lm):
    shapes = estimates.meta_model(lm.row)
    formats = schemes.plan(shapes, lm.scheme)
    head = shapes.get_output_embeddings()
    return config(
        lm.scheme.linear,
        lm.dtype,
        [name for name, module in shapes.named_modules() if name in formats and module is head],
    )


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


def dequantize_rows(packed, state, rows):
    """Rows of a 4-bit weight by the definition: code book entry × scale of the weight's block.

    `packed`: bytes of two codes, the first in the high half; `state`: bitsandbytes' `QuantState`; `rows`: integer tensor of
    any shape. Returns `(*rows.shape, columns)` in `state.dtype`. Right for rows of any length, for nested scales too.
    """
    columns = state.shape[-1]
    element = rows.unsqueeze(-1) * columns + torch.arange(columns, device=rows.device)
    pair = packed.reshape(-1).view(torch.uint8)[element >> 1]
    code = torch.where(element & 1 == 0, pair >> 4, pair & 15)
    block = element // state.blocksize
    scale = state.absmax[block]
    if state.nested:
        outer = state.state2
        scale = outer.code[scale.int()] * outer.absmax[block // outer.blocksize] + state.offset
    return (state.code[code.int()] * scale).to(state.dtype)


class StoredEmbedding(nn.Module):
    """An embedding kept as bitsandbytes stores a 4-bit or 8-bit weight, that dequantizes the rows asked for.

    `scale` multiplies them (Gemma's embeddings do), None leaves them alone.
    """

    def __init__(self, weight, dtype, scale=None):
        super().__init__()
        self.weight, self.dtype = weight, dtype
        self.num_embeddings, self.embedding_dim = weight.shape if _is_int8(weight) else weight.quant_state.shape
        self.register_buffer("scale", scale, persistent=False)

    def forward(self, ids):
        if _is_int8(self.weight):
            # Int8Params: a row's codes times its absolute maximum over 127 (LLM.int8(), arXiv 2208.07339)
            rows = self.weight.data[ids] * (self.weight.SCB[ids].unsqueeze(-1) / 127)
        else:
            rows = dequantize_rows(self.weight.data, self.weight.quant_state, ids)
        rows = rows.to(self.dtype)
        return rows if self.scale is None else rows * self.scale.to(self.dtype)

    def _save_to_state_dict(self, *_):
        # bitsandbytes can't save its own quantized embeddings either; without this the scales would be lost silently
        raise NotImplementedError("a quantized embedding can't be saved: save the model as nf4-dq, or in 16-bit")


class AnyShapeLinear4bit(bnb.nn.Linear4bit):
    """A 4-bit linear layer that dequantizes its whole weight by the definition, then multiplies."""

    def forward(self, x):
        rows = torch.arange(self.out_features, device=x.device)
        weight = dequantize_rows(self.weight.data, self.weight.quant_state, rows).to(x.dtype)
        return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


def finish(model, scheme, dtype) -> None:
    """What is left to do once transformers has loaded and quantized the linear layers of `model`."""
    with torch.no_grad():
        if scheme.embedding not in ("fp32", "bf16", "fp16"):
            store_ends(model, scheme.embedding, scheme.head, dtype)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.compute_dtype = (
                dtype  # a folder that was saved in 4-bit brings the type of the machine that saved it
            )
    mend(model)


def mend(model) -> int:
    """Give every 4-bit layer whose shape the CPU kernels get wrong a forward that is right; how many there were."""
    mended = 0
    for module in model.modules():
        if type(module) is not bnb.nn.Linear4bit or module.weight.device.type != "cpu":
            continue
        if module.in_features % module.weight.blocksize or module.out_features % 32:
            module.__class__ = AnyShapeLinear4bit
            mended += 1
    return mended


def store_ends(model, embedding_fmt: str, head_fmt: str, dtype) -> None:
    """Replace the input embedding and the output head of a loaded model by quantized ones; a tied pair stays tied.

    Raises QwlibError where the embedding does more than look rows up and scale them, or a tied pair is asked to differ.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    scale = getattr(embedding, "embed_scale", None)
    if type(embedding) is not nn.Embedding and not isinstance(scale, torch.Tensor):
        raise QwlibError(f"{type(embedding).__name__} does more than look rows up: choose nf4-dq for this model")
    if tied and embedding_fmt != head_fmt:
        raise QwlibError("embedding and head are one tensor in this model: choose a scheme that stores them alike")
    names = {id(module): name for name, module in model.named_modules()}
    weight = _store(embedding.weight, embedding_fmt)
    model.set_submodule(names[id(embedding)], StoredEmbedding(weight, dtype, scale).eval())
    if head is not None:
        weight = _twin(weight) if tied else _store(head.weight, head_fmt)
        model.set_submodule(names[id(head)], _head(weight, head, dtype))


def _is_int8(weight) -> bool:
    return isinstance(weight, bnb.nn.Int8Params)


def _store(weight, fmt: str):
    if fmt == "int8":  # Int8Params quantizes only on its way from the host to a device
        return bnb.nn.Int8Params(weight.data.cpu(), requires_grad=False, has_fp16_weights=False).to(weight.device)
    return bnb.nn.Params4bit(
        weight.data,
        requires_grad=False,
        quant_type=fmt.removesuffix("-dq"),
        compress_statistics=fmt.endswith("-dq"),
    ).to(weight.device)


def _twin(weight):
    """A second parameter on the same storage, whose quantization state can change without the first one's."""
    if _is_int8(weight):
        return bnb.nn.Int8Params(
            weight.data, requires_grad=False, has_fp16_weights=False, CB=weight.data, SCB=weight.SCB
        )
    twin = copy.copy(weight)
    twin.quant_state = copy.copy(weight.quant_state)
    return twin


def _head(weight, old, dtype):
    has_bias = old.bias is not None
    with torch.device("meta"):
        if _is_int8(weight):
            new = bnb.nn.Linear8bitLt(
                old.in_features, old.out_features, has_bias, has_fp16_weights=False, threshold=6.0
            )
        else:
            new = bnb.nn.Linear4bit(old.in_features, old.out_features, has_bias, compute_dtype=dtype)
    new.weight, new.bias = weight, old.bias
    return new.requires_grad_(False).eval()  # in training mode bitsandbytes takes a slower path
