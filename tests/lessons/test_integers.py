"""Integers against torch's and bitsandbytes' own, and against the bounds that rounding promises."""

import math

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwlib import QwlibError
from qwlib.lessons import integers

shapes = st.lists(st.integers(1, 40), min_size=1, max_size=3).map(tuple)


def random(shape, seed: int, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + shift


@settings(max_examples=100, deadline=None)
@given(shapes, st.integers(0, 999), st.sampled_from([4, 8]), st.sampled_from(["tensor", "row", 8, 64]))
def test_absmax_is_off_by_half_a_step_at_most(shape, seed, bits, per):
    tensor = random(shape, seed)
    quantized = integers.quantize_absmax(tensor, bits, per=per)
    restored = integers.dequantize(quantized)
    step = quantized.scale.repeat_interleave(quantized.block_size)[: tensor.numel()].reshape(shape)
    assert ((restored - tensor).abs() <= step * 0.5001).all()
    most = 2 ** (bits - 1) - 1
    assert quantized.codes.abs().max() == most
    assert quantized.codes.shape == tensor.shape


@settings(max_examples=100, deadline=None)
@given(shapes, st.integers(0, 999), st.floats(-9, 9), st.sampled_from(["tensor", "row", 8]))
def test_zero_point_is_off_by_a_step_at_most_and_keeps_zero(shape, seed, shift, per):
    tensor = random(shape, seed, shift)
    tensor.view(-1)[0] = 0
    quantized = integers.quantize_zero_point(tensor, per=per)
    restored = integers.dequantize(quantized)
    step = quantized.scale.repeat_interleave(quantized.block_size)[: tensor.numel()].reshape(shape)
    assert ((restored - tensor).abs() <= step * 1.001).all()
    assert restored.view(-1)[0] == 0


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_zero_point_is_torchs():
    tensor = random((50, 30), 0, 2.0)
    quantized = integers.quantize_zero_point(tensor)
    other = torch.quantize_per_tensor(tensor, quantized.scale.item(), int(quantized.zero_point), torch.qint8)
    assert torch.equal(quantized.codes, other.int_repr())
    assert torch.allclose(integers.dequantize(quantized), other.dequantize(), rtol=0, atol=1e-6)
    assert (quantized.codes.min(), quantized.codes.max()) == (-128, 127)


def test_rows_are_those_of_llm_int8():
    tensor = random((40, 96), 0).half()
    codes, scales, _ = bnb.int8_vectorwise_quant(tensor)
    ours = integers.quantize_absmax(tensor, per="row")
    assert torch.allclose(ours.scale * 127, scales, rtol=1e-6)
    difference = (ours.codes.int() - codes.int()).abs()
    assert difference.max() <= 1  # they multiply in 16 bits
    assert (difference > 0).float().mean() < 0.02
    whole = integers.quantize_absmax(tensor)
    assert ((whole.codes.int() - codes.int()).abs() > 0).float().mean() > 0.3


def test_one_outlier_ruins_a_tensor_and_only_its_block():
    tensor = random((64, 64), 0)
    tensor[3, 3] = 1000
    error = {
        per: integers.errors(tensor, integers.dequantize(integers.quantize_absmax(tensor, 4, per=per)))
        for per in ("tensor", "row", 8)
    }
    assert error["tensor"]["mean"] > 5 * error["row"]["mean"] > 5 * error[8]["mean"]


@pytest.mark.parametrize("shape", [(1,), (7,), (4, 130)])
def test_bytes_are_counted(shape):
    tensor, n = random(shape, 0), math.prod(shape)
    assert integers.quantize_absmax(tensor).nbytes == n + 4
    assert integers.quantize_absmax(tensor, 4).nbytes == math.ceil(n / 2) + 4
    assert integers.quantize_absmax(tensor, 4, per=64).nbytes == math.ceil(n / 2) + 4 * math.ceil(n / 64)
    assert integers.quantize_zero_point(tensor, per="row").nbytes == n + 8 * (n // shape[-1])


@given(st.binary(min_size=2, max_size=40))
def test_packing_is_reversible_and_puts_the_first_code_high(data):
    codes = torch.tensor([byte & 15 for byte in data][: len(data) // 2 * 2])
    packed = integers.pack(codes)
    assert packed.tolist() == [
        int(f"{a:x}{b:x}", 16) for a, b in zip(codes[::2].tolist(), codes[1::2].tolist(), strict=True)
    ]
    assert torch.equal(integers.unpack(packed, len(codes)), codes.to(torch.uint8))


def test_errors_are_what_they_say():
    original = torch.tensor([3.0, -4.0])
    found = integers.errors(original, torch.tensor([3.0, -3.5]))
    assert found == pytest.approx({"mean": 0.25, "max": 0.5, "relative": 0.1, "snr_db": 20.0})
    assert integers.errors(original, original) == {"mean": 0, "max": 0, "relative": 0, "snr_db": math.inf}


def test_signal_to_noise_gains_six_decibels_a_bit():
    """Of a uniform signal: the textbook figure, 20 log₁₀ 2 = 6.02 dB a bit; from 7 to 127 steps, 25.2 dB."""
    tensor = torch.rand(100_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    snr = [integers.errors(tensor, integers.dequantize(integers.quantize_absmax(tensor, b)))["snr_db"] for b in (4, 8)]
    assert snr[1] - snr[0] == pytest.approx(20 * math.log10(127 / 7), abs=0.2)
    assert snr[1] - snr[0] != pytest.approx(20 * math.log10(128 / 8), abs=0.2)


@pytest.mark.parametrize("size", [1e-25, 1e-20, 1e20, 3e38])
def test_very_small_and_very_large_values_keep_their_proportions(size):
    tensor = torch.tensor([1.0, -0.5, 0.0, 0.25]) * size
    for quantized in (integers.quantize_absmax(tensor), integers.quantize_zero_point(tensor)):
        restored = integers.dequantize(quantized)
        assert restored.isfinite().all()
        assert integers.errors(tensor / size, restored / size)["relative"] < 0.01
    both = integers.quantize_zero_point(torch.tensor([3e38, -3e38, 0.0]))
    assert both.codes.tolist() == [127, -128, 0]


def test_values_too_small_for_a_scale_become_zero():
    tensor = torch.tensor([1e-37, 1e-39, -1e-39, 0.0])
    assert integers.quantize_absmax(tensor).codes.tolist() == [0, 0, 0, 0]


def test_zeros_stay_zeros():
    absmax, zero_point = integers.quantize_absmax(torch.zeros(70), per=64), integers.quantize_zero_point(torch.zeros(9))
    assert not absmax.codes.any()
    for quantized in (absmax, zero_point):
        assert not integers.dequantize(quantized).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: integers.quantize_absmax(t, 5), "bits must be 4 or 8"),
        (lambda t: integers.quantize_absmax(t, per="column"), '"tensor", "row"'),
        (lambda t: integers.quantize_absmax(t, per=[1]), '"tensor", "row"'),
        (lambda t: integers.quantize_absmax(t, per=True), '"tensor", "row"'),
        (lambda t: integers.errors(t, t[:, None]), "two tensors of one shape"),
        (lambda t: integers.errors(t[:0], t[:0]), "not empty"),
        (lambda t: integers.quantize_absmax(t[:0]), "not empty"),
        (lambda t: integers.quantize_zero_point(t / 0), "64 of 64 values"),
        (lambda t: integers.quantize_zero_point(t.long()), "float32, float16 or bfloat16"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(QwlibError, match=message):
        call(torch.zeros(64))
