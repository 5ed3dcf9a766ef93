"""The one exception that a user's mistake or a machine's limit raises."""

import difflib


class QwlibError(ValueError):
    """Says in one line what is wrong and what to do; the command line prints it without a traceback."""


def unknown(kind: str, name, known, more: str = "") -> QwlibError:
    """The error for a name that is in no table: the nearest that are, all of them where none is near, and `more`."""
    near = difflib.get_close_matches(str(name), known, n=3) or list(known)
    return QwlibError(f"unknown {kind} {name!r}: did you mean {', '.join(near)}?{more}")
