"""The report page of a run: one HTML file that needs no network and no scripts, and is readable in light, in dark and on a phone.

It begins with the verdict. Then follow one row per notebook, the regressions with their probable causes, plots of memory, quality
and speed, every metric with its trend, and the figures from the notebooks. Jinja escapes everything that a model or a notebook
wrote. `summary.md` is a short version. It is also added to GitHub's step summary, if there is one.
"""

import base64
import contextlib
import os
from pathlib import Path

from .. import files
from . import gated, pages

TEMPLATE = Path(__file__).parent / "report.html"
GOOD, BAD = ("passed", "fine", "accepted"), ("failed", "timeout", "error", "regression")
# how the page names the state of a metric; `gates.Finding` explains the states
RESULTS = {
    "regression": "regression",
    "suspect": "slower for one night",
    "fine": "within tolerance",
    "accepted": "accepted as baseline",
    "new": "no baseline",
    "learning": "not judged",
    "skipped": "not measured",
}


def write(folder: Path, outcomes: list, names: list[str] | None = None) -> Path:
    """Write `index.html` into a run's folder, and a page for each executed notebook beside it.

    `names` are the names of all notebooks of the run. They are needed while the run is not finished.
    """
    names = names or [o.name for o in outcomes]
    passed, waiting = sum(o.status == "passed" for o in outcomes), _waiting(names, outcomes)
    verdict = f"{passed} of {len(names)} notebooks passed"
    verdict = f"Not finished: {verdict} so far" if waiting else verdict
    fine, where = passed == len(names), _where(folder, outcomes)
    return _render(folder, outcomes, waiting=waiting, verdict=verdict, fine=fine, where=where)


def _waiting(names: list[str], outcomes: list) -> list[dict]:
    done = {o.name for o in outcomes}
    return [{"name": name, "status": "not run yet", "look": "soft"} for name in names if name not in done]


def write_night(night) -> Path:
    """Write `index.html` and `summary.md` of a night. This also works for a night that is not finished."""
    waiting = _waiting(night.names, night.outcomes)
    names = {finding.name for finding in night.findings}
    trends = {name: [n["figures"][name] for n in night.nights if name in n["figures"]] for name in names}
    words = verdict(night)
    where = f"Size: {night.size}. {_where(night.folder, night.outcomes)}"
    summary = _markdown(night, words, where)
    files.write_text(night.folder / "summary.md", summary)
    if night.finished and (shared := os.environ.get("GITHUB_STEP_SUMMARY")):
        with open(shared, "a", encoding="utf-8") as file:
            file.write(summary)
    return _render(
        night.folder,
        night.outcomes,
        waiting=waiting,
        verdict=words,
        fine=night.finished and night.code == 0,
        where=where,
        notes=[*night.trouble, *night.notes],
        regressions=[_shown(f) for f in night.findings if f.state == "regression"],
        groups=_groups(night.findings, trends),
        plots=_plots(night.outcomes),
    )


# by exit code
HEADS = ("Fine", "Regression", "Failed", "The nightly run itself failed")


def verdict(night) -> str:
    """The result of the night in one line."""
    passed = sum(o.status == "passed" for o in night.outcomes)
    skipped = sum(o.status == "skipped" for o in night.outcomes)
    ran = f"{passed} of {len(night.names) - skipped} notebooks passed" + (f", {skipped} skipped" if skipped else "")
    if not night.finished:
        return f"Not finished: {ran} so far"
    states = ("regression", "suspect", "fine", "accepted", "new", "skipped")
    worse, suspects, held, accepted, new, absent = (sum(f.state == s for f in night.findings) for s in states)
    said = [f"{worse} of {worse + suspects + held} metrics regressed"] if worse else []
    said += [f"{held} metrics within tolerance"] if held and not worse else []
    said += [f"{accepted} metrics accepted as baseline"] if accepted else []
    said += [f"{suspects} slower for one night"] if suspects else []
    said = said or ["no metric was judged"]
    said += [f"{new} without a baseline"] if new else []
    said += [f"{absent} not measured"] if absent else []
    return f"{HEADS[night.code]}: {ran}, {', '.join(said)}"


def _render(folder: Path, outcomes: list, *, waiting: list = (), **parts) -> Path:
    import jinja2

    template = jinja2.Environment(autoescape=True, undefined=jinja2.ChainableUndefined).from_string(
        TEMPLATE.read_text("utf-8")
    )
    drawn = [{"name": o.name, "figures": _figures(o.executed)} for o in outcomes]
    rows = [_row(outcome) for outcome in outcomes] + list(waiting)
    page = template.render(
        policy=pages.POLICY, notebooks=rows, drawn=[each for each in drawn if each["figures"]], **parts
    )
    return files.write_text(Path(folder) / "index.html", page)


def _figures(executed: Path | None) -> list[tuple[str, str]]:
    with contextlib.suppress(Exception):  # whatever a copy holds, the page of the run is written
        return pages.figures(executed)
    return []


def _row(outcome) -> dict:
    return {
        "name": outcome.name,
        "page": pages.write(outcome.executed),
        "status": outcome.status,
        "look": _look(outcome.status),
        "time": f"{outcome.seconds:.0f} s" if outcome.seconds else "",
        "memory": f"{outcome.peak_bytes / 1e9:.2f} GB" if outcome.peak_bytes else "",
        "reason": outcome.reason,
        "category": outcome.category,
        "signature": outcome.signature,
    }


def _look(state: str) -> str:
    return "good" if state in GOOD else "bad" if state in BAD else "soft"


def _where(folder: Path, outcomes: list) -> str:
    environment = next((o.record["env"] for o in outcomes if o.record), None)
    if environment is None:
        return f"Run: {Path(folder).name} (UTC)."
    versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    device, cpu = environment["device"], environment["cpu"]
    device = cpu if cpu.startswith(device) else f"{device} ({cpu})"
    python = f"Python {environment['python']}"
    return f"Run: {Path(folder).name} (UTC). Device: {device}. Packages: {python}, {versions}."


def number(value: float | None) -> str:
    """A number for a reader: whole numbers in full, others with four digits, and an empty text for None."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _shown(finding) -> dict:
    tolerance = "exact" if finding.tolerance == 0 else f"± {number(finding.tolerance)}" if finding.tolerance else ""
    return {
        "name": finding.name,
        "short": finding.name.partition("/")[2],
        "result": RESULTS[finding.state],
        "look": _look(finding.state),
        "now": number(finding.now),
        "before": number(finding.before),
        "tolerance": tolerance,
        "cause": finding.cause,
        "why": finding.cause if finding.state != "regression" else "",
    }


def _groups(findings: list, trends: dict[str, list[float]]) -> list[dict]:
    """The findings by notebook, each with its trend over the nights."""
    groups = []
    for notebook in sorted({f.name.partition("/")[0] for f in findings}):
        own = [f for f in findings if f.name.partition("/")[0] == notebook]
        shown = [_shown(f) | {"trend": _trend(trends.get(f.name, []))} for f in sorted(own, key=lambda f: f.name)]
        counts = {state: sum(f.state == state for f in own) for state in dict.fromkeys(f.state for f in own)}
        summary = ", ".join(
            f"{count} {RESULTS[state]}{'s' * (state == 'regression' and count > 1)}" for state, count in counts.items()
        )
        groups.append({"name": notebook, "summary": summary, "figures": shown, "open": "regression" in counts})
    return groups


def _trend(values: list[float]) -> dict | None:
    """A line through the last thirty nights in a box of 110 by 24, with a dot on the last one. None for a single night."""
    values = values[-30:]
    if len(values) < 2:
        return None
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    points = [
        (4 + 102 * i / (len(values) - 1), 20 - 16 * (v - low) / span if high > low else 12)
        for i, v in enumerate(values)
    ]
    x, y = points[-1]
    return {
        "points": " ".join(f"{a:.1f},{b:.1f}" for a, b in points),
        "x": f"{x:.1f}",
        "y": f"{y:.1f}",
        "title": f"{len(values)} nights, from {number(low)} to {number(high)}",
    }


def _plots(outcomes: list) -> list[dict]:
    """Plots of memory against quality, and of speed, from the notebook with the most such rows."""
    from ..measuring import plots

    found = []
    for value, draw, caption in (
        (_byte_and_quality, plots.pareto, "memory against perplexity"),
        (_decode_tok_s, lambda rows: plots.bars(rows, "tokens/s"), "tokens/s while decoding, batch size 1"),
    ):
        each = {o.name: _values(o, value) for o in outcomes if o.status == "passed"}
        notebook, shown = max(each.items(), key=lambda item: len(item[1]), default=("", {}))
        for model in sorted({name.split("/")[1] for name in shown}):
            own = {_label(name.split("/")[2]): drawn for name, drawn in shown.items() if name.split("/")[1] == model}
            if len(own) > 1:
                png = base64.b64encode(draw(own)._repr_png_()).decode()
                found.append({"png": png, "caption": f"{model}: {caption} ({notebook})"})
    return found


def _values(outcome, value) -> dict:
    found = {}
    for name, row in gated.rows(outcome).items():
        with contextlib.suppress(KeyError, TypeError, ValueError):  # rows follow no schema
            found[name] = value(row)
    return found


def _label(name: str) -> str:
    """A name in a plot: shortened, and with dollar signs that start no formula."""
    return (name if len(name) <= 24 else f"{name[:23]}…").replace("$", r"\$")


def _byte_and_quality(row: dict) -> tuple[float, float, float]:
    held = (row["memory"]["weights_bytes"] + row["memory"]["state_bytes"]) / 1e9
    return held, float(row["quality"]["ppl"]), float(row["quality"]["ppl_stderr"])


def _decode_tok_s(row: dict) -> float:
    return float(row["speed"]["decode_tok_s"])


def _markdown(night, words: str, where: str) -> str:
    """The summary. Text from notebooks is in code spans, so that Markdown and HTML in it stay text."""
    lines = [f"## {words}", "", _code(where), ""]
    lines += [f"- {_code(note)}" for note in (*night.trouble, *night.notes)]
    lines += ["", "| notebook | status | time | peak host memory | reason |", "|---|---|--:|--:|---|"]
    for row in map(_row, night.outcomes):
        reason = _code(row["reason"]) + (f" {row['category']}, `{row['signature']}`" if row["signature"] else "")
        lines.append(f"| {row['name']} | {row['status']} | {row['time']} | {row['memory']} | {reason} |")
    worse = [_shown(f) for f in night.findings if f.state == "regression"]
    if worse:
        lines += ["", "| regression | expected | measured | tolerance | probable cause |", "|---|--:|--:|--:|---|"]
        for f in worse:
            lines.append(
                f"| {_code(f['name'])} | {f['before']} | {f['now']} | {f['tolerance']} | {_code(f['cause'])} |"
            )
    return "\n".join(lines) + "\n"


def _code(text: str) -> str:
    """A code span in a table cell. Nothing in the text can end the span or the cell."""
    plain = " ".join(text.replace("`", "'").replace("|", "¦").split())
    return f"`{plain}`" if plain else ""
