"""The embedding and the output head as bitsandbytes stores a 4-bit or 8-bit weight, which it does for linear layers alone.

They are quantized some rows at a time, so that a GPU never holds them in 16 bits. `StoredEmbedding` dequantizes the rows that are
asked for; a tied head shares the codes with it.
"""

import contextlib
import copy
from collections.abc import Iterator

import bitsandbytes as bnb
import torch
from torch import nn

from .. import schemes
from ..errors import QwlibError
from ..machine import memory

SLICE = 1 << 22  # weights of an embedding or a head that are quantized at a time: 8 MB in 16 bits


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
            rows = self.weight.data[ids] * int8_steps(self.weight)[ids].unsqueeze(-1)
        else:
            rows = dequantize_rows(self.weight.data, self.weight.quant_state, ids)
        rows = rows.to(self.dtype)
        return rows if self.scale is None else rows * self.scale.to(self.dtype)

    left_out = False  # of the model's state, see `left_out`

    def _save_to_state_dict(self, *_):
        # bitsandbytes can't save its own quantized embeddings either; without this the scales would be lost silently
        if not self.left_out:
            raise NotImplementedError("a quantized embedding can't be saved: save the model as nf4-dq, or in 16-bit")


@contextlib.contextmanager
def left_out() -> Iterator[None]:
    """Within it, the state of a model lacks its quantized embedding. peft goes through the state to load and save adapters."""
    StoredEmbedding.left_out = True
    try:
        yield
    finally:
        StoredEmbedding.left_out = False


class StoredHead(nn.Module):
    """A head in 8 bits on a GPU: codes times inputs in the inputs' type, some rows at a time, then every row's scale.

    Its inputs stay as they are; LLM.int8() looks for outliers among them on the host at every step, which no graph can.
    """

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.out_features, self.in_features = weight.shape

    def forward(self, x):
        rows = max(1, 4 * SLICE // self.in_features)
        parts = [nn.functional.linear(x, codes.to(x.dtype)) for codes in self.weight.data.split(rows)]
        out = (torch.cat(parts, -1) * int8_steps(self.weight)).to(x.dtype)
        return out if self.bias is None else out + self.bias


def int8_steps(weight):
    """What one step of a row's 8-bit codes stands for, (rows,) in float32: a 127th of the row's absolute maximum.

    Source: LLM.int8(), arXiv 2208.07339, section 2.
    """
    return weight.SCB / 127


def store_ends(model, embedding_fmt: str, head_fmt: str, dtype, device) -> None:
    """Replace the input embedding and the output head of a loaded model by quantized ones on `device`; a tied pair stays tied.

    Raises QwlibError where the embedding does more than look rows up and scale them, or a tied pair is asked to differ.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is not None and memory.pointer(head.weight) == memory.pointer(embedding.weight)  # maybe by two names
    scale = getattr(embedding, "embed_scale", None)
    if type(embedding) is not nn.Embedding and not isinstance(scale, torch.Tensor):
        raise QwlibError(f"{type(embedding).__name__} does more than look rows up: choose nf4-dq for this model")
    if tied and embedding_fmt != head_fmt:
        raise QwlibError("embedding and head are one tensor in this model: choose a scheme that stores them alike")
    names = {id(module): name for name, module in model.named_modules()}
    scale = None if scale is None else scale.to(device)
    weight = store(embedding.weight, embedding_fmt, device)
    model.set_submodule(names[id(embedding)], StoredEmbedding(weight, dtype, scale).eval())
    if head is not None:
        weight = _twin(weight) if tied else store(head.weight, head_fmt, device)
        model.set_submodule(names[id(head)], _head(weight, head, dtype))


def _is_int8(weight) -> bool:
    return isinstance(weight, bnb.nn.Int8Params)


def store(weight, fmt: str, device):
    """`Params4bit` or `Int8Params` on `device` of a weight (rows × columns) that may lie elsewhere.

    Some rows go there at a time, whole blocks of scales each; the bytes are those of quantizing it at once.
    """
    weight, (rows, columns) = weight.data, weight.shape
    step = max(1, SLICE // columns // schemes.BLOCK) * schemes.BLOCK
    starts = range(0, rows, step)
    if fmt == "int8":
        codes = torch.empty(rows, columns, dtype=torch.int8, device=device)
        scales = torch.empty(rows, device=device)
        for at in starts:  # in fp16, as bitsandbytes' own Int8Params does it
            part = weight[at : at + step].to(device, torch.float16)
            codes[at : at + step], scales[at : at + step], _ = bnb.functional.int8_vectorwise_quant(part)
        return bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)
    kind, nested = fmt.removesuffix("-dq"), fmt.endswith("-dq")
    codes = torch.empty(-(-weight.numel() // 2), 1, dtype=torch.uint8, device=device)
    scales = torch.empty(-(-weight.numel() // schemes.BLOCK), device=device)
    for at in starts:
        packed, state = bnb.functional.quantize_4bit(weight[at : at + step].to(device), quant_type=kind)
        codes[at * columns // 2 :][: len(packed)] = packed
        scales[at * columns // schemes.BLOCK :][: len(state.absmax)] = state.absmax
    state.shape, state.absmax = weight.shape, scales
    if nested:  # the scales, less their mean, in 8 bits: QLoRA, arXiv 2305.14314, section 3
        state.nested, state.offset = True, scales.mean()
        state.absmax, state.state2 = bnb.functional.quantize_blockwise(
            scales - state.offset, blocksize=schemes.NESTED_BLOCK
        )
    settings = {"quant_type": kind, "compress_statistics": nested, "bnb_quantized": True}
    return bnb.nn.Params4bit(codes, requires_grad=False, quant_state=state, **settings)


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
    bias = None if old.bias is None else nn.Parameter(old.bias.to(weight.device), requires_grad=False)
    if _is_int8(weight) and weight.device.type == "cuda":
        return StoredHead(weight, bias).eval()
    shape = (old.in_features, old.out_features, bias is not None)
    with torch.device("meta"):
        if _is_int8(weight):
            new = bnb.nn.Linear8bitLt(*shape, has_fp16_weights=False, threshold=6.0)
        else:
            new = bnb.nn.Linear4bit(*shape, compute_dtype=dtype)
    new.weight, new.bias = weight, bias
    return new.requires_grad_(False).eval()  # in training mode bitsandbytes takes a slower path
