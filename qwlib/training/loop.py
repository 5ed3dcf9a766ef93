"""What a training loop needs, whoever runs it: the loss, the parameters that are trained, and libraries that keep quiet.

`trainer.py` runs the loop with transformers' `Trainer`. Notebook 08 runs it by hand.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator

from ..running.lm import quiet
from . import examples

SHARED = 32  # tokens that all rows of a batch begin with, from which on they are read once


@contextlib.contextmanager
def still() -> Iterator[None]:
    """Without what transformers and accelerate tell about names of their own that are going to change, and about devices."""
    logger = logging.getLogger("transformers.trainer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|accelerate")
            yield
    finally:
        logger.setLevel(level)


def loss(model, inputs: dict, tokens=None, *, share: bool = True):
    """Cross-entropy of the labels that are learnt, in nats: summed with their `weights` and divided by `tokens`.

    Without `tokens` it is divided by the sum of this batch's weights, and without `weights` each label counts once.

    Scores are computed only where a label follows that is learnt in some row. With a large vocabulary and short answers, the
    scores of all positions would take most of the memory. What all rows of the batch begin with (a system message, a guard's long
    instructions) is read once with `share`, and its keys and values serve all rows; gradients flow through them. It needs a model
    that keeps keys and values of all positions (`keeps_all`).
    """
    import torch
    from torch.nn.functional import cross_entropy

    ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"][:, 1:]
    places = (labels != examples.IGNORED).any(0).nonzero()[:, 0]
    if not len(places):
        places = torch.tensor([labels.shape[1] - 1], device=labels.device)
    wanted = labels[:, places]
    weights = (wanted != examples.IGNORED).float()
    if "weights" in inputs:
        weights = weights * inputs["weights"][:, 1:][:, places]
    length, cache = min(_shared(ids), int(places[0])), None
    if share and length >= SHARED:
        cache = model(input_ids=ids[:1, :length], use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(ids))
    else:
        length = 0
    scores = model(
        input_ids=ids[:, length:],
        attention_mask=mask,
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=places - length,
    ).logits
    each = cross_entropy(
        scores.float().flatten(0, 1), wanted.flatten(), ignore_index=examples.IGNORED, reduction="none"
    )
    return (each * weights.flatten()).sum() / (weights.sum() if tokens is None else tokens)


def keeps_all(model) -> bool:
    """Whether a model's cache has keys and values of all positions in every layer: no sliding windows, no recurrent layers."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def _shared(ids) -> int:
    """How many tokens all rows (rows × length) begin with. One row shares none."""
    if len(ids) == 1:
        return 0
    same = (ids == ids[:1]).all(0).long()
    return int(same.cumprod(0).sum())


def trained(model) -> dict:
    """Name → parameter that is trained. Saving reads these alone, because quantized embeddings can't be saved."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
