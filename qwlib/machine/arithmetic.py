"""The arithmetic of products on a CPU: in the 16-bit type of the weights, or in float32 where the processor is faster so.

What weights are stored as is one thing, what their products are calculated in is another, and depends on the processor: one
with AVX512-BF16 or AMX multiplies bfloat16 by instructions of its own, one with AVX2 alone (most laptops, many Colab machines,
GitHub's runners) by a loop that is several times slower than float32. `choose` keeps bfloat16 where those instructions are. Else
it measures one product both ways, once a process, and says what it found.

Where float32 wins, `hook` lets a model calculate every product of several rows like this: the weight becomes float32 a slice at
a time, so that memory hardly grows, and the result goes back to the type that it would have had. Sums are float32 either way.
Products of one row stay as they are: a weight is read once for it, and half as many bytes are the faster. 4-bit layers have a
choice of their own, in `backends/bnb.py`: what is fast for one row depends on how fast they are dequantized.

What it leaves out: training. With gradients, products stay as they are. How it differs from autocast: that goes to a lower
precision, and converts whole weights, which it keeps.
"""

import functools
import threading
import time
from collections.abc import Callable

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from . import processor

ROWS = 16  # products of fewer rows stay in the type of the weights: benchmarks/arithmetic.py
SLICE = 1 << 19  # weights that are float32 at a time: 2 MB, which a processor's cache holds
TRIED = (128, 576, 1536)  # rows, columns, outputs of the product that is measured: a layer of a small model
NARROW = (torch.bfloat16, torch.float16)
PRODUCTS = {
    *(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__),
    *(torch.mm, torch.Tensor.mm, torch.bmm, torch.Tensor.bmm),
    *(torch.addmm, torch.Tensor.addmm, torch.baddbmm, torch.Tensor.baddbmm),
}


def choose(dtype, device) -> tuple[torch.dtype, str]:
    """(type that products of several rows are calculated in, why) for weights of `dtype` on `device`."""
    if device.type != "cpu" or dtype not in NARROW:
        return dtype, "the type of the weights"
    if dtype is torch.bfloat16 and processor.capability() in processor.BF16:
        return dtype, f"{processor.capability()} multiplies bfloat16 by instructions of its own"
    own, single = seconds(dtype)
    name = str(dtype).removeprefix("torch.")
    took = f"{TRIED[0]} rows took {1e3 * own:.2g} ms in {name}, {1e3 * single:.2g} in float32"
    return (torch.float32 if own > single else dtype), f"{processor.capability()}: {took}"


@functools.cache
def seconds(dtype) -> tuple[float, float]:
    """Seconds of one product, in `dtype` and in float32 with the conversion; the best of a few, measured once a process."""
    rows, columns, outputs = TRIED
    x, weight = torch.ones(rows, columns, dtype=dtype), torch.ones(outputs, columns, dtype=dtype)
    times: dict[Callable, list[float]] = {functional.linear: [], linear: []}
    with torch.inference_mode():
        for _ in range(6):  # in turn, so that a busy moment hits both; the first call of each also sets its kernel up
            for way, taken in times.items():
                began = time.perf_counter()
                way(x, weight)
                taken.append(time.perf_counter() - began)
    return min(times[functional.linear]), min(times[linear])


def linear(x, weight, bias=None):
    """x (… × columns) times a weight (outputs × columns), calculated in float32 a slice of outputs at a time; in x's type."""
    wide, (outputs, columns) = x.float(), weight.shape
    out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype)
    step = max(1, SLICE // columns)
    buffer = torch.empty(min(step, outputs), columns)
    for at in range(0, outputs, step):
        part = weight[at : at + step]
        some = None if bias is None else bias[at : at + step].float()
        out[..., at : at + step] = functional.linear(wide, buffer[: len(part)].copy_(part), some)
    return out


class Float32Products(TorchFunctionMode):
    """Within it, products of several rows of plain 16-bit tensors on the CPU are calculated in float32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is functional.linear and not kwargs:
            if all(map(_narrow, args[:2])) and args[0].shape[:-1].numel() >= ROWS:
                return linear(*args)
        elif function in PRODUCTS and "out" not in kwargs:
            given = [*args, *kwargs.values()]  # BLOOM names the factors of its product
            tensors = [each for each in given if isinstance(each, torch.Tensor)]
            if all(map(_narrow, tensors)) and tensors[-2].dim() > 1 and tensors[-2].shape[-2] >= ROWS:
                wide = [each.float() if isinstance(each, torch.Tensor) else each for each in given]
                named = dict(zip(kwargs, wide[len(args) :], strict=True))
                return function(*wide[: len(args)], **named).to(tensors[0].dtype)
        return function(*args, **kwargs)


def _narrow(tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.dtype in NARROW and tensor.is_cpu


def hook(model) -> Callable[[], None]:
    """Let a transformers model read several tokens under `Float32Products`; call what comes back to end that.

    Two forward hooks are all that changes: modules, their names, weights and bytes stay as they are.
    """
    entered = threading.local()  # the modes of this thread's calls that have not returned yet

    def enter(_, args, kwargs) -> None:
        if torch.compiler.is_compiling():
            return
        read = args[0] if args else kwargs.get("input_ids")
        read = kwargs.get("inputs_embeds") if read is None else read
        several = read is None or read.shape[:2].numel() >= ROWS
        mode = Float32Products() if several and not torch.is_grad_enabled() else None
        if mode:
            mode.__enter__()
        entered.modes = [*getattr(entered, "modes", ()), mode]

    def leave(*_) -> None:
        if torch.compiler.is_compiling():
            return
        *entered.modes, mode = getattr(entered, "modes", None) or [None]
        if mode:
            mode.__exit__(None, None, None)

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's generate calls that one
    before = inner.register_forward_pre_hook(enter, with_kwargs=True)
    after = inner.register_forward_hook(leave, always_call=True)
    return lambda: (before.remove(), after.remove())
