"""Files written whole or not at all, what a JSON file has to hold, and the one folder where unpacked checkpoints are kept.

A reader never sees half a file: everything is written under a temporary name beside its target, flushed to the disk,
and renamed. A rename within one folder is atomic on POSIX systems (IEEE 1003.1, `rename`) and on Windows (`os.replace`).
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


def cache_dir() -> Path:
    """The folder for unpacked and random checkpoints: `QWLIB_CACHE`, else the platform's cache folder."""
    from platformdirs import user_cache_path

    return Path(os.environ.get("QWLIB_CACHE") or user_cache_path("qwlib")).expanduser().absolute()


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_text(text: str) -> str:
    """Hex SHA-256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()


def misfit(value, schema: dict) -> str | None:
    """The first place where what a JSON file held does not follow a JSON Schema (draft 7), or is no number; None if all does."""
    import fastjsonschema

    try:
        _validator(json.dumps(schema))(value)
    except fastjsonschema.JsonSchemaValueException as error:
        place = ".".join(map(str, error.path[1:])) or "the top level"
        return f"{place}: {error.message.removeprefix(error.name).strip()[:200]}"
    return next(_no_numbers(value), None)


def _no_numbers(value, place: str = "") -> Iterator[str]:
    """Every place that holds NaN or an infinity: Python reads them, `1e999` too, and comparing with them means nothing."""
    if isinstance(value, float) and not math.isfinite(value):
        yield f"{place}: {value} is no number"
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _no_numbers(inner, f"{place}.{key}".lstrip("."))


@functools.cache
def _validator(schema: str):
    import fastjsonschema

    return fastjsonschema.compile(json.loads(schema))


def write_text(path: Path, text: str) -> Path:
    """Write `text` to `path` atomically, making the folders above it; the path comes back."""
    return write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> Path:
    """`write_text` for bytes."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp gives 0600
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """Whoever makes what belongs at `path`, in this or another process of this user, waits until nobody else is making it.

    The lock is the operating system's, which ends it with the process. Its file lies in the cache folder, and stays.
    """
    from filelock import FileLock

    locks = cache_dir() / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(locks / sha256_text(str(Path(path).absolute()))[:16]):
        yield


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Fill the folder that is yielded; it becomes `path` when the block ends without an error, else it is removed.

    Where another process was faster, its folder stays and this one is dropped.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as opened:
                    os.fsync(opened.fileno())
        os.chmod(temporary, 0o755)  # mkdtemp gives 0700
        try:
            os.rename(temporary, path)
        except OSError:
            if not path.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
