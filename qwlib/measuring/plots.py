"""Figures: functions that take records or arrays and return a matplotlib Figure.

One palette (Okabe and Ito, 2008, distinguishable with every common colour blindness), a white ground so that a figure reads
the same on a dark page, units on every axis.
"""

import math

from ..figures import COLOURS, INK, axes, looks


def arrivals(series: dict[str, list[float]]):
    """When things came, one row a series; `series` maps a label to seconds since the request."""
    figure, (ax,) = axes(height=0.9 + 0.55 * len(series))
    for row, seconds in enumerate(series.values()):
        ax.eventplot([1e3 * s for s in seconds], lineoffsets=-row, linelengths=0.7, colors=COLOURS[row % len(COLOURS)])
    ax.set_yticks([-row for row in range(len(series))], [f"{label} ({len(s)})" for label, s in series.items()])
    ax.set_xlabel("time since the request (ms)")
    ax.grid(visible=False)
    return figure


def gap_histogram(gaps: dict[str, list[float]]):
    """Distribution of inter-token latencies; `gaps` maps a scheme to seconds. Dashed lines are medians, with their values."""
    import numpy

    figure, (ax,) = axes()
    highest = max(numpy.percentile(values, 99) for values in gaps.values())
    lowest = min(min(values) for values in gaps.values())
    bins = numpy.linspace(1e3 * lowest * 0.95, 1e3 * highest * 1.05, 50)
    shown = looks(gaps)
    for row, (label, values) in enumerate(gaps.items()):
        colour, ms = shown[label]["color"], 1e3 * numpy.asarray(values)
        ax.hist(numpy.clip(ms, bins[0], bins[-1]), bins, alpha=0.65, color=colour)
        ax.axvline(numpy.median(ms), color=colour, linestyle="--", linewidth=1.5)
        name = f"{label}: median {numpy.median(ms):.1f} ms, n = {len(ms)}"
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "va": "top"}
        ax.annotate(name, (numpy.median(ms), 1 - 0.09 * row), (4, -2), color=INK, fontsize=9, **place)
    ax.set_xlabel("inter-token latency (ms); the last bin holds everything slower")
    ax.set_ylabel("tokens")
    ax.margins(y=0.25)
    return figure


def batch_sweep(sweeps: dict[str, list[dict]]):
    """Throughput of all users together and latency of each, against batch size; lists of `speed` parts by scheme.

    Both come from the median gap, which one slow moment of the machine does not move.
    """
    figure, (left, right) = axes(width=9.0, columns=2)
    shown = looks(sweeps)
    for label, speeds in sweeps.items():
        batches = [s["batch"] for s in speeds]
        left.plot(batches, [s["batch"] / s["itl_s"]["p50"] for s in speeds], linestyle="-", **shown[label])
        right.plot(batches, [1e3 * s["itl_s"]["p50"] for s in speeds], linestyle="-", **shown[label])
    for ax, unit in ((left, "all users: tokens/s at the median gap"), (right, "each user: median ITL (ms)")):
        ax.set_xscale("log", base=2)
        ax.set_xticks(batches, [str(b) for b in batches])
        ax.set_xlabel("batch size")
        ax.set_ylabel(unit)
        ax.set_ylim(bottom=0)
        _name_ends(ax, list(sweeps))
    return figure


def _name_ends(ax, names: list[str]) -> None:
    """Each line's name to the right of its last point, in the order of the lines, at least a line of text apart."""
    low, high = ax.get_ylim()
    ends = sorted((line.get_ydata()[-1], name, line) for name, line in zip(names, ax.lines, strict=True))
    place = -math.inf
    for y, name, line in ends:
        place = max(place + 0.07 * (high - low), y)
        x = line.get_xdata()[-1]
        style = {"textcoords": "offset points", "annotation_clip": False, "va": "center", "color": INK, "fontsize": 9}
        ax.annotate(name, (x, place), (7, 0), **style)


def memory_bars(rows: dict[str, dict[str, int]]):
    """Stacked bytes (GB) by scheme: weights and quantization state; `rows` maps a scheme to a record's `memory` part."""
    figure, (ax,) = axes(width=max(6.0, 1.1 * len(rows)))
    labels = list(rows)
    weights = [rows[k]["weights_bytes"] / 1e9 for k in labels]
    state = [rows[k]["state_bytes"] / 1e9 for k in labels]
    ax.bar(labels, weights, color=COLOURS[0], width=0.5, label="weights")
    ax.bar(labels, state, bottom=weights, color=COLOURS[1], width=0.5, label="scales and code books")
    for x, (w, s) in enumerate(zip(weights, state, strict=True)):
        if s:
            ax.annotate(f"{w:.3f}", (x, w / 2), ha="center", va="center", color="white")
        above = f"scales {s:.3f}\n{w + s:.3f}" if s else f"{w:.3f}"
        ax.annotate(
            above, (x, w + s), (0, 2), textcoords="offset points", ha="center", va="bottom", color=INK, fontsize=9
        )
    ax.set_ylabel("GB (10⁹ bytes)")
    ax.margins(y=0.2)
    ax.legend(frameon=False)
    return figure


def bars(rows: dict[str, float], unit: str):
    """One bar a scheme, its number beside it; `unit` is the axis' label."""
    figure, (ax,) = axes(height=0.9 + 0.32 * len(rows))
    drawn = ax.barh(list(rows), list(rows.values()), color=[look["color"] for look in looks(rows).values()])
    ax.bar_label(drawn, fmt="%.1f", padding=4, color=INK)
    ax.invert_yaxis()
    ax.margins(x=0.1)
    ax.grid(visible=False, axis="y")
    ax.set_xlabel(unit)
    return figure


def predicted_and_measured(rows: dict[str, tuple[float, float]], unit: str):
    """Pairs of bars, an outline for the prediction and a full bar for the measurement; maps a label to the two."""
    figure, (ax,) = axes(width=max(6.0, 1.3 * len(rows)))
    colours = [look["color"] for look in looks(rows).values()]
    for shift, index, name in ((-0.2, 0, "limit"), (0.2, 1, "measured")):
        for x, (pair, colour) in enumerate(zip(rows.values(), colours, strict=True)):
            ax.bar(x + shift, pair[index], width=0.38, facecolor=colour if index else "white", edgecolor=colour)
            text = f"{name}\n{pair[index]:.3g}"
            ax.annotate(text, (x + shift, pair[index]), ha="center", va="bottom", color=INK, fontsize=9)
    ax.margins(y=0.18)
    ax.set_xticks(range(len(rows)), list(rows))
    ax.set_ylabel(unit)
    return figure


def pareto(rows: dict[str, tuple[float, float, float]], *, metric: str = "perplexity"):
    """What a byte buys: `rows` maps a scheme to (weights in GB, metric, its standard error); less is better on both axes.

    A hollow marker means that another scheme takes no more bytes and is better by more than the error of the difference, both
    errors taken as independent. Two measurements of the same tokens differ by less than that, so no scheme is called beaten
    by chance.
    """
    figure, (ax,) = axes(width=7.5, height=4.0 + 0.06 * len(rows))
    shown = looks(rows)
    for name, (x, y, error) in rows.items():
        beaten = any(a <= x and y - b > 1.96 * math.hypot(error, e) for a, b, e in rows.values())
        style = shown[name] | {"linestyle": "none", "markerfacecolor": "white" if beaten else shown[name]["color"]}
        ax.errorbar(x, y, yerr=1.96 * error, capsize=3, markersize=7, **style)
    ax.margins(x=0.15)
    _label(ax, {name: (x, y) for name, (x, y, _) in rows.items()})
    ax.set_xlabel("weights and scales (GB); hollow: another one is smaller and better, beyond the error")
    ax.set_ylabel(f"{metric}\nwith its 95 % interval")
    return figure


def _label(ax, points: dict[str, tuple[float, float]]):
    """Names beside their points: the first place around each that no other name and no other point takes."""
    ax.autoscale_view()
    scale = 72 / ax.figure.dpi
    spots = {name: ax.transData.transform(point) * scale for name, point in points.items()}
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in spots.values()]
    for name, (x, y) in sorted(spots.items(), key=lambda item: -item[1][1]):
        width, height = 4.9 * len(name), 11  # of the letters below, in points
        sides = [(dx, dy) for dy in (-4, 7, -16, 19, -28, 31, -40) for dx in (8, -8 - width)]
        boxes = [(x + dx, y + dy, x + dx + width, y + dy + height) for dx, dy in sides]
        free = [not any(_overlap(box, other) for other in taken) for box in boxes]
        place = free.index(True) if True in free else 0
        taken.append(boxes[place])
        ground = {"facecolor": "white", "edgecolor": "none", "pad": 0.3, "alpha": 0.7}
        far = {"arrowstyle": "-", "color": INK, "linewidth": 0.5, "alpha": 0.6} if place > 5 else None
        ax.annotate(
            name,
            points[name],
            sides[place],
            textcoords="offset points",
            color=INK,
            fontsize=8,
            bbox=ground,
            arrowprops=far,
        )


def _overlap(one, other) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def degradation(rows: dict[str, dict[str, tuple[float, float]]], *, claim: float = 5.0):
    """Perplexity over the 16-bit one, in per cent: `rows` maps a model to scheme → (increase, standard error), a panel each.

    Bars carry 95 % intervals; the dashed line is what is often promised.
    """
    widest = max(map(len, rows.values()))
    figure, panels = axes(width=max(6.0, 1.1 * widest * len(rows)), columns=len(rows))
    for ax, (model, values) in zip(panels, rows.items(), strict=True):
        heights, errors = [v for v, _ in values.values()], [1.96 * e for _, e in values.values()]
        colours = [look["color"] for look in looks(values).values()]
        ax.bar(list(values), heights, 0.7, yerr=errors, color=colours, capsize=3, ecolor=INK)
        for x, (value, error) in enumerate(zip(heights, errors, strict=True)):
            ax.annotate(f"{value:+.1f}", (x, value + error), (0, 3), textcoords="offset points", ha="center")
        ax.axhline(claim, color=INK, linestyle="--", linewidth=1)
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "color": INK}
        ax.annotate(f"{claim:.0f} %", (1, claim), (4, -4), **place)
        ax.set_title(model, fontsize=10, color=INK)
        ax.set_xlim(-0.6, max(len(values), 4) - 0.4)
        ax.margins(y=0.15)
    panels[0].set_ylabel("perplexity over 16-bit (%)")
    return figure


def divergences(klds: dict[str, dict]):
    """Median, mean and 99th percentile of the divergence a token, with the noise floor; maps a scheme to a record's `kld`."""
    figure, (ax,) = axes(height=1.2 + 0.38 * len(klds))
    shown = looks(name.split()[-1] for name in klds)
    for row, (name, kld) in enumerate(klds.items()):
        look = shown[name.split()[-1]]
        ax.plot([kld["median"], kld["p99"]], [-row, -row], color="#bbbbbb", linewidth=5, solid_capstyle="butt")
        ax.plot(kld["mean"], -row, **look)
        ax.annotate(
            f"{kld['mean']:.3g}", (kld["mean"], -row), (0, 6), textcoords="offset points", ha="center", fontsize=9
        )
    floor = max(kld["noise_floor"] for kld in klds.values())
    ax.axvline(floor, color=COLOURS[5], linestyle="--", linewidth=1.5)
    ax.annotate(
        "noise of 16-bit",
        (floor, 1),
        (4, -2),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        va="top",
        color=COLOURS[5],
    )
    ax.set_xscale("log")
    ax.set_yticks([-row for row in range(len(klds))], list(klds))
    ax.set_xlabel("KL divergence from 16-bit (nats a token); marker: mean, bar: median to 99th percentile", fontsize=9)
    ax.margins(y=0.2)
    ax.grid(visible=False)
    return figure


def intervals(rows: dict[str, dict[str, tuple[float, float]]], unit: str):
    """Perplexities with 95 % intervals, a group a label: `rows` maps a label to series → (value, standard error)."""
    figure, (ax,) = axes(height=1.2 + 0.45 * len(rows))
    shown = looks(dict.fromkeys(name for values in rows.values() for name in values))
    for place, values in enumerate(rows.values()):
        for number, (name, (value, error)) in enumerate(values.items()):
            shift = (number - (len(values) - 1) / 2) * 0.25
            # the interval of the mean loss, which is the logarithm
            factor = math.exp(1.96 * error / value)
            label = name if place == 0 else None
            ax.plot([value / factor, value * factor], [-place - shift] * 2, color=shown[name]["color"], linewidth=2)
            ax.plot(value, -place - shift, linestyle="none", label=label, **shown[name])
    ax.set_yticks([-place for place in range(len(rows))], list(rows))
    ax.set_xscale("log")
    ax.set_xlabel(unit)
    ax.grid(visible=False)
    ax.legend(frameon=False)
    return figure


def score_scatter(ours, theirs, labels, *, names: tuple[str, str], threshold: float):
    """P(unsafe) of each row under two schemes, on axes of log-odds; rows in the grey quarters change their verdict."""
    import numpy

    figure, (ax,) = axes(4.8, 4.4)
    ours, theirs = (numpy.clip(numpy.asarray(scores), 1e-6, 1 - 1e-6) for scores in (ours, theirs))
    both = numpy.concatenate([ours, theirs, [threshold]])
    low, high = both.min() / 2, 1 - (1 - both.max()) / 2
    for x, y in (([low, threshold], [threshold, high]), ([threshold, high], [low, threshold])):
        ax.fill_between(x, y[0], y[1], color="#eeeeee", zorder=0)
    ax.set(xscale="logit", yscale="logit", xlim=(low, high), ylim=(low, high))
    ax.plot([low, high], [low, high], color="#999999", linewidth=1)
    for label, name, marker, colour in ((0, "safe", "o", COLOURS[0]), (1, "unsafe", "^", COLOURS[5])):
        some = numpy.asarray(labels) == label
        ax.plot(ours[some], theirs[some], marker, color=colour, markersize=5, alpha=0.75, label=f"labelled {name}")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_formatter("")
    ax.set_xlabel(f"P(unsafe) in {names[0]}, log-odds scale")
    ax.set_ylabel(f"P(unsafe) in {names[1]}, log-odds scale")
    ax.legend(frameon=False, loc="upper left", fontsize=9)
    return figure


def reliability(bins: dict[str, list[dict]]):
    """Share of unsafe rows against mean P(unsafe), a bin of scores a point; maps a scheme to `classify.reliability`'s bins."""
    figure, (ax,) = axes(5.2, 4.2)
    ax.plot([0, 1], [0, 1], color="#999999", linewidth=1)
    shown = looks(bins)
    for number, (name, found) in enumerate(bins.items()):
        mean = [each["mean_score"] + 0.008 * number for each in found]  # beside each other, not over each other
        share = [each["share_unsafe"] for each in found]
        low = [max(s - each["share_low"], 0) for s, each in zip(share, found, strict=True)]
        high = [max(each["share_high"] - s, 0) for s, each in zip(share, found, strict=True)]
        style = shown[name] | {"linestyle": "none", "capsize": 2, "markersize": 5}
        ax.errorbar(mean, share, yerr=[low, high], label=name, **style)
    ax.set(xlim=(0, 1), ylim=(0, 1))
    ax.set_xlabel("mean P(unsafe) of a bin")
    ax.set_ylabel("share of its rows labelled unsafe")
    ax.legend(frameon=False)
    return figure
