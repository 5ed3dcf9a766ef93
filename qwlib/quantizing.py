"""A model quantized into an artefact: the folder that can be loaded, measured and passed on."""

import json
import shutil
from pathlib import Path

from . import artefacts, catalog, estimates, files, loading, schemes
from .errors import QwlibError


def quantize(model: str, scheme: str, out: Path | None = None) -> Path:
    """The folder of `model` quantized under `scheme`: made now, or found where the same request made it before.

    `out` defaults to a folder in the cache. Raises QwlibError for an unknown model or scheme, one that can't be saved or is not
    quantized, a model that is quantized already or has an adapter, a disk without room, and an `out` that holds something else.
    """
    row, scheme = catalog.find(model), schemes.find(scheme)
    if scheme.bits_per_weight >= 16:
        raise QwlibError(f"{scheme.name} quantizes nothing: choose a scheme with fewer bits")
    if scheme.unsavable:
        raise QwlibError(scheme.unsavable)
    if row.adapter:
        raise QwlibError(f"{row.name} is an adapter over {row.source}: merge the two first, and name the folder")
    if saved := loading.saved_scheme(row):
        raise QwlibError(f"{row.name} is {saved} already: name the 16-bit model that it was made from")
    dtype, _ = loading.pick_dtype(scheme, loading.pick_device()[0])
    wanted = {"source": artefacts.source(row), "scheme": scheme.name, "dtype": str(dtype).removeprefix("torch.")}
    folder = Path(out).expanduser().absolute() if out is not None else _place(wanted)
    try:
        if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
            _check_disk(row, scheme, folder)
            with files.new_folder(folder) as made:
                with loading.load(row, scheme) as lm:
                    lm.save(made)
                artefacts.seal(made, **wanted)
        return _found(folder, wanted)
    except OSError as error:
        raise QwlibError(f"{folder} can't be written: {error.strerror or error}") from None


def _found(folder: Path, wanted: dict) -> Path:
    """`folder` if it holds what is wanted: made just now, at an earlier time, or by another process that was faster."""
    found = artefacts.verify(folder) if folder.is_dir() else None
    if (
        found is None
        or not artefacts.same(found["source"], wanted["source"])
        or any(found[key] != wanted[key] for key in ("scheme", "dtype"))
    ):
        raise QwlibError(f"{folder} holds something else: name another folder, or remove that one")
    return folder


def _place(wanted: dict) -> Path:
    key = files.sha256_text(json.dumps(wanted, sort_keys=True))[:16]
    return files.cache_dir() / "artefacts" / f"{wanted['source']['name'].replace('/', '--')}-{wanted['scheme']}-{key}"


def _check_disk(row: catalog.Model, scheme: schemes.Scheme, folder: Path) -> None:
    e = estimates.estimate(row, scheme, context=1)
    need = 1.1 * (e.weights_bytes + e.state_bytes) + 5e7  # names, tokenizer
    above = next(parent for parent in folder.parents if parent.is_dir())
    free = shutil.disk_usage(above).free
    if need > free:
        raise QwlibError(
            f"{row.name} in {scheme.name} takes {need / 1e9:.1f} GB on disk, {above} has {free / 1e9:.1f} free"
        )
