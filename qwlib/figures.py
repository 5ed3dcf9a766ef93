"""How every figure here looks: one palette, and axes that bear units.

The palette is that of Okabe and Ito (2008), whose colours can be told apart with every common colour blindness; the ground is
white, so that a figure reads the same on a dark page.
"""

import io

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
INK = "#333333"


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
