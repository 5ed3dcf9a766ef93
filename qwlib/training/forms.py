"""The forms that a student's linear layers can have while it is trained: each weight is rounded whenever it is used.

A form makes of a weight the values that are multiplied with. The weight itself stays in float32. Rounding has the derivative 0
almost everywhere, so the gradient of the rounded value is given to the weight as if it had not been rounded (the straight-through
estimator, arXiv 1308.3432). This is quantization-aware training.

- `nf4-dq` is what bitsandbytes stores and reads back, its 8-bit scales included. A weight becomes bfloat16 first, because that is
  what is quantized when the trained model is loaded.
- `int4` has 16 evenly spaced levels between the smallest and the largest of 64 weights, with an integer zero point.
- `int2` (levels -1.5, -0.5, 0.5, 1.5), `ternary` (-1, 0, 1) and `binary` (-0.5, 0.5) have symmetric levels, multiplied by a scale
  that is learnt (LSQ, arXiv 1902.08153). It belongs to 64 weights in `int2`, and to a row in the other two.

What it leaves out: activations, which stay in 16 bits, and the embedding and the output head, as in `nf4-dq`.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import QwlibError, unknown
from ..lessons import fourbit
from ..lessons.straight_through import StraightThrough
from ..schemes import BLOCK, NESTED_BLOCK, bits

# the distance of evenly spaced levels with the least squared error for a normal distribution, in standard deviations, by the
# number of levels; source: J. Max, "Quantizing for minimum distortion", IRE Transactions on Information Theory, 1960, table II
BEST_STEPS = {2: 1.596, 3: 1.224, 4: 0.9957}


@dataclass(frozen=True)
class Form:
    """`levels`: how many values a weight can have before it is scaled. `group`: weights that share a scale, None for a row.

    `scheme`: the scheme in which a trained model is loaded. `learnt`: whether the scales are trained too.
    """

    name: str
    levels: int
    group: int | None
    what: str
    scheme: str = "bf16"
    learnt: bool = False

    def bits_per_weight(self, columns: int) -> float:
        """Bits that a weight of a row with so many columns takes, packed, with its share of a 16-bit scale (and zero point).

        Three levels are packed as five in a byte (3⁵ = 243).
        """
        if self.scheme != "bf16":
            return bits(self.scheme)
        code = {16: 4, 4: 2, 3: 8 / 5, 2: 1}[self.levels]
        return code + (16 if self.learnt else 16 + code) / (self.group or columns)


FORMS = {
    form.name: form
    for form in (
        Form("nf4-dq", 16, BLOCK, "4-bit codes of bitsandbytes, with scales in 8 bits", scheme="nf4-dq"),
        Form("int4", 16, BLOCK, "4-bit integers with a zero point, groups of 64"),
        Form("int2", 4, BLOCK, "2 bits, groups of 64 with a learnt scale", learnt=True),
        Form("ternary", 3, None, "-1, 0 and 1, with a learnt scale for each row", learnt=True),
        Form("binary", 2, None, "two values, with a learnt scale for each row", learnt=True),
    )
}


def find(name: str) -> Form:
    """The form of that name.

    Raises QwlibError with the names that there are.
    """
    if name not in FORMS:
        raise unknown("form", name, FORMS)
    return FORMS[name]


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
        blocks = _groups(nn.functional.pad(kept.flatten(), (0, -kept.numel() % BLOCK)).float(), BLOCK)
        largest = blocks.abs().amax(-1)
        codes = torch.bucketize(blocks / largest.clamp(min=1e-30)[:, None], self.levels_ends)
        values = self.levels[codes] * self._stored(largest)[:, None]
        values = values.flatten()[: kept.numel()].reshape(kept.shape).bfloat16()
        return straight(weight, values.to(weight.dtype))

    def _stored(self, largest: torch.Tensor) -> torch.Tensor:
        """The scales of all blocks as their 8-bit codes give them back."""
        mean = largest.mean()
        apart = _groups(nn.functional.pad(largest - mean, (0, -len(largest) % NESTED_BLOCK)), NESTED_BLOCK)
        most = apart.abs().amax(-1, keepdim=True)
        codes = torch.bucketize(apart / most.clamp(min=1e-30), self.scales_ends)
        return (self.scales[codes] * most).flatten()[: len(largest)] + mean


class ZeroPoint(Rounding):
    """Evenly spaced levels, of which one is 0, between the ends of each group of a row."""

    def __init__(self, form: Form):
        super().__init__()
        self.most, self.group = form.levels - 1, form.group

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        blocks = _groups(weight.detach().float(), self.group)
        low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
        step = ((high - low) / self.most).clamp(min=1e-12).bfloat16().float()
        zero = (-low / step).round()
        codes = ((blocks / step).round() + zero).clamp(0, self.most)
        return straight(weight, ((codes - zero) * step).reshape(weight.shape).bfloat16().to(weight.dtype))


class Learnt(Rounding):
    """Symmetric levels times a scale that is trained. The first one is the best for a normal distribution."""

    def __init__(self, form: Form, weight: torch.Tensor):
        super().__init__()
        self.limit, self.group = (form.levels - 1) / 2, form.group
        self.offset = 0.0 if form.levels % 2 else 0.5
        deviation = _groups(weight.detach().float(), self.group).square().mean(-1, keepdim=True).sqrt()
        self.scale = nn.Parameter((BEST_STEPS[form.levels] * deviation).clamp(min=1e-8))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        blocks = _groups(weight.float(), self.group)
        scale = straight(self.scale, self.scale.detach().clamp(min=1e-8).bfloat16().float())
        places = (blocks / scale).clamp(-self.limit, self.limit)
        nearest = ((places.detach() - self.offset).round() + self.offset).clamp(-self.limit, self.limit)
        return (straight(places, nearest) * scale).reshape(weight.shape).bfloat16().to(weight.dtype)


def _groups(weight: torch.Tensor, group: int | None) -> torch.Tensor:
    """A weight cut into groups along its rows: groups × weights in a group."""
    return weight.reshape(-1, group or weight.shape[-1])


class RoundedLinear(nn.Linear):
    """A linear layer whose weight goes through its `rounding` whenever it is used.

    `torch.nn.utils.parametrize` does the same with a class for each layer, so that no two layers share compiled code.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.rounding(self.weight), self.bias)


def dress(model, form: Form) -> None:
    """Round the weight of every linear layer but the head whenever it is used."""
    head = model.get_output_embeddings()
    for module in list(model.modules()):
        if type(module) is nn.Linear and module is not head:
            made = (
                Learnt(form, module.weight)
                if form.learnt
                else NormalFloat()
                if form.name == "nf4-dq"
                else ZeroPoint(form)
            )
            module.rounding = made.to(module.weight.device)
            module.__class__ = RoundedLinear


@torch.no_grad()
def undress(model, form: Form) -> list[torch.Tensor]:
    """Give the layers the weights that are saved: for `nf4-dq` those that are quantized again, else the rounded values.

    The rounded values of each layer come back.
    """
    found = []
    for module in list(model.modules()):
        if type(module) is RoundedLinear:
            found.append(module.rounding(module.weight))
            if form.scheme == "bf16":
                module.weight.copy_(found[-1])
            del module.rounding
            module.__class__ = nn.Linear
    return found


def counted(weights: Iterable[torch.Tensor], form: Form) -> dict:
    """What weights (each outputs × inputs) take if they are packed, counted from what they are.

    `levels`: the most different values in a group, which codes have to tell apart. `zeros`: the share of weights that are 0.
    `bits_per_weight`: as `Form` counts.

    Raises QwlibError where a group has more values than the form.
    """
    most = zeros = count = 0
    size = 0.0
    for weight in weights:
        found = levels_found(weight, form.group)
        if found > form.levels:
            raise QwlibError(f"a group has {found} values, and {form.name} has {form.levels}: please report this")
        most, count = max(most, found), count + weight.numel()
        zeros += int((weight == 0).sum())
        size += weight.numel() * form.bits_per_weight(weight.shape[-1])
    return {"levels": most, "zeros": zeros / count, "bits_per_weight": size / count}


def levels_found(weight: torch.Tensor, group: int | None) -> int:
    """The most different values that a group of a stored weight has."""
    blocks = _groups(weight.detach(), group).sort(-1).values
    return int((blocks.diff(dim=-1) != 0).sum(-1).max()) + 1
