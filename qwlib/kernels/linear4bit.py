"""4-bit linear layers on a GPU, faster than bitsandbytes' kernels: `linear4bit.cu` and `plain4bit.cu` say how they work.

    up to 64 rows of x      16 at a time, by tensor cores (compute capability 8.0 and later) for columns in multiples of 32,
                            else by a plain kernel, for any shape and compute capability 7.5 and later
    more                    W in 16 bits first (the bytes that bitsandbytes' kernel writes), then PyTorch's product

They read what bitsandbytes stores where it lies. Nothing is repacked, memory does not grow, and a model is saved as before. What
`obstacle` names goes through bitsandbytes.

bitsandbytes rounds level × scale to 16 bits. The kernel for tensor cores rounds the levels alone, multiplied by a number for
which that costs little (`rounded_well`), and scales the sums in float32. Against the definition in float64 its relative error is
at most 1.02 times that of bitsandbytes' own kernels (`tests/kernels`).
"""

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from ..errors import QwlibError
from . import compiling

ROWS = 16  # of x in one launch, at most
MOST = 64  # of x, at most: with more, it is faster to write W in 16 bits first (docs/measured.md)
PARTS = 4  # weights in one launch, at most
SMALL = 1024 + 128  # bytes of the scales' levels and of offsets
# (warps, pieces that each keeps on their way, whether the table is spread), the fastest on an H100 first; the first is too slow
# for 16 rows of x
RINGS = ((16, 3, True), (16, 2, True), (16, 2, False), (8, 4, False), (8, 2, False))
SUMS = 20  # as in the CUDA source
FAR = 2**31 - 1  # the first tile of a part that does not exist


class Part(ctypes.Structure):
    """One weight of a launch, as `Part` in `common.cuh`."""

    _fields_ = (
        ("packed", ctypes.c_void_p),
        ("absmax", ctypes.c_void_p),
        ("scale_absmax", ctypes.c_void_p),
        ("offset", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("out_features", ctypes.c_int),
        ("begin", ctypes.c_int),
    )


NO_PART = Part(begin=FAR)


def obstacle(weight, dtype) -> str | None:
    """Why a `Params4bit` (rows × columns) can't be multiplied here, None where it can. `dtype`: the type of x."""
    state = weight.quant_state
    why = compiling.obstacle() or settings_obstacle(state.blocksize, state.nested and state.state2.blocksize, dtype)
    if why is None and weight.data_ptr() % 16:
        why = "the kernel reads 16 bytes at a time, and these codes begin between"
    return why or _device_obstacle(weight.device.index or 0, dtype, state.nested)


@cache
def _device_obstacle(device: int, dtype, nested: bool) -> str | None:
    """Why a GPU can't run it; it is compiled here for one row, or found on disk."""
    capability = torch.cuda.get_device_capability(device)
    if capability < (7, 5):
        return f"the kernel needs compute capability 7.5, and this GPU has {capability[0]}.{capability[1]}"
    try:
        _kernel(device, *_choice(device, 1, 256, 64), dtype, nested)
    except QwlibError as error:
        return str(error)
    return None


def settings_obstacle(block_size: int, nested_block_size: int, dtype) -> str | None:
    """Why weights with blocks of a size, 8-bit scales with blocks of a size (0: none), and x of a type can't be multiplied."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the kernel computes in 16 bits, not in {str(dtype).removeprefix('torch.')}"
    if block_size < 32 or block_size & (block_size - 1):
        return f"the kernel needs blocks of 32, 64, 128 and so on, not {block_size}"
    if nested_block_size not in (0, 256):
        return f"the kernel needs second-level scales for 256 scales each, not {nested_block_size}"
    return None


@torch.library.custom_op("qwlib::linear4bit", mutates_args=())
def linear4bit(
    x: torch.Tensor,
    packed: Sequence[torch.Tensor],
    absmax: Sequence[torch.Tensor],
    levels: torch.Tensor,
    gain: float,
    scale_levels: torch.Tensor | None,
    scale_absmax: Sequence[torch.Tensor],
    offset: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor],
    out_features: Sequence[int],
    block_size: int,
) -> list[torch.Tensor]:
    """x (… × columns, at most 64 rows) times up to four 4-bit weights (`out_features` × columns each), in x's type.

    `packed`, `absmax`: bitsandbytes' codes and scales; `levels`: its code book; `gain`: see `rounded_well`. With double
    quantization there are `scale_levels`, `scale_absmax` and `offset` too. `bias`: one for each weight, or none at all.
    """
    return _multiply(
        x, packed, absmax, levels, gain, scale_levels, scale_absmax, offset, bias, out_features, block_size
    )


@linear4bit.register_fake
def _(x, packed, absmax, levels, gain, scale_levels, scale_absmax, offset, bias, out_features, block_size):
    return [x.new_empty(*x.shape[:-1], rows) for rows in out_features]


def multiply(x, weights, gain: float, biases=()) -> list[torch.Tensor]:
    """x (… × columns, at most 64 rows) times each of up to four `Params4bit` of one kind, for which `obstacle` names none.

    `gain`: what `gain_of` gives for them; `biases`: one for each, or none at all.
    """
    states = [weight.quant_state for weight in weights]
    first = states[0]
    nested = first.nested
    # the operator costs more than the launch, and only torch.compile needs it
    product = linear4bit if torch.compiler.is_compiling() else _multiply
    return product(
        x,
        [weight.data for weight in weights],
        [state.absmax for state in states],
        first.code,
        gain,
        first.state2.code if nested else None,
        [state.state2.absmax for state in states] if nested else [],
        [state.offset for state in states] if nested else [],
        list(biases),
        [state.shape[0] for state in states],
        first.blocksize,
    )


def _multiply(x, packed, absmax, levels, gain, scale_levels, scale_absmax, offset, bias, out_features, block_size):
    columns, device, nested = x.shape[-1], x.get_device(), scale_levels is not None
    rows = x.numel() // columns
    if rows > MOST or len(packed) > PARTS:
        raise QwlibError(f"the kernel takes {MOST} rows and {PARTS} weights at most, not {rows} and {len(packed)}")
    x = x.contiguous()
    if x.data_ptr() % 16:
        x = x.clone()
    outs = [x.new_empty(*x.shape[:-1], each) for each in out_features]
    empty, shift = [None] * len(packed), block_size.bit_length() - 1
    each = list(
        zip(packed, absmax, scale_absmax or empty, offset or empty, bias or empty, outs, out_features, strict=True)
    )
    for first in range(0, rows, ROWS):
        some = min(ROWS, rows - first)
        name, options = _choice(device, some, columns, block_size)
        kernel, processors = _kernel(device, name, options, x.dtype, nested)
        inputs, tiles, parts = ctypes.c_void_p(x.data_ptr() + 2 * first * columns), 0, []
        for *tensors, out, rows_out in each:
            pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
            parts.append(Part(*pointers, out.data_ptr() + 2 * first * rows_out, rows_out, tiles))
            tiles += -(-rows_out // 16)
        if name == "linear4bit":
            parts += [NO_PART] * (PARTS - len(parts))
            arguments = (scale_levels, levels, inputs, tiles, columns, some, shift, gain, (Part * PARTS)(*parts))
            _launch(kernel, device, min(processors, tiles), arguments)
            continue
        for part in parts:
            blocks = min(8 * processors, -(-part.out_features // 8))
            _launch(kernel, device, blocks, (scale_levels, levels, inputs, columns, some, shift, part))
    return outs


def _launch(kernel, device: int, blocks: int, arguments) -> None:
    if not blocks:
        return
    if device == torch.cuda.current_device():
        kernel.launch(blocks, arguments)
    else:
        with torch.cuda.device(device):
            kernel.launch(blocks, arguments)


@torch.library.custom_op("qwlib::dequantize4bit", mutates_args=())
def dequantize4bit(
    packed: torch.Tensor,
    absmax: torch.Tensor,
    levels: torch.Tensor,
    scale_levels: torch.Tensor | None,
    scale_absmax: torch.Tensor | None,
    offset: torch.Tensor | None,
    shape: Sequence[int],
    block_size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """A 4-bit weight in 16 bits (rows × columns), bit for bit as bitsandbytes' kernels dequantize it; settings as above."""
    device, out = packed.get_device(), packed.new_empty(*shape, dtype=dtype)
    kernel, processors = _kernel(device, "dequantize4bit", (("WIDE", 1),), dtype, scale_levels is not None)
    tensors = (scale_levels, levels, packed, absmax, scale_absmax, offset, out)
    blocks = min(16 * processors, -(-out.numel() // 2048))
    _launch(kernel, device, blocks, (*tensors, *shape, block_size.bit_length() - 1))
    return out


@dequantize4bit.register_fake
def _(packed, absmax, levels, scale_levels, scale_absmax, offset, shape, block_size, dtype):
    return packed.new_empty(*shape, dtype=dtype)


def dequantize(weight, dtype):
    """A `Params4bit`, for which `obstacle` names none, in 16 bits (rows × columns)."""
    state = weight.quant_state
    nested = (state.state2.code, state.state2.absmax, state.offset) if state.nested else (None, None, None)
    return dequantize4bit(weight.data, state.absmax, state.code, *nested, list(state.shape), state.blocksize, dtype)


def gain_of(weight, dtype) -> float:
    """The number by which a `Params4bit`'s levels are multiplied before they are rounded to `dtype`."""
    return _gain(tuple(weight.quant_state.code.tolist()), dtype)


@cache
def _gain(levels: tuple[float, ...], dtype) -> float:
    return rounded_well(levels, dtype)


def rounded_well(levels, dtype) -> float:
    """The number from 1 to 2 for which `levels` times it have the smallest sum of squared errors when rounded to `dtype`."""
    gains = torch.linspace(1, 2, 4097, dtype=torch.float64)[:-1, None]
    exact = gains * torch.tensor(levels, dtype=torch.float64)
    lost = ((exact.to(dtype).double() - exact) / gains).square().sum(1)
    return float(gains[lost.argmin()])


@cache
def _choice(device: int, rows: int, columns: int, block_size: int) -> tuple[str, tuple]:
    """(the kernel that multiplies, its options)."""
    wide = 1 if rows == 1 else 8 if rows <= 8 else 16
    if columns % 32 or torch.cuda.get_device_capability(device) < (8, 0):
        return "plain4bit", (("WIDE", wide),)
    pieces, halves = columns % 256 == 0 and block_size == 64, columns % 64 != 0 or block_size < 64
    return "linear4bit", (("WIDE", wide), ("PIECES", int(pieces)), ("HALVES", int(halves)))


@cache
def _kernel(device: int, name: str, options: tuple, dtype, nested: bool):
    """(a kernel, multiprocessors of the device)."""
    properties, defined = torch.cuda.get_device_properties(device), dict(options)
    defined |= {"NESTED": int(nested), "HALF": int(dtype == torch.float16)}
    built = {"threads": 256, "shared_bytes": 0, "pdl": False}
    if name == "linear4bit":
        room = properties.shared_memory_per_block_optin
        warps, stages, spread, shared_bytes = ring(room, defined["WIDE"], nested, defined["HALVES"])
        built = {"threads": 32 * warps, "shared_bytes": shared_bytes, "pdl": properties.major >= 9}
        defined |= {"WARPS": warps, "STAGES": stages, "SPREAD": int(spread), "PDL": int(built["pdl"])}
    files = ("common.cuh", "linear4bit.cu" if name == "linear4bit" else "plain4bit.cu")
    source = "".join(Path(__file__).with_name(file).read_text(encoding="utf-8") for file in files)
    with torch.cuda.device(device):
        capability = f"{properties.major}{properties.minor}"
        return compiling.build(source, name, defined, **built, capability=capability), properties.multi_processor_count


def ring(room: int, wide: int, nested: bool, halves: bool = False) -> tuple[int, int, bool, int]:
    """(warps, pieces that each keeps on their way, whether the table is spread, bytes of shared memory) of a block.

    `room`: the bytes that a block may have. Raises QwlibError where not even two pieces of 8 warps fit.
    """
    piece = 16 * (144 if halves else 160) + (128 if nested else 256)
    for warps, stages, spread in RINGS[wide == 16 :]:
        need = (65536 if spread else 32768) + SMALL + 2 * warps * (4 if wide == 1 else wide) * SUMS * 4
        need += warps * stages * piece
        if need <= room:
            return warps, stages, spread, need
    raise QwlibError(f"the kernel needs {need} bytes of shared memory, and this GPU has {room}")
