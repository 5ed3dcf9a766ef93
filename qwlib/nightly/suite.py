"""Which notebooks a run without a screen executes, and with what parameters: `sizes.toml` beside the notebooks.

A notebook that the file does not name is an error, and so is a name that has no notebook: nothing is left out by being forgotten.
"""

import tomllib
from pathlib import Path

from ..errors import QwlibError
from .runner import TIMEOUT_S, Plan

SIZES = ("smoke", "nightly")
FILE = "sizes.toml"


def plans(folder: Path, size: str, *, gpu: bool | None = None) -> list[Plan]:
    """What to do with every notebook of `folder` at a size, in the order of their names.

    `gpu`: whether `gpu` parameters go over the nightly ones; None looks at the machine.

    Raises QwlibError for a size that does not exist, and where the file and the folder do not agree.
    """
    if size not in SIZES:
        raise QwlibError(f"there is no size {size!r}: take {' or '.join(SIZES)}")
    file = Path(folder) / FILE
    try:
        rows = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QwlibError(f"there is no {file}: start in the project's folder") from None
    except (OSError, ValueError) as error:
        raise QwlibError(f"{file} can't be read: {error}") from None
    paths = {path.stem: path for path in sorted(Path(folder).glob("*.ipynb"))}
    if missing := sorted(paths.keys() - rows.keys()):
        raise QwlibError(f"{file} does not list {', '.join(missing)}: say what they run with, or why they are skipped")
    if stale := sorted(rows.keys() - paths.keys()):
        raise QwlibError(f"{file} lists {', '.join(stale)}, and there are no such notebooks")
    return [_plan(path, rows[name], size, file, gpu) for name, path in paths.items()]


def _plan(path: Path, row, size: str, file: Path, gpu: bool | None) -> Plan:
    where = f"{file}: {path.stem}"
    if not isinstance(row, dict):
        raise QwlibError(f"{where} is not a table")
    if unknown := sorted(row.keys() - {"timeout_s", "gpu", *SIZES}):
        raise QwlibError(f"{where} has {', '.join(unknown)}; known are timeout_s, gpu, {', '.join(SIZES)}")
    if size not in row:
        raise QwlibError(f"{where} has no {size}")
    timeout_s = row.get("timeout_s", TIMEOUT_S)
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s < float("inf"):
        raise QwlibError(f"{where}: timeout_s is a number of seconds, not {timeout_s!r}")
    if isinstance(row[size], str) and row[size].strip():
        return Plan(path, skip=row[size])
    chosen = [row[size]]
    if size == "nightly" and row.get("gpu") and (has_gpu() if gpu is None else gpu):
        chosen.append(row["gpu"])
    parameters = {}
    for part in chosen:
        if not isinstance(part, dict) or not all(isinstance(value, str | int | float) for value in part.values()):
            raise QwlibError(
                f"{where}: {size} and gpu are tables of texts, numbers, true and false, or a reason to skip"
            )
        parameters |= part
    return Plan(path, parameters, timeout_s)


def has_gpu() -> bool:
    """Whether PyTorch sees a GPU, so that `gpu` parameters apply."""
    import torch

    return torch.cuda.is_available()
