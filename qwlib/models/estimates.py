"""Bytes predicted from shapes, before anything is loaded.

`estimate` builds the model on PyTorch's meta device (shapes without data) from its configuration, lays the scheme's plan
over it, and counts. The key-value cache is counted the same way: a forward pass on the meta device makes the very cache
that generation would make, so sliding windows and grouped heads need no formula of their own.

What it leaves out: activations and workspace (they depend on the attention kernel), the allocator's rounding, and the
CUDA context. GB means 10⁹ bytes.
"""

import copy
import math
from dataclasses import dataclass
from pathlib import Path

from .. import schemes
from ..errors import QwlibError, whole_number
from ..schemes import BLOCK, NESTED_BLOCK
from . import adapters, catalog, hub, limits

_ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Estimate:
    """Bytes that a model will take under a scheme.

    `weights_bytes`: parameters and buffers, and those of an adapter; `state_bytes`: scales and code books; `kv_bytes`: the
    key-value cache of `batch` sequences of `context` tokens; `read_bytes`: what one decoding step reads of weights and state.
    """

    model: str
    scheme: str
    parameters: int
    weights_bytes: int
    state_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    read_bytes: int
    batch: int
    context: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.state_bytes + self.kv_bytes

    @property
    def held_bits(self) -> float:
        """Bits that a parameter takes on average: what a scheme leaves in 16 bits, scales and buffers included."""
        return 8 * (self.weights_bytes + self.state_bytes) / self.parameters


def stored_bytes(shape, fmt: str) -> tuple[int, int]:
    """(weight bytes, state bytes) of one weight of that shape (output rows first) under a format (see `schemes.bits`).

    State is what bitsandbytes 0.50 keeps beside the codes: a float32 scale a block (or 8-bit scales with float32 scales
    of their own, a 256-entry map and an offset), a 16-entry code book; for int8 a float32 scale a row. Formats of other
    backends count as weights, scales and all, by their nominal bits: their files can hold more.
    """
    n = math.prod(shape)
    if fmt in _ELEMENT_BYTES:
        return n * _ELEMENT_BYTES[fmt], 0
    if fmt == "int8":
        return n, 4 * (n // shape[-1])
    if not fmt.startswith(("nf4", "fp4")):
        return math.ceil(n * schemes.bits(fmt) / 8), 0
    blocks = math.ceil(n / BLOCK)
    codebook = 16 * 4
    if fmt.endswith("-dq"):
        return math.ceil(n / 2), blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + 256 * 4 + 4 + codebook
    return math.ceil(n / 2), 4 * blocks + codebook


@catalog.once
def meta_model(row: catalog.Model, base: str = "bf16"):
    """The model's modules with shapes and without data, built from its configuration; `base` is fp32, bf16 or fp16."""
    import torch
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(row.config())
    if hasattr(config, "quantization_config"):  # a folder that was saved quantized: only its shapes are wanted
        del config.quantization_config
    # eager attention: the mask of other kinds looks at values (transformers 5.17), and here are none
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[base]
    with torch.device("meta"), hub.explained(row):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()


CONTEXT = 2048  # tokens of a cache, where nobody says how many


def estimate(model: str, scheme: str = "bf16", *, batch: int = 1, context: int | None = None) -> Estimate:
    """Bytes of weights, quantization state and key-value cache, from shapes alone; nothing is downloaded for a catalog row.

    `context`: tokens that the cache holds, else `CONTEXT`, or as many as the model has positions.

    Raises QwlibError for an unknown model or scheme, for a longer context than the model has positions, and for a cache that
    can't be predicted.
    """
    row, scheme = catalog.find(model), schemes.find(scheme)
    batch, most = whole_number(batch, "batch"), limits.positions(row.config())
    context = min(CONTEXT, most or CONTEXT) if context is None else whole_number(context, "context")
    if most and context > most:
        raise QwlibError(f"a context of {context} tokens is more than the {most} positions of {row.name}")
    weights = state = read = parameters = 0
    for part, numel, w, s in _stored(meta_model(row, scheme.base), scheme):
        parameters, weights, state = parameters + numel, weights + w, state + s
        read += 0 if part in ("embedding", "buffers") else w + s
    weights, read = (held + adapter_bytes(row, scheme.base) for held in (weights, read))
    kv = batch * _cache_bytes(row, scheme.base, context)
    per_token = _cache_bytes(row, scheme.base, 1)
    return Estimate(row.name, scheme.name, parameters, weights, state, kv, per_token, read, batch, context)


def held_bytes(model: str, scheme: str = "bf16") -> int:
    """Bytes of weights, adapter and state alone: those that loading needs, also of a model whose cache can't be predicted.

    Raises QwlibError for an unknown model or scheme.
    """
    row, scheme = catalog.find(model), schemes.find(scheme)
    stored = sum(weights + state for _, _, weights, state in _stored(meta_model(row, scheme.base), scheme))
    return stored + adapter_bytes(row, scheme.base)


def adapter_bytes(row: catalog.Model, base: str) -> int:
    """What a model's adapter adds to its weights: 0 without one, and for one on the Hub whose rank is not known here."""
    from safetensors import safe_open

    if not row.adapter:
        return 0
    there = Path(row.adapter.source)
    if there.is_dir():
        with safe_open(there / (adapters.folder(row) or "") / adapters.WEIGHTS, "pt") as file:
            numbers = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    else:
        numbers = (row.adapter.rank or 0) * sum(map(sum, linear_shapes(row)))
    return numbers * _ELEMENT_BYTES[base]


def outside(model: str) -> float:
    """Share of the parameters that no scheme quantizes, because they lie in no linear layer: the experts of many mixtures are one
    tensor a layer. Embedding and head are not meant.

    Raises QwlibError for an unknown model.
    """
    counted = {"other": 0}
    for part, numel, _, _ in _stored(meta_model(catalog.find(model)), schemes.find("nf4")):
        counted[part] = counted.get(part, 0) + numel
    return counted["other"] / sum(counted.values())


def linear_shapes(model: str) -> list[tuple[int, int]]:
    """(outputs, inputs) of every linear layer but the output head: those that schemes quantize and adapters are put over.

    Raises QwlibError for an unknown model.
    """
    shapes = meta_model(catalog.find(model))
    plan = schemes.plan(shapes, schemes.find("nf4"))
    return [tuple(shapes.get_submodule(name).weight.shape) for name, fmt in plan.items() if fmt == "nf4"]


def breakdown(model: str, scheme: str = "bf16") -> dict[str, int]:
    """Bytes by part: `linear layers`, `embedding`, `head`, `embedding and head` where they are one tensor, `other` (norms,
    biases, positions, buffers), and `scales and code books` of all of them. Together they are `estimate`'s weights and state.

    Raises QwlibError for an unknown model or scheme.
    """
    row, scheme = catalog.find(model), schemes.find(scheme)
    names = {"linear": "linear layers", "ends": "embedding and head", "buffers": "other"}
    parts = {}
    for part, _, weights, state in _stored(meta_model(row, scheme.base), scheme):
        name = names.get(part, part)
        parts[name] = parts.get(name, 0) + weights
        parts["scales and code books"] = parts.get("scales and code books", 0) + state
    return parts


def _stored(shapes, scheme):
    """(part, elements, weight bytes, state bytes) of every parameter of a meta-device model, and of its buffers (0 elements).

    Parts: linear, embedding, head, ends (embedding and head in one tensor, which comes once), other, buffers.
    """
    formats = schemes.plan(shapes, scheme)
    embedding, head = shapes.get_input_embeddings(), shapes.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    for name, module in shapes.named_modules():
        for leaf, tensor in module.named_parameters(recurse=False):
            if module is head and tied and leaf == "weight":
                continue
            shape = tensor.shape if type(module).__name__ != "Conv1D" else tensor.shape[::-1]
            fmt = formats.get(name, scheme.base) if leaf == "weight" else scheme.base
            part = "other" if leaf != "weight" or name not in formats else "linear"
            if module is embedding:
                part = "ends" if tied else "embedding"
            elif module is head:
                part = "head"
            yield part, tensor.numel(), *stored_bytes(shape, fmt)
        yield "buffers", 0, sum(b.numel() * b.element_size() for b in module.buffers(recurse=False)), 0


@catalog.once
def _cache_bytes(row: catalog.Model, base: str, tokens: int) -> int:
    import torch

    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    model = meta_model(row, base)
    with torch.inference_mode():
        try:
            try:
                out = model(ids, use_cache=True)
            except RuntimeError:
                # GPT-2's kind looks for padding where there is no mask, LFM2 looks into a mask; here are no values to find
                out = model(ids, attention_mask=torch.ones_like(ids), use_cache=True)
        except Exception as error:  # code that looks at values, or at a layer that so small a model has not
            why = f"the cache of {row.name} can't be predicted from shapes ({hub.point(error)[:100]})"
            raise QwlibError(f"{why}: load the model, and look at lm.memory") from None
    cache = getattr(out, "past_key_values", None) or getattr(out, "cache_params", None)
    held = [vars(layer).values() for layer in getattr(cache, "layers", [])]
    tensors = [t for values in held for t in values if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return sum(t.nbytes for t in tensors)
