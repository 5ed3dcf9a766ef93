"""What a forward pass keeps is counted once, and weights are not."""

import torch
from torch import nn

from qwlib.lessons import activations


def test_inputs_and_results_are_counted_once_and_weights_are_not():
    """A linear layer keeps its input (for its weight), tanh its result, which the next layer's input is."""
    model = nn.Sequential(nn.Linear(8, 16, bias=False), nn.Tanh(), nn.Linear(16, 4, bias=False))
    x = torch.randn(32, 8)
    assert activations.kept_bytes(model, lambda: model(x).sum()) == 4 * 32 * (8 + 16)
    assert activations.kept_bytes(model, lambda: model(x[:16].clone()).sum()) == 4 * 16 * (8 + 16)


def test_a_frozen_layer_keeps_no_input():
    model = nn.Linear(8, 16, bias=False).requires_grad_(False)
    x = torch.randn(32, 8, requires_grad=True)
    assert activations.kept_bytes(model, lambda: model(x).sum()) == 0
    assert activations.kept_bytes(model.requires_grad_(True), lambda: model(x).sum()) == x.nbytes


def test_recomputed_activations_are_not_kept():
    model = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8), nn.Tanh())
    x = torch.randn(32, 8, requires_grad=True)

    def again():
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum()

    assert activations.kept_bytes(model, again) <= x.nbytes
    assert activations.kept_bytes(model, lambda: model(x).sum()) > 8 * x.nbytes
