"""Exercises that say whether an answer is right, and run clean while there is none."""

import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def check(answer: Any, right: Callable[[Any], bool], hint: str) -> str:
    """One line on `answer`: "not answered yet" for None, "right", or "not yet" with the hint.

    `right` gets the answer and says whether it is right; an answer that makes it fail is wrong, and the error is told.
    """
    if answer is None:
        return "not answered yet"
    try:
        if right(answer):
            return "right"
    except Exception as error:  # whatever a reader wrote: the notebook goes on
        return f"not yet: {type(error).__name__}: {error}. {hint}"
    return f"not yet: {hint}"


def spoil_one(folder: Path, copies: Mapping[str, Path]) -> str:
    """Copy `folder` to every path of `copies`, change one byte in the largest file of one of them, and return its name."""
    for copy in copies.values():
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
    name = random.choice(list(copies))
    largest = max(copies[name].iterdir(), key=lambda file: file.stat().st_size)
    with largest.open("r+b") as file:
        file.seek(largest.stat().st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    return name
