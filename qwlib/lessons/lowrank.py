"""A LoRA layer by hand: a product with frozen weights, plus one of low rank that is trained, and its backward pass.

**What.** A linear layer computes y = x Wᵀ. LoRA (arXiv 2106.09685) leaves W alone and adds two small matrices:

    y = x Wᵀ + s (x Aᵀ) Bᵀ            W: outputs × inputs, A: rank × inputs, B: outputs × rank, s = alpha ÷ rank

Together they change W by s B A, whose rank is at most that of A and B. They have rank × (inputs + outputs) numbers.

**How.** With g, the gradient of the loss with respect to y, the chain rule gives

    for A:  s (g B)ᵀ x          for B:  s gᵀ (x Aᵀ)          for x:  g W + s (g B) A

W is only multiplied by. It needs no gradient, so it may be stored in any format that can be read back (QLoRA, arXiv 2305.14314).

**What it leaves out**, and peft has: dropout, several adapters over a layer, DoRA's magnitudes, conversions between types.
"""

from collections.abc import Callable, Iterable
from math import prod

import torch

from . import fourbit, integers


def forward(
    x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0
) -> torch.Tensor:
    """y (… × outputs) of x (… × inputs)."""
    return x @ weight.T + scale * (x @ a.T) @ b.T


def backward(
    g: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0
) -> dict[str, torch.Tensor]:
    """The gradients of `x`, `a` and `b`; `g` (rows × outputs) is that of y, `x` is rows × inputs."""
    return {"x": g @ weight + scale * (g @ b) @ a, "a": scale * (g @ b).T @ x, "b": scale * g.T @ (x @ a.T)}


def numbers(shapes: Iterable[tuple[int, int]], rank: int) -> int:
    """How many numbers A and B have, over layers of those shapes (outputs, inputs)."""
    return sum(rank * (outputs + inputs) for outputs, inputs in shapes)


def shares(matrix: torch.Tensor) -> torch.Tensor:
    """The share of the squared norm that the nearest matrix of rank 1, 2, … has; the last is 1.

    It is the share of the first singular values, squared (Eckart and Young, 1936).
    """
    squares = torch.linalg.svdvals(matrix.float()).double().square()
    return squares.cumsum(0) / squares.sum()


def codes_moved(weight: torch.Tensor, step: torch.Tensor, quant_type: str = "nf4") -> float:
    """The share of the 4-bit codes that change when `step` is added to the weights that they stand for.

    Each sum is rounded to the nearest level again, with the scale that its block has.
    """
    stored = fourbit.quantize_4bit(weight.float(), quant_type)
    before = integers.unpack(stored.packed, prod(stored.shape)).int()
    scales = stored.scales.repeat_interleave(stored.block_size)[: len(before)].clamp(min=1e-38)
    levels = fourbit.code_book(quant_type, weight.device)
    sums = fourbit.dequantize_4bit(stored).flatten() + step.flatten().float()
    # two codes of FP4 stand for zero, so levels are compared and not their numbers
    return (levels[fourbit.nearest(sums / scales, levels)] != levels[before]).double().mean().item()


def gradient(model, layer: str, loss: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight of that layer and its gradient, both float32 on the host; all other parameters are frozen from here on."""
    weight = model.requires_grad_(False).train().get_submodule(layer).weight.requires_grad_(True)
    loss().backward()
    found = weight.detach().float().cpu().clone(), weight.grad.float().cpu()
    weight.grad = None
    return found
