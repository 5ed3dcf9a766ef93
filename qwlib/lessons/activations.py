"""Activations in 8 bits: a scale for each token at run time, or one scale from calibration, and the product of integers.

**What.** Weights in fewer bits save memory. Where the inputs of a layer are integers too, the product itself can be computed with
integers, which processors and GPUs do faster. The scale of weights is known beforehand. That of inputs is not.

**How.** *Dynamic* quantization takes the largest magnitude of each token when the token arrives (`per_token`). *Static*
quantization takes one scale from calibration inputs (`calibrated`). It needs no search at run time, and it clips whatever is
larger than what calibration saw. `int8_product` adds products of codes in int32, which is exact. The two scales are
applied to the sum:

    y = (Σ_j x_code_j × w_code_j) × x_scale × w_scale

This works because neither scale depends on j. A scale per input channel could not be taken out of the sum. So one channel with
large values, an *outlier*, makes the steps of all channels coarse (LLM.int8(), arXiv 2208.07339).

**What it leaves out**: the cures for outliers. LLM.int8() keeps these channels in 16 bits. SmoothQuant (arXiv 2211.10438) moves
their size into the weights. It also leaves out zero points, 4-bit activations, and kernels: the integer product of torch
on a CPU is slower than that of floats.
"""

from collections.abc import Callable

import torch

from ..errors import QwlibError
from .integers import Integers, checked, quantize_absmax


def inputs(model, layer: str, run: Callable[[], object]) -> torch.Tensor:
    """What that layer of a model reads while `run()` is called: rows × inputs, float32, on the host.

    `layer` is its name in the model, `run` calls the model. Raises QwlibError where the layer is not called.
    """
    seen = []
    hook = model.get_submodule(layer).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].detach().flatten(0, -2).float().cpu())
    )
    try:
        with torch.no_grad():
            run()
    finally:
        hook.remove()
    if not seen:
        raise QwlibError(f"{layer} was not called: run must call the model that the layer is part of")
    return torch.cat(seen)


def per_token(x: torch.Tensor, bits: int = 8) -> Integers:
    """x (… × inputs) in integers, symmetric, a scale for each token: its largest magnitude becomes the largest integer.

    `bits` is 8 or 4. Errors as for `integers.quantize_absmax`; `integers.dequantize` reads the result back.
    """
    return quantize_absmax(x, bits, per="row")


def calibrated(x: torch.Tensor) -> float:
    """The scale with which int8 spans everything in x, the inputs of calibration: their largest magnitude ÷ 127."""
    return quantize_absmax(x).scale.item()


def static(x: torch.Tensor, scale: float) -> Integers:
    """x (any shape) in int8 with that scale; what is beyond 127 × scale is clipped to it.

    Raises QwlibError for a scale that is not above zero, NaN, infinity, and an empty tensor.
    """
    flat = checked(x)
    if not 0 < scale < float("inf"):
        raise QwlibError(f"scale must be a number above zero, not {scale!r}: calibrated(inputs) gives one")
    if not len(flat):
        raise QwlibError("there is nothing to quantize in an empty tensor")
    codes = (flat / scale).round().clamp(-127, 127).to(torch.int8)
    return Integers(codes, flat.new_tensor([scale]), None, tuple(x.shape), x.dtype, 8, len(flat))


def int8_product(x: Integers, weight: Integers) -> torch.Tensor:
    """x Wᵀ (tokens × outputs, float32) of integers x (tokens × inputs) and W (outputs × inputs), with exact sums in int32.

    x comes from `per_token` or `static`, W from `integers.quantize_absmax` per "row" or per "tensor".
    Raises QwlibError for shapes that do not fit, zero points, and scales that are shared within a row.
    """
    if len(x.shape) != 2 or len(weight.shape) != 2 or x.shape[1] != weight.shape[1]:
        raise QwlibError(f"the inputs of x and W must be equally many: their shapes are {x.shape} and {weight.shape}")
    if x.zero_point is not None or weight.zero_point is not None:
        raise QwlibError("integers with a zero point need a correction of the sums: use quantize_absmax")
    sums = x.codes.int() @ weight.codes.int().T
    return sums.float() * _scales(x) * _scales(weight).T


def outliers(x: torch.Tensor) -> torch.Tensor:
    """The largest magnitude of each channel (inputs; float32) of x (… × inputs), over that of the median channel.

    A value of 1 is ordinary. Raises QwlibError where more than half of the channels are zero throughout.
    """
    largest = checked(x).reshape(-1, x.shape[-1]).abs().amax(0)
    median = largest.median()
    if median == 0:
        raise QwlibError("more than half of the channels are zero throughout: leave those out")
    return largest / median


def _scales(of: Integers) -> torch.Tensor:
    """rows × 1, or 1 × 1 where all share one."""
    if len(of.scale) not in (1, of.shape[0]) or (len(of.scale) > 1 and of.block_size != of.shape[1]):
        raise QwlibError('a sum over a row needs one scale for the row: quantize per="row" or per="tensor"')
    return of.scale[:, None]
