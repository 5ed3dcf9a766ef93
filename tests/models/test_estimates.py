"""Predictions against what loading measures."""

import pytest
import torch
from conftest import TINY

import qwlib
from qwlib import schemes
from qwlib.models import estimates


def off(estimate, lm) -> float:
    measured = lm.memory["weights_bytes"] + lm.memory["state_bytes"]
    return abs(estimate.weights_bytes + estimate.state_bytes - measured) / measured


@pytest.mark.parametrize("scheme", schemes.BUILT_IN)
def test_the_estimate_is_what_loading_measures(scheme):
    with qwlib.load("smollm2-135m", scheme) as lm:
        estimate = qwlib.estimate("smollm2-135m", scheme)
        assert off(estimate, lm) < 0.01
        assert estimate.state_bytes == pytest.approx(lm.memory["state_bytes"], rel=0.01)
        others = [qwlib.estimate("smollm2-135m", other) for other in ("fp32", "int8", "nf4-all") if other != scheme]
        assert all(off(other, lm) > 0.01 for other in others)


@pytest.mark.parametrize("kind", TINY)
@pytest.mark.parametrize("scheme", schemes.BUILT_IN)
def test_the_estimate_holds_for_every_architecture(tiny_folder, kind, scheme):
    folder = tiny_folder(kind)
    with qwlib.load(folder, scheme) as lm:
        whole, parts = qwlib.estimate(folder, scheme), estimates.breakdown(folder, scheme)
        assert off(whole, lm) < 0.01
        assert off(qwlib.estimate(folder, "fp32" if scheme != "fp32" else "bf16"), lm) > 0.01
        assert sum(parts.values()) == whole.weights_bytes + whole.state_bytes
        assert parts["scales and code books"] == whole.state_bytes
        embedding, head = lm.model.get_input_embeddings(), lm.model.get_output_embeddings()
        linear = [m for m in lm.model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        assert parts["linear layers"] == sum(m.weight.nbytes for m in linear)
        one = "embedding and head" in parts
        assert parts["embedding and head" if one else "head"] == head.weight.nbytes
        assert one or parts["embedding"] == embedding.weight.nbytes


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox"])
def test_the_cache_is_what_generation_fills(tiny_folder, kind):
    """gemma2's window of 16 is shorter than the 40 tokens: its local layers must be counted short."""
    folder = tiny_folder(kind)
    with qwlib.load(folder, "bf16") as lm:
        ids = torch.randint(0, 1000, (3, 40))
        with torch.inference_mode():
            layers = lm.model(ids.to(lm.device), use_cache=True).past_key_values.layers
        real = sum(t.nbytes for layer in layers for t in (layer.keys, layer.values))
        assert qwlib.estimate(folder, "bf16", batch=3, context=40).kv_bytes == real
        assert qwlib.estimate(folder, "bf16", batch=2, context=40).kv_bytes != real


def test_published_savings_are_reproduced_from_shapes():
    """Llama-3.1-8B: 16.06 GB, and 4.14 GB with everything in NF4 + DQ (shares of 64.5 and 74.2 % saved)."""

    def gb(scheme):
        e = qwlib.estimate("llama-3.1-8b", scheme)
        return (e.weights_bytes + e.state_bytes) / 1e9

    assert gb("bf16") == pytest.approx(16.06, abs=0.005)
    assert 1 - gb("nf4-dq") / gb("bf16") == pytest.approx(0.645, abs=0.001)
    assert 1 - gb("nf4-all") / gb("bf16") == pytest.approx(0.742, abs=0.001)


def test_a_state_space_model_has_an_estimate_too(tmp_path):
    import json

    shape = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 1000, "state_size": 8}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"} | shape))
    assert qwlib.estimate(str(tmp_path), "nf4").weights_bytes > 0
