"""What every night measured, one JSON line a night, appended and never rewritten.

    {"schema": 1, "night": "20261123-013000", "size", "device", "packages", "notebooks": [{name, status, seconds, signature}],
     "figures": {name: value}, "regressions": [name], "accepted": true after --update-baseline}

A line that a crash or a full disk cut short is reported by its number and skipped; it stays in the file, and the next night
begins a line of its own. Of two lines of one night (a resumed one), the later counts.
"""

import json
import os
from pathlib import Path

SCHEMA = 1


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


def read(path: Path, *, size: str, device: str) -> tuple[list[dict], list[str]]:
    """(the nights of this size on this device, oldest first; a line for a reader on each line that is damaged)."""
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
            if night["schema"] != SCHEMA:
                raise ValueError(f"schema {night['schema']}")
            if (night["size"], night["device"]) == (size, device):
                if not all(isinstance(value, int | float) for value in night["figures"].values()):
                    raise ValueError("a figure that is no number")
                nights[night["night"]] = night
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            damaged.append(f"{Path(path).name}, line {number}: {type(error).__name__} {error}; skipped")
    return sorted(nights.values(), key=lambda night: night["night"]), damaged


def passes(nights: list[dict]) -> dict[str, list[float]]:
    """The values of each figure, oldest first, that no gate rejected, since a baseline was accepted last."""
    found: dict[str, list[float]] = {}
    for night in nights:
        if night.get("accepted"):
            found = {}
        for name, value in night["figures"].items():
            if name not in night["regressions"]:
                found.setdefault(name, []).append(value)
    return found
