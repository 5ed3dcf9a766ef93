"""Artefacts: a quantized model as a folder that says what it is, and is refused once it is not that any more.

An artefact is what a backend wrote, with `qwlib.json` beside it: the model it was made from (revision or hash), the scheme,
the versions of the tools, the calibration if there was one, and size and SHA-256 of every file. It appears under its name
when all of that is written, so an interrupted quantization leaves nothing that opens. The same request finds it again.

A folder or Hub repository without the manifest was quantized by somebody else: it opens too, and records call it foreign.
What a manifest leaves out: a signature. It tells damage and mix-ups, not an attacker who rewrites it.
"""

import json
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from . import catalog, embedded, files, record, schemes
from .errors import QwlibError

MANIFEST = "qwlib.json"
SCHEMA = 1


def seal(folder: Path, *, source: dict, scheme: str, calibration: dict | None = None) -> None:
    """Write the manifest of all files in `folder`."""
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    held = {name: {"bytes": (folder / name).stat().st_size, "sha256": files.sha256(folder / name)} for name in names}
    manifest = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": source,
        "scheme": scheme,
        "tools": record.environment()["packages"],
        **({"calibration": calibration} if calibration else {}),
        "files": held,
    }
    files.write_text(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def read(folder: Path) -> dict | None:
    """The manifest of a folder, None where there is none.

    Raises QwlibError for one that can't be read.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if not (newer := manifest["schema"] > SCHEMA):
            _check(manifest)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise QwlibError(f"{path} is damaged: quantize again, or remove it to open the folder as foreign") from None
    if newer:
        raise QwlibError(f"{path} was written by a newer qwlib: update this one")
    return manifest


def _check(manifest: dict) -> None:
    schemes.find(manifest["scheme"])
    if not isinstance(manifest["source"]["name"], str):
        raise TypeError
    for file in manifest["files"].values():
        if not isinstance(file["bytes"], int) or not isinstance(file["sha256"], str):
            raise TypeError


def verify(folder: Path) -> dict | None:
    """The manifest of `folder`, every file checked against it; None where there is none.

    Raises QwlibError with the name of a file that is missing, was cut short or changed.
    """
    folder, manifest = Path(folder), read(folder)
    for name, fact in (manifest or {"files": {}})["files"].items():
        file = folder / name
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise QwlibError(f"{folder / MANIFEST} names a file outside its folder: {name}")
        if not file.is_file():
            why = "is missing"
        elif file.stat().st_size != fact["bytes"]:
            why = f"has {file.stat().st_size} bytes instead of {fact['bytes']}"
        elif files.sha256(file) != fact["sha256"]:
            why = "was changed"
        else:
            continue
        raise QwlibError(f"{name} in {folder} {why}: quantize or download it again")
    return manifest


def source(row: catalog.Model) -> dict:
    """What a model was made from: name, and revision or hash."""
    if row.source is None:
        return {"name": row.name, "sha256": embedded.sha256(row.name)}
    folder = Path(row.source)
    if folder.is_dir():
        if found := read(folder):
            raise QwlibError(f"{row.name} is {found['scheme']} already: name the 16-bit model that it was made from")
        hashes = "".join(files.sha256(path) for path in sorted(folder.glob("*.safetensors")))
        return {"name": folder.name, "sha256": files.sha256_text(hashes)}
    return {"name": row.source, "revision": row.revision or "unpinned"}
