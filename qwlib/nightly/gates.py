"""Is tonight worse than what was accepted, or is it noise? Every figure is held to a tolerance that it brings itself.

Four kinds of figure, four questions:

    exact    bytes of weights, scales and cache per token: counted, not timed. Any difference is a change.
    paired   perplexity, divergence, a guard's scores: the same model reads the same text again, so that sampling errors cancel
             and what is left is rounding. Two-sided, within one standard error of the accepted measurement, or a floor where
             that is smaller (another processor's kernels moved perplexity by up to 0.15 %: docs/measured.md).
             A figure that suddenly improves is a change too: something else is being measured.
    ratio    speed over that of 16 bits in the same run, share of the roofline: what the machine does to one it does to both.
             One-sided, against the median of the last seven passes on this device, at least three.
    time     16 bits' own speed, a notebook's seconds: one-sided against the same median, half as slow again.

Speed is judged at nightly size only: at smoke size a dozen tokens are timed once. One slow night is a suspicion, two running are
a regression, and so is one that is twice beyond its tolerance: of many timed figures one strays nearly every night.

A baseline is what was accepted: `baselines/<device>.json`, one figure a line, its tolerance beside it, changed by
`--update-baseline` and reviewed like code; who, when and why stands in git. Speed is not in it: it lives in the history, which
starts anew with an updated baseline. A rejected value never enters a median, or a slow week would make slowness the norm.

What it leaves out: trends too slow to cross a tolerance on any night (the report draws them), and corrections for looking at
hundreds of figures; tolerances are wide enough for that.
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
SECONDS_FLOOR = 60  # a notebook that is slower by less is not worth a look


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
    """What the history knows: values of each figure that no gate rejected, oldest first; last night's suspects and packages."""

    passes: dict[str, list[float]] = field(default_factory=dict)
    suspects: set[str] = field(default_factory=set)
    packages: dict[str, str] = field(default_factory=dict)


@dataclass
class Finding:
    """What became of one figure; `state` is fine, suspect, regression, new, learning, skipped or accepted."""

    name: str
    state: str
    now: float | None = None
    before: float | None = None
    tolerance: float | None = None
    cause: str = ""


def judge(outcomes: list, baseline: dict | None, past: Past, *, timed: bool = True) -> list[Finding]:
    """A finding for every figure of tonight, the baseline and the history, and for every row that failed; regressions first.

    `baseline`: this device's and size's part of the baseline file, None where there is none. `timed`: whether speed is judged.
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
            finding = Finding(name, "learning", figure.value, cause="speed is judged at nightly size")
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
        return Finding(name, "learning", figure.value, cause=f"{len(values)} of {NEEDED} passes that a median needs")
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
    """How much worse than the median a figure may be, as a share of it: three robust standard deviations, within limits.

    The median absolute deviation times 1.4826 estimates a normal distribution's standard deviation (Rousseeuw and Croux,
    Alternatives to the median absolute deviation, 1993). A history too noisy to judge by is not let judge nothing.
    """
    middle = statistics.median(values)
    spread = 1.4826 * statistics.median(abs(value - middle) for value in values)
    floor = {"ratio": RATIO_SLACK, "time": TIME_SLACK}[kind]
    return min(max(floor, 3 * spread / middle if middle else 0.0), MOST_SLACK)


def _gone(name: str, accepted: dict | None, outcomes: list) -> Finding:
    """A known figure that tonight lacks: its notebook did not pass, its row failed or was skipped, or it vanished."""
    notebook, row = name.split("/")[0], name.rpartition("/")[0]
    accepted = accepted or {}
    finding = Finding(name, "skipped", before=accepted.get("value"), tolerance=accepted.get("tolerance"))
    outcome = next((o for o in outcomes if o.name == notebook), None)
    if outcome is None:
        finding.state, finding.cause = "regression", f"there is no notebook {notebook} any more"
    elif outcome.status != "passed":
        finding.cause = f"{notebook} {outcome.status}"
    elif failure := rows(outcome).get(row, {}).get("failure"):
        finding.cause = failure["reason"]
    else:
        finding.state, finding.cause = "regression", "tonight's record has no such figure"
    return finding


def cause(then: dict, now: dict, was: dict, given: dict) -> str:
    """What changed beside the figure, as its probable cause."""
    changed = []
    for old, new in ((was, given), (then, now)):
        for key in sorted(old.keys() | new.keys()) if old and new else ():
            if old.get(key) != new.get(key):
                changed.append(f"{key} {old.get(key, 'absent')} → {new.get(key, 'absent')}")
    return "; ".join(changed) or "nothing that is recorded changed but the code"


def path_of(folder: Path, device: str) -> Path:
    """Where a device's baseline stands."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    if not device.isascii() or not name:  # letters that the name lost may be all that tells two devices apart
        name = f"{name}-{files.sha256_text(device)[:8]}".lstrip("-")
    return Path(folder) / f"{name}.json"


def read(path: Path) -> dict | None:
    """The baseline file, None where there is none.

    Raises QwlibError for a damaged file and for one of another schema.
    """
    try:
        whole = json.loads(Path(path).read_text(encoding="utf-8"))
        why = whole["schema"] == SCHEMA and files.misfit(whole, BASELINE)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        why = str(error)[:200]
    if why:
        raise QwlibError(f"{path} is damaged ({why}): take it from git again, or run --update-baseline") from None
    if whole["schema"] != SCHEMA:
        raise QwlibError(
            f"{path} is of schema {whole['schema']}, and {SCHEMA} is read here: accept tonight with --update-baseline"
        )
    return whole


def accept(path: Path, device: str, size: str, outcomes: list) -> Path:
    """Write what was measured tonight as this device's baseline at this size; figures of notebooks that did not pass, and of rows
    that were skipped or failed, stay as they were. A file that can't be read is kept beside it, with `.old` at its end.
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
    """JSON with a line a figure, sorted, so that a review shows what moved."""
    text = json.dumps(whole, indent=1, sort_keys=True, ensure_ascii=False)
    flat = re.sub(
        r"\{\n\s+(\"(?:value|tolerance)\"[^{}]*?)\n\s+\}", lambda m: "{" + re.sub(r"\s*\n\s*", " ", m[1]) + "}", text
    )
    return flat + "\n"
