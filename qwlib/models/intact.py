"""Whether the files of a checkpoint are whole, before anything reads them: what is wrong is told by the file's name.

Readers of these formats say "header too large" or "Expecting value: line 1 column 1" of a file that was cut short, or that is a
Git LFS pointer because it was cloned without git-lfs. Here a look at the heads is enough: no weight is read.

Source of the format of safetensors: https://github.com/huggingface/safetensors#format (8 bytes of length, a JSON header with the
place of each tensor behind it, the data). Of pointers: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md.
"""

import json
import struct
from pathlib import Path

from ..errors import QwlibError

POINTER = b"version https://git-lfs"
ADAPTER = ("adapter_config.json", "adapter_model.safetensors")


def check(folder: Path) -> None:
    """Raises QwlibError for the first file of a checkpoint that is empty, cut short, no JSON, a pointer, or missing in an index.

    Also for an adapter that lies beside a model, or in its place.
    """
    folder = Path(folder)
    names = {path.name for path in folder.iterdir() if path.is_file()}
    for name in sorted(names):
        if name.endswith((".safetensors", ".json", ".model", ".gguf")):
            _file(folder / name)
    for name in sorted(name for name in names if name.endswith(".safetensors.index.json")):
        _index(folder / name, names)
    if set(ADAPTER) & names:
        whole = [name for name in names if name.endswith((".safetensors", ".gguf")) and name not in ADAPTER]
        if not whole:
            raise QwlibError(
                f"{folder.name} is an adapter: name the model that it is for before it, as model+{folder.name}"
            )
        raise QwlibError(
            f"{folder.name} holds a whole model and an adapter ({min(set(ADAPTER) & names)}), which would be put over it: "
            "take the adapter's files out if it is merged already, else name it as model+adapter"
        )


def _file(path: Path) -> None:
    def wrong(what: str) -> QwlibError:
        return QwlibError(f"{path.name} in {path.parent.name} {what}: download it again")

    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(len(POINTER))
        if not size:
            raise wrong("is empty")
        if head == POINTER:
            raise QwlibError(
                f"{path.name} in {path.parent.name} is a Git LFS pointer, not the file: `git lfs pull` there, or download it"
            )
        if path.suffix == ".safetensors" and (why := _safetensors(head, size, file)):
            raise wrong(why)
    if path.suffix == ".json":
        try:
            found = json.loads(path.read_bytes().decode("utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise wrong(f"is no JSON ({str(error)[:80]})") from None
        if path.name == "config.json" and not isinstance(found, dict):
            raise wrong("is no configuration")


def _safetensors(head: bytes, size: int, file) -> str | None:
    if size < 8:
        return "is cut short"
    (length,) = struct.unpack("<Q", head[:8])
    if length > size - 8:
        return "is cut short, or no safetensors file"
    file.seek(8)
    try:
        tensors = json.loads(file.read(length))
        end = max((t["data_offsets"][1] for name, t in tensors.items() if name != "__metadata__"), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return "is no safetensors file"
    if 8 + length + end > size:
        return f"is cut short ({size:,} of {8 + length + end:,} bytes)"
    return None if 8 + length + end == size else "is longer than its header says"


def _index(path: Path, names: set[str]) -> None:
    places = json.loads(path.read_bytes().decode("utf-8-sig"))
    places = places.get("weight_map") if isinstance(places, dict) else None
    if not isinstance(places, dict):
        raise QwlibError(f"{path.name} in {path.parent.name} names no files: download it again")
    if missing := sorted({str(name) for name in places.values()} - names):
        raise QwlibError(f"{missing[0]} is missing in {path.parent.name}, and {path.name} names it: download it")
