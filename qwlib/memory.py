"""Bytes: predicted from shapes before anything is loaded, and measured from the tensors after.

`estimate` builds the model on PyTorch's meta device (shapes without data) from its configuration, lays the scheme's plan
over it, and counts. The key-value cache is counted the same way: a forward pass on the meta device makes the very cache
that generation would make, so sliding windows and grouped heads need no formula of their own.

What it leaves out: activations and workspace (they depend on the attention kernel), the allocator's rounding, and the
CUDA context. GB means 10⁹ bytes.

How it differs from transformers' `get_memory_footprint`: that counts parameters and buffers only and leaves out the
quantization state (the scales): of the 4.5 bits that a weight takes in NF4, half a bit.
"""

import contextlib
import ctypes
import gc
import math
import os
from dataclasses import dataclass
from pathlib import Path

from . import catalog, hub, schemes
from .schemes import BLOCK, NESTED_BLOCK

GB = 1e9
_ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Estimate:
    """Bytes that a model will take under a scheme.

    `weights_bytes`: parameters and buffers; `state_bytes`: scales and code books; `kv_bytes`: the key-value cache of
    `batch` sequences of `context` tokens; `read_bytes`: what one decoding step reads of weights and state.
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


def stored_bytes(shape, fmt: str) -> tuple[int, int]:
    """(weight bytes, state bytes) of one weight of that shape (output rows first) under a format of `schemes.BITS`.

    State is what bitsandbytes 0.50 keeps beside the codes: a float32 scale a block (or 8-bit scales with float32 scales
    of their own, a 256-entry map and an offset), a 16-entry code book; for int8 a float32 scale a row.
    """
    n = math.prod(shape)
    if fmt in _ELEMENT_BYTES:
        return n * _ELEMENT_BYTES[fmt], 0
    if fmt == "int8":
        return n, 4 * (n // shape[-1])
    blocks = math.ceil(n / BLOCK)
    codebook = 16 * 4
    if fmt.endswith("-dq"):
        return math.ceil(n / 2), blocks + 4 * math.ceil(blocks / NESTED_BLOCK) + 256 * 4 + 4 + codebook
    return math.ceil(n / 2), 4 * blocks + codebook


def meta_model(row: catalog.Model, base: str = "bf16"):
    """The model's modules with shapes and without data, built from its configuration; `base` is fp32, bf16 or fp16."""
    import torch
    from transformers import AutoModelForCausalLM

    config = row.config()
    if hasattr(config, "quantization_config"):  # a folder that was saved quantized: only its shapes are wanted
        del config.quantization_config
    # eager attention: the mask of other kinds looks at values (transformers 5.17), and here are none
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[base]
    with torch.device("meta"), hub.explained(row):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="eager").eval()


def estimate(model: str, scheme: str = "bf16", *, batch: int = 1, context: int = 2048) -> Estimate:
    """Bytes of weights, quantization state and key-value cache, from shapes alone; nothing is downloaded for a catalog row.

    Raises QwlibError for an unknown model or scheme.
    """
    row, scheme = catalog.find(model), schemes.find(scheme)
    shapes = meta_model(row, scheme.base)
    formats = schemes.plan(shapes, scheme)
    weights = state = read = parameters = 0
    embedding, head = shapes.get_input_embeddings(), shapes.get_output_embeddings()
    tied = head is not None and head.weight is embedding.weight
    for name, module in shapes.named_modules():
        for leaf, tensor in module.named_parameters(recurse=False):
            if module is head and tied and leaf == "weight":
                continue
            parameters += tensor.numel()
            fmt = formats.get(name, scheme.base) if leaf == "weight" else scheme.base
            shape = tensor.shape if type(module).__name__ != "Conv1D" else tensor.shape[::-1]
            w, s = stored_bytes(shape, fmt)
            weights, state = weights + w, state + s
            if module is not embedding or tied:
                read += w + s
        weights += sum(b.numel() * b.element_size() for b in module.buffers(recurse=False))
    kv = batch * _cache_bytes(shapes, context)
    per_token = _cache_bytes(shapes, 1)
    return Estimate(row.name, scheme.name, parameters, weights, state, kv, per_token, read, batch, context)


def _cache_bytes(shapes, tokens: int) -> int:
    import torch

    ids = torch.zeros(1, tokens, dtype=torch.long, device="meta")
    with torch.inference_mode():
        out = shapes(ids, use_cache=True)
    cache = getattr(out, "past_key_values", None) or getattr(out, "cache_params", None)
    held = [vars(layer).values() for layer in getattr(cache, "layers", [])]
    tensors = [t for values in held for t in values if isinstance(t, torch.Tensor) and t.is_floating_point()]
    return sum(t.nbytes for t in tensors)


def measure(model) -> dict[str, int]:
    """`weights_bytes` and `state_bytes` of a loaded model: every tensor storage once, however many names share it."""
    weights, state = {}, {}

    def add(where, tensor):
        if tensor is not None and tensor.device.type != "meta":
            where[_pointer(tensor)] = tensor.untyped_storage().nbytes()

    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for _, tensor in tensors:
        add(weights, tensor)
    for _, tensor in tensors:
        for part in _state_tensors(tensor):
            add(state, part)
    for module in model.modules():
        if hasattr(module, "state"):  # Linear8bitLt moves its scales here at the first forward
            add(state, getattr(module.state, "SCB", None))
    return {"weights_bytes": sum(weights.values()), "state_bytes": sum(n for p, n in state.items() if p not in weights)}


def own(model) -> None:
    """Copy whatever lies in the mapped checkpoint file, so that resident memory on a CPU says what the model takes."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
        if getattr(parameter, "CB", None) is not None:
            parameter.CB, parameter.SCB = parameter.data, parameter.SCB.clone()
        outer = getattr(parameter, "quant_state", None)
        for level in (outer, getattr(outer, "state2", None)):
            if level is not None:
                level.absmax, level.code = level.absmax.clone(), level.code.clone()


def read_bytes(model) -> int:
    """What one decoding step reads: all weights and state, but of an untied embedding only a row, counted as nothing."""
    total = sum(measure(model).values())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = head is not None and _pointer(head.weight) == _pointer(embedding.weight)
    return total if shared else total - sum(measure(embedding).values())


def _pointer(tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _state_tensors(parameter):
    yield getattr(parameter, "SCB", None)
    outer = getattr(parameter, "quant_state", None)
    for level in (outer, getattr(outer, "state2", None)):
        if level is not None:
            yield from (level.absmax, level.code, level.offset)


# the process and the device


def rss_bytes() -> int:
    """Resident memory of this process."""
    import psutil

    return psutil.Process().memory_info().rss


def reset_peak(device) -> bool:
    """Start the peak meter again: the allocator's on a GPU, the kernel's high-water mark (Linux) on a CPU."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # Linux, proc_pid_clear_refs(5): resets VmHWM
    except OSError:
        return False
    return True


def peak_bytes(device) -> int | None:
    """Highest use since `reset_peak`: allocated bytes on a GPU, resident bytes on a CPU, None where no meter exists."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return None


def used_bytes(device) -> int:
    """Bytes in use now: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device)
    return rss_bytes()


def free_bytes(device) -> int:
    """Bytes that a load may take: free on the GPU, available on the host."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # a container's own limit: cgroup v2, "max" where there is none
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        held = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        free = min(free, limit - int(held["anon"]))
    return free


def give_back() -> None:
    """Collect garbage, empty CUDA's cache, and return the C library's free pages to the system."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if os.name == "posix":
        with contextlib.suppress(OSError, AttributeError):  # only glibc has malloc_trim
            ctypes.CDLL("libc.so.6").malloc_trim(0)
