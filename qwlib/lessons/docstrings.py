"""Examples to train on without a download: questions on Python's own functions, answered by their docstrings.

A function of the standard library is named, and the answer is the first sentence of its docstring. The examples depend on the
version of Python.
"""

import importlib
import inspect
import json
import random
from pathlib import Path

from .. import files

MODULES = (
    "argparse array ast asyncio base64 bisect calendar cmath codecs collections contextlib copy csv datetime decimal "
    "difflib dis email.utils enum fileinput fnmatch fractions functools getpass glob gzip hashlib heapq html inspect io "
    "ipaddress itertools json linecache locale logging math mimetypes operator os pathlib pickle platform pprint random re "
    "secrets shlex shutil signal socket statistics string struct subprocess sys tempfile textwrap threading time tokenize "
    "traceback types urllib.parse uuid warnings weakref zipfile zlib"
)


def write(path: Path, count: int | None = None) -> int:
    """A line with `prompt` and `answer` for every public function whose docstring begins with a short sentence.

    `count`: draw so many of them, the same ones each time. How many were written comes back.
    """
    pairs = {}
    for name in MODULES.split():
        module = importlib.import_module(name)
        for called, found in vars(module).items():
            text = inspect.getdoc(found) if callable(found) and not called.startswith("_") else None
            first = " ".join((text or "").partition("\n\n")[0].split()).partition(". ")[0].rstrip(".")
            if 20 < len(first) < 120 and "(" not in first and not inspect.isclass(found):
                pairs.setdefault(first, {"prompt": f"What does {name}.{called} in Python do?", "answer": f"{first}."})
    rows = list(pairs.values())
    rows = random.Random(0).sample(rows, min(count, len(rows))) if count else rows
    files.write_text(path, "\n".join(map(json.dumps, rows)))
    return len(rows)
