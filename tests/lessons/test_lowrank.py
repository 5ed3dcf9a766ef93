"""A LoRA layer by hand is peft's, its gradients are autograd's, and codes move where they should."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from qwlib.lessons import fourbit, lowrank

RANK, ALPHA = 4, 12


@pytest.fixture(scope="module")
def drawn():
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (5, 64), "weight": (48, 64), "a": (RANK, 64), "b": (48, RANK)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_the_layer_is_peft_s(drawn):
    plain = nn.Linear(64, 48, bias=False)
    plain.weight.data = drawn["weight"]
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["layer"])
    theirs = inject_adapter_in_model(settings, nn.ModuleDict({"layer": plain}))["layer"]
    theirs.lora_A["default"].weight.data, theirs.lora_B["default"].weight.data = drawn["a"], drawn["b"]
    wanted = theirs(drawn["x"])
    assert torch.allclose(lowrank.forward(**drawn, scale=ALPHA / RANK), wanted, atol=1e-3)
    assert not torch.allclose(lowrank.forward(**drawn, scale=1.01 * ALPHA / RANK), wanted, atol=1e-3)


def test_its_gradients_are_autograd_s(drawn):
    leaves = {name: each.double().requires_grad_(name != "weight") for name, each in drawn.items()}
    y = lowrank.forward(**leaves, scale=3.0)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double()
    wanted = dict(zip("xab", torch.autograd.grad(y, [leaves[name] for name in "xab"], g), strict=True))
    plain = {name: each.detach() for name, each in leaves.items()}
    for name, got in lowrank.backward(g, **plain, scale=3.0).items():
        assert torch.allclose(got, wanted[name], rtol=1e-9)
    for name, got in lowrank.backward(g, **plain, scale=3.001).items():
        assert not torch.allclose(got, wanted[name], rtol=1e-5), name


def test_only_b_has_a_gradient_where_b_is_zero(drawn):
    found = lowrank.backward(torch.ones(5, 48), **drawn | {"b": torch.zeros(48, RANK)})
    assert not found["a"].any()
    assert found["b"].any()


def test_numbers_are_those_of_both_matrices(drawn):
    assert lowrank.numbers([(48, 64)], RANK) == drawn["a"].numel() + drawn["b"].numel()
    assert lowrank.numbers([(48, 64), (64, 48)], 1) == 2 * (48 + 64)


def test_shares_are_what_the_nearest_matrix_of_a_rank_has(drawn):
    weight = drawn["weight"]
    shares = lowrank.shares(weight)
    assert len(shares) == 48
    assert shares[-1].item() == pytest.approx(1)
    u, values, v = torch.linalg.svd(weight, full_matrices=False)
    nearest = (u[:, :5] * values[:5]) @ v[:5]
    assert shares[4].item() == pytest.approx(1 - ((weight - nearest).norm() / weight.norm()).item() ** 2, abs=1e-5)
    product = drawn["b"] @ drawn["a"]
    assert lowrank.shares(product)[RANK - 1].item() == pytest.approx(1, abs=1e-6)
    assert lowrank.shares(product)[RANK - 2] < 0.97


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_codes_move_with_a_step_of_half_a_level_and_not_with_less(kind):
    levels = fourbit.code_book(kind).unique()  # from -1 to 1, so the scale of the block is 1
    inner = (levels < 1).float()
    narrow, wide = levels.diff().min() / 2, levels.diff().max() / 2
    assert lowrank.codes_moved(levels, 0.99 * narrow * inner, kind) == 0
    assert lowrank.codes_moved(levels, 1.01 * wide * inner, kind) == pytest.approx(inner.mean().item())
    assert 0 < lowrank.codes_moved(levels, 0.9 * wide * inner, kind) < inner.mean()


def test_the_gradient_of_one_layer_is_that_of_the_whole_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 1))
    x = torch.randn(3, 8)
    (wanted,) = torch.autograd.grad(model(x).sum(), [model[0].weight])
    weight, gradient = lowrank.gradient(model, "0", lambda: model(x).sum())
    assert torch.equal(weight, model[0].weight)
    assert torch.allclose(gradient, wanted)
    assert [name for name, each in model.named_parameters() if each.requires_grad] == ["0.weight"]
