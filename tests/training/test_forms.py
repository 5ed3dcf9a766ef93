"""The forms of a student: each gives the values that its format stores, and its gradients are the ones that are meant."""

import copy
import itertools

import bitsandbytes.functional as bnb
import pytest
import torch
from scipy import integrate, optimize, stats
from torch import nn

from qwlib import QwlibError
from qwlib.lessons import pruning
from qwlib.training import forms, pruned, rounding, student


@pytest.fixture(scope="module")
def weight():
    """Rows with very different scales, 48 × 192."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(48, 192, generator=draw) * torch.rand(48, 1, generator=draw).exp() / 20


def rounded_by(name: str, weight):
    return forms._rounding(forms.find(name), weight, torch.ones(weight.shape[1]))


def stored(weight, quant_type: str):
    packed, state = bnb.quantize_4bit(
        weight.bfloat16().reshape(-1, 64), blocksize=64, compress_statistics=True, quant_type=quant_type
    )
    return bnb.dequantize_4bit(packed, state).reshape(weight.shape).float()


@pytest.mark.parametrize("rows", [48, 1])
def test_nf4_is_what_bitsandbytes_stores(weight, rows):
    got, wanted = rounded_by("nf4-dq", weight)(weight[:rows]), stored(weight[:rows], "nf4")
    # bitsandbytes rounds a scale before it looks for its 8-bit code on a CPU, so that a few scales have the next one
    assert (got == wanted).double().mean() > 0.98
    assert (got - wanted).abs().max() < 0.02 * wanted.abs().max()
    assert (got == stored(weight[:rows], "fp4")).double().mean() < 0.3


def test_nf4_takes_weights_that_are_no_multiple_of_a_block():
    odd = torch.linspace(-1, 1, 7 * 9).reshape(7, 9)
    assert (rounded_by("nf4-dq", odd)(odd) - odd).abs().max() < 0.2
    zero = torch.zeros(4, 64)
    assert not rounded_by("nf4-dq", zero)(zero).any()


def test_int4_is_torch_s_fake_quantization(weight):
    groups = weight.reshape(-1, 64)
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scale = ((high - low) / 15).bfloat16().float()
    zero = (-low / scale).round()
    wanted = torch.fake_quantize_per_channel_affine(groups, scale, zero.float(), 0, 0, 15).reshape(weight.shape)
    got = rounded_by("int4", weight)(weight)
    assert torch.equal(got, wanted.bfloat16().float())
    assert not torch.equal(got, (1.01 * wanted).bfloat16().float())


@pytest.mark.parametrize(
    ("name", "levels", "bits"), [("int2", 4, 2.25), ("ternary", 3, 1.6 + 1 / 12), ("binary", 2, 1 + 1 / 12)]
)
def test_learnt_scales_stand_between_few_levels(weight, name, levels, bits):
    form, made = forms.find(name), rounded_by(name, weight)
    values = made(weight).detach()
    assert forms.levels_found(values, form.group) == levels
    told = forms.counted([values], form)
    assert told == {"levels": levels, "zeros": told["zeros"], "bits_per_weight": pytest.approx(bits)}
    assert (told["zeros"] > 0.2) == (name == "ternary")
    assert torch.equal(values, values.bfloat16().float())
    with pytest.raises(QwlibError, match="please report"):
        forms.counted([weight], form)


@pytest.mark.parametrize("levels", rounding.BEST_STEPS)
def test_the_first_scales_are_the_best_for_a_normal_distribution(levels):
    def error(step: float) -> float:
        places = [step * (number - (levels - 1) / 2) for number in range(levels)]
        ends = [-9, *((a + b) / 2 for a, b in itertools.pairwise(places)), 9]
        parts = zip(places, ends, ends[1:], strict=False)
        return sum(integrate.quad(lambda x, p=p: (x - p) ** 2 * stats.norm.pdf(x), a, b)[0] for p, a, b in parts)

    best = optimize.minimize_scalar(error, bounds=(0.3, 3), method="bounded").x
    assert rounding.BEST_STEPS[levels] == pytest.approx(best, abs=1e-3)
    assert rounding.BEST_STEPS[levels] != pytest.approx(1.01 * best, abs=1e-3)


@pytest.mark.parametrize("name", ["nf4-dq", "int4"])
def test_the_gradient_of_rounded_values_is_the_weight_s(weight, name):
    leaf, g = weight.clone().requires_grad_(), torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    rounded_by(name, leaf)(leaf).backward(g)
    assert torch.equal(leaf.grad, g)


@pytest.mark.parametrize("name", ["int2", "ternary", "binary"])
def test_gradients_of_learnt_scales_are_lsq_s(weight, name):
    """The formula of arXiv 1902.08153, section 2.1, for each group: what a weight gives to its scale."""
    form, made, leaf = forms.find(name), rounded_by(name, weight), weight.clone().requires_grad_()
    g = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    made(leaf).backward(g)
    scale = made.scale.detach().bfloat16().float()
    places = weight.reshape(len(scale), -1) / scale
    limit = (form.levels - 1) / 2
    beyond = places.abs() > limit
    code = (made(weight).detach().reshape(places.shape) / scale * 2).round() / 2
    wanted = (g.reshape(places.shape) * torch.where(beyond, code, code - places)).sum(1, keepdim=True)
    # the sum is over values of either sign, and gradients are rounded to bfloat16 on their way
    size = (g.reshape(places.shape) * places).square().sum(1, keepdim=True).sqrt()
    assert ((made.scale.grad - wanted) / size).abs().max() < 0.02
    assert ((made.scale.grad - 1.3 * wanted) / size).abs().max() > 0.02
    assert torch.equal(leaf.grad.reshape(places.shape) == 0, beyond | (g.reshape(places.shape) == 0))


def test_layers_are_dressed_but_for_the_head_and_get_their_values(shallow32):
    model = copy.deepcopy(shallow32.model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    form = forms.find("ternary")
    forms.dress(model, form)
    layers = [name for name, module in model.named_modules() if type(module) is rounding.RoundedLinear]
    assert len(layers) == 3 * 7
    assert model.get_output_embeddings() not in [model.get_submodule(name) for name in layers]
    ids = torch.arange(8)[None]
    with torch.no_grad():
        scores = model(ids).logits
    assert len(forms.undress(model, form)) == len(layers)
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, scores, atol=1e-4)
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {name.removesuffix(".weight") for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(layers)
    assert not any(type(module) is rounding.RoundedLinear for module in model.modules())


def test_what_is_saved_for_nf4_is_not_rounded(shallow32):
    model = copy.deepcopy(shallow32.model)
    form, layer = forms.find("nf4-dq"), model.model.layers[0].mlp.up_proj
    before = layer.weight.detach().clone()
    forms.dress(model, form)
    values = forms.undress(model, form)
    assert torch.equal(layer.weight, before)
    assert forms.counted(values, form)["levels"] <= 16
    assert isinstance(layer, nn.Linear)


def test_unknown_forms_are_told_with_those_that_there_are():
    with pytest.raises(QwlibError, match=r"int3.*int2|int2.*int3"):
        forms.find("int3")


@pytest.mark.parametrize(("name", "zeros", "bits"), [("sparse-50", 0.5, 9), ("sparse-75", 0.75, 5), ("2:4", 0.5, 9)])
def test_pruned_weights_are_zero_and_get_no_gradient(weight, name, zeros, bits):
    norms = torch.rand(192, generator=torch.Generator().manual_seed(2)) + 0.1
    form, leaf = forms.find(name), weight.clone().requires_grad_()
    values = forms._rounding(form, leaf, norms)(leaf)
    values.sum().backward()
    scores = weight.abs() * norms
    assert torch.equal(values != 0, leaf.grad != 0)
    if name == "2:4":
        assert (scores.reshape(-1, 4).topk(2).values.sum() - (scores * (values != 0)).sum()).abs() < 1e-3
    else:
        assert torch.equal(values != 0, pruning.wanda(weight, norms, zeros))
    assert forms.counted([values.detach()], form) == {"zeros": zeros, "bits_per_weight": pytest.approx(bits, rel=0.01)}
    with pytest.raises(QwlibError, match="please report"):
        forms.counted([weight], forms.find("2:4"))


def test_norms_are_those_of_each_layer_s_inputs(shallow32):
    ids = torch.arange(60).reshape(4, 15)
    found, layer = pruned.norms(shallow32.model, ids), "model.layers.1.mlp.down_proj"
    seen = []
    hook = shallow32.model.get_submodule(layer).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        shallow32.model(ids)
    hook.remove()
    wanted = torch.cat([each.flatten(0, 1) for each in seen]).norm(dim=0)
    assert len(found) == 3 * 7
    assert torch.allclose(found[layer], wanted, rtol=1e-3)
    assert not torch.allclose(found[layer], 1.01 * wanted, rtol=1e-3)


def test_the_layer_that_changes_least_is_dropped(shallow32):
    model = copy.deepcopy(shallow32.model)
    ids = torch.arange(60).reshape(4, 15)
    with torch.no_grad():
        # a layer that gives what it is given
        for module in (model.model.layers[1].self_attn.o_proj, model.model.layers[1].mlp.down_proj):
            module.weight.zero_()
        scores = model(ids).logits
    influence = pruned.influences(model, ids)
    assert influence[1] == pytest.approx(0, abs=1e-5)
    assert min(influence[0], influence[2]) > 1e-3
    student.shaped(model, forms.find("layers-2"), model, ids)
    assert model.config.num_hidden_layers == len(model.model.layers) == 2
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, scores, atol=1e-3)
        # one token after the other, which needs a cache of two layers
        cached = model(ids[:, 9:], past_key_values=model(ids[:, :9]).past_key_values).logits
    assert torch.allclose(cached, scores[:, 9:], atol=1e-3)
    with pytest.raises(QwlibError, match="keep from 2 to 1"):
        student.shaped(model, forms.find("layers-2"), model, ids)
