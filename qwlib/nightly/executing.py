"""One notebook, executed by papermill in a process of its own, with what papermill keeps silent about told.

    python -m qwlib.nightly.executing JOB.json      # {"notebook", "executed", "parameters", "ended"}: four paths and a table

papermill 2.7 calls these a success: a failed `!command`, `x = !command` or `%pip`, `exit()`, a `sys.exit(0)` half-way, a
parameter that the notebook does not declare, or declares as something else. Commands and `exit` are made to raise in the kernel,
parameters are looked up first (`parameters`), and cells that never ran are counted.
How it ended goes into the file `ended`, as JSON: status, category, reason, exception. Whether it wrote its record is for
`runner` to see. The process holds its parent's pipe as standard input: once that closes, the parent is dead, and the kernel and
whatever it started are ended too.
"""

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

from .. import files
from ..errors import QwlibError
from ..machine.processes import without
from .parameters import checked

MARK = "QWLIB_RUN"  # in the environment of every process of one notebook: what runs under it can be found, and ended
_STRICT = "from qwlib.nightly import executing; executing.strict()"


def strict() -> None:
    """In a kernel: what would be passed over raises.

    That is a `!command`, `x = !command` or `%pip` that fails, `exit` and `quit` (a kernel goes on after them), and an unknown
    magic, which IPython tells on standard error alone, so that papermill has no reason to show.
    """
    from IPython import get_ipython
    from IPython.core.autocall import ExitAutocall
    from IPython.utils.text import LSString, SList

    shell = get_ipython()
    plain = shell.system

    def failed(command, code):
        return RuntimeError(f"the command `{command}` ended with exit code {code}")

    def system(command):
        plain(command)
        if code := shell.user_ns.get("_exit_code", 0):
            raise failed(command, code)

    def getoutput(command, split=True, depth=0):
        call = shell.var_expand(command, depth=depth + 1)
        done = subprocess.run(
            call, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
        )
        if done.returncode:
            raise failed(command, done.returncode)
        return SList(done.stdout.splitlines()) if split else LSString(done.stdout)

    class Ends(ExitAutocall):
        def __call__(self, *_):
            raise RuntimeError("exit() and quit() do not end a notebook: raise an error, or remove the cells after it")

    shell.system, shell.getoutput = system, getoutput
    shell.user_ns["exit"] = shell.user_ns["quit"] = Ends(shell)
    shell.show_usage_error = lambda error: shell._showtraceback(type(error), error, [f"UsageError: {error}"])


def processes(mark: str) -> list:
    """Every other process that runs under this mark, as psutil's objects."""
    import psutil

    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == mark:
                found.append(process)
        except (psutil.Error, OSError):  # ended meanwhile, or somebody else's
            continue
    return found


def end(mark: str) -> None:
    """End every other process under this mark, and wait until they are gone."""
    import contextlib

    import psutil

    left = processes(mark)
    for process in left:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(left, timeout=10)


def execute(notebook: Path, executed: Path, parameters: dict) -> dict:
    """Execute `notebook` into the file `executed`; how that ended, as `status, category, reason, exception`."""
    with without("rfc3987_syntax"):
        import nbclient.exceptions
        import papermill

    try:
        wanted = checked(notebook, parameters)
    except QwlibError as error:
        _copy_bare(notebook, executed)
        return _ended("error", "parameters", str(error))
    os.environ["PYDEVD_DISABLE_FILE_VALIDATION"] = "1"  # else each kernel prints a warning about frozen modules
    try:
        papermill.execute_notebook(
            str(notebook),
            str(executed),
            parameters=wanted,
            kernel_name="python3",
            language="python",  # else a notebook whose metadata name no kernel is refused
            cwd=str(notebook.parent),
            progress_bar=False,
            coalesce_streams=True,  # a streamed sentence is one output, not one a word
            # ipykernel 7 warns that its loopback socket is not encrypted
            extra_arguments=["--IPKernelApp.log_level=40", f"--IPKernelApp.exec_lines={_STRICT}"],
        )
    except papermill.exceptions.PapermillExecutionError as error:
        said = f"{error.ename}: {error.evalue or _line(error.traceback)}"
        return _ended("failed", "cell error", f"cell {error.exec_count}: {said}", said)
    except nbclient.exceptions.DeadKernelError:
        return _ended(
            "failed", "kernel died", f"the kernel died in {running(executed)} (out of memory?)", "kernel died"
        )
    except Exception as error:  # the harness must outlive whatever a notebook does; the reason is shown
        return _ended("error", "harness", f"{type(error).__name__}: {error}")
    if stopped := unfinished(executed):
        return _ended("failed", "missing record", stopped, "stopped half-way")
    return _ended("passed", "", "")


def _copy_bare(notebook: Path, executed: Path) -> None:
    """A copy without outputs, for the page of a notebook of which no cell ran; none of a file that is no notebook."""
    try:
        content = json.loads(notebook.read_text(encoding="utf-8"))
        for cell in content["cells"]:
            if cell["cell_type"] == "code":
                cell |= {"outputs": [], "execution_count": None}
    except (ValueError, TypeError, KeyError):
        return
    files.write_text(executed, json.dumps(content))


def _line(traceback) -> str:
    """The line of the cell at which it stopped: what tells one bare `assert` from another."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(traceback))
    arrow = re.search(r"^-+> *\d+ (.*)$", plain, re.MULTILINE)
    return arrow[1].strip() if arrow else ""


def _ended(status: str, category: str, reason: str, exception: str = "") -> dict:
    return {"status": status, "category": category, "reason": reason, "exception": exception or reason}


def code_cells(executed: Path) -> list[dict]:
    """The code cells of an executed copy, as far as it was written; none where there is no readable copy."""
    try:
        cells = json.loads(Path(executed).read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError):
        return []
    return [cell for cell in cells if cell["cell_type"] == "code"]


def running(executed: Path) -> str:
    """Which code cell papermill was at, for a reader: `cell 7 of 20`."""
    cells = code_cells(executed)
    started = [n for n, cell in enumerate(cells, 1) if cell["metadata"].get("papermill", {}).get("start_time")]
    return f"cell {max(started)} of {len(cells)}" if started else "no cell yet"


def unfinished(executed: Path) -> str:
    """A reason where cells never ran although no error was seen, else nothing."""
    cells = [cell for cell in code_cells(executed) if "".join(cell["source"]).strip()]
    counts = [cell["execution_count"] for cell in cells]
    if not cells:
        return "there is no executed copy"
    if None not in counts:
        return ""
    stopped = f"stopped in cell {counts.index(None)} of {len(cells)} without an error, as sys.exit(0) does"
    return f"{stopped}: the other cells did not run"


def mask(text: str) -> str:
    """What stays the same of a failure from night to night: colours, addresses, hashes, paths and numbers are blanked."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = re.sub(r"0x[0-9a-fA-F]+|\b(?=[0-9a-f-]*\d)[0-9a-f]{8}[0-9a-f-]*\b", "#", text)
    text = re.sub(r"(?:[A-Za-z]:)?[~.]*[\\/][^\s'\"`,;:()]+", "/", text)
    return re.sub(r"\d+(?:[.,]\d+)*(?:e[+-]?\d+)?", "#", text)


def signature(category: str, exception: str) -> str:
    """Twelve hex digits that name a failure: the same one has the same name every night, in whatever folder."""
    return files.sha256_text(f"{category}\n{mask(exception)}")[:12]


def _with_parent() -> None:
    """End with the parent: the pipe that it holds closes when it dies, whatever it died of."""
    os.read(0, 1)  # not sys.stdin: Python ends with a fatal error where a thread waits in one of its own files
    end(os.environ[MARK])
    os._exit(1)


def main() -> None:
    threading.Thread(target=_with_parent, daemon=True).start()
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    ended = execute(Path(job["notebook"]), Path(job["executed"]), job["parameters"])
    files.write_text(Path(job["ended"]), json.dumps(ended))


if __name__ == "__main__":
    main()
