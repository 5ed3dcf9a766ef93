"""Attention of one decoding step against transformers' own, and where it is used."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qwlib.running import attention


@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("tokens", [1, 3])
def test_a_step_reads_what_transformers_reads(heads, tokens):
    torch.manual_seed(0)
    query = torch.randn(3, heads, tokens, 8)
    key, value = torch.randn(3, 2, 11, 8), torch.randn(3, 2, 11, 8)
    seen = torch.rand(3, 1, tokens, 11) > 0.4
    seen[..., 0] = True
    added = torch.zeros_like(seen, dtype=torch.float32).masked_fill(~seen, torch.finfo(torch.float32).min)
    module = SimpleNamespace(num_key_value_groups=heads // 2, is_causal=True)
    wanted, _ = sdpa_attention_forward(module, query, key, value, seen, scaling=0.3)
    got, weights = attention.step(module, query, key, value, added, scaling=0.3)
    assert weights is None
    assert got.shape == wanted.shape == (3, tokens, heads, 8)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    other, _ = attention.step(module, query.flip(1), key, value, added, scaling=0.3)
    assert not torch.allclose(other, wanted, rtol=1e-5, atol=1e-6)


def test_the_mask_as_numbers_is_the_one_of_true_and_false():
    filled = torch.tensor([[False, True, True, True, False], [True, True, True, True, False]])
    shape = {"batch_size": 2, "q_length": 1, "kv_length": 5, "q_offset": 3, "attention_mask": filled}
    seen = sdpa_mask(**shape, allow_is_causal_skip=False)
    added = attention.added(**shape, dtype=torch.bfloat16, allow_is_causal_skip=True)
    assert added.dtype == torch.bfloat16
    assert torch.equal(added == 0, seen)
    assert bool((added[~seen] < -1e38).all())
    assert bool((~seen).any())


def without_source(model):
    """The same as a class that was typed into a shell."""
    made = type("Typed", (type(model),), {"__module__": "typed into a shell"})
    other = copy.deepcopy(model)
    other.__class__ = made
    return other


def test_it_is_in_use_for_steps_alone_and_left_out_where_a_model_asks_for_a_name():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
    llama = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", intermediate_size=32, **sizes))
    assert llama.config._attn_implementation == "sdpa"
    with contextlib.suppress(RuntimeError), attention.stepping(llama):
        assert llama.config._attn_implementation == attention.NAME
        raise RuntimeError
    assert llama.config._attn_implementation == "sdpa"
    for other in (
        AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **sizes)),
        AutoModelForCausalLM.from_config(llama.config, attn_implementation="eager"),
        without_source(llama),
    ):
        before = other.config._attn_implementation
        with attention.stepping(other):
            assert other.config._attn_implementation == before
