"""Is tonight worse than what was accepted, or is it noise? Every metric is compared with a tolerance from its own measurement.

There are four kinds of metric:

    exact    bytes of weights, of scales, and of cache per token. They are counted, not timed. Any difference is a regression.
    paired   perplexity, KL divergence, a guard's scores, the validation loss of a training run. The same model reads the same
             text again, so sampling errors cancel, and only rounding is left. The tolerance is one standard error of the accepted
             measurement, in both directions, with a floor (another processor's kernels changed perplexity by up to 0.15 %:
             docs/measured.md). A metric that suddenly improves is a regression too, because something else is being measured.
    ratio    speed divided by the 16-bit speed of the same run (for training the time of a step and the peak of memory), and share
             of the roofline. A slow machine slows both. Only a slower value counts, compared with the median of the last seven
             passes on this device. It needs at least three.
    time     the 16-bit speed itself, and a notebook's seconds. They are compared with the same median, and may be half as slow
             again.

Speed is judged only at nightly size, because at smoke size a dozen tokens are timed once. A value that is slower than its
tolerance on one night is suspect. Two nights in a row are a regression, and so is one night beyond twice the tolerance. Of many
timed metrics, one is outside its tolerance nearly every night.

A baseline is the file `baselines/<device>.json`, with one accepted metric and its tolerance per line. `--update-baseline` changes
it, and the change is reviewed like code. Speed is not in the baseline but in the history, which starts again with an updated
baseline. A rejected value is never part of a median. Otherwise, after a slow week, slow would be normal.

What it leaves out: trends that are too slow to leave a tolerance on any night (the report draws them), and corrections for the
number of metrics, which is in the hundreds. The tolerances are wide enough for that.
"""

import json
import re
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from .. import files
from ..errors import QwlibError
from .gated import Figure, figures, given, packages_of, rows

SCHEMA = 1
PASSES, NEEDED = 7, 3
RATIO_SLACK, TIME_SLACK, MOST_SLACK = 0.15, 0.5, 0.5
# a notebook that is slower by less than this is no regression
SECONDS_FLOOR = 60


_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
_ACCEPTED = {
    "type": "object",
    "properties": {"value": {"type": "number"}, "tolerance": {"type": "number", "minimum": 0}},
    "required": ["value"],
}
_SIZE = {
    "type": "object",
    "properties": {
        "packages": _TEXTS,
        "given": {"type": "object", "additionalProperties": {"type": "object"}},
        "figures": {"type": "object", "additionalProperties": _ACCEPTED},
    },
    "required": ["packages", "given", "figures"],
}
BASELINE = {
    "type": "object",
    "properties": {"sizes": {"type": "object", "additionalProperties": _SIZE}},
    "required": ["schema", "device", "sizes"],
}


@dataclass
class Past:
    """What the history contains: the accepted values of each metric, oldest first, and last night's suspects and packages."""

    passes: dict[str, list[float]] = field(default_factory=dict)
    suspects: set[str] = field(default_factory=set)
    packages: dict[str, str] = field(default_factory=dict)


@dataclass
class Finding:
    """The result for one metric.

    `state` is `fine` (within tolerance), `suspect` (slower for one night), `regression`, `new` (no baseline), `learning` (not
    judged yet), `skipped` (not measured) or `accepted` (with --update-baseline).
    """

    name: str
    state: str
    now: float | None = None
    before: float | None = None
    tolerance: float | None = None
    cause: str = ""


def judge(outcomes: list, baseline: dict | None, past: Past, *, timed: bool = True) -> list[Finding]:
    """A finding for every metric of tonight, the baseline and the history, and for every row that failed. Regressions come first.

    `baseline` is the entry of this device and size in the baseline file, or None. `timed` says whether speed is judged.
    """
    now, facts = figures(outcomes), given(outcomes)
    accepted = (baseline or {}).get("figures", {})
    then = (baseline or {}).get("packages") or past.packages
    known = {name for name, values in past.passes.items() if timed and len(values) >= NEEDED}
    findings = [
        _failed(name, row) for o in outcomes if o.status == "passed" for name, row in rows(o).items() if _broke(row)
    ]
    for name in sorted(now.keys() | accepted.keys() | known):
        figure, row = now.get(name), name.rpartition("/")[0]
        if figure is None:
            findings.append(_gone(name, accepted.get(name), outcomes))
            continue
        if figure.kind in ("exact", "paired"):
            finding = _against(name, figure, accepted.get(name))
        elif timed:
            finding = _over_time(name, figure, past.passes.get(name, []), name in past.suspects)
        else:
            finding = Finding(name, "learning", figure.value, cause="speed is judged only at nightly size")
        if finding.state in ("regression", "suspect"):
            was = (baseline or {}).get("given", {}).get(row, {})
            finding.cause = cause(then, packages_of(outcomes), was, facts.get(row, {}))
        findings.append(finding)
    return sorted(findings, key=lambda finding: finding.state != "regression")


def _broke(row: dict) -> bool:
    return "failure" in row and not row["failure"].get("skipped")


def _failed(name: str, row: dict) -> Finding:
    return Finding(f"{name}/failed", "regression", cause=row["failure"]["reason"])


def _against(name: str, figure: Figure, accepted: dict | None) -> Finding:
    if accepted is None:
        return Finding(name, "new", figure.value)
    value, tolerance = accepted["value"], accepted.get("tolerance", 0.0)
    fine = abs(figure.value - value) <= tolerance
    return Finding(name, "fine" if fine else "regression", figure.value, value, tolerance)


def _over_time(name: str, figure: Figure, values: list[float], suspected: bool) -> Finding:
    values = values[-PASSES:]
    if len(values) < NEEDED:
        return Finding(
            name, "learning", figure.value, cause=f"the median needs {NEEDED} passes, and there are {len(values)}"
        )
    middle = statistics.median(values)
    share = slack(figure.kind, values)
    if figure.kind == "time" and not figure.less:
        share /= 1 + share  # half as slow again is two thirds of the speed
    tolerance = share * middle
    if name.endswith("/seconds"):
        tolerance = max(tolerance, SECONDS_FLOOR)
    worse = figure.value - middle if figure.less else middle - figure.value
    state = "fine" if worse <= tolerance else "regression" if suspected or worse > 2 * tolerance else "suspect"
    return Finding(name, state, figure.value, middle, tolerance)


def slack(kind: str, values: list[float]) -> float:
    """How much worse than the median a metric may be, as a share of the median: three robust standard deviations, within limits.

    The median absolute deviation times 1.4826 estimates a normal distribution's standard deviation (Rousseeuw and Croux,
    Alternatives to the median absolute deviation, 1993). The upper limit keeps a noisy history from letting every value pass.
    """
    middle = statistics.median(values)
    spread = 1.4826 * statistics.median(abs(value - middle) for value in values)
    floor = {"ratio": RATIO_SLACK, "time": TIME_SLACK}[kind]
    return min(max(floor, 3 * spread / middle if middle else 0.0), MOST_SLACK)


def _gone(name: str, accepted: dict | None, outcomes: list) -> Finding:
    """A known metric that is missing tonight. Its notebook did not pass, its row failed or was skipped, or it disappeared."""
    notebook, row = name.split("/")[0], name.rpartition("/")[0]
    accepted = accepted or {}
    finding = Finding(name, "skipped", before=accepted.get("value"), tolerance=accepted.get("tolerance"))
    outcome = next((o for o in outcomes if o.name == notebook), None)
    if outcome is None:
        finding.state, finding.cause = "regression", f"there is no notebook {notebook} any more"
    elif outcome.status != "passed":
        finding.cause = f"the status of notebook {notebook} is: {outcome.status}"
    elif failure := rows(outcome).get(row, {}).get("failure"):
        finding.cause = failure["reason"]
    else:
        finding.state, finding.cause = "regression", "tonight's record does not contain this metric"
    return finding


def cause(then: dict, now: dict, was: dict, given: dict) -> str:
    """What else changed, as the probable cause."""
    changed = []
    for old, new in ((was, given), (then, now)):
        for key in sorted(old.keys() | new.keys()) if old and new else ():
            if old.get(key) != new.get(key):
                changed.append(f"{key} {old.get(key, 'absent')} → {new.get(key, 'absent')}")
    return "; ".join(changed) or "no recorded package, hash or setting changed, so it may be the code"


def path_of(folder: Path, device: str) -> Path:
    """The path of a device's baseline file."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    if not device.isascii() or not name:  # letters that the name lost may be all that tells two devices apart
        name = f"{name}-{files.sha256_text(device)[:8]}".lstrip("-")
    return Path(folder) / f"{name}.json"


def read(path: Path) -> dict | None:
    """The content of the baseline file, or None if there is no file.

    Raises QwlibError for a damaged file and for a file with another schema.
    """
    try:
        whole = json.loads(Path(path).read_text(encoding="utf-8"))
        why = whole["schema"] == SCHEMA and files.misfit(whole, BASELINE)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        why = str(error)[:200]
    if why:
        raise QwlibError(
            f"{path} is damaged ({why}): restore it from git, or write a new one with --update-baseline"
        ) from None
    if whole["schema"] != SCHEMA:
        raise QwlibError(
            f"{path} has schema {whole['schema']}, but this version reads {SCHEMA}: write a new one with --update-baseline"
        )
    return whole


def accept(path: Path, device: str, size: str, outcomes: list) -> Path:
    """Write what was measured tonight as the baseline of this device at this size.

    Metrics of notebooks that did not pass, and of rows that were skipped or failed, keep their accepted values. A baseline file
    that can't be read is kept beside the new one, with `.old` at the end of its name.
    """
    try:
        whole = read(path) or {"schema": SCHEMA, "device": device, "sizes": {}}
    except QwlibError:
        files.write_bytes(Path(f"{path}.old"), Path(path).read_bytes())
        whole = {"schema": SCHEMA, "device": device, "sizes": {}}
    old = whole["sizes"].get(size, {"figures": {}, "given": {}, "packages": {}})
    new = {}
    for name, figure in figures(outcomes).items():
        if figure.kind in ("exact", "paired"):
            digits = figure.value if figure.kind == "exact" else float(f"{figure.value:.6g}")
            new[name] = {"value": digits} | (
                {"tolerance": float(f"{figure.tolerance:.3g}")} if figure.tolerance else {}
            )
    stays = {name: kept for name, kept in old["figures"].items() if name not in new and _stays(name, outcomes)}
    facts = {row: kept for row, kept in old["given"].items() if any(name.startswith(f"{row}/") for name in stays)}
    facts |= {row: fact for row, fact in given(outcomes).items() if any(name.startswith(f"{row}/") for name in new)}
    whole["sizes"][size] = {
        "packages": packages_of(outcomes) or old["packages"],
        "given": facts,
        "figures": stays | new,
    }
    return files.write_text(path, _lines(whole))


def _stays(name: str, outcomes: list) -> bool:
    return _gone(name, None, outcomes).state != "regression"


def _lines(whole: dict) -> str:
    """Sorted JSON with one metric per line, so that a review shows what changed."""
    text = json.dumps(whole, indent=1, sort_keys=True, ensure_ascii=False)
    flat = re.sub(
        r"\{\n\s+(\"(?:value|tolerance)\"[^{}]*?)\n\s+\}", lambda m: "{" + re.sub(r"\s*\n\s*", " ", m[1]) + "}", text
    )
    return flat + "\n"
