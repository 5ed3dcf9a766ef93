"""What is taken out of a student before it learns: single weights, or whole layers. Text that the model reads decides which.

- Weights with the lowest magnitude times norm of their inputs, in each row (Wanda, arXiv 2306.11695), by the masks of
  `lessons/pruning.py`.
- Layers that change what passes through them least: 1 minus the cosine of a token's state before and after the layer, in the mean
  (Block Influence of ShortGPT, arXiv 2403.03853).

What it leaves out: SparseGPT's correction of the weights that stay, because training corrects them, and rows or heads as a whole.
"""

import itertools

import torch
from torch import nn

from ..errors import QwlibError
from ..lessons import pruning

AT_ONCE = 8  # rows that are read at once


@torch.no_grad()
def norms(model, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Name of each linear layer but the head → the L2 norm of its input columns (float32, on the host) while `ids` are read."""
    head, sums, hooks = model.get_output_embeddings(), {}, []

    def watched(name):
        def add(_, given):
            squares = given[0].detach().float().flatten(0, -2).square().sum(0).cpu()
            sums[name] = sums.get(name, 0) + squares

        return add

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            hooks.append(module.register_forward_pre_hook(watched(name)))
    try:
        for some in ids.split(AT_ONCE):
            model(input_ids=some.to(model.device), use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: squares.sqrt() for name, squares in sums.items()}


def mask(weight: torch.Tensor, norms: torch.Tensor, sparsity: float | str) -> torch.Tensor:
    """The mask of what is kept (outputs × inputs, True is kept), where the weight is; `sparsity` is a share or `2:4`."""
    weight, norms = weight.detach().float(), norms.to(weight.device)
    if sparsity == "2:4":
        return pruning.two_of_four(pruning.wanda_scores(weight, norms))
    return pruning.wanda(weight, norms, sparsity)


@torch.no_grad()
def influences(model, ids: torch.Tensor) -> list[float]:
    """How much each layer changes what passes through it, while `ids` (rows × length) are read: 0 is not at all."""
    total, count = None, 0
    for some in ids.split(AT_ONCE):
        told = model(input_ids=some.to(model.device), use_cache=False, output_hidden_states=True, logits_to_keep=1)
        # the last state has gone through the final norm, but the last layer stays whatever its number is
        states = [state.float() for state in told.hidden_states]
        pairs = itertools.pairwise(states)
        found = torch.stack([1 - nn.functional.cosine_similarity(a, b, -1).mean() for a, b in pairs]).cpu()
        total, count = found * len(some) if total is None else total + found * len(some), count + len(some)
    return (total / count).tolist()


def drop(model, influence: list[float], keep: int) -> list[int]:
    """Leave the `keep` layers of the largest influence in a model, in their order. Their numbers come back.

    The first and the last layer stay. Raises QwlibError for a model without a list of layers, or without so many.
    """
    inner = model.get_decoder() if hasattr(model, "get_decoder") else None
    layers = getattr(inner, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise QwlibError(f"{type(model).__name__} has no list of layers here: prune its weights instead")
    if not 2 <= keep < len(layers):
        raise QwlibError(f"{type(model).__name__} has {len(layers)} layers: keep from 2 to {len(layers) - 1} of them")
    inside = sorted(range(1, len(layers) - 1), key=lambda number: influence[number])
    kept = sorted(set(range(len(layers))) - set(inside[: len(layers) - keep]))
    inner.layers = nn.ModuleList(layers[number] for number in kept)
    for place, layer in enumerate(inner.layers):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = place
    config = model.config.get_text_config(decoder=True)
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[number] for number in kept]
    config.num_hidden_layers = keep
    return kept
