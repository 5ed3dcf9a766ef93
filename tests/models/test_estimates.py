"""Predictions against what loading measures."""

import functools
import json

import pytest
import torch
import transformers
from conftest import TINY
from typer.testing import CliRunner

import qwlib
from qwlib import __main__ as main
from qwlib import schemes
from qwlib.models import catalog, estimates


def off(estimate, lm) -> float:
    measured = lm.memory["weights_bytes"] + lm.memory["state_bytes"]
    return abs(estimate.weights_bytes + estimate.state_bytes - measured) / measured


@pytest.fixture(scope="module")
def row_of(tiny_folder):
    """A function: a kind of random checkpoint, or a model's name → its row, which keeps its meta models for all schemes."""
    return functools.cache(lambda name: catalog.find(tiny_folder(name) if name in TINY else name))


@pytest.mark.parametrize("scheme", schemes.BUILT_IN)
def test_the_estimate_is_what_loading_measures(row_of, scheme):
    row = row_of("smollm2-135m")
    with qwlib.load(row, scheme) as lm:
        estimate = qwlib.estimate(row, scheme)
        assert off(estimate, lm) < 0.01
        assert estimate.state_bytes == pytest.approx(lm.memory["state_bytes"], rel=0.01)
        others = [qwlib.estimate(row, other) for other in ("fp32", "int8", "nf4-all") if other != scheme]
        assert all(off(other, lm) > 0.01 for other in others)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("scheme", schemes.BUILT_IN)
def test_the_estimate_holds_for_every_architecture(row_of, kind, scheme):
    row = row_of(kind)
    with qwlib.load(row, scheme) as lm:
        whole, parts = qwlib.estimate(row, scheme), estimates.breakdown(row, scheme)
        assert off(whole, lm) < 0.01
        assert off(qwlib.estimate(row, "fp32" if scheme != "fp32" else "bf16"), lm) > 0.01
        assert sum(parts.values()) == whole.weights_bytes + whole.state_bytes
        assert parts["scales and code books"] == whole.state_bytes
        embedding, head = lm.model.get_input_embeddings(), lm.model.get_output_embeddings()
        linear = [m for m in lm.model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        assert parts["linear layers"] == sum(m.weight.nbytes for m in linear)
        one = "embedding and head" in parts
        assert parts["embedding and head" if one else "head"] == head.weight.nbytes
        assert one or parts["embedding"] == embedding.weight.nbytes


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox"])
def test_the_cache_is_what_generation_fills(row_of, kind):
    """gemma2's window of 16 is shorter than the 40 tokens: its local layers must be counted short."""
    row = row_of(kind)
    with qwlib.load(row, "bf16") as lm:
        ids = torch.randint(0, 1000, (3, 40))
        with torch.inference_mode():
            layers = lm.model(ids.to(lm.device), use_cache=True).past_key_values.layers
        real = sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))
        assert qwlib.estimate(row, "bf16", batch=3, context=40).kv_bytes == real
        assert qwlib.estimate(row, "bf16", batch=2, context=40).kv_bytes != real


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "pad_token_id": 2},
        {
            "model_type": "lfm2",
            "hidden_size": 64,
            "num_key_value_heads": 2,
            "num_hidden_layers": 2,
            "layer_types": ["conv", "full_attention"],
        },
    ],
)
def test_models_that_look_for_padding_have_an_estimate(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 320, "num_attention_heads": 4} | config))
    assert qwlib.estimate(str(tmp_path), "nf4", context=7).kv_bytes > 0


def test_published_savings_are_reproduced_from_shapes(row_of):
    """Llama-3.1-8B: 16.06 GB, and 4.14 GB with everything in NF4 + DQ (shares of 64.5 and 74.2 % saved)."""

    def gb(scheme):
        e = qwlib.estimate(row_of("llama-3.1-8b"), scheme)
        return (e.weights_bytes + e.state_bytes) / 1e9

    assert gb("bf16") == pytest.approx(16.06, abs=0.005)
    assert 1 - gb("nf4-dq") / gb("bf16") == pytest.approx(0.645, abs=0.001)
    assert 1 - gb("nf4-all") / gb("bf16") == pytest.approx(0.742, abs=0.001)


def test_a_state_space_model_has_an_estimate_too(tmp_path):
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 1000, "state_size": 8}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"} | shape))
    assert qwlib.estimate(str(tmp_path), "nf4").weights_bytes > 0


def test_experts_of_a_mixture_stay_in_16_bits_and_the_estimate_says_so(tmp_path, row_of):
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.MixtralConfig(vocab_size=1001, num_key_value_heads=2, num_local_experts=4, **shape)
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    four, sixteen = (qwlib.estimate(str(tmp_path), scheme) for scheme in ("nf4", "bf16"))
    assert experts / four.parameters < estimates.outside(str(tmp_path)) < experts / four.parameters + 0.01  # and norms
    assert 8 * experts * 2 / four.parameters < four.held_bits
    assert sixteen.held_bits == pytest.approx(16, abs=0.01)
    assert estimates.outside(row_of("smollm2-135m")) < 0.001
    assert qwlib.estimate(row_of("smollm2-135m"), "nf4").held_bits == pytest.approx(7.1, abs=0.2)  # a large embedding
    done = CliRunner().invoke(main.app, ["estimate", str(tmp_path), "nf4"]).stdout
    assert f"{four.held_bits:.2f}" in done
    assert f"{estimates.outside(str(tmp_path)):.0%} of the parameters are outside the linear layers" in done
    assert "no linear layer" not in CliRunner().invoke(main.app, ["estimate", "opt-350m", "nf4"]).stdout


def test_linear_shapes_are_those_that_adapters_are_put_over():
    attention, mlp = [(576, 576), (192, 576), (192, 576), (576, 576)], [(1536, 576), (1536, 576), (576, 1536)]
    assert estimates.linear_shapes("smollm2-135m") == 30 * (attention + mlp)
    assert (50432, 6144) not in estimates.linear_shapes("gpt-neox-20b")  # its head is a matrix of its own
    assert len(estimates.linear_shapes("gpt-neox-20b")) == 44 * 4
