"""Figures that explain: levels on a line, blocks and outliers, codes in use, where the bytes go.

Arrays and tensors in, a matplotlib Figure out, in the look of `plots.py`.
"""

import contextlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..figures import COLOURS, INK, axes, looks
from . import fourbit, integers


def number_line(books: Mapping[str, Sequence[float]], values: Sequence[float] = ()):
    """Levels as ticks, one line a code book; `values` as dots above the first line, each tied to its nearest level there."""
    figure, (ax,) = axes(height=0.9 + 0.5 * len(books) + 0.5 * bool(len(values)))
    shown = looks(books)
    for row, (name, levels) in enumerate(books.items()):
        levels = [float(level) for level in levels]
        ax.axhline(-row, color="#bbbbbb", linewidth=1, zorder=1)
        ax.plot(
            levels, [-row] * len(levels), "|", color=shown[name]["color"], markersize=20, markeredgewidth=2, zorder=2
        )
        for value in map(float, values if row == 0 else ()):
            near = min(levels, key=lambda level, value=value: abs(level - value))
            ax.plot([value, near], [0.8, 0.2], color=COLOURS[4], linewidth=1)
            ax.plot(value, 0.8, "o", color=COLOURS[4], markersize=5)
    ax.set_yticks([-row for row in range(len(books))], list(books))
    ax.set_ylim(-len(books) + 0.4, 1.1 if len(values) else 0.6)
    ax.set_xlabel("weight over the largest magnitude")
    ax.grid(visible=False)
    ax.spines["left"].set_visible(False)
    return figure


def error_maps(errors: Mapping[str, "Tensor"]):  # noqa: F821  torch comes with the caller
    """Error magnitudes of a matrix, one panel a way of quantizing it, all on one logarithmic colour scale."""
    from matplotlib.colors import LogNorm

    tensors = {name: error.detach().float().abs() for name, error in errors.items()}
    highest = max(float(error.max()) for error in tensors.values()) or 1.0
    figure, panels = axes(width=3.0 * len(errors) + 1, height=3.2, columns=len(errors))
    for ax, (name, error) in zip(panels, tensors.items(), strict=True):
        picture = ax.imshow(error.clamp(min=highest / 1e4), norm=LogNorm(highest / 1e4, highest), cmap="cividis")
        ax.set_title(f"{name}: mean {error.mean():.2g}", fontsize=10, color=INK)
        ax.set_xlabel("column")
        ax.grid(visible=False)
    panels[0].set_ylabel("row")
    figure.colorbar(picture, ax=list(panels), label="magnitude of the error (log scale)", shrink=0.9)
    return figure


def weights_and_normal(weights: Mapping[str, "Tensor"]):  # noqa: F821
    """Histograms of weights, each over its own standard deviation, and the normal density."""
    import numpy

    figure, (ax,) = axes()
    x = numpy.linspace(-4.5, 4.5, 301)
    for colour, (name, values) in zip(itertools.cycle(COLOURS), weights.items(), strict=False):
        values = values.detach().float().flatten()
        scaled = (values / values.std()).numpy(force=True)
        ax.hist(
            scaled,
            numpy.linspace(-4.5, 4.5, 91),
            density=True,
            histtype="stepfilled",
            alpha=0.5,
            color=colour,
            label=name,
        )
    ax.plot(x, _density(x), color=INK, linewidth=1.5, label="normal density")
    ax.set_xlabel("weight (standard deviations)")
    ax.set_ylabel("density")
    ax.legend(frameon=False)
    return figure


def levels_on_density(levels: Sequence[float], outermost: float):
    """Levels under the normal density; shaded are the stretches of values that go to each. 1 lies `outermost` deviations out."""
    import numpy

    figure, (ax,) = axes()
    at = outermost * numpy.asarray([float(level) for level in levels])
    middles = [-3.5, *((at[1:] + at[:-1]) / 2), 3.5]
    for number, (left, right) in enumerate(itertools.pairwise(middles)):
        x = numpy.linspace(left, right, 40)
        ax.fill_between(x, _density(x), color=COLOURS[4] if number % 2 else COLOURS[0], alpha=0.35, linewidth=0)
    ax.vlines(at, 0, _density(at), color=COLOURS[1], linewidth=2, label="levels")
    x = numpy.linspace(-3.5, 3.5, 301)
    ax.plot(x, _density(x), color=INK, linewidth=1.5, label="normal density")
    ax.set_xlabel("weight (standard deviations)")
    ax.set_ylabel("density")
    ax.legend(frameon=False)
    return figure


def _density(x):
    import numpy

    return numpy.exp(-(x**2) / 2) / numpy.sqrt(2 * numpy.pi)


def levels_on_histogram(weight: "Tensor", levels: "Tensor", block_size: int = 64, name: str = ""):  # noqa: F821
    """Weights over the largest magnitude of their block, the levels among them, and what rounding to those costs.

    `levels`: ascending values between -1 and 1. The title has `name`, the relative error, and the bits a weight with float32
    scales. The peaks at the two ends are the largest weight of each block.
    """
    flat = weight.detach().float().flatten()
    flat = flat[: len(flat) // block_size * block_size]
    blocks = flat.view(-1, block_size)
    scaled = (blocks / blocks.abs().amax(1, keepdim=True).clamp(min=1e-38)).flatten()
    error = integers.errors(flat, fourbit.rounded(flat, levels, block_size))["relative"]
    figure, (ax,) = axes(height=2.8)
    density, *_ = ax.hist(scaled.numpy(force=True), 121, (-1, 1), density=True, color=COLOURS[4], alpha=0.6)
    top = 1.15 * density[1:-1].max()
    ax.set_ylim(0, top)
    ax.vlines(levels.tolist(), 0, top, color=COLOURS[1], linewidth=1.5)
    bits = math.log2(len(levels)) + 32 / block_size
    title = f"{name}blocks of {block_size}: relative error {100 * error:.2f} %, {bits:.2f} bits a weight"
    ax.set_title(title, fontsize=10, color=INK)
    ax.set_xlabel("weight over the largest magnitude of its block (lines: levels)")
    ax.set_ylabel("density")
    return figure


def slider(draw: Callable[[Any], Any], values: Sequence, start: Any, label: str) -> None:
    """Show the figure `draw(start)`, and a slider over `values` that draws it again.

    Where no kernel or no ipywidgets is at hand, the figure stays as it is.
    """
    from IPython.display import display

    shown = display(draw(start), display_id=True)
    with contextlib.suppress(ImportError):
        import ipywidgets

        knob = ipywidgets.SelectionSlider(options=values, value=start, description=label, continuous_update=False)
        knob.observe(lambda change: shown.update(draw(change["new"])), "value")
        display(knob)


def code_usage(counts: Mapping[str, Sequence[int]]):
    """How often each code is used, one panel a code book, codes from the lowest level to the highest; dashed: all alike."""
    figure, panels = axes(width=3.0 * len(counts) + 0.6, height=2.9, columns=len(counts))
    shares = {name: [100 * int(c) / max(sum(map(int, values)), 1) for c in values] for name, values in counts.items()}
    shown = looks(shares)
    for ax, (name, values) in zip(panels, shares.items(), strict=False):
        ax.bar(range(len(values)), values, color=shown[name]["color"], width=0.85)
        ax.axhline(100 / len(values), color=INK, linestyle="--", linewidth=1)
        ax.set_title(name, fontsize=10, color=INK)
        ax.set_xlabel("level, lowest to highest")
        ax.set_ylim(0, 1.08 * max(map(max, shares.values())) or 1)
        ax.annotate(
            "equal use",
            (len(values) - 1, 100 / len(values)),
            (0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
    panels[0].set_ylabel("share of the weights (%)")
    return figure


def error_by_block(series: Mapping[str, Sequence[tuple[int, float, float]]]):
    """What smaller blocks buy and cost: `series` maps a label to (block size, bits a weight, relative error) triples.

    Left against the block size, right against the bits a weight beyond 4, which its scale takes. Every second series is dashed.
    """
    figure, (left, right) = axes(width=9.0, height=3.4, columns=2)
    shown = looks(series)
    for number, (label, points) in enumerate(series.items()):
        style = shown[label] | {"label": label, "markersize": 4}
        # a dashed line often lies on a solid one: it is dark, and on top
        style |= {"linestyle": "--", "color": INK, "linewidth": 1, "zorder": 3} if number % 2 else {"linewidth": 2.5}
        sizes, bits, errors = zip(*points, strict=True)
        left.plot(sizes, [100 * e for e in errors], **style)
        right.plot([each - 4 for each in bits], [100 * e for e in errors], **style)
    right.set_xscale("log", base=2)
    left.set_xscale("log", base=2)
    left.set_xticks(sizes, [str(size) for size in sizes], rotation=45)
    left.set_xlabel("block size (weights per scale)")
    left.set_ylabel("relative error (%)")
    right.set_xlabel("bits a weight for scales (the codes take 4)")
    left.legend(frameon=False, fontsize=9)
    return figure


_PARTS = dict(  # of estimates.breakdown, in the order of the bars
    zip(
        ("linear layers", "scales and code books", "embedding", "head", "embedding and head", "other"),
        (*COLOURS[:4], COLOURS[2], COLOURS[5]),
        strict=True,
    )
)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def where_bytes_go(parts: Mapping[str, Mapping[str, int]]):
    """Stacked shares of a model's bytes, one bar a label; `parts` maps a label to what `estimates.breakdown` gives.

    Bars are as long as the bytes over those of the first label. Segments that are wide enough show their size.
    """
    figure, (ax,) = axes(width=8.0, height=1.2 + 0.45 * len(parts))
    whole = sum(next(iter(parts.values())).values())
    for row, values in enumerate(parts.values()):
        left = 0.0
        for name, colour in _PARTS.items():
            if width := 100 * values.get(name, 0) / whole:
                ax.barh(-row, width, left=left, color=colour, height=0.62, label=name)
                if width > 6:
                    dark = "white" if colour == COLOURS[0] else "black"
                    middle = (left + width / 2, -row)
                    ax.annotate(_size(values[name]), middle, ha="center", va="center", fontsize=7.5, color=dark)
            left += width
        total = _size(sum(values.values()))
        ax.annotate(total, (left, -row), (4, 0), textcoords="offset points", va="center", color=INK)
    ax.set_yticks([-row for row in range(len(parts))], list(parts))
    ax.set_xlabel(f"bytes, in per cent of {next(iter(parts))}")
    ax.set_xlim(0, 116)
    ax.grid(visible=False)
    bars, labels = ax.get_legend_handles_labels()
    bars = dict(zip(labels, bars, strict=True))
    named = [(bars[name], name) for name in _PARTS if name in bars]
    figure.legend(*zip(*named, strict=True), loc="outside upper center", ncols=6, frameon=False, fontsize=9)
    return figure
