"""What becomes of a weight whenever it is used, so that training sees what rounding or pruning does.

Each `Rounding` takes a weight and returns values in its type and shape. In the backward pass the gradient of the values is the
weight's (`lessons/straight_through.py`), but for a weight that is clipped or pruned, which gets none.
"""

import torch
from torch import nn

from ..lessons import fourbit
from ..lessons.straight_through import StraightThrough
from ..schemes import BLOCK, NESTED_BLOCK

# the distance of evenly spaced levels with the least squared error for a normal distribution, in standard deviations, by the
# number of levels; source: J. Max, "Quantizing for minimum distortion", IRE Transactions on Information Theory, 1960, table II
BEST_STEPS = {2: 1.596, 3: 1.224, 4: 0.9957}


def straight(weight: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The values in the forward pass; in the backward pass their gradient is the weight's."""
    return StraightThrough.apply(weight, values, None)


class Rounding(nn.Module):
    """What a form makes of a weight: `forward` takes a weight (outputs × inputs) and returns values in its type and shape.

    The values are rounded to bfloat16, because that is what a trained model is saved in.
    """


class NormalFloat(Rounding):
    """NF4 with 8-bit scales, as bitsandbytes stores it and reads it back, in operations that can be compiled."""

    def __init__(self):
        super().__init__()
        levels, scales = fourbit.code_book("nf4"), fourbit.dynamic_map()
        for name, book in (("levels", levels), ("scales", scales)):
            self.register_buffer(name, book, persistent=False)
            self.register_buffer(f"{name}_ends", (book[1:] + book[:-1]) / 2, persistent=False)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        kept = weight.detach().bfloat16()
        blocks = groups(nn.functional.pad(kept.flatten(), (0, -kept.numel() % BLOCK)).float(), BLOCK)
        largest = blocks.abs().amax(-1)
        codes = torch.bucketize(blocks / largest.clamp(min=1e-30)[:, None], self.levels_ends)
        values = self.levels[codes] * self._stored(largest)[:, None]
        values = values.flatten()[: kept.numel()].reshape(kept.shape).bfloat16()
        return straight(weight, values.to(weight.dtype))

    def _stored(self, largest: torch.Tensor) -> torch.Tensor:
        """The scales of all blocks as their 8-bit codes give them back."""
        mean = largest.mean()
        apart = groups(nn.functional.pad(largest - mean, (0, -len(largest) % NESTED_BLOCK)), NESTED_BLOCK)
        most = apart.abs().amax(-1, keepdim=True)
        codes = torch.bucketize(apart / most.clamp(min=1e-30), self.scales_ends)
        return (self.scales[codes] * most).flatten()[: len(largest)] + mean


class ZeroPoint(Rounding):
    """Evenly spaced levels, of which one is 0, between the ends of each group of a row."""

    def __init__(self, levels: int, group: int):
        super().__init__()
        self.most, self.group = levels - 1, group

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        blocks = groups(weight.detach().float(), self.group)
        low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
        step = ((high - low) / self.most).clamp(min=1e-12).bfloat16().float()
        zero = (-low / step).round()
        codes = ((blocks / step).round() + zero).clamp(0, self.most)
        return straight(weight, ((codes - zero) * step).reshape(weight.shape).bfloat16().to(weight.dtype))


class Learnt(Rounding):
    """Symmetric levels times a scale that is trained. The first one is the best for a normal distribution."""

    def __init__(self, weight: torch.Tensor, levels: int, group: int | None):
        super().__init__()
        self.limit, self.group = (levels - 1) / 2, group
        self.offset = 0.0 if levels % 2 else 0.5
        deviation = groups(weight.detach().float(), self.group).square().mean(-1, keepdim=True).sqrt()
        self.scale = nn.Parameter((BEST_STEPS[levels] * deviation).clamp(min=1e-8))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        blocks = groups(weight.float(), self.group)
        scale = straight(self.scale, self.scale.detach().clamp(min=1e-8).bfloat16().float())
        places = (blocks / scale).clamp(-self.limit, self.limit)
        nearest = ((places.detach() - self.offset).round() + self.offset).clamp(-self.limit, self.limit)
        return (straight(places, nearest) * scale).reshape(weight.shape).bfloat16().to(weight.dtype)


class Sparse(Rounding):
    """A weight without those that a mask leaves out. The others are trained."""

    def __init__(self, mask: torch.Tensor):
        super().__init__()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        kept = weight * self.mask
        return straight(kept, kept.detach().bfloat16().to(weight.dtype))


def groups(weight: torch.Tensor, group: int | None) -> torch.Tensor:
    """A weight cut into groups along its rows: groups × weights in a group."""
    return weight.reshape(-1, group or weight.shape[-1])


class RoundedLinear(nn.Linear):
    """A linear layer whose weight goes through its `rounding` whenever it is used.

    `torch.nn.utils.parametrize` does the same with a class for each layer, so that no two layers share compiled code.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.rounding(self.weight), self.bias)
