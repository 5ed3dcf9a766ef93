"""How a GPU kernel multiplies by 4-bit weights, one step after another in plain torch.

**What.** `multiply` gives x Wᵀ from what `fourbit` stores, without a tensor that holds W in 16 bits. It follows
`kernels/linear4bit.cu`: the same pieces, the same registers, the same order of columns, the same roundings.

**How.** A *tile* is 16 rows of W. It is read in *pieces* of 256 columns, which are 128 bytes a row. A *warp* is 32 threads, its
*lanes*, which execute each instruction together. A piece has four *units* of 64 columns. In a unit each lane reads 8 bytes of two
rows, looks up a pair of levels for each byte, and has the operands of four tensor-core products (`a_registers`). It reads x in
the same order of columns (`b_registers`). Then the sums of 64 columns are multiplied by the scales, in float32.

**The tensor core.** `mma` follows the layout of `mma.m16n8k16` in NVIDIA's PTX manual, section "Matrix Fragments for
mma.m16n8k16 with floating point type": which lane holds which element of a 16 × 16, a 16 × 8 and a 16 × 8 matrix.

**What it leaves out**: everything that makes a kernel fast. There is no shared memory and no asynchronous copy. No warps
share the pieces, so float32 sums are added in another order. All tiles are computed at once, which takes a lot of memory.
"""

import torch
from torch.nn.functional import pad

from ..errors import QwlibError
from .fourbit import Quantized

ROWS, COLUMNS, UNIT = 16, 256, 64  # of a tile, of a piece, and columns that share a scale
LANE = torch.arange(32)
GROUP, MEMBER = LANE // 4, LANE % 4  # the manual's groupID and threadID_in_group
_PAIR = torch.arange(2)

# where the elements of the fragments lie: (lane, register, half of the register)
_R = torch.arange(4)[:, None]
A_ROW = (GROUP[:, None, None] + 8 * (_R % 2)).expand(32, 4, 2)
A_COLUMN = 2 * MEMBER[:, None, None] + 8 * (_R // 2) + _PAIR
B_ROW = 2 * MEMBER[:, None, None] + 8 * _R[:2] + _PAIR
B_COLUMN = GROUP[:, None, None].expand(32, 2, 2)
# and of the result: (lane, register), one float32 a register
C_ROW = GROUP[:, None] + 8 * (_R[:, 0] // 2)
C_COLUMN = 2 * MEMBER[:, None] + _R[:, 0] % 2


def pairs(levels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The table (256 × 2): for each byte the levels of its upper and its lower code, rounded to `dtype`."""
    byte = torch.arange(256)
    return levels[torch.stack([byte >> 4, byte & 15], dim=1)].to(dtype)


def pieces(weight: Quantized) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes: tiles × pieces × 16 rows × 128 bytes, scales: tiles × pieces × 16 rows × 4 units) of rows × columns weights.

    Past the last row the last one is repeated, and past the last column there are zeros: both are left out of the result.
    Raises QwlibError where the kernel can't take the weights in this way: no matrix, columns that are no multiple of 64, or
    blocks that end within 64 columns.
    """
    if len(weight.shape) != 2 or 0 in weight.shape or weight.shape[1] % UNIT or weight.block_size % UNIT:
        raise QwlibError(
            f"tiles need a matrix with columns and blocks in multiples of {UNIT}, not the shape {weight.shape} "
            f"and blocks of {weight.block_size}"
        )
    rows, columns = weight.shape
    row = torch.arange(rows + -rows % ROWS).clamp(max=rows - 1)
    first = row[:, None] * columns + UNIT * torch.arange(columns // UNIT)
    codes = weight.packed.reshape(rows, columns // 2)[row]
    scales = weight.scales[first // weight.block_size]
    return _cut(codes, COLUMNS // 2), _cut(scales, COLUMNS // UNIT)


def _cut(matrix, width: int):
    """rows × columns → tiles × pieces × 16 × `width`, with zeros on the right."""
    whole = pad(matrix, (0, -matrix.shape[1] % width))
    return whole.reshape(len(whole) // ROWS, ROWS, -1, width).transpose(1, 2)


def lane_bytes(codes: torch.Tensor) -> torch.Tensor:
    """What each lane reads of units (… × 16 rows × 32 bytes): … × 32 lanes × 2 rows × 8 bytes.

    The four lanes of a group share two rows, 8 apart, and each has a quarter of the columns.
    """
    row = GROUP[:, None, None] + 8 * torch.arange(2)[:, None]
    return codes[..., row, 8 * MEMBER[:, None, None] + torch.arange(8)]


def a_registers(codes: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The operands a of a unit's four products: … × 4 products × 32 lanes × 4 registers × 2, of … × 16 rows × 32 bytes.

    A byte is a pair of neighbouring columns, and a pair fills a register. Product i takes bytes 2i and 2i + 1 of each lane.
    """
    read = lane_bytes(codes).int().unflatten(-1, (4, 2))  # … × lane × row × product × byte
    read = read.movedim(-2, -4).transpose(-1, -2)  # … × product × lane × byte × row
    return table[read.flatten(-2)]


def b_registers(x: torch.Tensor) -> torch.Tensor:
    """The operands b of a unit's four products: … × 4 products × 32 lanes × 2 registers × 2, of … × 8 rows of x × 64 columns.

    Lane t of a group reads the 16 columns from 16 t on, for this is where its codes are.
    """
    read = x[..., GROUP[:, None], 16 * MEMBER[:, None] + torch.arange(16)]
    return read.unflatten(-1, (4, 2, 2)).transpose(-4, -3)


def column_order() -> torch.Tensor:
    """Which of a unit's 64 columns the tensor core multiplies in each place: 4 products × 16."""
    order = torch.empty(4, 16, dtype=torch.long)
    order[:, B_ROW[:4]] = b_registers(torch.arange(UNIT).expand(8, UNIT))[:, :4]
    return order


def mma(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """c + a b as the tensor core computes it for a warp; leading dimensions are shared as in a matrix product.

    `c` and the result: … × 32 lanes × 4 in float32; `a`: … × 32 × 4 × 2; `b`: … × 32 × 2 × 2.
    """
    left, right = a.new_zeros(*a.shape[:-3], 16, 16), b.new_zeros(*b.shape[:-3], 16, 8)
    left[..., A_ROW, A_COLUMN], right[..., B_ROW, B_COLUMN] = a, b
    return c + (left.float() @ right.float())[..., C_ROW, C_COLUMN]


def multiply(x: torch.Tensor, weight: Quantized, levels: torch.Tensor, gain: float = 1.0) -> torch.Tensor:
    """x Wᵀ (1 to 16 rows × rows of W) in the type of x, to which the levels times `gain` are rounded; see `pieces` for errors.

    `levels`: the 16 of the code book. With x in float32 nothing but the sums is rounded.
    """
    if x.dim() != 2 or not 1 <= len(x) <= 16 or x.shape[1] != weight.shape[-1]:
        raise QwlibError(f"x has 1 to 16 rows of {weight.shape[-1]} columns, not the shape {tuple(x.shape)}")
    codes, scales = pieces(weight)
    table = pairs(levels * gain, x.dtype)
    a = a_registers(codes.unflatten(-1, (4, 32)).transpose(2, 3), table)
    padded = pad(x, (0, -x.shape[1] % COLUMNS, 0, -len(x) % 8))
    b = b_registers(padded.reshape(len(padded) // 8, 8, -1, 4, UNIT).permute(0, 2, 3, 1, 4))
    # tiles × rows of x / 8 × pieces × units × lanes × registers
    sums = torch.zeros(len(a), len(b), *a.shape[1:3], 32, 4)
    for product in range(4):
        sums = mma(sums, a[:, None, :, :, product], b[:, :, :, product])
    scale = scales.transpose(2, 3)[..., C_ROW]
    total = (sums * scale[:, None]).sum((2, 3)) / gain
    tiles = torch.zeros(*total.shape[:2], ROWS, 8)
    tiles[..., C_ROW, C_COLUMN] = total
    return tiles.permute(1, 3, 0, 2).flatten(2).flatten(0, 1)[: len(x), : weight.shape[0]].to(x.dtype)


def wavefronts(addresses: torch.Tensor, size: int = 4) -> torch.Tensor:
    """How often shared memory has to be read until all 32 lanes have their `size` bytes; `addresses`: … × 32, in bytes.

    There are 32 banks of 4 bytes. One reading gives one word of each bank, to as many lanes as want it. Lanes that want 8 or 16
    bytes are served in two or four groups. Source: NVIDIA's CUDA programming guide, "Shared Memory".
    """
    words = addresses[..., None] // 4 + torch.arange(size // 4)
    words = words.flatten(-2).unflatten(-1, (size // 4, 32)).sort(-1).values
    first = torch.ones_like(words)
    first[..., 1:] = words[..., 1:] != words[..., :-1]
    return torch.zeros_like(words).scatter_add(-1, words % 32, first).amax(-1).sum(-1)
