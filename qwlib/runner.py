"""Notebooks executed without a screen, and judged by what they wrote.

papermill reports success in cases that are none: a kernel that died, a `sys.exit(0)` half-way, a failed `%pip`, a
parameter that the notebook does not know. So a run counts only by its record: the last cell writes `record.json` into the
folder that the runner names, and the runner reads it back, checks it against the schema, and checks that it is of this
run. One notebook's failure does not stop the others.
"""

import os
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from . import record, report
from .errors import QwlibError

CELL_TIMEOUT_S = 1800


@dataclass
class Outcome:
    """How one notebook ended. `status` is passed, failed or timeout; `reason` is empty where it passed."""

    name: str
    status: str
    seconds: float
    reason: str
    executed: Path
    record: dict | None = None


def run(notebooks: list[Path], out: Path, *, parameters: dict | None = None) -> tuple[list[Outcome], Path]:
    """Execute the notebooks into a new folder under `out`; outcomes and that folder come back.

    `parameters` go into every notebook over those that its parameters cell declares; `OUT` is the runner's own.

    Raises QwlibError where there is nothing to run.
    """
    if not notebooks:
        raise QwlibError("no notebooks to run: name some, or start in the project's folder")
    if missing := [str(path) for path in notebooks if not Path(path).is_file()]:
        raise QwlibError(f"no such notebook: {', '.join(missing)}")
    folder = _new_folder(Path(out).resolve())
    outcomes = []
    for path in notebooks:
        print(f"{path} ...", flush=True)
        outcome = execute(Path(path), folder, parameters=parameters or {})
        print(f"{path} {outcome.status} in {outcome.seconds:.0f} s", flush=True)
        outcomes.append(outcome)
        report.write(folder, outcomes)
        _point_latest(folder)
    return outcomes, folder


def execute(path: Path, folder: Path, *, parameters: dict) -> Outcome:
    """One notebook: its executed copy and its record land in `folder`."""
    name, began, now = path.stem, time.monotonic(), datetime.now(UTC)
    executed, home = folder / path.name, folder / name
    status, reason = _papermill(path, executed, parameters | {"OUT": str(home)})
    written = None
    if status == "passed":
        try:
            written = record.read(home / "record.json")
            if written["kind"] != "notebook" or datetime.fromisoformat(written["created"]) < now:
                status, reason = "failed", "the record is not of this run"
        except QwlibError as error:
            status, reason = "failed", f"the last cell did not write a valid record: {error}"
    return Outcome(name, status, time.monotonic() - began, reason, executed, written)


def _papermill(path: Path, executed: Path, parameters: dict) -> tuple[str, str]:
    import nbclient.exceptions
    import papermill

    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # else each kernel prints a warning about frozen modules
    try:
        declared = papermill.inspect_notebook(str(path))
        if unknown := sorted(set(parameters) - set(declared)):
            return "failed", f"the parameters cell does not declare {', '.join(unknown)}"
        papermill.execute_notebook(
            str(path),
            str(executed),
            parameters=parameters,
            kernel_name="python3",
            cwd=str(path.parent),
            execution_timeout=CELL_TIMEOUT_S,
            progress_bar=False,
            coalesce_streams=True,  # a streamed sentence is one output, not one a word
            extra_arguments=[
                "--IPKernelApp.log_level=40"
            ],  # ipykernel 7 warns that its loopback socket is not encrypted
        )
    except papermill.exceptions.PapermillExecutionError as error:
        return "failed", f"cell {error.exec_count}: {error.ename}: {error.evalue}"
    except nbclient.exceptions.CellTimeoutError:
        return "timeout", f"a cell took longer than {CELL_TIMEOUT_S} s"
    except nbclient.exceptions.DeadKernelError:
        return "failed", "the kernel died (out of memory?)"
    except Exception as error:  # the harness must outlive whatever a notebook does; the reason is shown
        return "failed", f"{type(error).__name__}: {error}"
    return "passed", ""


def _new_folder(out: Path) -> Path:
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{n}" for n in range(2, 1000))):
        folder = out / f"{stamp}{suffix}"
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise QwlibError(f"can't make a new folder in {out}")


def _point_latest(folder: Path) -> None:
    link = folder.parent / "latest"
    temporary = folder.parent / f".latest-{os.getpid()}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(folder.name, target_is_directory=True)
    os.replace(temporary, link)
