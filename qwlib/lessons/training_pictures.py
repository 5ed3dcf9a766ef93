"""Explanatory figures of fine-tuning: what a low rank holds, which codes move, losses, and the parts of memory.

Plain numbers in, a matplotlib Figure out, in the style of `figures.py`.
"""

from collections.abc import Mapping, Sequence

from ..figures import COLOURS, INK, axes

PARTS = ("weights", "adapter", "gradients", "optimizer", "activations", "scores")
Points = Sequence[tuple[float, float]]


def ranks(series: Mapping[str, Sequence[float]], rank: int):
    """The share of the squared norm that a matrix of low rank holds, by its rank; the dashed line is at `rank`."""
    figure, (ax,) = axes()
    for number, (name, shares) in enumerate(series.items()):
        ax.plot(range(1, len(shares) + 1), [100 * share for share in shares], color=COLOURS[number], label=name)
    ax.axvline(rank, color=INK, linestyle="--", linewidth=1)
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "bottom"}
    ax.annotate(f"rank {rank}", (rank, 0), (4, 3), color=INK, fontsize=9, **place)
    ax.set_xscale("log", base=2)
    ticks = [2**n for n in range(20) if 2**n <= max(map(len, series.values()))]
    ax.set_xticks(ticks, [str(tick) for tick in ticks])
    ax.set_ylim(0, 105)
    ax.set_xlabel("rank of the nearest matrix")
    ax.set_ylabel("share of the squared norm (%)")
    ax.legend(frameon=False, loc="lower right")
    return figure


def codes_by_rate(shares: Mapping[float, float], marks: Mapping[str, float]):
    """The share of 4-bit codes that one step changes, by the learning rate; `marks` are named rates."""
    figure, (ax,) = axes()
    ax.plot(list(shares), [100 * share for share in shares.values()], color=COLOURS[0], marker="o")
    for number, (name, rate) in enumerate(marks.items()):
        ax.axvline(rate, color=COLOURS[5], linestyle="--", linewidth=1.2)
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
        ax.annotate(name, (rate, 1 - 0.12 * number), (4, -2), color=INK, fontsize=9, **place)
    ax.set_xscale("log")
    ax.set_xlabel("learning rate")
    ax.set_ylabel("codes that change\nin one step (%)")
    ax.set_ylim(-3, 105)
    return figure


def losses(training: Mapping[str, Points], validation: Mapping[str, Points]):
    """(step, loss) of each run: left of each step's batch, right on the examples that were held back."""
    figure, panels = axes(width=9.6, height=3.4, columns=2)
    for ax, runs, title in zip(panels, (training, validation), ("batch of the step", "held back"), strict=True):
        for number, (name, points) in enumerate(runs.items()):
            steps, values = zip(*points, strict=True)
            marker = "osD^v"[number % 5] if len(points) < 30 else None
            ax.plot(steps, values, color=COLOURS[number], marker=marker, markersize=5, label=name)
        ax.set_title(title, fontsize=10, color=INK)
        ax.set_xlabel("step")
        ax.xaxis.get_major_locator().set_params(integer=True)
    panels[0].set_ylabel("loss (nats a token)")
    panels[1].legend(frameon=False, fontsize=9)
    return figure


def memory(predicted: Mapping[str, Mapping[str, float]], measured: Mapping[str, float]):
    """Bytes by part as one bar a run (GB), and a line where the measured peak is; parts are some of `PARTS`."""
    figure, (ax,) = axes(width=9.0, height=1.5 + 0.5 * len(predicted))
    shown = [part for part in PARTS if any(part in parts for parts in predicted.values())]
    for row, (name, parts) in enumerate(predicted.items()):
        left = 0.0
        for part in shown:
            size = parts.get(part, 0) / 1e9
            ax.barh(
                -row, size, left=left, height=0.6, color=COLOURS[PARTS.index(part)], label=part if row == 0 else None
            )
            left += size
        if name in measured:
            peak, label = measured[name] / 1e9, "measured peak" if row == 0 else None
            ax.plot([peak, peak], [-row - 0.42, -row + 0.42], color="black", linewidth=2, label=label)
        most = max(left, measured.get(name, 0) / 1e9)
        ax.annotate(f"{most:.2f}", (most, -row), (5, 0), textcoords="offset points", va="center", color=INK)
    ax.set_yticks([-row for row in range(len(predicted))], list(predicted))
    ax.set_xlabel("GB (10⁹ bytes)")
    ax.margins(x=0.08)
    ax.grid(visible=False)
    figure.legend(loc="outside upper center", ncols=7, frameon=False, fontsize=9)
    return figure
