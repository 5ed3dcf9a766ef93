"""4-bit layers that are multiplied in one launch. The launch itself is played here by the definition, on a CPU."""

import copy

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from qwlib.backends import bnb_ends
from qwlib.kernels import layers, linear4bit

COLUMNS = 64
ROWS_OUT = {"q_proj": 64, "k_proj": 32, "v_proj": 32}


class Attention(nn.Module):
    """Three layers that read the same input; k reads `other` where there is one."""

    def __init__(self, dtype=torch.bfloat16, bias=False):
        super().__init__()
        torch.manual_seed(0)
        settings = {"bias": bias, "compute_dtype": dtype, "quant_type": "nf4", "compress_statistics": False}
        for name, rows in ROWS_OUT.items():
            setattr(self, name, bnb.nn.Linear4bit(COLUMNS, rows, **settings))

    def forward(self, x, other=None):
        return torch.cat([self.q_proj(x), self.k_proj(x if other is None else other), self.v_proj(x)], -1)


@pytest.fixture
def launches(monkeypatch):
    """How many weights each launch had."""
    seen = []

    def multiply(x, packed, absmax, levels, gain, _, __, ___, bias, out_features, block_size):
        seen.append(len(packed))
        outs = []
        for place, (codes, scales, rows) in enumerate(zip(packed, absmax, out_features, strict=True)):
            shape = torch.Size((rows, x.shape[-1]))
            state = bnb.functional.QuantState(scales, shape=shape, code=levels, blocksize=block_size, dtype=x.dtype)
            weight = bnb_ends.dequantize_rows(codes, state, torch.arange(rows))
            outs.append(nn.functional.linear(x, weight, bias[place] if bias else None))
        return outs

    monkeypatch.setattr(linear4bit, "_multiply", multiply)
    monkeypatch.setattr(linear4bit, "obstacle", lambda *_: None)
    return seen


def taken(model, dtype=torch.bfloat16):
    model = model.to("cpu")  # quantizes
    assert layers.take(model, list(model.children()), dtype) == {}
    return model


X = torch.randn(3, COLUMNS, generator=torch.Generator().manual_seed(1)).bfloat16()


@pytest.mark.parametrize("bias", [False, True])
def test_one_launch_gives_what_three_give(launches, bias):
    model = taken(Attention(bias=bias))
    names, keys = dict(model.named_modules()).keys(), model.state_dict().keys()
    with torch.no_grad():
        together = model(X)
        assert launches == [3]
        for layer in model.children():
            layer.joined = None
        assert torch.equal(model(X), together)
    assert launches == [3, 1, 1, 1]
    assert names == {"", *ROWS_OUT}
    assert {key for key in keys if key.endswith("weight")} == {f"{name}.weight" for name in ROWS_OUT}


@pytest.mark.parametrize("kind", ["forward", "pre"])
def test_a_layer_with_hooks_is_multiplied_on_its_own(launches, kind):
    model, seen = taken(Attention()), []
    add = model.k_proj.register_forward_hook if kind == "forward" else model.k_proj.register_forward_pre_hook
    with torch.no_grad():
        wanted = model(X)
        hook = add(lambda *_: seen.append(1))
        assert torch.equal(model(X), wanted)
        assert launches == [3, 1, 1, 1]
        assert seen == [1]
        hook.remove()
        model(X)
    assert launches[-1] == 3


def test_a_layer_that_was_replaced_is_what_counts(launches):
    model = taken(Attention())

    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base

        def forward(self, x):
            return self.base(x) + 1

    with torch.no_grad():
        wanted = model(X)
        model.v_proj = Adapted(model.v_proj)
        got = model(X)
    assert launches == [3, 1, 1, 1]
    assert torch.equal(got[:, :96], wanted[:, :96])
    assert torch.equal(got[:, 96:], wanted[:, 96:] + 1)


def test_a_layer_whose_forward_is_replaced_is_told_and_left(launches):
    model = Attention().to("cpu")
    model.k_proj.forward = model.k_proj.forward
    assert layers.take(model, list(model.children()), torch.bfloat16) == {"something has replaced its forward": 1}
    assert [type(layer) is layers.OwnLinear4bit for layer in model.children()] == [True, False, True]


def test_each_layer_gets_the_result_of_its_own_input(launches):
    model = taken(Attention())
    alone = copy.deepcopy(model)
    for layer in alone.children():
        layer.joined = None
    other = X.flip(0)
    with torch.no_grad():
        assert torch.equal(model(X, other), alone(X, other))
        held = X.clone()
        before = model.q_proj(held)
        held.mul_(2)  # the other results were of what it was
        assert torch.equal(model.k_proj(held), alone.k_proj(held))
        assert torch.equal(model.q_proj(held), alone.q_proj(held))
        assert not torch.equal(model.q_proj(held), before)
        for name in ("q_proj", "q_proj", "v_proj"):
            layer = model.get_submodule(name)
            assert torch.equal(layer(X), alone.get_submodule(name)(X))


def test_compiled_as_a_whole_it_is_one_launch_too(launches):
    model = taken(Attention())
    with torch.inference_mode():
        wanted = model(X)
        compiled = torch.compile(model, fullgraph=True, dynamic=False, backend="eager")
        for _ in range(2):
            assert torch.equal(compiled(X), wanted)
    assert launches == [3, 3, 3]


def test_layers_that_are_not_alike_stay_apart(launches):
    model = Attention()
    settings = {"bias": False, "compute_dtype": torch.bfloat16, "compress_statistics": False}
    model.k_proj = bnb.nn.Linear4bit(COLUMNS, 32, quant_type="fp4", **settings)
    model = taken(model)
    assert all(layer.joined is None for layer in model.children())
    with torch.no_grad():
        model(X)
    assert launches == [1, 1, 1]


def test_many_rows_and_gradients_go_other_ways(launches, monkeypatch):
    model = taken(Attention())
    ways = []
    monkeypatch.setattr(
        linear4bit, "dequantize", lambda weight, dtype: ways.append("16 bits") or torch.zeros(64, COLUMNS).to(dtype)
    )
    monkeypatch.setattr(bnb, "matmul_4bit", lambda x, *_, **__: ways.append("bitsandbytes") or x)
    many = torch.zeros(linear4bit.MOST + 1, COLUMNS).bfloat16()
    model.q_proj(many)
    model.q_proj(X.clone().requires_grad_())
    assert ways == ["16 bits", "bitsandbytes"]
    assert launches == []
    model.q_proj(many[1:])
    assert launches == [3]


def test_what_can_t_be_multiplied_stays_with_its_reason(monkeypatch):
    model = Attention().to("cpu")
    monkeypatch.setattr(linear4bit, "obstacle", lambda *_: "no")
    assert layers.take(model, list(model.children()), torch.bfloat16) == {"no": 3}
    assert {type(layer) for layer in model.children()} == {bnb.nn.Linear4bit}
