"""4-bit quantization from first principles, in plain torch: what bitsandbytes stores, byte for byte.

**What.** A weight becomes a *code*, the number of the nearest entry in a *code book* of 16 levels between -1 and 1. Such
levels fit a tensor only after scaling, so weights are cut into *blocks* of (by default) 64 neighbours, and each block is
divided by its largest magnitude, its *scale* or *absmax*. Kept are two codes a byte and one float32 scale a block:

    weight ≈ code_book[code] × absmax[block]          4 bits + 32 bits / 64 = 4.5 bits a weight

**How.** `quantize_4bit` scales, finds the nearest level and packs; `dequantize_4bit` looks up and multiplies. With
`double_quant` the scales are quantized too: their mean is taken off, and blocks of 256 of them become 8-bit codes in a code
book whose levels are dense near zero (`dynamic_map`), with one float32 scale a block: 4.127 bits a weight.

**Which levels.** NF4 takes quantiles of the normal distribution, because weights are nearly normal: each level is to be used
about equally often (`normal_float`; QLoRA, arXiv 2305.14314). FP4 is a 4-bit float: sign, two exponent bits, one mantissa bit;
it spends two codes on zero.

**How it differs from bitsandbytes** (0.50.2), whose packed bytes, scales and nested scales it gives on a CPU bit for bit:

- bitsandbytes' dequantization on CPUs with AVX512-BF16 is wrong where a block of up to 1024 crosses a row of even length; this
  one follows the definition. Elsewhere the two are equal, but for what depends on the processor: with AVX512-BF16 bfloat16
  results below 1.2e-38 become zero, without it float16 results are rounded away from zero at ties.
- NaN, infinity and scales whose mean overflows are refused here, and quantized into nonsense there.
- its GPU kernels take FP4's other zero, compare with midpoints that were rounded on their own, and search the 8-bit map
  exactly, where the CPU code first rounds a scale to one of 65,536 cells. So a GPU's bytes differ from a CPU's: none of nf4's
  in 16 million weights, 1.2 % of fp4's, 0.1 % of the 8-bit scales (`docs/measured.md`). This file follows the CPU's rule.

**What it leaves out**: multiplying without writing the weights out again, which is what makes 4-bit fast; and thrift:
temporaries take several times the tensor (`benchmarks/fourbit.py` puts the times side by side).
"""

from dataclasses import dataclass
from math import prod

import torch

from ..errors import QwlibError
from ..schemes import BLOCK, NESTED_BLOCK
from .integers import checked, pack, padded, unpack

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)  # what bitsandbytes 0.50 takes

# bitsandbytes' rounding of (29/30 + 31/32) / 2: how far out the last quantile lies, between those of 15 and 16 levels
_OUTERMOST = 0.9677083


def normal_float(outermost: float = _OUTERMOST) -> torch.Tensor:
    """The 16 NF4 levels, derived: quantiles at even steps, 7 below zero, zero, 8 above, divided by the largest.

    `outermost` is the share of weights below the last level, between 0.5 and 1; bitsandbytes' value gives NF4.
    Source: QLoRA, arXiv 2305.14314, section 3; the outermost quantile is bitsandbytes' (`create_normal_map`).
    """

    def quantiles(count):
        probabilities = torch.linspace(outermost, 0.5, count + 1)[:-1]
        return torch.special.ndtri(probabilities.double()).float()

    levels = torch.cat([-quantiles(7), torch.zeros(1), quantiles(8).flip(0)])
    return levels / levels.max()


def float4() -> torch.Tensor:
    """What the 16 FP4 codes mean: a sign bit, two exponent bits, one mantissa bit, over the largest. 15 levels, two zeros.

    Exponent bits 01, 10 and 11 stand for 8, 4 and 2, downwards, and a mantissa bit adds half; 00 holds zero and the one
    subnormal, 1/16 (bitsandbytes' `get_4bit_type`). It is no IEEE or OCP format.
    """
    magnitudes = torch.tensor([0, 1 / 16, 8, 12, 4, 6, 2, 3]) / 12
    return torch.cat([magnitudes, 0 - magnitudes])  # not -magnitudes: code 8 is a second +0, as bitsandbytes has it


def code_book(quant_type: str, device=None) -> torch.Tensor:
    """16 values, the `i`th being what code `i` means. `quant_type` is nf4 or fp4, else QwlibError."""
    if quant_type not in ("nf4", "fp4"):
        raise QwlibError(f"quant_type must be 'nf4' or 'fp4', not {quant_type!r}")
    return (normal_float() if quant_type == "nf4" else float4()).to(device)


def dynamic_map() -> torch.Tensor:
    """The 256 levels for 8-bit scales, ascending: each power of ten has twice as many as the one below it, and 0 and 1.

    Source: "8-Bit Approximations for Parallelism in Deep Learning", arXiv 1511.04561; bitsandbytes' `create_dynamic_map`.
    """
    levels = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (i - 6)
        levels += [middles, -middles]
    return torch.cat(levels).sort().values


def nearest(values: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Index of the level nearest to each value (int64, shape of `values`); half-way goes to the lower level."""
    ascending, order = levels.sort(stable=True)
    middles = (ascending[:-1] + ascending[1:]) / 2
    return order[torch.bucketize(values, middles)]


def rounded(tensor: torch.Tensor, levels: torch.Tensor, block_size: int = BLOCK) -> torch.Tensor:
    """`tensor` (its size a multiple of `block_size`) with each weight at the nearest of any `levels` times its block's absmax.

    Float32, in the shape of `tensor`. With the levels of `code_book` it is what `quantize_4bit` stores, read back.
    """
    flat = checked(tensor)
    if len(flat) % block_size:
        raise QwlibError(f"{len(flat)} weights are no multiple of block_size {block_size}: cut the tensor")
    levels = torch.as_tensor(levels, dtype=torch.float32, device=flat.device)
    absmax, scaled = _scaled(flat, block_size)
    return (levels[nearest(scaled, levels)] * absmax.repeat_interleave(block_size)).reshape(tensor.shape)


@dataclass(frozen=True)
class Quantized:
    """A tensor in 4 bits. `packed`: ceil(n / 2) bytes; `absmax`: a scale a block, float32, or with double quantization
    their 8-bit codes, `nested_absmax` (float32, one for 256 of them) and `offset` (their mean); n is the product of `shape`.
    """

    packed: torch.Tensor
    absmax: torch.Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    quant_type: str
    block_size: int
    nested_absmax: torch.Tensor | None = None
    offset: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all that is kept. bitsandbytes keeps its code books beside every tensor: 64 bytes, with double
        quantization 1,088."""
        parts = (self.packed, self.absmax, self.nested_absmax, self.offset)
        return sum(part.nbytes for part in parts if part is not None)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.nbytes / max(prod(self.shape), 1)

    @property
    def scales(self) -> torch.Tensor:
        """The float32 scale of each block, read back from 8 bits where they were quantized."""
        if self.nested_absmax is None:
            return self.absmax
        levels = dynamic_map().to(self.absmax.device)[self.absmax.int()]
        return levels * self.nested_absmax.repeat_interleave(NESTED_BLOCK)[: len(levels)] + self.offset


def quantize_4bit(
    tensor: torch.Tensor, quant_type: str = "nf4", block_size: int = BLOCK, double_quant: bool = False
) -> Quantized:
    """`tensor` (float32, float16 or bfloat16; any shape, any device) in 4 bits.

    Raises QwlibError for other types, NaN, infinity, and block sizes that bitsandbytes does not take.
    """
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        raise QwlibError(f"block_size must be one of {', '.join(map(str, BLOCK_SIZES))}, not {block_size}")
    flat = checked(tensor)
    levels = code_book(quant_type, flat.device)
    absmax, scaled = _scaled(flat, block_size)
    packed = pack(nearest(padded(scaled, 2), levels))
    rest = {"shape": tuple(tensor.shape), "dtype": tensor.dtype, "quant_type": quant_type, "block_size": block_size}
    if not double_quant or not len(absmax):
        return Quantized(packed, absmax, **rest)
    offset = absmax.mean()
    if not offset.isfinite():
        raise QwlibError("the mean of the block scales overflows float32: divide the tensor by a constant first")
    codes, nested_absmax = _quantize_scales(absmax - offset)
    return Quantized(packed, codes, nested_absmax=nested_absmax, offset=offset, **rest)


def dequantize_4bit(quantized: Quantized) -> torch.Tensor:
    """The tensor that `quantized` stands for, in its original shape and type: code book entry × scale of the block."""
    count = prod(quantized.shape)
    codes = unpack(quantized.packed, count).int()
    values = code_book(quantized.quant_type, codes.device)[codes]
    scales = quantized.scales.repeat_interleave(quantized.block_size)[:count]
    return (values * scales).to(quantized.dtype).reshape(quantized.shape)


def _scaled(flat, block_size: int):
    """(absmax of each block, values over the absmax of their block), as bitsandbytes rounds them.

    Whole blocks are multiplied by the reciprocal, a shorter last one is divided, which can round the other way. Division is
    by 1e-38 at least, so that no reciprocal overflows; a short block of zeros even keeps that 1e-38 as its scale.
    """
    full = len(flat) - len(flat) % block_size
    blocks = flat[:full].reshape(-1, block_size)
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
    if full < len(flat):
        last = flat[full:].abs().max().clamp(min=1e-38)
        absmax = torch.cat([absmax, last[None]])
        scaled = torch.cat([scaled.reshape(-1), flat[full:] / last])
    return absmax, scaled.reshape(-1).clamp(-1, 1)


def _quantize_scales(values):
    """(8-bit codes, float32 scale for each 256 of them) of centred block scales, as bitsandbytes' CPU code rounds them:
    first to one of 65,536 cells between -1 and 1, then from the middle of the cell to the nearest level."""
    blocks = padded(values, NESTED_BLOCK).reshape(-1, NESTED_BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1 / absmax)[:, None]).clamp(-1, 1)
    scaled = scaled.nan_to_num(-1.0)  # 0 / 0: a block of zeros has code 0 throughout, which stands for -0.993 × 0
    cells = ((scaled + 1) * 32767.5 + 0.5).floor()
    codes = nearest(cells / 32767.5 - 1, dynamic_map().to(values.device))
    return codes.to(torch.uint8).reshape(-1)[: len(values)], absmax
