"""Attention of one decoding step: PyTorch's, with less work around it than transformers' own call has.

transformers hands a mask of true and false to every layer, and PyTorch makes numbers of it in each. Here it is made into numbers
once a step. And where several query heads share a key head, transformers 5.17 repeats keys and values for each of them, at every
token anew. With one token a row, the query heads can stand as rows of one product with their common keys instead.
"""

import contextlib
import inspect
import re
from collections.abc import Iterator
from functools import cache

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "qwlib_step"


def step(module, query, key, value, attention_mask, dropout=0.0, scaling=None, **settings):
    """As transformers' `sdpa_attention_forward`: query (batch × heads × tokens × size), keys and values with fewer heads.

    Returns (batch × tokens × heads × size), and None for the weights.
    """
    batch, heads, tokens, _ = query.shape
    share = heads // key.shape[1]
    plain = attention_mask is not None and attention_mask.shape[1] == 1 and settings.get("position_bias") is None
    if tokens > 1 or share == 1 or not plain or settings.get("softcap") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **settings
        )
    rows = query.reshape(batch, key.shape[1], share, -1)
    read = scaled_dot_product_attention(rows, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling)
    return read.reshape(batch, 1, heads, -1), None


def added(*shape, dtype=torch.float32, **settings):
    """The mask as numbers to add, made by what makes `sdpa_mask`'s; transformers' own such function can't be captured in 5.17."""
    seen = sdpa_mask(*shape, **settings | {"allow_is_causal_skip": False})
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


AttentionInterface.register(NAME, step)
AttentionMaskInterface.register(NAME, added)


@contextlib.contextmanager
def stepping(model) -> Iterator[None]:
    """`model` reads one token a row by `step` meanwhile, if it reads by PyTorch's attention whatever that is called."""
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    if before != "sdpa" or _asks_for_a_name(type(model)):
        yield
        return
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


@cache
def _asks_for_a_name(kind) -> bool:
    """Whether the file of a model's class compares the name of its attention, or can't be read: it may do more by itself."""
    try:
        source = inspect.getsource(inspect.getmodule(kind))
    except (OSError, TypeError):
        return True
    return bool(re.search(r"_attn_implementation (==|!=|in|not in) ", source))
