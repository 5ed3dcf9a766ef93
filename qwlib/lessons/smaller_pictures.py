"""Explanatory figures of pruning, fake quantization and activations: masks, errors by sparsity, a staircase, channels.

Plain numbers in, a matplotlib Figure out, in the style of `figures.py`. `training_pictures.losses` draws losses of training, and
`measuring.plots.pareto` draws bytes against quality.
"""

import itertools
from collections.abc import Mapping, Sequence

from ..figures import COLOURS, INK, axes, looks


def masks(kept: Mapping[str, "Tensor"]):  # noqa: F821  torch comes with the caller
    """Which weights are kept (dark), one panel a mask; each mask is rows × columns of bool, some 16 × 32 at most."""
    from matplotlib.colors import ListedColormap

    rows = max(mask.shape[0] / mask.shape[1] for mask in kept.values())
    width = min(3.2, 9.6 / len(kept))
    figure, panels = axes(width=width * len(kept) + 0.2, height=width * rows + 0.9, columns=len(kept))
    for ax, (name, mask) in zip(panels, kept.items(), strict=True):
        # edges in white tell neighbours apart, and the count of columns from the left shows
        cells = mask.numpy(force=True)
        ax.pcolormesh(
            cells, cmap=ListedColormap(["#e8e8e8", COLOURS[0]]), vmin=0, vmax=1, edgecolor="white", linewidth=0.8
        )
        ax.set_aspect("equal")
        ax.invert_yaxis()
        ax.set_title(f"{name}\n{100 * (1 - cells.mean()):.0f} % zeros", fontsize=10, color=INK)
        ax.set_xlabel("input column")
        ax.set_xticks(range(0, cells.shape[1] + 1, 4 if cells.shape[1] <= 32 else cells.shape[1] // 4))
        ax.set_yticks([])
        ax.grid(visible=False)
        ax.spines[["left", "bottom"]].set_visible(False)
    panels[0].set_ylabel("output row")
    return figure


def by_sparsity(series: Mapping[str, Sequence[tuple]], ylabel: str, reference: tuple[str, float] | None = None):
    """A value (log scale) by sparsity, a line a series of (sparsity, value) or (sparsity, value, (low, high)) points.

    Sparsities are shares from 0 to 1, and (low, high) is an interval, drawn as a bar. `reference` (name, value) is a dashed line.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, (ax,) = axes(height=3.6)
    shown = looks(series)
    for (name, points), marker in zip(series.items(), itertools.cycle("osD^v"), strict=False):
        style = shown[name] | {"marker": marker, "markersize": 5, "label": name}
        ax.plot([100 * point[0] for point in points], [point[1] for point in points], **style)
        for at, value, (low, high) in (point for point in points if len(point) > 2):
            bar = {"yerr": [[value - low], [high - value]], "capsize": 3, "color": style["color"]}
            ax.errorbar(100 * at, value, **bar)
    if reference:
        ax.axhline(reference[1], color=INK, linestyle="--", linewidth=1, label=reference[0])
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("sparsity (% of the weights that are zero)")
    ax.set_ylabel(ylabel)
    ax.legend(frameon=False, fontsize=9)
    return figure


def staircase(weights: Sequence[float], values: Sequence[float], gradients: Mapping[str, Sequence[float]]):
    """Left the fake-quantized `values` against the `weights` (ascending); right the derivative that training uses instead.

    `gradients` maps the name of an estimator to a derivative for each weight. The staircase's own, zero between the jumps, is
    drawn beside them.
    """
    figure, (left, right) = axes(width=9.0, height=3.4, columns=2)
    left.plot(weights, weights, color=INK, linestyle="--", linewidth=1, label="the weight itself")
    left.plot(weights, values, color=COLOURS[0], linewidth=2, label="fake-quantized")
    left.set_ylabel("value in the forward pass")
    left.legend(frameon=False, fontsize=9, loc="upper left")
    right.plot(weights, [0] * len(weights), color=COLOURS[0], linewidth=2, label="staircase: 0 between jumps")
    for (name, gradient), line, colour in zip(gradients.items(), ("-", "--", ":"), COLOURS[1:], strict=False):
        right.plot(weights, gradient, color=colour, linewidth=2, linestyle=line, label=name)
    right.set_ylabel("derivative in the backward pass")
    right.set_ylim(-0.15, 1.75)
    right.set_yticks([0, 0.5, 1])
    right.legend(frameon=False, fontsize=9, loc="upper left")
    for ax in (left, right):
        ax.set_xlabel("weight")
    return figure


def channels(x: "Tensor", static: float | None = None, bits: int = 8):  # noqa: F821
    """The largest and the median magnitude of each input channel of x (tokens × channels), channels by their largest.

    Lines show half a quantization step: per token at the median token, and with the scale `static`. What is smaller becomes zero.
    """
    magnitudes = x.detach().float().abs()
    largest, order = magnitudes.amax(0).sort(descending=True)
    typical = magnitudes.median(0).values[order]
    steps = {"per token (median token)": (magnitudes.amax(1) / (2 ** (bits - 1) - 1)).median().item()}
    steps |= {} if static is None else {"static scale": static}
    figure, (ax,) = axes(width=9.0, height=3.6)
    places = range(1, len(order) + 1)
    least = min(0.1 * min(steps.values()), typical[typical > 0].min().item() if typical.any() else 1.0)
    for values, colour, label in ((largest, COLOURS[0], "largest of the channel"), (typical, COLOURS[4], "median")):
        ax.plot(places, values.clamp(min=least).tolist(), ".", markersize=3, color=colour, label=label)
    for (name, step), colour, line in zip(steps.items(), (COLOURS[5], INK), ("-", "--"), strict=False):
        ax.axhline(step / 2, color=colour, linestyle=line, linewidth=1.5, label=f"half a step, {name}")
    ax.set_yscale("log")
    ax.set_xscale("log")
    ax.set_xlabel("input channel, by its largest magnitude")
    ax.set_ylabel("magnitude")
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=9, markerscale=3)
    return figure
