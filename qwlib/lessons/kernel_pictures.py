"""Figures of a GPU kernel at work: where a step's time goes, fragments, memory banks, pipelines, rounds and rates.

Plain numbers and tensors in, a matplotlib Figure out, in the style of `figures.py`.
"""

from collections.abc import Mapping, Sequence

from ..figures import COLOURS, INK, axes, looks
from . import tiles

IDLE = "#dddddd"


def _ink(colour: str) -> str:
    """The colour of a text that is read on `colour`."""
    return "white" if colour in (COLOURS[0], COLOURS[5], COLOURS[6]) else "black"


def time_by_kind(profiles: Mapping[str, Sequence[Mapping]]):
    """One bar a label, stacked from the `kind`s and their `ms`; the last kind, idle, is grey. Wide segments show their ms."""
    figure, (ax,) = axes(width=8.0, height=1.3 + 0.5 * len(profiles))
    names = [part["kind"] for part in next(iter(profiles.values()))]
    looks = {name: IDLE if name == "idle" else colour for name, colour in zip(names, COLOURS, strict=False)}
    longest = max(sum(part["ms"] for part in parts) for parts in profiles.values())
    for row, parts in enumerate(profiles.values()):
        left = 0.0
        for part in parts:
            colour = looks[part["kind"]]
            label = part["kind"] if row == 0 else None
            ax.barh(-row, part["ms"], left=left, height=0.62, color=colour, label=label)
            if part["ms"] > 0.045 * longest:
                middle = (left + part["ms"] / 2, -row)
                ax.annotate(f"{part['ms']:.2f}", middle, ha="center", va="center", fontsize=8, color=_ink(colour))
            left += part["ms"]
        ax.annotate(f"{left:.2f} ms", (left, -row), (4, 0), textcoords="offset points", va="center", color=INK)
    ax.set_yticks([-row for row in range(len(profiles))], list(profiles))
    ax.set_xlabel("time of one decoding step (ms)")
    ax.set_xlim(0, 1.14 * longest)
    ax.grid(visible=False)
    figure.legend(loc="outside upper center", ncols=5, frameon=False, fontsize=9)
    return figure


def fragments():
    """Which lane holds which element of a tensor-core product (m16n8k16): a number is a lane, a colour its place in its group."""
    figure, panels = axes(width=9.6, height=4.4, columns=3)
    panels[0].get_gridspec().set_width_ratios((2, 1, 1))
    layouts = {
        "a: weights": (tiles.A_ROW, tiles.A_COLUMN, (16, 16), "column of W", "row of W"),
        "b: x": (tiles.B_ROW, tiles.B_COLUMN, (16, 8), "row of x", "column of x"),
        "c: sums": (tiles.C_ROW, tiles.C_COLUMN, (16, 8), "row of x", "row of W"),
    }
    for ax, (title, (row, column, shape, across, down)) in zip(panels, layouts.items(), strict=True):
        lane = tiles.LANE.reshape(32, *[1] * (row.dim() - 1)).expand(row.shape)
        for n, r, c in zip(lane.flatten().tolist(), row.flatten().tolist(), column.flatten().tolist(), strict=True):
            _cell(ax, c, r, n)
        ax.set_title(title, fontsize=10, color=INK)
        ax.set_xlim(-0.5, shape[1] - 0.5)
        ax.set_ylim(shape[0] - 0.5, -0.5)
        ax.set_aspect("equal")
        ax.axhline(7.5, color="black", linewidth=1.5)
        if shape[1] == 16:
            ax.axvline(7.5, color="black", linewidth=1.5)
        ax.set_xlabel(across)
        ax.set_ylabel(down)
        ax.grid(visible=False)
    return figure


def _cell(ax, x: float, y: float, lane: int, text: str | None = None):
    from matplotlib.patches import Rectangle

    colour = COLOURS[lane % 4]
    ax.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=0.5, alpha=0.85))
    text = str(lane) if text is None else text
    ax.annotate(text, (x, y), ha="center", va="center", fontsize=6.5, color=_ink(colour))


def orders(columns: Mapping[str, "Tensor"]):  # noqa: F821  torch comes with the caller
    """Which lane of a group (colour) has which of a unit's 64 columns in which product (number).

    `columns` maps a label to the columns of the four products: 4 products × 16, as the tensor core numbers them.
    """
    figure, (ax,) = axes(width=9.6, height=0.9 + 0.55 * len(columns))
    for row, placed in enumerate(columns.values()):
        for product, each in enumerate(placed.tolist()):
            for number, column in enumerate(each):
                _cell(ax, column, row, number % 8 // 2, str(product))
    ax.set_yticks(range(len(columns)), list(columns))
    ax.set_xlim(-0.5, 63.5)
    ax.set_ylim(len(columns) - 0.4, -0.6)
    ax.set_xticks(range(0, 64, 8))
    ax.set_xlabel("column of a unit (number: which product; colour: which of the four lanes)")
    ax.grid(visible=False)
    return figure


def banks(lookups: Mapping[str, "Tensor"], fronts: Mapping[str, "Tensor"]):  # noqa: F821
    """Left: different words that one lookup wants of each of 32 banks. Right: how often a lookup has to read shared memory.

    `lookups`: the 32 addresses of one lookup; `fronts`: `tiles.wavefronts` of many.
    """
    figure, (left, right) = axes(width=9.0, height=3.2, columns=2)
    width = 0.8 / len(lookups)
    for number, (name, addresses) in enumerate(lookups.items()):
        words = (addresses // 4).unique()
        counts = (words % 32).bincount(minlength=32).tolist()
        shift = width * (number - (len(lookups) - 1) / 2)
        left.bar([bank + shift for bank in range(32)], counts, width, color=COLOURS[number], label=name)
        many = fronts[name].flatten().bincount(minlength=9)
        share = (100 * many / many.sum()).tolist()
        right.bar([front + shift for front in range(len(share))], share, width, color=COLOURS[number], label=name)
    left.set_xlabel("bank")
    left.set_ylabel("different words in one lookup")
    left.yaxis.get_major_locator().set_params(integer=True)
    right.set_xlabel("readings that a lookup needs")
    right.set_ylabel("share of the lookups (%)")
    right.set_xlim(0.3, max(int(each.max()) for each in fronts.values()) + 0.7)
    right.legend(frameon=False, fontsize=9)
    return figure


def pipeline(runs: Mapping[str, Sequence[tuple[float, float, float, float]]], unit: str):
    """Pieces on their way, one panel a run, one row a piece: (copy begins, arrives, products begin, products end)."""
    figure, panels = axes(width=9.6, height=3.4, columns=len(runs))
    last = max(end for pieces in runs.values() for *_, end in pieces)
    for ax, (name, pieces) in zip(panels, runs.items(), strict=True):
        begin, there, start, end = zip(*pieces, strict=True)
        for kind, left, right, colour in (
            ("on the way", begin, there, COLOURS[4]),
            ("waits in the ring", there, start, IDLE),
            ("products", start, end, COLOURS[5]),
        ):
            widths = [stop - go for go, stop in zip(left, right, strict=True)]
            ax.barh(range(len(pieces)), widths, 0.7, left, color=colour, label=kind)
        ax.set_title(f"{name}: done after {pieces[-1][-1]:g}", fontsize=10, color=INK)
        ax.set_xlim(0, last)
        ax.set_ylim(len(pieces) - 0.4, -0.6)
        ax.set_yticks(range(len(pieces)), [str(row + 1) for row in range(len(pieces))])
        ax.set_xlabel(f"time ({unit})")
        ax.grid(visible=False)
    panels[0].set_ylabel("piece")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False, fontsize=9)
    return figure


def rounds(launches: Mapping[str, Sequence[tuple[str, int]]], processors: int):
    """How many multiprocessors have a tile, round after round: one panel a way, which is a list of launches (name, tiles)."""
    figure, panels = axes(width=9.6, height=3.1, columns=len(launches))
    longest = max(sum(-(-count // processors) for _, count in each) for each in launches.values())
    for ax, (way, each) in zip(panels, launches.items(), strict=True):
        at = 0
        for number, (name, count) in enumerate(each):
            busy = [min(processors, count - done) for done in range(0, count, processors)]
            place = range(at, at + len(busy))
            colour = COLOURS[(0, 1, 2, 4)[number % 4]]
            ax.bar(place, [processors] * len(busy), 0.9, color="white", edgecolor="#999999", linewidth=0.8)
            ax.bar(place, busy, 0.9, color=colour, label=name)
            for x, height in zip(place, busy, strict=True):
                ax.annotate(str(height), (x, height / 2), ha="center", va="center", fontsize=9, color=_ink(colour))
            at += len(busy)
        ax.set_title(f"{way}: {at} rounds", fontsize=10, color=INK)
        ax.set_xticks(range(longest), [str(number + 1) for number in range(longest)])
        ax.set_xlim(-0.6, longest - 0.4)
        ax.set_xlabel("round")
        ax.grid(visible=False)
        ax.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(0, -0.18), ncols=4)
    panels[0].set_ylabel("busy multiprocessors")
    return figure


def ladder(values: Mapping[str, float], limits: Mapping[str, float], unit="tokens/s, batch size 1", form="%.0f"):
    """Values as bars, bf16 in its own colour; `limits` are lines, ascending, with their names above."""
    names = list(values)
    figure, (ax,) = axes(width=8.6, height=1.2 + 0.36 * len(names))
    colours = [COLOURS[0 if name.startswith("bf16") else 1] for name in names]
    drawn = ax.barh(range(len(names)), list(values.values()), 0.7, color=colours)
    ground = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    ax.bar_label(drawn, fmt=form, padding=4, color=INK, bbox=ground)
    for number, (name, limit) in enumerate(limits.items()):
        ax.axvline(limit, color=COLOURS[5], linestyle="--", linewidth=1.2, zorder=0)
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        left = number == len(limits) - 1
        ax.annotate(
            f"{name}: {form % limit}",
            (limit, 1),
            (-3 if left else 3, 3),
            ha="right" if left else "left",
            va="bottom",
            color=INK,
            fontsize=9,
            **place,
        )
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.grid(visible=False)
    ax.margins(x=0.06)
    ax.set_xlabel(unit)
    return figure


def by_rows(panels: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], across: str = "rows of x (batch size)"):
    """Lines over a number of rows on a logarithmic axis, one panel a unit: label → (rows, value) pairs."""
    figure, each = axes(width=4.8 * len(panels), height=3.6, columns=len(panels))
    for ax, (unit, series) in zip(each, panels.items(), strict=True):
        ticks = sorted({x for points in series.values() for x, _ in points})
        for number, (name, points) in enumerate(series.items()):
            x, y = zip(*points, strict=True)
            ax.plot(x, y, color=looks(series)[name]["color"], marker="osD^v"[number % 5], label=name)
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.set_xlabel(across)
        ax.set_ylabel(unit)
        ax.set_ylim(bottom=0)
        ax.legend(frameon=False, fontsize=9)
    return figure
