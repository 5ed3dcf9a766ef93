"""How every figure here looks: one palette, and axes that bear units.

The palette is that of Okabe and Ito (2008), whose colours can be told apart with every common colour blindness; the ground is
white, so that a figure reads the same on a dark page.
"""

import io
import itertools

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
INK = "#333333"
# the same scheme or code book looks alike in every figure: colour by family, marker by name
FAMILIES = {"bf16": 0, "16-bit": 0, "even": 0, "nf4": 1, "fp4": 2, "int8": 3, "8-bit": 3}
MARKERS = {"nf4": "s", "nf4-dq": "D", "nf4-mixed": "v", "nf4-all": "p", "fp4": "^", "fp4-dq": "<", "int8": "X"}


def looks(names) -> dict[str, dict]:
    """Each name's `color` and `marker`, as matplotlib calls them; what is of no known family takes the colours that are left."""
    families = {
        name: next((n for start, n in FAMILIES.items() if name.lower().startswith(start)), None) for name in names
    }
    spare = itertools.cycle([n for n in range(len(COLOURS)) if n not in families.values()] or range(len(COLOURS)))
    return {
        name: {
            "color": COLOURS[next(spare) if number is None else number],
            "marker": MARKERS.get(name.lower().partition(",")[0], "o"),
        }
        for name, number in families.items()
    }


def axes(width: float = 7.0, height: float = 3.2, columns: int = 1):
    """(figure, its axes in a row), with the look that all figures here share; sizes in inches."""
    from matplotlib.figure import Figure

    class Shown(Figure):
        """A figure that a notebook shows although pyplot never heard of it, so that it is shown once."""

        def _repr_png_(self):
            png = io.BytesIO()
            self.savefig(png, format="png")
            return png.getvalue()

    figure = Shown(figsize=(width, height), dpi=110, facecolor="white", layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(colors=INK)
        ax.grid(axis="y", color="#dddddd", linewidth=0.6)
        ax.set_axisbelow(True)
    return figure, axes
