"""The type of matrix multiplications on a CPU: the 16-bit type of the weights, or float32 if that is faster on the processor.

Weights can be stored in one type and multiplied in another. Which is faster depends on the processor. A processor with
AVX512-BF16 or AMX has instructions for bfloat16. With AVX2 alone (most laptops, many Colab machines, GitHub's runners), PyTorch
multiplies bfloat16 in a loop that is several times slower than float32. `choose` keeps bfloat16 if the processor has the
instructions. Otherwise it times one matrix multiplication in both types, once per process, and gives the times as the reason.

If float32 is faster, `hook` makes a model calculate every matrix multiplication with `ROWS` or more rows in float32. The weight
is converted slice by slice, so memory hardly grows. The result is converted back to the type that it would have had. Sums are
float32 in both cases. Multiplications with fewer rows stay in the type of the weights. With one row, each weight is read once, so
reading half as many bytes is faster. 4-bit layers make this choice themselves, in `backends/bnb.py`, because for them the speed
with one row depends on how fast the weights are dequantized.

Training takes the same way, forward and backward: a gradient is calculated in float32 and has the type of its tensor. How it
differs from autocast: autocast changes to a lower precision, converts whole weights, and keeps them.
"""

import functools
import threading
import time
from collections.abc import Callable

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from . import processor

# with fewer rows, a matrix multiplication stays in the type of the weights: benchmarks/arithmetic.py
ROWS = 16
# weights that are converted to float32 at a time: 2 MB, which fits into a processor's cache
SLICE = 1 << 19
# rows, columns and outputs of the matrix multiplication that is timed: a layer of a small model
TRIED = (128, 576, 1536)
NARROW = (torch.bfloat16, torch.float16)
PRODUCTS = {
    *(torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.__rmatmul__),
    *(torch.mm, torch.Tensor.mm, torch.bmm, torch.Tensor.bmm),
    *(torch.addmm, torch.Tensor.addmm, torch.baddbmm, torch.Tensor.baddbmm),
}


def choose(dtype, device) -> tuple[torch.dtype, str]:
    """(type for matrix multiplications with several rows, reason) for weights of `dtype` on `device`."""
    if device.type != "cpu" or dtype not in NARROW:
        return dtype, "the type of the weights"
    if dtype is torch.bfloat16 and processor.capability() in processor.BF16:
        return dtype, f"{processor.capability()} has instructions for it"
    own, single = seconds(dtype)
    name = str(dtype).removeprefix("torch.")
    took = f"{TRIED[0]} rows took {1e3 * own:.2g} ms in {name} and {1e3 * single:.2g} ms in float32"
    return (torch.float32 if own > single else dtype), f"{processor.capability()}: {took}"


@functools.cache
def seconds(dtype) -> tuple[float, float]:
    """Seconds of one matrix multiplication, in `dtype` and in float32 with the conversion. It is timed once per process."""
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
    """x (… × columns) times a weight (outputs × columns), calculated in float32 slice by slice. The result has x's type."""
    wide, (outputs, columns) = x.float(), weight.shape
    out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype)
    step = max(1, SLICE // columns)
    buffer = torch.empty(min(step, outputs), columns)
    for at in range(0, outputs, step):
        part = weight[at : at + step]
        some = None if bias is None else bias[at : at + step].float()
        out[..., at : at + step] = functional.linear(wide, buffer[: len(part)].copy_(part), some)
    return out


class _Differentiable(torch.autograd.Function):
    """`linear` with gradients, which are calculated in float32 too."""

    @staticmethod
    def forward(ctx, x, weight, bias=None):
        # x is needed for the gradient of a weight alone, and that of an adapter's base is frozen
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        wanted, flat = ctx.needs_input_grad, gradient.float().flatten(0, -2)
        found: list[torch.Tensor | None] = [None, None, None]
        if wanted[0]:
            step, total = max(1, SLICE // weight.shape[1]), flat.new_zeros(len(flat), weight.shape[1])
            for at in range(0, len(weight), step):
                total.addmm_(flat[:, at : at + step], weight[at : at + step].float())
            found[0] = total.to(gradient.dtype).view(*gradient.shape[:-1], weight.shape[1])
        if wanted[1]:
            found[1] = (flat.T @ x.float().flatten(0, -2)).to(weight.dtype)
        if len(wanted) > 2 and wanted[2]:
            found[2] = flat.sum(0).to(gradient.dtype)
        return tuple(found[: len(wanted)])


class Float32Products(TorchFunctionMode):
    """Within it, matrix multiplications of plain 16-bit tensors with `ROWS` or more rows are calculated in float32 on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is functional.linear and not kwargs:
            if all(map(_narrow, args[:2])) and args[0].shape[:-1].numel() >= ROWS:
                learnt = torch.is_grad_enabled() and any(getattr(each, "requires_grad", False) for each in args)
                return _Differentiable.apply(*args) if learnt else linear(*args)
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
    """Run a transformers model under `Float32Products` whenever it reads several tokens. Call the returned function to undo it.

    Only two forward hooks are added. Modules, their names, weights and bytes stay as they are. Layers whose activations are
    computed again in the backward pass (gradient checkpointing) do that under `Float32Products` too.
    """
    entered = threading.local()  # the modes of this thread's calls that have not returned yet
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # peft's generate calls that one
    calls = {}  # layers whose activations are computed again → transformers' function that does it

    def enter(_, args, kwargs) -> None:
        if torch.compiler.is_compiling():
            return
        for layer in inner.modules() if torch.is_grad_enabled() else ():
            if getattr(layer, "gradient_checkpointing", False) and layer not in calls:
                calls[layer] = layer._gradient_checkpointing_func
                layer._gradient_checkpointing_func = functools.partial(_twice, calls[layer])
        read = args[0] if args else kwargs.get("input_ids")
        read = kwargs.get("inputs_embeds") if read is None else read
        mode = Float32Products() if read is None or read.shape[:2].numel() >= ROWS else None
        if mode:
            mode.__enter__()
        entered.modes = [*getattr(entered, "modes", ()), mode]

    def leave(*_) -> None:
        if torch.compiler.is_compiling():
            return
        *entered.modes, mode = getattr(entered, "modes", None) or [None]
        if mode:
            mode.__exit__(None, None, None)

    def undo() -> None:
        before.remove()
        after.remove()
        for layer, call in calls.items():
            layer._gradient_checkpointing_func = call

    before = inner.register_forward_pre_hook(enter, with_kwargs=True)
    after = inner.register_forward_hook(leave, always_call=True)
    return undo


def _twice(call, layer, hidden, *more):
    """transformers' `call` of a `layer` that is called again in the backward pass, where the model's hooks are not."""

    def wide(*args):
        with Float32Products():
            return layer(*args)

    return call(wide if hidden.shape[:2].numel() >= ROWS else layer, hidden, *more)
