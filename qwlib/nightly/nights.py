"""A night: every notebook at its size, each figure judged, one report; with or without a GPU.

    0  fine      1  a regression      2  a notebook failed      3  the harness itself

What is done is on the disk before the next thing starts: a night that was killed shows how far it came, and `resume` runs what
has no valid record. One night at a time: a lock holds the owner's process number, and goes with the process.
"""

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from .. import files
from ..errors import QwlibError
from ..machine import about
from . import executing, gated, gates, history, report, runner, suite

LAST = "last-{size}.json"  # in the folder of the runs: which night is the last of its size; a folder's name is only a clock's


@dataclass
class Night:
    """One night as the report shows it. `trouble` is what went wrong with the harness, a line each; `notes` is what to know."""

    folder: Path
    size: str
    device: str
    names: list[str]
    outcomes: list[runner.Outcome] = field(default_factory=list)
    findings: list[gates.Finding] = field(default_factory=list)
    nights: list[dict] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    trouble: list[str] = field(default_factory=list)
    finished: bool = False

    @property
    def code(self) -> int:
        """The exit code."""
        if self.trouble or any(outcome.status == "error" for outcome in self.outcomes):
            return 3
        if any(outcome.status in ("failed", "timeout") for outcome in self.outcomes):
            return 2
        return int(any(finding.state == "regression" for finding in self.findings))


def run(
    notebooks: Path = Path("notebooks"),
    out: Path = Path("runs"),
    *,
    size: str = "nightly",
    baselines: Path = Path("baselines"),
    resume: bool = False,
    update_baseline: bool = False,
) -> Night:
    """Run every notebook of a folder at a size, judge what it measured, and write report, summary and history under `out`.

    `resume`: go on with the last night of this size, with what has no valid record; a finished one is judged again.
    `update_baseline`: accept what was measured.

    Raises QwlibError before anything runs: a notebook that `sizes.toml` does not name, a night that is still running, nothing
    to resume.
    """
    plans, out = suite.plans(notebooks, size), Path(out).resolve()
    if not plans:
        raise QwlibError(f"there are no notebooks in {notebooks}: start in the project's folder")
    with alone(out):
        folder, began = _last(out, size) if resume else _begin(out, size)
        night = Night(folder, size, "", [plan.name for plan in plans])
        for plan in plans:
            executing.end(str(folder / plan.name))  # what a killed night left running
            outcome = runner.kept(plan, folder, began) if resume else None
            if outcome:
                print(f"{outcome.name} passed before, and its record is valid", flush=True)
            night.outcomes.append(outcome or runner.execute(plan, folder))
            with _told(night, "the report could not be written"):
                report.write_night(night)
                runner.point_latest(folder)
        # not asked before: this process would keep memory of the GPU that the notebooks are to have
        with _told(night, "the night could not be judged"):
            known = (o.record["env"]["device"] for o in night.outcomes if o.record)
            night.device = next(known, "") or about.device_name()
            _judge(night, out / "history.jsonl", gates.path_of(baselines, night.device), update_baseline)
        night.finished = True
        with _told(night, "the report could not be written"):
            report.write_night(night)
            runner.scrub(folder)
        return night


def _judge(night: Night, kept: Path, file: Path, update_baseline: bool) -> None:
    """Judge what was measured, accept it if that is wanted, and append the night to the history."""
    baseline, nights = None, []
    try:
        with _told(night, "the baseline could not be read"):
            baseline = gates.read(file)
    except QwlibError as error:
        (night.notes if update_baseline else night.trouble).append(str(error))
    with _told(night, "the history could not be read"):
        nights, damaged = history.read(kept, size=night.size)
        night.notes += damaged
    mine = {"night": night.folder.name, "device": night.device}
    before = next((each for each in nights if mine.items() <= each.items()), {})  # judged, and now judged again
    nights = [each for each in nights if each is not before]
    mixed = _devices(night, nights)
    earlier = [each for each in nights if each["device"] == night.device]
    accepted = (baseline or {}).get("sizes", {}).get(night.size)
    if accepted is None and not update_baseline:
        night.notes.append(
            f"there is no baseline for {night.size} on {night.device}: --update-baseline accepts the measured values as one"
        )
    odd: list[str] = []
    gated.figures(night.outcomes, odd)
    night.trouble += [f"the row {name} can't be read: it was not judged" for name in odd]
    past = history.past(earlier)
    if before.get("accepted"):  # its speed is the new norm, and not held to the old one
        past = gates.Past(packages=past.packages)
    night.findings = gates.judge(night.outcomes, accepted, past, timed=night.size == "nightly")
    if mixed:
        night.nights = earlier
        return
    line = _line(night) | ({"accepted": True} if before.get("accepted") else {})
    if update_baseline:
        with _told(night, "the baseline could not be written"):
            written = gates.accept(file, night.device, night.size, night.outcomes)
            night.notes.append(f"the measured values were accepted as the baseline in {written.name}")
            line["accepted"] = True
            for finding in night.findings:
                if not finding.name.endswith("/failed") and finding.state in ("regression", "suspect", "new"):
                    finding.state = "accepted"
    for state, names in (("regression", "regressions"), ("suspect", "suspects")):
        line[names] = [finding.name for finding in night.findings if finding.state == state]
    with _told(night, "the history could not be written"):
        history.append(kept, line)
    night.nights = [*earlier, line]


def _line(night: Night) -> dict:
    """What the history keeps of a night, but for what its gates said."""
    return {
        "night": night.folder.name,
        "size": night.size,
        "device": night.device,
        "gpu": _on_gpu(night.outcomes),
        "packages": gated.packages_of(night.outcomes),
        "notebooks": [
            {"name": o.name, "status": o.status, "seconds": round(o.seconds, 1), "signature": o.signature}
            for o in night.outcomes
        ],
        "figures": {name: figure.value for name, figure in gated.figures(night.outcomes).items()},
    }


def _devices(night: Night, nights: list[dict]) -> bool:
    """Whether tonight's figures are of several devices: those are neither accepted nor kept. A GPU that is gone is trouble."""
    devices = sorted({o.record["env"]["device"] for o in night.outcomes if o.record})
    if mixed := len(devices) > 1:
        line = f"the device changed during the night: {', '.join(devices)}"
        night.trouble.append(f"{line}. Its values were neither accepted nor added to the history")
    if nights and nights[-1]["device"] != night.device:
        line = f"the nights before were on {nights[-1]['device']}, and this one is on {night.device}"
        if nights[-1].get("gpu"):
            night.trouble.append(f"{line}: is a GPU missing? From the next night on, this is the expected device")
        else:  # hosted runners have one processor today and another tomorrow
            night.notes.append(f"{line}: it is compared only with nights on the same device")
    return mixed


def _on_gpu(outcomes: list) -> bool:
    env = next((o.record["env"] for o in outcomes if o.record), {"cpu": "", "device": ""})
    return not env["cpu"].startswith(env["device"])


@contextlib.contextmanager
def _told(night: Night, what: str) -> Iterator[None]:
    """What fails is told, and stops nothing else: a full disk, or a mistake of ours over what a notebook wrote."""
    try:
        yield
    except QwlibError:
        raise
    except Exception as error:
        reason = runner.hide_tokens(f"{what}: {type(error).__name__}: {error}")
        night.trouble.append(reason)
        print(reason, file=sys.stderr)


def _begin(out: Path, size: str) -> tuple[Path, datetime]:
    folder, began = runner.new_folder(out), datetime.now(UTC)
    files.write_text(
        out / LAST.format(size=size), json.dumps({"folder": folder.name, "began": began.isoformat()}) + "\n"
    )
    return folder, began


def _last(out: Path, size: str) -> tuple[Path, datetime]:
    """The last night of this size, and when it began."""
    state = out / LAST.format(size=size)
    if not state.exists():
        raise QwlibError(f"there is no {size} night in {out} to resume: start one without --resume")
    try:
        known = json.loads(state.read_text(encoding="utf-8"))
        folder, began = out / Path(known["folder"]).name, datetime.fromisoformat(known["began"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QwlibError(f"{state} is damaged ({error}): start a new night, without --resume") from None
    if not folder.is_dir():
        raise QwlibError(f"the last {size} night, {folder}, is gone: start a new one, without --resume")
    return folder, began


@contextlib.contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the lock of the runs in `out`; the system lets go of it when the process ends, however that happens.

    Raises QwlibError where another process holds it.
    """
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "night.lock", "a+", encoding="utf-8", errors="replace") as lock:
        lock.seek(0)
        owner = lock.read().strip() or "unknown"
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise QwlibError(
                f"a night is running already, as process {owner}: wait for it, or use another --out"
            ) from None
        if owner != "unknown":
            print(f"the night of process {owner} was interrupted: --resume continues it", flush=True)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        try:
            yield
        finally:
            lock.truncate(0)
