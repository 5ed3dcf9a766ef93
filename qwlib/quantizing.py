"""A model quantized into an artefact: the folder that can be loaded, measured and passed on."""

import json
import shutil
from pathlib import Path

from . import artefacts, catalog, estimates, files, loading, schemes
from .errors import QwlibError


def quantize(model: str, scheme: str, out: Path | None = None) -> Path:
    """The folder of `model` quantized under `scheme`: made now, or found where the same request made it before.

    `out` defaults to a folder in the cache. Raises QwlibError for an unknown model or scheme, a scheme that can't be saved,
    a disk without room, and an `out` that holds something else.
    """
    row, scheme = catalog.find(model), schemes.find(scheme)
    if scheme.unsavable:
        raise QwlibError(scheme.unsavable)
    wanted = {"source": artefacts.source(row), "scheme": scheme.name}
    folder = Path(out) if out is not None else _place(wanted)
    if folder.exists():
        found = artefacts.read(folder)
        if found is None or any(found[key] != value for key, value in wanted.items()):
            raise QwlibError(f"{folder} holds something else: name another folder, or remove that one")
        artefacts.verify(folder)
        return folder
    _check_disk(row, scheme, folder)
    with files.new_folder(folder) as made:
        with loading.load(row, scheme) as lm:
            lm.save(made)
        artefacts.seal(made, **wanted)
    return folder


def _place(wanted: dict) -> Path:
    key = files.sha256_text(json.dumps(wanted, sort_keys=True))[:16]
    return files.cache_dir() / "artefacts" / f"{Path(wanted['source']['name']).name}-{wanted['scheme']}-{key}"


def _check_disk(row: catalog.Model, scheme: schemes.Scheme, folder: Path) -> None:
    e = estimates.estimate(row, scheme, context=1)
    need = 1.1 * (e.weights_bytes + e.state_bytes) + 5e7  # names, tokenizer
    above = next(parent for parent in folder.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(above).free
    if need > free:
        raise QwlibError(
            f"{row.name} in {scheme.name} takes {need / 1e9:.1f} GB on disk, {above} has {free / 1e9:.1f} free"
        )
