"""A prediction, and what came of it: one line under the cell that measured it.

A text that says "as predicted" is wrong wherever the number beside it disagrees, and numbers differ between machines. So the cell
decides, not the text. Times vary from run to run; where two ranges of times overlap, the prediction stays undecided.
"""

from collections.abc import Sequence


class Outcome(int):
    """1 or 0, as true or false, which a notebook does not show again under the printed line."""

    def _ipython_display_(self) -> None:
        """IPython asks for this instead of the representation."""


def came_true(claim: str, held: bool | None, found: str) -> Outcome:
    """Print whether a prediction came true, with the numbers that decide it; returns 1 or 0, for an `assert`.

    `claim` is the prediction, as a sentence without its full stop. `held` says whether it came true; None means that the
    measurement does not decide it. `found` is what was measured, with units.
    """
    outcome = Outcome(held is not None and bool(held))
    verdict = "? undecided" if held is None else "✓ came true" if outcome else "✗ did not come true"
    print(f"{verdict}: {claim} ({found})")
    return outcome


def smaller(one: Sequence[float], other: Sequence[float]) -> bool | None:
    """Whether every number of `one` is below every number of `other`; None where the two ranges overlap."""
    if max(one) < min(other):
        return True
    return False if min(one) > max(other) else None
