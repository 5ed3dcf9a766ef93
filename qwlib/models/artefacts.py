"""Artefacts: a quantized model as a folder that says what it is, and is refused once it is not that any more.

An artefact is what a backend wrote, with `qwlib.json` beside it: the model it was made from (revision or hash), the scheme,
the type of what is not quantized, the calibration and settings, the versions of the tools, and size and SHA-256 of every file
that loading may read. It appears under its name when all of that is written: an interrupted quantization leaves nothing there.

A folder or Hub repository without the manifest was quantized by somebody else: it opens too, and records call it foreign.
What a manifest leaves out: a signature. It tells damage and mix-ups, not an attacker who rewrites it.
"""

import json
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path

from .. import files, schemes
from ..errors import QwlibError
from ..machine import about
from . import hub

MANIFEST = "qwlib.json"
SCHEMA = 1
WEIGHTS = ("*.safetensors", "*.gguf", "*.onnx.data", "*.onnx")


def seal(folder: Path, *, source: dict, scheme: str, dtype: str, **facts) -> None:
    """Write the manifest of the files in `folder` that loading may read.

    `facts` that are None are left out; `tools` among them are the versions of another environment's packages.
    """
    held = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": files.sha256(folder / name)} for name in parts(folder)
    }
    manifest = {
        "schema": SCHEMA,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": source,
        "scheme": scheme,
        "dtype": dtype,
        "tools": about.packages(),
        **{name: fact for name, fact in facts.items() if fact is not None},
        "files": held,
    }
    files.write_text(folder / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")


def parts(folder: Path) -> list[str]:
    """Names of the files in `folder` that loading may read, the manifest left out; `/` stands before one in a sub-folder."""
    names = sorted(path.name for path in Path(folder).iterdir() if path.is_file())
    wanted = (*hub.WANTED, *WEIGHTS)
    templates = sorted(path for path in (Path(folder) / hub.TEMPLATES).glob("*.jinja") if path.is_file())
    return [
        *(name for name in names if name != MANIFEST and any(fnmatch(name, each) for each in wanted)),
        *(f"{hub.TEMPLATES}/{path.name}" for path in templates),
    ]


def is_complete(names) -> bool:
    """Whether files of these names can be a model: a configuration and weights."""
    return "config.json" in names and any(fnmatch(name, wanted) for name in names for wanted in WEIGHTS)


def read(folder: Path) -> dict | None:
    """The manifest of a folder, None where there is none.

    Raises QwlibError for one that can't be read, or that this version does not know.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        return None
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        newer = manifest["schema"] > SCHEMA
        whole = newer or _whole(manifest)
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise QwlibError(f"{path} is damaged: remove the folder and quantize again")
    if newer or manifest["scheme"] not in schemes.SCHEMES:
        raise QwlibError(f"{path} was written by a newer qwlib: update this one")
    return manifest


NEEDED = {"text", "text_sha256", "samples", "length", "tokens", "sequences"}  # of a calibration (`calibration.py`)


def _whole(manifest: dict) -> bool:
    texts = [manifest["scheme"], manifest["dtype"], *manifest["source"].values(), manifest["source"]["name"]]
    held = manifest["files"]
    return (
        all(isinstance(text, str) for text in texts)
        and all(type(file["bytes"]) is int and isinstance(file["sha256"], str) for file in held.values())
        and all("/" not in name.removeprefix(f"{hub.TEMPLATES}/") and "\\" not in name for name in held)
        and is_complete(held)
        and set(manifest.get("calibration", NEEDED)) >= NEEDED
    )


def digest(manifest: dict) -> str:
    """Hex SHA-256 of the names, sizes and hashes of all files."""
    return files.sha256_text(json.dumps(manifest["files"], sort_keys=True))


def weight_bytes(manifest: dict) -> int:
    """Bytes of the files that hold weights."""
    held = manifest["files"].items()
    return sum(file["bytes"] for name, file in held if any(fnmatch(name, wanted) for wanted in WEIGHTS))


def verify(folder: Path) -> dict | None:
    """The manifest of `folder`, every file checked against it; None where there is none.

    Raises QwlibError with the name of a file that is missing, was cut short, changed, or came later.
    """
    folder, manifest = Path(folder), read(folder)
    if manifest is None:
        return None
    again = "remove the folder and quantize or download it again"
    for name, fact in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            why = "is missing"
        elif file.stat().st_size != fact["bytes"]:
            why = f"has {file.stat().st_size} bytes instead of {fact['bytes']}"
        elif files.sha256(file) != fact["sha256"]:
            why = "was changed"
        else:
            continue
        raise QwlibError(f"{name} in {folder} {why}: {again}")
    if stray := set(parts(folder)) - set(manifest["files"]):
        raise QwlibError(f"{min(stray)} in {folder} is not in its manifest: {again}")
    return manifest


def same(one: dict, other: dict) -> bool:
    """Whether two sources are one model; a folder may have been renamed."""
    keys = ("sha256", "repository", "revision", "adapter")
    return [one.get(key) for key in keys] == [other.get(key) for key in keys]
