"""The mean magnitude is the best scale of signs, ternary weights are BitNet's, and five trits fit a byte."""

import math

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from qwlib import QwlibError
from qwlib.lessons import one_bit


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_scale_of_signs_has_the_least_squared_error():
    weight = random(5, 40) * torch.arange(1, 6)[:, None]
    codes, scales = one_bit.binary(weight)
    assert codes.dtype == torch.int8
    assert set(codes.unique().tolist()) == {-1, 1}
    assert (codes * weight >= 0).all()
    assert scales.shape == (5, 1)
    for row, signs, scale in zip(weight.double(), codes, scales, strict=True):
        found = minimize_scalar(lambda s, row=row, signs=signs: (row - s * signs).square().sum().item(), (0, 1))
        assert scale.item() == pytest.approx(found.x, rel=1e-5)
        # the root mean square, which is the scale of a normal distribution, is another
        assert row.square().mean().sqrt().item() != pytest.approx(found.x, rel=1e-2)


def test_no_other_signs_are_better():
    weight = random(1, 8)
    codes, scale = one_bit.binary(weight)
    ours = (weight - codes * scale).square().sum().item()
    others = 2.0 * (torch.arange(256)[:, None] >> torch.arange(8) & 1) - 1
    best = (others @ weight.T) / 8
    errors = (weight - others * best).square().sum(1)
    assert ours == pytest.approx(errors.min().item(), rel=1e-5)
    assert (errors < 1.001 * ours).sum() == 2  # these signs, and all of them turned round with a negative scale


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6), st.integers(1, 30), st.integers(0, 99), st.sampled_from(["tensor", "row"]))
def test_ternary_codes_are_those_of_the_paper(rows, columns, seed, per):
    weight = random(rows, columns, seed=seed)
    codes, scales = one_bit.ternary(weight, per)
    plain = weight.double().numpy()
    mean = numpy.abs(plain).mean(axis=1 if per == "row" else None, keepdims=True)
    # the nearest of -1, 0 and 1: beyond half the scale it is a sign
    wanted = numpy.where(numpy.abs(plain) > mean / 2, numpy.sign(plain), 0)
    assert numpy.array_equal(codes.numpy(), wanted)
    assert scales.shape == (1 if per == "tensor" else rows, 1)
    assert numpy.allclose(scales.numpy(), mean, rtol=1e-5)


def test_ternary_of_a_tensor_and_of_rows_differ_where_rows_are_of_different_sizes():
    weight = random(2, 50) * torch.tensor([[1.0], [9.0]])
    whole, each = ((codes != 0).float().mean(1) for codes, _ in map(one_bit.ternary, [weight] * 2, ["tensor", "row"]))
    assert whole[0] < 0.1 < each[0]
    codes, scales = one_bit.ternary(torch.zeros(2, 3))
    assert not codes.any()
    assert not scales.any()


def test_ternary_is_nearer_than_signs_where_weights_are_normal():
    weight = random(64, 256)
    both = one_bit.binary(weight), one_bit.ternary(weight, "row")
    signs, trits = (((weight - codes * scales).norm() / weight.norm()).item() for codes, scales in both)
    # the squared error of signs is 1 - 2 / pi where weights are normal
    assert signs**2 == pytest.approx(1 - 2 / math.pi, rel=0.02)
    assert trits < 0.9 * signs


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-1, 1), max_size=43))
def test_trits_come_back_from_bytes(trits):
    values = torch.tensor(trits, dtype=torch.int8)
    packed = one_bit.pack_trits(values)
    assert packed.dtype == torch.uint8
    assert len(packed) == math.ceil(len(trits) / 5)
    assert one_bit.unpack_trits(packed, len(trits)).tolist() == trits
    # read as numbers in base 3 by python, the last digit first
    for number, at in zip(packed.tolist(), range(0, len(trits), 5), strict=True):
        digits = "".join(str(trit + 1) for trit in trits[at : at + 5]).ljust(5, "1")
        assert number == int(digits[::-1], 3)


def test_all_bytes_below_243_are_used_once():
    every = torch.arange(243, dtype=torch.uint8)
    assert torch.equal(one_bit.pack_trits(one_bit.unpack_trits(every, 5 * 243)), every)
    assert one_bit.TRIT_BITS == 1.6 > math.log2(3)
    weight = random(10, 100)
    assert 8 * one_bit.pack_trits(one_bit.ternary(weight)[0]).nbytes == 1.6 * weight.numel()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: one_bit.binary(random(8)), "a matrix"),
        (lambda: one_bit.binary(random(2, 8) / 0), "infinite"),
        (lambda: one_bit.ternary(random(2, 8), "column"), '"tensor" or "row"'),
        (lambda: one_bit.ternary(torch.ones(2, 2, dtype=torch.int8)), "float32"),
        (lambda: one_bit.pack_trits(torch.tensor([0, 2])), "codes of ternary"),
        (lambda: one_bit.pack_trits(torch.tensor([0.5])), "codes of ternary"),
        (lambda: one_bit.unpack_trits(torch.tensor([243], dtype=torch.uint8), 5), "below 243"),
        (lambda: one_bit.unpack_trits(torch.tensor([3]), 5), "uint8"),
        (lambda: one_bit.unpack_trits(torch.tensor([3], dtype=torch.uint8), 6), "up to 5 trits, not 6"),
    ],
)
def test_what_has_no_trits_is_refused_in_one_line(call, says):
    with pytest.raises(QwlibError, match=says) as refused:
        call()
    assert "\n" not in str(refused.value)
