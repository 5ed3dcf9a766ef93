"""Weights of two or three values: signs with a scale, and trits, five of them in a byte.

**What.** A binary weight is +s or −s. A ternary one is +s, 0 or −s. The scale s is shared by a row or by the whole tensor.
Products by such weights need no multiplication but that by s.

**How.** `binary` (XNOR-Net, arXiv 1603.05279) keeps the sign. Of all scales, the mean magnitude of the row has the least squared
error. `ternary` (BitNet b1.58, arXiv 2402.17764) divides by the mean magnitude, rounds, and clips to −1…1.

A value out of three holds log₂ 3 = 1.585 bits. `pack_trits` writes five of them as the digits of a number in base 3, which fits
a byte because 3⁵ = 243: 1.6 bits a weight, and 32 bits for each scale. Most bytes of llama.cpp's TQ1_0 hold five trits, too.

**What it leaves out**: training. BitNet's models are trained with these weights from the start, and a model that was not trained
for them has a large error. It also leaves out the 8-bit activations that BitNet multiplies them by, and the scale that has the
least squared error for ternary codes (Ternary Weight Networks, arXiv 1605.04711), which is not the mean magnitude.
"""

import torch
from torch.nn.functional import pad

from ..errors import QwlibError
from .integers import matrix

TRITS = 5  # in a byte
TRIT_BITS = 8 / TRITS


def binary(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes −1 or 1, int8, in the shape of `weight`; scales, float32, outputs × 1) of a matrix; codes × scales is near it.

    Zero counts as positive. Raises QwlibError for what is no matrix of floats, for NaN and for infinity.
    """
    values = matrix(weight)
    return torch.where(values < 0, -1, 1).to(torch.int8), values.abs().mean(1, keepdim=True)


def ternary(weight: torch.Tensor, per: str = "tensor") -> tuple[torch.Tensor, torch.Tensor]:
    """(codes −1, 0 or 1, int8, in the shape of `weight`; scales, float32) of a matrix; codes × scales is near it.

    `per` is "tensor" (BitNet's; scales are 1 × 1) or "row" (scales are outputs × 1). Raises QwlibError as `binary` does, and for
    another `per`.
    """
    values = matrix(weight)
    if per not in ("tensor", "row"):
        raise QwlibError(f'per must be "tensor" or "row", not {per!r}')
    scale = values.abs().mean(1, keepdim=True) if per == "row" else values.abs().mean().reshape(1, 1)
    return (values / scale.clamp(min=1e-30)).round().clamp(-1, 1).to(torch.int8), scale


def pack_trits(values: torch.Tensor) -> torch.Tensor:
    """Values −1, 0 and 1 (any shape), five a byte, the first as the lowest digit in base 3: uint8, ceil(n ÷ 5).

    Missing values at the end are zeros. Raises QwlibError for other values.
    """
    if ((values != -1) & (values != 0) & (values != 1)).any():
        raise QwlibError("trits are -1, 0 and 1: give the codes of ternary(), not the weights")
    digits = values.reshape(-1).to(torch.uint8) + 1  # 255 + 1 is 0 in uint8
    digits = pad(digits, (0, -len(digits) % TRITS), value=1).reshape(-1, TRITS)
    return (digits * _powers(digits.device)).sum(1).to(torch.uint8)


def unpack_trits(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` values (int8, flat) of what `pack_trits` gave.

    Raises QwlibError where there are fewer, and for bytes that it never writes (243 and more).
    """
    if packed.dtype != torch.uint8 or (packed >= 3**TRITS).any():
        raise QwlibError(f"packed trits are uint8 below {3**TRITS}: give what pack_trits() returned")
    if not 0 <= count <= TRITS * packed.numel():
        raise QwlibError(f"{packed.numel()} bytes hold up to {TRITS * packed.numel()} trits, not {count}")
    digits = packed.reshape(-1, 1) // _powers(packed.device) % 3
    return (digits.to(torch.int8) - 1).reshape(-1)[:count]


def _powers(device) -> torch.Tensor:
    return torch.tensor([3**place for place in range(TRITS)], dtype=torch.uint8, device=device)
