"""A prediction, and what came of it: one line under the cell that measured it.

A text that says "as predicted" is wrong wherever the number beside it disagrees, and numbers differ between machines. So the cell
decides, not the text.
"""


class Outcome(int):
    """1 or 0, as true or false, which a notebook does not show again under the printed line."""

    def _ipython_display_(self) -> None:
        """IPython asks for this instead of the representation."""


def came_true(claim: str, held: bool, found: str) -> Outcome:
    """Print whether a prediction came true, with the numbers that decide it; the same comes back, for an `assert`.

    `claim` is what was predicted, as a sentence without its full stop; `held`, whether it did; `found`, what was measured, with
    units.
    """
    outcome = Outcome(bool(held))
    print(f"{'✓ came true' if outcome else '✗ did not come true'}: {claim} ({found})")
    return outcome
