"""Fake quantization is torch's, its gradient is the identity, and training through it finds weights on the grid."""

import pytest
import torch

from qwlib import QwlibError
from qwlib.lessons import fourbit, integers, straight_through


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


WAYS = {
    "zero point": lambda w: straight_through.fake_zero_point(w, 3, 8),
    "nf4": lambda w: straight_through.fake_nf4(w, 32),
    "absmax": lambda w: straight_through.fake(
        w, lambda w: integers.dequantize(integers.quantize_absmax(w, 4, per="row"))
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_the_identity(way):
    weight, g = random(6, 32).requires_grad_(), random(6, 32, seed=1)
    values = WAYS[way](weight)
    assert not torch.equal(values, weight)
    values.backward(g)
    assert torch.equal(weight.grad, g)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_is_faked_keeps_its_type_and_does_not_change_when_it_is_faked_again(way, dtype):
    once = WAYS[way](random(6, 32).to(dtype))
    assert once.dtype == dtype
    assert torch.allclose(WAYS[way](once), once, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_zero_points_are_torchs_fake_quantization(bits):
    weight = random(8, 64) + torch.linspace(-3, 3, 8)[:, None]
    scale, zero = straight_through.zero_points(weight, bits, 16)
    assert scale.shape == zero.shape == (8, 4)
    groups = weight.reshape(-1, 16)
    most = 2**bits - 1
    theirs = torch.fake_quantize_per_channel_affine(groups, scale.flatten(), zero.flatten().int(), 0, 0, most)
    got = straight_through.fake_zero_point(weight, bits, 16)
    assert torch.allclose(got, theirs.reshape(8, 64), rtol=0, atol=1e-6)
    other = torch.fake_quantize_per_channel_affine(groups, scale.flatten() * 1.001, zero.flatten().int(), 0, 0, most)
    assert not torch.allclose(got, other.reshape(8, 64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_grid_spans_its_group_with_zero_on_it(bits):
    weight = random(8, 64) + torch.linspace(-3, 3, 8)[:, None]
    weight[:, 5] = 0
    got = straight_through.fake_zero_point(weight, bits, 16)
    scale, _ = straight_through.zero_points(weight, bits, 16)
    assert not got[:, 5].any()
    # half a step by rounding a weight, and half a step by rounding the zero point
    assert ((got - weight).abs() <= 1.0001 * scale.repeat_interleave(16, dim=1)).all()
    assert ((got - weight).abs() > 0.4 * scale.repeat_interleave(16, dim=1)).any()
    assert all(len(group.unique()) <= 2**bits for group in got.reshape(-1, 16))
    assert torch.equal(straight_through.fake_zero_point(torch.zeros(2, 16), bits, 16), torch.zeros(2, 16))


def test_8_bits_are_those_of_the_lesson_on_integers():
    weight = random(8, 64) + 1
    theirs = integers.dequantize(integers.quantize_zero_point(weight, per=64))
    got = straight_through.fake_zero_point(weight, 8, 64)
    assert torch.allclose(got, theirs, rtol=0, atol=1e-6)
    assert not torch.allclose(got, weight, rtol=0, atol=1e-3)


def test_nf4_is_what_is_stored():
    weight = random(4, 64)
    assert torch.equal(straight_through.fake_nf4(weight), fourbit.rounded(weight, fourbit.normal_float()))


def test_values_are_exact_where_the_short_form_is_not():
    def signs(weight):
        return torch.where(weight < 0, -1, 1) * weight.abs().mean()

    weight = random(500)
    short = weight + (signs(weight) - weight).detach()
    assert torch.equal(straight_through.fake(weight, signs), signs(weight))
    assert len(short.unique()) > 2
    assert torch.allclose(short, signs(weight))


def test_the_clipped_gradient_is_torchs():
    scale, low, high = 0.25, -4, 3

    def quantize(weight):
        return (weight / scale).round().clamp(low, high) * scale

    weight, g = random(400), random(400, seed=1)
    ours, theirs, plain = (weight.clone().requires_grad_() for _ in range(3))
    limits = ((low - 0.5) * scale, (high + 0.5) * scale)
    values = straight_through.fake(ours, quantize, limits)
    values.backward(g)
    wanted = torch.fake_quantize_per_tensor_affine(theirs, scale, 0, low, high)
    wanted.backward(g)
    straight_through.fake(plain, quantize).backward(g)
    assert torch.allclose(values, wanted)
    assert torch.equal(ours.grad, theirs.grad)
    assert 0 < (ours.grad == 0).sum() < 400
    assert torch.equal(plain.grad, g)


def test_training_through_it_lowers_the_loss():
    target = random(4, 16, seed=1)
    # inputs of two directions and a little of all the others, so that errors can cancel
    x = random(256, 2, seed=3) @ random(2, 16, seed=2) + 0.1 * random(256, 16)
    weight = target.clone().requires_grad_()
    optimizer, seen = torch.optim.Adam([weight], lr=0.001), []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (x @ (straight_through.fake_zero_point(weight, 2, 16) - target).T).square().mean()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    assert seen[-1] < 0.5 * seen[0]


def test_without_it_there_is_no_gradient():
    weight, scale = random(4, 16).requires_grad_(), 0.5
    (weight / scale).round().mul(scale).sum().backward()
    assert not weight.grad.any()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: straight_through.fake_zero_point(random(2, 8), 0, 8), "1 to 8, not 0"),
        (lambda: straight_through.fake_zero_point(random(2, 8), 4.0, 8), "1 to 8, not 4.0"),
        (lambda: straight_through.fake_zero_point(random(2, 8), 4, 3), "divide the columns"),
        (lambda: straight_through.fake_zero_point(random(8), 4, 8), "divide the columns"),
        (lambda: straight_through.fake_zero_point(random(2, 8) / 0, 4, 8), "infinite"),
        (lambda: straight_through.fake_nf4(random(2, 8), 8), "block_size"),
        (lambda: straight_through.fake(random(2, 8), lambda weight: weight[0]), "keep the shape"),
    ],
)
def test_what_cannot_be_faked_is_refused_in_one_line(call, says):
    with pytest.raises(QwlibError, match=says) as refused:
        call()
    assert "\n" not in str(refused.value)
