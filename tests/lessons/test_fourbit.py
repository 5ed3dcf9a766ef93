"""fourbit against bitsandbytes bit for bit, against brute force, and against what its own words promise."""

import math
from fractions import Fraction
from statistics import NormalDist

import bitsandbytes.functional as theirs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwlib import QwlibError, schemes
from qwlib.lessons import fourbit, integers
from qwlib.models import estimates

AVX512_BF16 = theirs.has_avx512bf16()
TYPES = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@pytest.fixture(autouse=True, scope="module")
def uncompiled():
    """bitsandbytes' fallback compiles itself anew for each shape; here the shapes are many and small."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def draw(kind: str, count: int, dtype, seed: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=random)
    if kind == "constant":
        values = values[:1].expand(count)
    elif kind == "zero":
        values = values * 0  # with both signs of zero
    elif kind == "denormal":
        values = values * torch.finfo(dtype).tiny / 8
    elif kind == "outliers":
        values = torch.where(torch.rand(count, generator=random) < 0.02, values * 1e4, values)
    elif kind == "some blocks zero":
        values = torch.where(torch.arange(count) // 64 % 3 == 0, 0, values)
    elif kind == "levels":  # on, and half-way between, the levels themselves
        levels = torch.cat([fourbit.normal_float(), fourbit.float4()]).sort().values
        levels = torch.cat([levels, (levels[1:] + levels[:-1]) / 2])
        values = levels[torch.randint(len(levels), (count,), generator=random)] * torch.rand((), generator=random)
    elif kind == "any bits":  # every finite number is as likely as another, 1e-45 as 1e38
        span = 2 ** (torch.finfo(dtype).bits - 1)
        bits = torch.randint(-span, span, (count,), generator=random).to(TYPES[dtype])
        values = bits.view(dtype).float()
        values = torch.where(values.abs() < torch.finfo(dtype).max / count, values, 1)  # their mean must not overflow
    return values.to(dtype).contiguous()


KINDS = ["normal", "constant", "zero", "denormal", "outliers", "some blocks zero", "levels", "any bits"]
tensors = st.builds(
    draw,
    st.sampled_from(KINDS),
    st.one_of(st.integers(1, 700), st.sampled_from([64, 4096, 64 * 257, 64 * 256 + 1, 20_001])),
    st.sampled_from(list(TYPES)),
    st.integers(0, 2**31),
)
quant_types = st.sampled_from(["nf4", "fp4"])
block_sizes = st.sampled_from(fourbit.BLOCK_SIZES)


def same_bits(a, b) -> bool:
    """Equal in every bit: 0 is not -0 here."""
    a, b = a.contiguous().reshape(-1), b.contiguous().reshape(-1)
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def assert_dequantized_alike(ours, packed, state):
    """Equal values, as far as bitsandbytes' kernels for two kinds of processor agree with each other: with AVX512-BF16 bfloat16
    denormals become zero (Intel's VCVTNEPS2BF16); without, float16 is rounded by a conversion that is a last bit off at ties.
    """
    restored, other = fourbit.dequantize_4bit(ours), theirs.dequantize_4bit(packed, state).reshape(ours.shape)
    assert restored.dtype == other.dtype
    if AVX512_BF16 and restored.dtype == torch.bfloat16:
        restored, other = (torch.where(t.abs() < torch.finfo(t.dtype).tiny, 0, t) for t in (restored, other))
    if not AVX512_BF16 and restored.dtype == torch.float16:
        assert torch.allclose(restored.float(), other.float(), rtol=2**-10, atol=2**-24)
    else:
        assert torch.equal(restored, other)


def assert_stored_alike(tensor, quant_type, block_size, double_quant):
    ours = fourbit.quantize_4bit(tensor, quant_type, block_size, double_quant)
    packed, state = theirs.quantize_4bit(
        tensor, blocksize=block_size, compress_statistics=double_quant, quant_type=quant_type
    )
    assert same_bits(ours.packed, packed)
    assert same_bits(ours.absmax, state.absmax)
    if double_quant:
        assert same_bits(ours.nested_absmax, state.state2.absmax)
        assert same_bits(ours.offset, state.offset)
    return ours, packed, state


@settings(max_examples=400, deadline=None)
@given(tensors, quant_types, block_sizes, st.booleans())
def test_bitsandbytes_stores_the_same_bits(tensor, quant_type, block_size, double_quant):
    ours, packed, state = assert_stored_alike(tensor, quant_type, block_size, double_quant)
    if len(tensor) % block_size == 0:  # the tensor is one row
        assert_dequantized_alike(ours, packed, state)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    blocks=st.integers(1, 4),
    block_size=block_sizes,
    quant_type=quant_types,
    double_quant=st.booleans(),
    dtype=st.sampled_from(list(TYPES)),
    kind=st.sampled_from(KINDS),
)
def test_dequantized_values_are_bitsandbytes_where_rows_are_whole_blocks(
    rows, blocks, block_size, quant_type, double_quant, dtype, kind
):
    tensor = draw(kind, rows * blocks * block_size, dtype, rows).reshape(rows, -1)
    ours, packed, state = assert_stored_alike(tensor, quant_type, block_size, double_quant)
    assert_dequantized_alike(ours, packed, state)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_short_last_block_is_divided_and_a_whole_one_multiplied(quant_type):
    """Values beside a midpoint times a scale, where x / scale and x × (1 / scale) round to different levels."""
    levels = fourbit.code_book(quant_type).sort().values
    middles = (levels[:-1] + levels[1:]) / 2
    scale = torch.rand(4000, 1, generator=torch.Generator().manual_seed(0))
    values = middles * scale
    split = torch.bucketize(values / scale, middles) != torch.bucketize(values * (1 / scale), middles)
    rows = torch.nonzero(split.any(1)).flatten()[:50]
    assert len(rows) > 10
    for row in rows.tolist():
        whole = torch.cat([values[row], scale[row].expand(64 - len(middles))])
        assert_stored_alike(whole, quant_type, 64, False)
        assert_stored_alike(whole[:-1], quant_type, 64, False)
    shorter = fourbit.quantize_4bit(whole[:-2], quant_type)
    assert not torch.equal(fourbit.quantize_4bit(whole, quant_type).packed[:31], shorter.packed)


CROSSING = [(64, 96, 64), (64, 48, 32), (576, 576, 128), (576, 576, 256), (64, 32, 64), (64, 1536, 1024)]


@pytest.mark.parametrize(("rows", "columns", "block_size"), CROSSING)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_where_a_block_crosses_a_row_the_definition_holds_here_and_not_in_bitsandbytes(
    rows, columns, block_size, quant_type
):
    scale = torch.rand(rows, 1, generator=torch.Generator().manual_seed(0))
    tensor = draw("normal", rows * columns, torch.bfloat16, 1).reshape(rows, columns) * scale.to(torch.bfloat16)
    ours, packed, state = assert_stored_alike(tensor, quant_type, block_size, False)
    restored = fourbit.dequantize_4bit(ours)
    flat = fourbit.quantize_4bit(tensor.flatten(), quant_type, block_size)  # the same blocks, with no rows to cross
    assert same_bits(restored, fourbit.dequantize_4bit(flat))
    mine = integers.errors(tensor, restored)["relative"]
    other = integers.errors(tensor, theirs.dequantize_4bit(packed, state))["relative"]
    assert mine < 0.16
    if AVX512_BF16:
        assert other > 2 * mine, "bitsandbytes mended its AVX512-BF16 kernel: docstrings and `bnb.mend` may say so"
    else:
        assert other == mine


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@settings(max_examples=200, deadline=None)
@given(tensors, quant_types, block_sizes, st.booleans())
def test_a_gpu_stores_the_same_bits_as_a_cpu(tensor, quant_type, block_size, double_quant):
    here = fourbit.quantize_4bit(tensor, quant_type, block_size, double_quant)
    there = fourbit.quantize_4bit(tensor.cuda(), quant_type, block_size, double_quant)
    assert same_bits(there.packed.cpu(), here.packed)
    if double_quant:  # the mean is summed in another order
        assert torch.allclose(there.offset.cpu(), here.offset, rtol=1e-5, atol=0)
        assert torch.allclose(there.scales.cpu(), here.scales, rtol=0.02, atol=float(here.nested_absmax.max()) / 100)
    else:
        assert same_bits(there.absmax.cpu(), here.absmax)
        assert torch.allclose(fourbit.dequantize_4bit(there).cpu(), fourbit.dequantize_4bit(here), rtol=0, atol=0)


@pytest.mark.parametrize(("rows", "columns", "block_size"), [(576, 576, 2048), (64, 33, 64)])
def test_large_blocks_and_odd_rows_are_right_in_bitsandbytes_too(rows, columns, block_size):
    if AVX512_BF16 and torch.backends.cpu.get_cpu_capability() != "AVX512":
        pytest.skip(
            "bitsandbytes asks PyTorch for AVX512 here, its library asks the processor, and the two were told otherwise"
        )
    tensor = draw("normal", rows * columns, torch.float32, 1).reshape(rows, columns)
    assert_dequantized_alike(*assert_stored_alike(tensor, "nf4", block_size, False))


# by other means


@settings(max_examples=100, deadline=None)
@given(tensors, quant_types, block_sizes)
def test_no_level_is_nearer_than_the_one_taken(tensor, quant_type, block_size):
    quantized = fourbit.quantize_4bit(tensor, quant_type, block_size)
    taken = fourbit.dequantize_4bit(quantized).double()
    restored = quantized.scales.double().repeat_interleave(block_size)[: len(tensor), None]
    every = restored * fourbit.code_book(quant_type).double()
    best = (every - tensor.double()[:, None]).abs().amin(1)
    normal = restored[:, 0] > 1e-37  # below, the reciprocal is bounded, and values are lost to zero
    kind = torch.finfo(tensor.dtype)
    rounding = restored[:, 0] * 1e-6 + tensor.double().abs().clamp(min=kind.tiny) * kind.eps
    assert ((taken - tensor.double()).abs() <= best + rounding)[normal].all()
    codes = integers.unpack(quantized.packed, len(tensor))
    order = fourbit.code_book(quant_type).sort(stable=True)
    place = order.indices.argsort()[codes.int()]
    beside = every.gather(1, order.indices[(place + 1).clamp(max=15)][:, None])[
        :, 0
    ]  # the level above, for the top its own
    apart = (
        normal
        & ((beside - taken).abs() > 4 * rounding)
        & ((taken - tensor.double()).abs() < (beside - taken).abs() / 4)
    )
    assert not ((beside - tensor.double()).abs() <= best + rounding)[apart].any()


@settings(max_examples=60, deadline=None)
@given(tensors, quant_types, block_sizes, st.booleans())
def test_dequantizing_is_a_level_times_a_scale(tensor, quant_type, block_size, double_quant):
    quantized = fourbit.quantize_4bit(tensor, quant_type, block_size, double_quant)
    book, map_ = theirs.get_4bit_type(quant_type, device="cpu"), theirs.create_dynamic_map()
    restored = fourbit.dequantize_4bit(quantized)
    for i in {0, 1, len(tensor) // 2, len(tensor) - 1} & set(range(len(tensor))):
        byte = int(quantized.packed[i // 2])
        level = book[byte >> 4 if i % 2 == 0 else byte & 15]
        block = i // block_size
        scale = quantized.absmax[block]
        if double_quant:
            scale = map_[int(scale)] * quantized.nested_absmax[block // 256] + quantized.offset
        assert same_bits(restored[i], (level * scale).to(tensor.dtype))


def test_the_levels_are_bitsandbytes_constants():
    for quant_type in ("nf4", "fp4"):
        assert same_bits(fourbit.code_book(quant_type), theirs.get_4bit_type(quant_type, device="cpu"))
    assert same_bits(fourbit.dynamic_map(), theirs.create_dynamic_map())


def test_nf4_levels_are_quantiles():
    """Derived again with the standard library, from the fractions that the paper's text implies."""
    outermost = (Fraction(29, 30) + Fraction(31, 32)) / 2
    normal = NormalDist()

    def quantiles(count):
        step = (outermost - Fraction(1, 2)) / count
        return [normal.inv_cdf(float(Fraction(1, 2) + step * i)) for i in range(1, count + 1)]

    expected = [-q for q in reversed(quantiles(7))] + [0.0] + quantiles(8)
    expected = [level / expected[-1] for level in expected]
    assert fourbit.normal_float().tolist() == pytest.approx(expected, abs=1e-6)
    symmetric = [*[-q for q in reversed(quantiles(8))], *quantiles(8)]
    assert fourbit.normal_float().tolist() != pytest.approx(symmetric, abs=1e-2)


def test_half_way_goes_to_the_lower_level():
    levels = torch.tensor([1.0, -1.0, 0.0])  # in no order
    assert fourbit.nearest(torch.tensor([-0.5, 0.5, 0.6, 9.0]), levels).tolist() == [1, 2, 0, 0]


# sizes


@pytest.mark.parametrize("shape", [(), (1,), (7,), (0,), (3, 5), (2, 3, 64), (1, 1, 1, 130)])
@pytest.mark.parametrize("double_quant", [False, True])
def test_any_shape_comes_back(shape, double_quant):
    tensor = torch.randn(shape, dtype=torch.float16)
    quantized = fourbit.quantize_4bit(tensor, double_quant=double_quant)
    restored = fourbit.dequantize_4bit(quantized)
    assert restored.shape == tensor.shape
    assert restored.dtype == torch.float16
    flat = fourbit.quantize_4bit(tensor.flatten(), double_quant=double_quant)
    assert same_bits(restored, fourbit.dequantize_4bit(flat))
    if tensor.numel() > 100:
        assert integers.errors(tensor, restored)["relative"] < 0.13
        assert integers.errors(tensor, restored.flip(0))["relative"] > 0.13 or len(tensor) == 1


def test_a_view_is_quantized_as_what_it_shows():
    tensor = torch.randn(96, 128)
    assert same_bits(fourbit.quantize_4bit(tensor.T).packed, fourbit.quantize_4bit(tensor.T.contiguous()).packed)


@pytest.mark.parametrize("fmt", ["nf4", "nf4-dq", "fp4", "fp4-dq"])
@pytest.mark.parametrize("shape", [(576, 1536), (31, 33), (4096, 130)])
def test_bytes_are_those_of_the_estimate_and_of_bitsandbytes(fmt, shape):
    tensor, double = torch.randn(shape), fmt.endswith("-dq")
    quantized = fourbit.quantize_4bit(tensor, fmt.removesuffix("-dq"), double_quant=double)
    books = 64 + 1024 * double
    assert quantized.nbytes + books == sum(estimates.stored_bytes(shape, fmt))
    packed, state = theirs.quantize_4bit(tensor, quant_type=fmt.removesuffix("-dq"), compress_statistics=double)
    kept = [packed, state.absmax, state.code]
    kept += [state.offset, state.state2.absmax, state.state2.code] if double else []
    assert quantized.nbytes + books == sum(part.nbytes for part in kept)


def test_bits_per_weight_are_the_schemes():
    tensor = torch.randn(64 * 256, 64)
    for double, name in ((False, "nf4"), (True, "nf4-dq")):
        bits = fourbit.quantize_4bit(tensor, double_quant=double).bits_per_weight
        assert bits == pytest.approx(schemes.BITS[name], abs=1e-4)
        assert bits - schemes.BITS[name] == (8 * 4 / tensor.numel() if double else 0)  # the mean's four bytes


# refusals


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_near_no_level_is_refused(bad):
    tensor = torch.zeros(100)
    tensor[7] = bad
    with pytest.raises(QwlibError, match="1 of 100 values are NaN or infinite"):
        fourbit.quantize_4bit(tensor)


def test_a_short_block_of_zeros_keeps_the_least_scale_as_bitsandbytes_does():
    zeros = torch.zeros(64 + 6)
    ours, _, state = assert_stored_alike(zeros, "nf4", 64, False)
    assert state.absmax.tolist() == pytest.approx([0, 1e-38], abs=1e-44)
    assert not fourbit.dequantize_4bit(ours).any()


def test_what_is_no_tensor_is_refused():
    with pytest.raises(QwlibError, match="a tensor is wanted, not list"):
        fourbit.quantize_4bit([1.0, 2.0])


def test_scales_that_have_no_mean_are_refused():
    tensor = torch.full((64 * 4,), 3e38)
    fourbit.quantize_4bit(tensor)
    with pytest.raises(QwlibError, match="overflows"):
        fourbit.quantize_4bit(tensor, double_quant=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 48}, "32, 64, 128"),
        ({"block_size": 64.0}, "not 64.0"),
        ({"quant_type": "int4"}, "'nf4' or 'fp4'"),
        ({"block_size": 0}, "not 0"),
    ],
)
def test_options_that_bitsandbytes_lacks_are_refused(options, message):
    with pytest.raises(QwlibError, match=message):
        fourbit.quantize_4bit(torch.zeros(64), **options)


def test_other_types_are_refused():
    for dtype in (torch.int8, torch.float64, torch.complex64):
        with pytest.raises(QwlibError, match="float32, float16 or bfloat16"):
            fourbit.quantize_4bit(torch.zeros(64, dtype=dtype))


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_rounding_to_any_levels_is_quantizing_with_those_of_a_code_book(kind):
    torch.manual_seed(0)
    weight = torch.randn(8, 256)
    expected = fourbit.dequantize_4bit(fourbit.quantize_4bit(weight, kind, block_size=128))
    assert torch.equal(fourbit.rounded(weight, fourbit.code_book(kind), 128), expected)
    assert not torch.equal(fourbit.rounded(weight, fourbit.normal_float(0.93), 128), expected)
    with pytest.raises(QwlibError, match="2048 weights are no multiple of block_size 100"):
        fourbit.rounded(weight, fourbit.code_book(kind), 100)
