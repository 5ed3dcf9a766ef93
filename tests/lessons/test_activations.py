"""8-bit activations are torch's fake quantization, their product is exact, and outliers and drift do what the lesson says."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qwlib import QwlibError
from qwlib.lessons import activations, integers


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def off(x: torch.Tensor, quantized) -> float:
    return integers.errors(x, integers.dequantize(quantized))["relative"]


def test_per_token_is_torchs_fake_quantization_by_row():
    x = random(12, 64) * torch.arange(1, 13)[:, None]
    scale = x.abs().amax(1) / 127
    zero = torch.zeros(12, dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(x, scale, zero, 0, -127, 127)
    got = integers.dequantize(activations.per_token(x))
    assert torch.allclose(got, theirs, rtol=0, atol=1e-6)
    other = torch.fake_quantize_per_channel_affine(x, scale * 1.001, zero, 0, -127, 127)
    assert not torch.allclose(got, other, rtol=0, atol=1e-6)


def test_static_is_torchs_fake_quantization_of_the_tensor():
    x = random(3, 4, 64)
    scale = activations.calibrated(x[:2])
    assert scale == pytest.approx(x[:2].abs().max().item() / 127, rel=1e-6)
    got = integers.dequantize(activations.static(3 * x, scale))
    theirs = torch.fake_quantize_per_tensor_affine(3 * x, scale, 0, -127, 127)
    assert got.shape == x.shape
    assert torch.allclose(got, theirs, rtol=0, atol=1e-6)
    assert got.max() == pytest.approx(127 * scale)
    assert not torch.allclose(got, 3 * x, rtol=0, atol=0.1)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 9), st.integers(1, 40), st.integers(1, 9), st.sampled_from(["row", "tensor"]), st.integers(0, 99))
def test_the_product_is_that_of_what_is_read_back(tokens, inputs, outputs, per, seed):
    x, weight = random(tokens, inputs, seed=seed), random(outputs, inputs, seed=seed + 1)
    w = integers.quantize_absmax(weight, per=per)
    for codes in (activations.per_token(x), activations.static(x, activations.calibrated(x))):
        wanted = integers.dequantize(codes).double() @ integers.dequantize(w).double().T
        got = activations.int8_product(codes, w)
        assert got.shape == (tokens, outputs)
        assert torch.allclose(got.double(), wanted, rtol=1e-5, atol=1e-5)


def test_sums_are_exact_where_those_of_float32_are_not():
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(120, 128, (8, 4001), generator=generator).float() for _ in range(2))
    x[:, 0] = weight[:, 0] = 127  # so that the scales are 1
    sums = x.numpy().astype(numpy.int64) @ weight.numpy().astype(numpy.int64).T
    assert sums.max() > 2**24
    got = activations.int8_product(activations.per_token(x), integers.quantize_absmax(weight, per="row"))
    assert numpy.array_equal(got.numpy(), sums.astype(numpy.float32))
    half = activations.int8_product(activations.per_token(x / 2), integers.quantize_absmax(weight, per="row"))
    assert torch.equal(half, got / 2)


def test_an_outlier_makes_all_channels_coarse():
    x = random(200, 64)
    before = off(x, activations.per_token(x))
    x[:, 7] *= 100
    rest = torch.arange(64) != 7
    quantized = activations.per_token(x)
    restored = integers.dequantize(quantized)[:, rest]
    after = integers.errors(x[:, rest].contiguous(), restored.contiguous())["relative"]
    # from its definition, in float64
    plain = x.double().numpy()
    step = numpy.abs(plain).max(axis=1, keepdims=True) / 127
    wanted = (numpy.rint(plain / step) * step - plain)[:, rest.numpy()]
    assert after == pytest.approx(numpy.linalg.norm(wanted) / numpy.linalg.norm(plain[:, rest.numpy()]), rel=1e-3)
    assert after > 15 * before


def test_a_scale_for_each_token_stays_right_under_drift_and_a_static_one_clips():
    calibration = random(100, 64)
    scale = activations.calibrated(calibration)
    for size in (0.01, 1, 30):
        x = size * random(100, 64, seed=1)
        dynamic, static = off(x, activations.per_token(x)), off(x, activations.static(x, scale))
        assert dynamic < 0.01
        assert dynamic < static
        # far from calibration either steps are too coarse or values are clipped
        assert (static > 0.05) == (size != 1)
    assert (activations.static(30 * calibration, scale).codes.abs() == 127).float().mean() > 0.5


def test_outliers_are_channels_over_the_median_one():
    x = random(50, 4, 31)
    x[..., 3] *= 40
    found = activations.outliers(x)
    largest = numpy.abs(x.numpy()).max(axis=(0, 1))
    assert numpy.allclose(found.numpy(), largest / numpy.median(largest), rtol=1e-6)
    assert found.argmax() == 3
    assert found[3] > 20 > 2 > found[torch.arange(31) != 3].max()


def test_inputs_are_what_the_layer_reads():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
    x = random(2, 5, 8)
    got = activations.inputs(model, "2", lambda: [model(x[:1]), model(x[1:])])
    assert torch.equal(got, model[:2](x).reshape(10, 6))
    assert not got.requires_grad
    assert not model[2]._forward_pre_hooks
    with pytest.raises(QwlibError, match="was not called"):
        activations.inputs(model, "2", lambda: None)


X, W = activations.per_token(random(3, 8)), integers.quantize_absmax(random(4, 8), per="row")


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: activations.per_token(random(3, 8), bits=5), "4 or 8"),
        (lambda: activations.static(random(3, 8), 0.0), "calibrated"),
        (lambda: activations.static(random(3, 8), float("nan")), "above zero"),
        (lambda: activations.static(random(0, 8), 1.0), "empty"),
        (lambda: activations.static(random(3, 8) / 0, 1.0), "infinite"),
        (lambda: activations.int8_product(X, integers.quantize_absmax(random(4, 6))), "equally many"),
        (lambda: activations.int8_product(X, integers.quantize_zero_point(random(4, 8), per="row")), "zero point"),
        (lambda: activations.int8_product(X, integers.quantize_absmax(random(4, 8), per=4)), "one scale for the row"),
        (lambda: activations.int8_product(X, integers.quantize_absmax(random(4, 8), per=16)), "one scale for the row"),
        (lambda: activations.outliers(torch.zeros(2, 8)), "half of the channels"),
    ],
)
def test_what_cannot_be_multiplied_is_refused_in_one_line(call, says):
    with pytest.raises(QwlibError, match=says) as refused:
        call()
    assert "\n" not in str(refused.value)


def test_integers_of_rows_fit():
    assert activations.int8_product(X, W).shape == (3, 4)
