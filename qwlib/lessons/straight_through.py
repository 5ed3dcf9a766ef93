"""Fake quantization and the straight-through estimator: how a model is trained for a format that it will be stored in.

**What.** Quantization-aware training keeps weights w in float. In each forward pass it computes with q(w): the weights rounded
to the format's levels and read back. This is *fake quantization*, because nothing is stored in fewer bits. The loss then
belongs to the model as it will be stored, and the optimizer can lower it.

**How.** The staircase q has derivative zero almost everywhere, so no gradient would reach w. The straight-through estimator
(arXiv 1308.3432) puts the identity in its place in the backward pass:

    forward: q(w)          backward: the gradient of w is the gradient of q(w)

The clipped variant sets the gradient to zero where w is beyond the outermost levels, because there q(w) does not follow w.
torch's own `fake_quantize_per_tensor_affine` does that. The grids here span the weights of each group from the smallest to
the largest, so that no weight is far beyond them. `w + (q(w) − w).detach()` is the usual short form. Where w and q(w) differ by
more than a factor of two, it can miss q(w) by a rounding error. A `torch.autograd.Function` gives q(w) exactly.

**What it leaves out**: scales that are learnt (LSQ, arXiv 1902.08153), and the schedule on which training begins to round.
"""

from collections.abc import Callable

import torch

from ..errors import QwlibError
from . import fourbit
from .integers import checked


class StraightThrough(torch.autograd.Function):
    """forward(weight, values, limits) gives `values`; the gradient goes to `weight`, unchanged within the limits."""

    @staticmethod
    def forward(ctx, weight, values, limits):
        inside = None if limits is None else (weight >= limits[0]) & (weight <= limits[1])
        ctx.save_for_backward(inside)
        return values.clone()

    @staticmethod
    def backward(ctx, gradient):
        (inside,) = ctx.saved_tensors
        return gradient if inside is None else gradient * inside, None, None


def fake(
    weight: torch.Tensor,
    quantize: Callable[[torch.Tensor], torch.Tensor],
    limits: tuple[float | torch.Tensor, float | torch.Tensor] | None = None,
) -> torch.Tensor:
    """quantize(weight), with the gradient of the identity.

    `quantize` takes a tensor and returns one of the same shape, quantized and read back. With `limits` (low, high; numbers, or
    tensors that broadcast) the gradient is zero where the weight is beyond them: the clipped estimator.
    Raises QwlibError where `quantize` changes the shape.
    """
    values = quantize(weight.detach())
    if values.shape != weight.shape:
        raise QwlibError(
            f"quantize must keep the shape {tuple(weight.shape)}, but gave {tuple(values.shape)}: read it back"
        )
    return StraightThrough.apply(weight, values.to(weight.dtype), limits)


def zero_points(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(scales, zero points), float32, rows × groups of `group` columns: the grid that spans each group of weights.

    A weight w has the code round(w ÷ scale) + zero point, between 0 and 2^bits − 1. Zero is always on the grid.
    Raises QwlibError for bits outside 1…8, what is no matrix, and columns that are no multiple of `group`.
    """
    if type(bits) is not int or not 1 <= bits <= 8:
        raise QwlibError(f"bits must be a whole number from 1 to 8, not {bits!r}")
    if weight.dim() != 2 or type(group) is not int or group < 1 or weight.shape[1] % group:
        raise QwlibError(f"group must divide the columns of a matrix: {group!r} and the shape {tuple(weight.shape)}")
    groups = checked(weight).reshape(len(weight), -1, group)
    low, high = groups.amin(2).clamp(max=0), groups.amax(2).clamp(min=0)
    scale = ((high - low) / (2**bits - 1)).clamp(min=1e-30)
    return scale, (-low / scale).round().clamp(0, 2**bits - 1)


def fake_zero_point(weight: torch.Tensor, bits: int = 4, group: int = 32) -> torch.Tensor:
    """`weight` (rows × columns) rounded to the grids of `zero_points` and read back, with the straight-through gradient.

    The type is that of `weight`; errors are those of `zero_points`.
    """

    def quantize(weight):
        scale, zero = (each[:, :, None] for each in zero_points(weight, bits, group))
        groups = weight.float().reshape(len(weight), -1, group)
        codes = ((groups / scale).round() + zero).clamp(0, 2**bits - 1)
        return ((codes - zero) * scale).reshape(weight.shape)

    return fake(weight, quantize)


def fake_nf4(weight: torch.Tensor, block: int = 64) -> torch.Tensor:
    """`weight` (any shape) in NF4 with blocks of that size and read back, with the straight-through gradient.

    The type is that of `weight`; errors are those of `fourbit.quantize_4bit`.
    """
    return fake(weight, lambda weight: fourbit.dequantize_4bit(fourbit.quantize_4bit(weight, "nf4", block)))
