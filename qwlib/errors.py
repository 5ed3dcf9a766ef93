"""The one exception that a user's mistake or a machine's limit raises."""

import difflib


class QwlibError(ValueError):
    """Says in one line what is wrong and what to do; the command line prints it without a traceback."""


def unknown(kind: str, name, known, more: str = "") -> QwlibError:
    """The error for a name that is in no table: the nearest that are, all of them where none is near, and `more`."""
    near = difflib.get_close_matches(str(name), known, n=3) or list(known)
    return QwlibError(f"unknown {kind} {name!r}: did you mean {', '.join(near)}?{more}")


def whole_number(value, name: str, least: int = 1) -> int:
    """The value itself, if it is a whole number of at least `least`.

    Raises QwlibError that names it.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise QwlibError(f"{name} is a whole number of at least {least}, not {value!r}")
    return value
