"""What every night measured, with one JSON line per night. Lines are appended and never rewritten.

    {"schema": 1, "night": "20261123-013000", "size", "device", "packages", "notebooks": [{name, status, seconds, signature}],
     "figures": {name: value}, "regressions": [name], "suspects": [name], "accepted": true after --update-baseline}

If a crash or a full disk cut a line short, the line is reported by its number and skipped. It stays in the file, and the next
night begins a new line. If a night was resumed and has two lines for one device, the later one counts.
"""

import json
import os
from pathlib import Path

from .. import files
from . import gates

SCHEMA = 1
_NAMES = {"type": "array", "items": {"type": "string"}}
_TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
NIGHT = {
    "type": "object",
    "properties": {
        "schema": {"const": SCHEMA},
        "night": {"type": "string"},
        "size": {"type": "string"},
        "device": {"type": "string"},
        "packages": _TEXTS,
        "figures": {"type": "object", "additionalProperties": {"type": "number"}},
        "regressions": _NAMES,
        "suspects": _NAMES,
    },
    "required": ["schema", "night", "size", "device", "packages", "figures", "regressions", "suspects"],
}


def append(path: Path, line: dict) -> None:
    """Add a night. What can't be written whole is taken back, and raises OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = (json.dumps({"schema": SCHEMA} | line, ensure_ascii=False) + "\n").encode()
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        if size and not _ends_a_line(path):
            content = b"\n" + content
        try:
            if file.write(content) < len(content):
                raise OSError(f"{path}: the disk is full")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(size)
            raise


def _ends_a_line(path: Path) -> bool:
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def read(path: Path, *, size: str) -> tuple[list[dict], list[str]]:
    """(the nights of this size in the file's order; a line for a reader on each line that is damaged).

    The order is that in which they were appended: a clock that was wrong for one night changes nothing.
    """
    nights, damaged = {}, []
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            night = json.loads(line)
            if why := files.misfit(night, NIGHT):
                raise ValueError(why)
        except ValueError as error:
            damaged.append(f"{Path(path).name}: line {number} is damaged and was skipped ({str(error)[:100]})")
            continue
        if night["size"] == size:
            key = night["device"], night["night"]
            before = nights.pop(key, {})
            nights[key] = night | ({"accepted": True} if before.get("accepted") else {})
    return list(nights.values()), damaged


def past(nights: list[dict]) -> gates.Past:
    """What nights of one device say about the next: values that no gate rejected, since a baseline was accepted last."""
    passes: dict[str, list[float]] = {}
    for night in nights:
        if night.get("accepted"):
            passes = {}
        rejected = {*night["regressions"], *night["suspects"]}
        for name, value in night["figures"].items():
            if name not in rejected:
                passes.setdefault(name, []).append(value)
    last = nights[-1] if nights else {"regressions": [], "suspects": [], "packages": {}}
    # what was rejected stays under suspicion: a slow week is one regression after the other
    return gates.Past(passes, {*last["suspects"], *last["regressions"]}, last["packages"])
