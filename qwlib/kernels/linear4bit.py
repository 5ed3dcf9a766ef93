"""A 4-bit linear layer for 1 to 16 rows on a GPU, faster than bitsandbytes' own: `linear4bit.cu` says how it works.

It reads what bitsandbytes stores where it lies. Nothing is repacked, memory does not grow, and a model is saved as before. More
rows than 16, and what `obstacle` names, go through bitsandbytes.

bitsandbytes rounds level × scale to 16 bits. The kernel rounds the levels alone, multiplied by a number for which that costs
little (`rounded_well`), and scales the sums in float32. Against the definition in float64 its relative error is no larger than
that of bitsandbytes' own kernels (`tests/kernels`).
"""

from functools import cache
from pathlib import Path

import torch

from ..errors import QwlibError
from . import compiling

ROWS = 16  # of x, at most
TABLE = 32768 + 1024  # bytes of the pairs of levels, and of the scales' levels
SUMS = 20  # as in the CUDA source
PIECE = 16 * 160  # bytes of the codes of 16 rows and 256 columns, padded


def obstacle(weight, dtype) -> str | None:
    """Why a `Params4bit` (rows × columns) can't be multiplied by this kernel, None where it can. `dtype`: the type of x."""
    state = weight.quant_state
    why = compiling.obstacle() or shape_obstacle(tuple(state.shape), state.blocksize, dtype)
    return why or _device_obstacle(weight.device.index or 0, dtype, state.nested)


@cache
def _device_obstacle(device: int, dtype, nested: bool) -> str | None:
    """Why a GPU can't run it; it is compiled here for one row, or found on disk."""
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"the kernel needs compute capability 8.0, and this GPU has {capability[0]}.{capability[1]}"
    try:
        _kernel(device, 1, dtype, nested, True)
    except QwlibError as error:
        return str(error)
    return None


def shape_obstacle(shape: tuple[int, int], block_size: int, dtype) -> str | None:
    """Why weights of a shape (rows × columns) and block size, and x of a type, can't be multiplied by it."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"the kernel computes in 16 bits, not in {str(dtype).removeprefix('torch.')}"
    if shape[1] % 64:
        return f"the kernel needs columns in multiples of 64, not {shape[1]}"
    if block_size < 64:
        return f"the kernel needs blocks of 64 or more, not {block_size}"
    return None


@torch.library.custom_op("qwlib::linear4bit", mutates_args=())
def linear4bit(
    x: torch.Tensor,
    packed: torch.Tensor,
    absmax: torch.Tensor,
    levels: torch.Tensor,
    gain: float,
    scale_levels: torch.Tensor | None,
    scale_absmax: torch.Tensor | None,
    offset: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_features: int,
    block_size: int,
) -> torch.Tensor:
    """x (… × columns, at most 16 rows) times a 4-bit weight (`out_features` × columns), in x's type.

    `packed`, `absmax`: bitsandbytes' codes and scales; `levels`: its code book times `gain`. With double quantization there are
    `scale_levels`, `scale_absmax` and `offset` too.
    """
    settings = (scale_levels, scale_absmax, offset, bias, out_features, block_size)
    return _multiply(x, packed, absmax, levels, gain, *settings)


@linear4bit.register_fake
def _(x, packed, absmax, levels, gain, scale_levels, scale_absmax, offset, bias, out_features, block_size):
    return x.new_empty(*x.shape[:-1], out_features)


def multiply(x, weight, bias=None, book=None):
    """x (… × columns) times a `Params4bit`, for which `obstacle` names none. `book`: what `code_book` gives for it."""
    state, (levels, gain) = weight.quant_state, book or code_book(weight, x.dtype)
    nested = (state.state2.code, state.state2.absmax, state.offset) if state.nested else (None, None, None)
    # the operator costs more than the launch, and only torch.compile needs it
    product = linear4bit if torch.compiler.is_compiling() else _multiply
    return product(x, weight.data, state.absmax, levels, gain, *nested, bias, state.shape[0], state.blocksize)


def _multiply(x, packed, absmax, levels, gain, scale_levels, scale_absmax, offset, bias, out_features, block_size):
    columns, device = x.shape[-1], x.get_device()
    rows = x.numel() // columns
    if rows > ROWS:
        raise QwlibError(f"the kernel takes {ROWS} rows at most, not {rows}")
    x = x.contiguous()
    out = x.new_empty(*x.shape[:-1], out_features)
    if rows and out_features:
        wide = 1 if rows == 1 else 8 if rows <= 8 else 16
        pieces = columns % 256 == 0 and block_size == 64
        kernel, processors = _kernel(device, wide, x.dtype, scale_levels is not None, pieces)
        pointers = (packed, absmax, scale_levels, scale_absmax, offset, levels, x, bias, out)
        numbers = (out_features, columns, rows, block_size.bit_length() - 1, gain)
        blocks = min(processors, -(-out_features // 16))
        if device == torch.cuda.current_device():
            kernel.launch(blocks, pointers, numbers)
        else:
            with torch.cuda.device(device):
                kernel.launch(blocks, pointers, numbers)
    return out


def code_book(weight, dtype) -> tuple[torch.Tensor, float]:
    """(the levels of a `Params4bit` times a number, that number), for which they lose little when rounded to `dtype`."""
    code = weight.quant_state.code
    return _book(tuple(code.tolist()), dtype, code.device)


@cache
def _book(levels: tuple[float, ...], dtype, device) -> tuple[torch.Tensor, float]:
    gain = rounded_well(levels, dtype)
    return gain * torch.tensor(levels, device=device), gain


def rounded_well(levels, dtype) -> float:
    """The number from 1 to 2 for which `levels` times it have the smallest sum of squared errors when rounded to `dtype`."""
    gains = torch.linspace(1, 2, 4097, dtype=torch.float64)[:-1, None]
    exact = gains * torch.tensor(levels, dtype=torch.float64)
    lost = ((exact.to(dtype).double() - exact) / gains).square().sum(1)
    return float(gains[lost.argmin()])


@cache
def _kernel(device: int, wide: int, dtype, nested: bool, pieces: bool):
    """(the kernel, multiprocessors of the device) for `wide` rows of x at most."""
    properties = torch.cuda.get_device_properties(device)
    warps, stages, shared_bytes = ring(properties.shared_memory_per_block_optin, wide, nested)
    pdl = properties.major >= 9
    options = {"WARPS": warps, "STAGES": stages, "WIDE": wide, "NESTED": nested, "PIECES": pieces, "PDL": pdl}
    options = {name: int(value) for name, value in options.items()} | {"HALF": int(dtype == torch.float16)}
    source = Path(__file__).with_suffix(".cu").read_text(encoding="utf-8")
    capability = f"{properties.major}{properties.minor}"
    built = {"threads": 32 * warps, "shared_bytes": shared_bytes, "capability": capability, "pdl": pdl}
    with torch.cuda.device(device):
        return compiling.build(source, "linear4bit", options, **built), properties.multi_processor_count


def ring(room: int, wide: int, nested: bool) -> tuple[int, int, int]:
    """(warps, pieces that each keeps on their way, bytes of shared memory) of a block that may have `room` bytes.

    Raises QwlibError where not even two pieces of 8 warps fit.
    """
    piece = PIECE + (128 if nested else 256)
    for warps, least in ((16, 3), (8, 2)):
        fixed = TABLE + 2 * warps * wide * SUMS * 4
        stages = min(4, (room - fixed) // (warps * piece))
        if stages >= least:
            return warps, stages, fixed + warps * stages * piece
    raise QwlibError(f"the kernel needs {fixed + 2 * warps * piece} bytes of shared memory, and this GPU has {room}")
