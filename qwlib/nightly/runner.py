"""Execute notebooks without a browser, and judge them by the records that they write.

papermill reports success in some cases that are failures (`executing` lists them). So a notebook passes only with a record: its
last cell writes `record.json` into the folder that the runner gives it. The runner reads the file, checks it against the schema,
and checks that it was written during this run. Each notebook has its own process and a time limit. When it ends, every process
that it started is ended too, and its memory is free again. The failure of one notebook does not stop the others. Each result is
on the disk before the next notebook starts.

    status    passed, failed (an error in the notebook), timeout, error (in qwlib or in the parameters), skipped (with a reason)
    category  cell error, kernel died, timeout, missing record, parameters, harness (qwlib itself); empty if it passed
"""

import contextlib
import itertools
import json
import mmap
import os
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path

from .. import files
from ..errors import QwlibError
from ..machine import about, processes
from ..measuring import record
from . import executing, report

TIMEOUT_S = 3600
REASON = 2000  # characters of a reason that are shown
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "GITHUB_TOKEN")


@dataclass
class Plan:
    """What to do with one notebook: its parameters, its time limit, or the reason to skip it. `name` names its results."""

    path: Path
    parameters: dict = field(default_factory=dict)
    timeout_s: float = TIMEOUT_S
    skip: str = ""
    name: str = ""

    def __post_init__(self):
        self.name = self.name or self.path.stem


@dataclass
class Outcome:
    """How one notebook ended. `peak_bytes` is the peak of the resident memory of all its processes, sampled twice a second."""

    name: str
    status: str
    seconds: float = 0.0
    reason: str = ""
    category: str = ""
    signature: str = ""
    peak_bytes: int = 0
    executed: Path | None = None
    record: dict | None = None


def run(plans: list[Plan], out: Path) -> tuple[list[Outcome], Path]:
    """Execute notebooks into a new folder under `out`. Returns the outcomes and that folder.

    Parameters replace those that a notebook's parameters cell declares. The runner sets `OUT` itself.

    Raises QwlibError if there is nothing to run.
    """
    if not plans:
        raise QwlibError("there are no notebooks to run: name one, or start in the project's folder")
    if missing := [str(plan.path) for plan in plans if not plan.path.is_file()]:
        raise QwlibError(f"no such notebook: {', '.join(missing)}")
    plans, outcomes = _told_apart(plans), []
    folder = new_folder(Path(out).resolve())
    for plan in plans:
        outcomes.append(execute(plan, folder))
        report.write(folder, outcomes, [each.name for each in plans])
        point_latest(folder)
    return outcomes, folder


def _told_apart(plans: list[Plan]) -> list[Plan]:
    """The plans with a different name for each: the second notebook called `a` becomes `a-2`."""
    taken, out = set(), []
    for plan in plans:
        ends = itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
        free = (f"{plan.name}{end}" for end in ends)
        name = next(name for name in free if name.lower() not in taken)  # some file systems know no capitals
        taken.add(name.lower())
        out.append(replace(plan, name=name))
    return out


def execute(plan: Plan, folder: Path) -> Outcome:
    """One notebook: its executed copy, its record and `outcome.json` land in `folder`; progress goes to standard output."""
    name, home, executed = plan.name, folder / plan.name, folder / f"{plan.name}.ipynb"
    if plan.skip:
        outcome = Outcome(name, "skipped", reason=plan.skip)
    else:
        print(f"{name} ...", flush=True)
        began, now = time.monotonic(), datetime.now(UTC)
        try:
            ended, peak = _in_a_process(plan, executed, home)
            outcome = _judged(name, ended, home, now)
        except Exception as error:  # such as a full disk: what was done before stays, the others are still tried
            outcome, peak = Outcome(name, "error", reason=f"{type(error).__name__}: {error}", category="harness"), 0
        outcome.seconds, outcome.peak_bytes, outcome.executed = time.monotonic() - began, peak, executed
    if outcome.category:
        outcome.signature = executing.signature(outcome.category, outcome.reason)
        # one line without control characters: terminals and GitHub's log take some for commands
        outcome.reason = re.sub(r"[\x00-\x20\x7f-\x9f]+", " ", hide_tokens(outcome.reason)).strip()[:REASON]
    try:
        scrub(folder)
        keep(outcome, home)
    except OSError as error:
        outcome.status, outcome.category = "error", "harness"
        outcome.reason = f"{outcome.reason}; the outcome could not be written: {error}".lstrip("; ")
    why = f": {outcome.reason}" if outcome.reason else ""
    print(f"{name} {outcome.status} in {outcome.seconds:.0f} s{why}", flush=True)
    return outcome


def _in_a_process(plan: Plan, executed: Path, home: Path) -> tuple[dict, int]:
    """(how it ended, peak bytes); every process that it started is gone when this comes back."""
    home.mkdir(parents=True, exist_ok=True)
    for old in (home / "ended.json", home / "record.json", home / "outcome.json", executed):
        old.unlink(missing_ok=True)
    job = {"notebook": str(plan.path.resolve()), "executed": str(executed), "ended": str(home / "ended.json")}
    job["parameters"] = plan.parameters | {"OUT": str(home)}
    files.write_text(home / "job.json", json.dumps(job | {"asked": _asked(plan)}))
    with open(home / "log.txt", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "qwlib.nightly.executing", str(home / "job.json")],
            stdin=subprocess.PIPE,  # held open: when this process dies, that one sees it
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=processes.environment() | {executing.MARK: str(home)},
        )
        try:
            late, peak = _watched(process, plan.timeout_s, executed)
        finally:
            executing.end(str(home))
            process.stdin.close()
            process.wait()
    at = executing.running(executed)
    if late:
        reason = f"stopped in {at}, at the time limit of {plan.timeout_s:g} s"
        return {"status": "timeout", "category": "timeout", "reason": reason}, peak
    try:
        return json.loads((home / "ended.json").read_text(encoding="utf-8")), peak
    except (OSError, ValueError):
        last = (home / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        why = f"its process ended with exit code {process.returncode} in {at}" + (f": {last[-1]}" if last else "")
        return {"status": "error", "category": "harness", "reason": why}, peak


def _asked(plan: Plan) -> dict:
    """The notebook, its parameters and the code. A result is valid only for these."""
    return {"parameters": plan.parameters, "sha256": files.sha256(plan.path), "code": _code()}


def _code(folder: Path = Path(__file__).parents[1]) -> str:
    """Hash of this package, which an editable install lets change under a constant version."""
    return files.sha256_text("\n".join(files.sha256(path) for path in sorted(folder.rglob("*.py"))))


def _watched(process, timeout_s: float, executed: Path) -> tuple[bool, int]:
    """(whether the time limit was reached, peak bytes), once the process has ended or must be ended."""
    began, peak, shown = time.monotonic(), 0, ""
    while process.poll() is None:
        if time.monotonic() - began > timeout_s:
            return True, peak
        peak = max(peak, _resident(process.pid))
        if sys.stderr.isatty() and (now := executing.running(executed)) != shown:
            print(f"\r  {now}\x1b[K", end="\r", file=sys.stderr, flush=True)
            shown = now
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
    return False, peak


def _resident(pid: int) -> int:
    import psutil

    total = 0
    try:
        owner = psutil.Process(pid)
        for process in (owner, *owner.children(recursive=True)):
            try:
                total += process.memory_info().rss
            except psutil.Error:
                continue
    except psutil.Error:
        return total
    return total


def _judged(name: str, ended: dict, home: Path, began: datetime) -> Outcome:
    """The outcome from what the process reported. If that was a success, the record decides."""
    outcome = Outcome(name, ended["status"], reason=ended["reason"], category=ended["category"])
    if outcome.status == "passed":
        try:
            outcome.record = proved(home, began)
        except QwlibError as error:
            outcome.status, outcome.category, outcome.reason = "failed", "missing record", str(error)
    return outcome


def proved(home: Path, began: datetime) -> dict:
    """The record that proves a pass, without the environment's tokens.

    Raises QwlibError for one that is missing, damaged, of another kind, or older than this run.
    """
    try:
        written = record.read(home / "record.json")
    except QwlibError as error:
        raise QwlibError(f"the last cell did not write a valid record: {error}") from None
    if written["kind"] != "notebook" or datetime.fromisoformat(written["created"]) < began:
        raise QwlibError("the record was not written during this run")
    return json.loads(hide_tokens(json.dumps(written)))


def keep(outcome: Outcome, home: Path) -> None:
    """Write the outcome beside its record."""
    plain = asdict(outcome) | {"executed": outcome.executed.name if outcome.executed else None}
    plain.pop("record")
    files.write_text(home / "outcome.json", json.dumps(plain, indent=1) + "\n")


def kept(plan: Plan, folder: Path, began: datetime) -> Outcome | None:
    """The outcome of a notebook that passed since `began`, and whose record still proves it; None where it is to be run.

    It counts for the same notebook with the same parameters under the same code and packages only.
    """
    home, executed = folder / plan.name, folder / f"{plan.name}.ipynb"
    try:
        job = json.loads((home / "job.json").read_text(encoding="utf-8"))
        if plan.skip or job["asked"] != _asked(plan):
            return None
        if (home / "outcome.json").exists():
            outcome = Outcome(**json.loads((home / "outcome.json").read_text(encoding="utf-8")))
        elif (home / "ended.json").exists() and json.loads((home / "ended.json").read_text())["status"] != "passed":
            return None
        else:  # the night was killed between the record and the outcome
            started = (home / "job.json").stat().st_mtime
            outcome = Outcome(home.name, "passed", (home / "record.json").stat().st_mtime - started)
        if outcome.status != "passed" or executing.unfinished(executed):
            return None
        outcome.executed, outcome.record = executed, proved(home, began)
    except (OSError, ValueError, TypeError, KeyError, QwlibError):
        return None
    return outcome if outcome.record["env"]["packages"] == about.packages() else None


def hide_tokens(text: str) -> str:
    """The text without the values of the environment's tokens."""
    for value in _tokens():
        text = text.replace(value, "***")
    return text


def scrub(folder: Path) -> None:
    """Take the environment's tokens out of every file of a run: a notebook may print what it likes."""
    secrets = [value.encode() for value in _tokens()]
    for path in folder.rglob("*") if secrets else ():
        if not path.is_file() or path.is_symlink() or not path.stat().st_size:
            continue
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if all(content.find(secret) < 0 for secret in secrets):
                continue
        clean = path.read_bytes()
        for secret in secrets:
            clean = clean.replace(secret, b"***")
        try:
            files.write_bytes(path, clean)
        except OSError:  # no room for a copy: better no file than a token
            path.unlink()
            raise


def _tokens() -> list[str]:
    return [value for name in TOKENS if len(value := os.environ.get(name, "").strip()) >= 8]


def new_folder(out: Path) -> Path:
    """A new folder under `out` named by the time, in UTC."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
        folder = out / f"{stamp}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise QwlibError(f"can't make a new folder in {out}")


def point_latest(folder: Path) -> None:
    """Let `latest` beside the folder lead to it."""
    link = folder.parent / "latest"
    temporary = folder.parent / f".latest-{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name, target_is_directory=True)
    os.replace(temporary, link)
