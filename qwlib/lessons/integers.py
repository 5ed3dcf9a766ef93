"""Evenly spaced integers: the older way to fewer bits, and the parts that 4-bit code books share with it.

A scale turns weights into integers: divide, round, keep. `quantize_absmax` makes the largest magnitude the largest integer, so
one outlier makes every other weight coarse; sharing a scale among fewer neighbours (a row, a block) contains the damage and
costs bytes. `quantize_zero_point` shifts the range as well, for lopsided values. `pack` puts two 4-bit codes into a byte, and
`errors` says how far off the result is.

It leaves out what LLM.int8() (arXiv 2208.07339) adds to rows of absmax integers: keeping outlier columns in 16 bits, and
multiplying in 8. bitsandbytes does both, and `scheme="int8"` is that.
"""

from dataclasses import dataclass
from math import inf, log10, prod

import torch

from ..errors import QwlibError

_LEAST = 1e-30  # of what is divided by: far below any weight, far above where float32 loses its precision


@dataclass(frozen=True)
class Integers:
    """A tensor in evenly spaced integers of 8 or 4 bits. `stored`: int8 codes, or two 4-bit ones a byte (code + 8); `scale`
    and `zero_point` (0 throughout for absmax): float32, one for each `block_size` neighbours.
    """

    stored: torch.Tensor
    scale: torch.Tensor
    zero_point: torch.Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    bits: int
    block_size: int

    @property
    def codes(self) -> torch.Tensor:
        """The integers (int8) in the shape of the original."""
        count = prod(self.shape)
        flat = self.stored[:count] if self.bits == 8 else unpack(self.stored, count).to(torch.int8) - 8
        return flat.reshape(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(part.nbytes for part in (self.stored, self.scale, self.zero_point) if part is not None)


def quantize_absmax(tensor: torch.Tensor, bits: int = 8, *, per: str | int = "tensor") -> Integers:
    """Integers from -127 to 127 (or -7 to 7): the largest magnitude becomes the largest integer, zero stays zero.

    `per` says who shares a scale: the whole "tensor", a "row" (the last dimension), or that many neighbours.
    Raises QwlibError as `quantize_4bit` does, and for other bits.
    """
    if bits not in (4, 8):
        raise QwlibError(f"bits must be 4 or 8, not {bits!r}")
    most = 2 ** (bits - 1) - 1
    blocks = _blocks(tensor, per)
    scale = blocks.abs().amax(1, keepdim=True).clamp(min=_LEAST) / most
    return _integers((blocks / scale).round().clamp(-most, most), scale, None, tensor, bits)


def quantize_zero_point(tensor: torch.Tensor, *, per: str | int = "tensor") -> Integers:
    """Integers from -128 to 127 spread between the smallest and the largest value, zero among them and exact.

    For lopsided values. `per` and errors as for `quantize_absmax`.
    """
    blocks = _blocks(tensor, per)
    low, high = blocks.amin(1, keepdim=True).clamp(max=0), blocks.amax(1, keepdim=True).clamp(min=0)
    scale = (high / 255 - low / 255).clamp(min=_LEAST)  # high - low could overflow
    zero_point = (-128 - low / scale).round().clamp(-128, 127)
    codes = ((blocks / scale).round() + zero_point).clamp(-128, 127)
    return _integers(codes, scale, zero_point, tensor, 8)


def dequantize(quantized: Integers) -> torch.Tensor:
    """The tensor that `quantized` stands for: (code − zero point) × scale, in its original shape and type."""
    count = prod(quantized.shape)

    def spread(values):
        return values.repeat_interleave(quantized.block_size)[:count]

    values = quantized.codes.reshape(-1).float()
    if quantized.zero_point is not None:
        values = values - spread(quantized.zero_point)
    return (values * spread(quantized.scale)).to(quantized.dtype).reshape(quantized.shape)


def errors(original: torch.Tensor, restored: torch.Tensor) -> dict[str, float]:
    """How far `restored` is from `original`, in float64: `mean` and `max` magnitude, `relative` (root of the ratio of the
    squares' sums) and `snr_db`, the signal-to-noise ratio in decibels: 10 log₁₀ of signal's over noise's squares.

    Raises QwlibError where the shapes differ.
    """
    if original.shape != restored.shape or not original.numel():
        raise QwlibError(f"two tensors of one shape and not empty: {tuple(original.shape)}, {tuple(restored.shape)}")
    signal = original.detach().double()
    noise = restored.detach().double() - signal
    ratio = (noise.norm() / signal.norm()).item() if noise.any() else 0.0
    return {
        "mean": noise.abs().mean().item(),
        "max": noise.abs().max().item(),
        "relative": ratio,
        "snr_db": -20 * log10(ratio) if ratio else inf,
    }


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Two codes of 0–15 a byte, the first in the high half; of an even number of codes."""
    codes = codes.reshape(-1).to(torch.uint8)
    return codes[::2] << 4 | codes[1::2]


def unpack(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` codes (uint8) of `packed`."""
    return torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1)[:count]


def checked(tensor: torch.Tensor) -> torch.Tensor:
    """The values of `tensor`, flat, in float32.

    Raises QwlibError for anything but a tensor of float32, float16 or bfloat16, for NaN and for infinity.
    """
    if not isinstance(tensor, torch.Tensor):
        raise QwlibError(f"a tensor is wanted, not {type(tensor).__name__}: torch.tensor(...) makes one")
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise QwlibError(f"a tensor to quantize must be float32, float16 or bfloat16, not {tensor.dtype}")
    flat = tensor.detach().reshape(-1).float()
    if not flat.isfinite().all():
        bad = (~flat.isfinite()).sum()
        raise QwlibError(f"{bad} of {len(flat)} values are NaN or infinite: nothing is near them on a scale")
    return flat


def matrix(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` (rows × columns) in float32.

    Raises QwlibError as `checked` does, and for any other number of dimensions and an empty tensor.
    """
    flat = checked(tensor)
    if tensor.dim() != 2 or not len(flat):
        raise QwlibError(f"a matrix (rows × columns) is wanted, not the shape {tuple(tensor.shape)}")
    return flat.reshape(tensor.shape)


def padded(flat: torch.Tensor, multiple: int) -> torch.Tensor:
    """`flat` with zeros behind it, up to a multiple of that length."""
    return torch.nn.functional.pad(flat, (0, -len(flat) % multiple))


def _blocks(tensor, per: str | int):
    flat = checked(tensor)
    sizes = {"tensor": len(flat), "row": tensor.shape[-1] if tensor.dim() else 1}
    size = sizes.get(per, per) if isinstance(per, str) else per
    if type(size) is not int or size < 1:
        raise QwlibError(f'per must be "tensor", "row" or a number of weights, not {per!r}; the tensor not empty')
    return padded(flat, size).reshape(-1, size)


def _integers(codes, scale, zero_point, tensor, bits: int) -> Integers:
    size, codes = codes.shape[1], codes.reshape(-1)[: tensor.numel()].to(torch.int8)
    stored = codes if bits == 8 else pack(padded(codes, 2) + 8)
    zero_point = zero_point if zero_point is None else zero_point.reshape(-1)
    return Integers(stored, scale.reshape(-1), zero_point, tuple(tensor.shape), tensor.dtype, bits, size)
