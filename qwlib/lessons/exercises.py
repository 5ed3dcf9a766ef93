"""Exercises that say whether an answer is right, and run clean while there is none."""

from collections.abc import Callable
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
