"""The forms of a student: what its linear layers are while it is trained, and what they take if they are packed.

A form makes of a weight the values that are multiplied with (`rounding.py`). The weight itself stays in float32. Training with
rounded values is quantization-aware training.

- `nf4-dq` is what bitsandbytes stores and reads back, its 8-bit scales included. A weight becomes bfloat16 first, because that is
  what is quantized when the trained model is loaded.
- `int4` has 16 evenly spaced levels between the smallest and the largest of 64 weights, with an integer zero point.
- `int2` (levels -1.5, -0.5, 0.5, 1.5), `ternary` (-1, 0, 1) and `binary` (-0.5, 0.5) have symmetric levels, multiplied by a scale
  that is learnt (LSQ, arXiv 1902.08153). It belongs to 64 weights in `int2`, and to a row in the other two.
- `sparse-50` has half of each row's weights, and `2:4` two of every four neighbours. Which ones is decided once (`pruned.py`).
- `layers-24` has 24 layers of the model.

What it leaves out: activations, which stay in 16 bits, and the embedding and the output head, as in `nf4-dq`.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..errors import QwlibError, unknown
from ..lessons import pruning
from ..schemes import BLOCK, bits
from . import pruned, rounding
from .rounding import RoundedLinear


@dataclass(frozen=True)
class Form:
    """`levels`: how many values a weight can have before it is scaled. `group`: weights that share a scale, None for a row.

    `scheme`: the scheme in which a trained model is loaded. `learnt`: whether the scales are trained too. `sparsity`: the share
    of weights that are 0, or `2:4`. `layers`: how many are kept.
    """

    name: str
    levels: int | None
    group: int | None
    what: str
    scheme: str = "bf16"
    learnt: bool = False
    sparsity: float | str | None = None
    layers: int | None = None

    def bits_per_weight(self, columns: int) -> float:
        """Bits that a weight of a row with so many columns takes, packed, with its share of a 16-bit scale (and zero point).

        Three levels are packed as five in a byte (3⁵ = 243). Of weights that are pruned, a bit for each says which are kept, or
        two bits for each of the two of four.
        """
        if self.layers:
            return 16
        if self.sparsity:
            return (2 * 16 + 2 * 2) / 4 if self.sparsity == "2:4" else 16 * (1 - self.sparsity) + 1
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
        Form("sparse-50", None, None, "half of each row's weights, in 16 bits; sparse-60 has 40 %", sparsity=0.5),
        Form("2:4", None, None, "two of every four neighbours, in 16 bits", sparsity="2:4"),
        Form("layers-24", None, None, "24 of the layers, in 16 bits; any other number too", layers=24),
    )
}


def find(name: str) -> Form:
    """The form of that name: one of `FORMS`, or `sparse-N` and `layers-N` with another number.

    Raises QwlibError with the names that there are.
    """
    if match := re.fullmatch(r"(sparse|layers)-([1-9]\d?)", str(name)):
        kind, number = match[1], int(match[2])
        changed = {"sparsity": number / 100} if kind == "sparse" else {"layers": number}
        return replace(next(form for form in FORMS.values() if form.name.startswith(kind)), name=name, **changed)
    if name not in FORMS:
        raise unknown("form", name, FORMS)
    return FORMS[name]


def dress(model, form: Form, norms: Mapping[str, torch.Tensor] | None = None) -> None:
    """Round the weight of every linear layer but the head whenever it is used.

    `norms`: those of each layer's inputs, by its name (`pruned.norms`), for forms that are sparse.
    """
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            module.rounding = _rounding(form, module.weight, (norms or {}).get(name)).to(module.weight.device)
            module.__class__ = RoundedLinear


def _rounding(form: Form, weight: torch.Tensor, norms: torch.Tensor | None) -> rounding.Rounding:
    if form.sparsity:
        return rounding.Sparse(pruned.mask(weight, norms, form.sparsity))
    if form.learnt:
        return rounding.Learnt(weight, form.levels, form.group)
    return rounding.NormalFloat() if form.name == "nf4-dq" else rounding.ZeroPoint(form.levels, form.group)


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

    `zeros`: the share of weights that are 0. `bits_per_weight`: as `Form` counts, for pruned weights in the smallest format of
    `lessons.pruning.stored_bytes`. `levels`: the most different values in a group, which codes have to tell apart.

    Raises QwlibError where the weights are not what the form says.
    """
    most = zeros = count = 0
    size = 0.0
    for weight in weights:
        count, zeros = count + weight.numel(), zeros + int((weight == 0).sum())
        if form.sparsity:
            formats = pruning.stored_bytes(weight != 0)
            if form.sparsity == "2:4" and "2:4" not in formats:
                raise QwlibError("four neighbours have more than two weights: please report this")
            size += 8 * min(formats.values())
            continue
        most = max(most, found := levels_found(weight, form.group))
        if found > form.levels:
            raise QwlibError(f"a group has {found} values, and {form.name} has {form.levels}: please report this")
        size += weight.numel() * form.bits_per_weight(weight.shape[-1])
    told = {"zeros": zeros / count, "bits_per_weight": size / count}
    return told | ({"levels": most} if form.levels else {})


def levels_found(weight: torch.Tensor, group: int | None) -> int:
    """The most different values that a group of a stored weight has."""
    blocks = rounding.groups(weight.detach(), group).sort(-1).values
    return int((blocks.diff(dim=-1) != 0).sum(-1).max()) + 1
