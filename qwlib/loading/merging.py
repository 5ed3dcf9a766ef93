"""An adapter merged into its model's 16-bit weights, to be quantized afterwards.

Added to weights that are 4-bit already, most of a low-rank correction would be rounded away. Whether a model loses less merged
and quantized, or with its adapter in 16 bits beside 4-bit weights, is measured, not known.
"""

import json
from pathlib import Path

from .. import files
from ..errors import QwlibError
from ..models import catalog, checkpoints, hub
from ..running.lm import quiet
from . import quantizing
from .load import load


def merge(model: str, out: Path | None = None) -> Path:
    """The folder of a 16-bit checkpoint with the adapter of `model` in its weights: made now, or found.

    `model` is `nemoguard-8b`, or a model and its adapter as `model+adapter`. `out` defaults to a folder in the cache.

    Raises QwlibError for a model without an adapter, what `load` raises, and an `out` that is there already.
    """
    row = catalog.find(model)
    if not row.adapter:
        raise QwlibError(f"{row.name} has no adapter to merge: name it as model+adapter")
    with hub.explained(row):
        facts = checkpoints.source(row)
    if out is None:
        place = files.cache_dir() / "merged" / f"{Path(row.name).name}-{files.sha256_text(repr(facts))[:16]}"
        if place.is_dir():
            return place
    else:
        place = Path(out).expanduser().absolute()
        if place.exists():
            raise QwlibError(f"{place} is there already: name a new folder")
    with load(row, "bf16") as lm:
        merged = lm.model.merge_and_unload()
        with files.new_folder(place) as made, quiet():
            merged.save_pretrained(made)
            lm.tokenizer.save_pretrained(made)
            (made / checkpoints.MERGED).write_text(json.dumps(facts), encoding="utf-8")
        del merged
    return place


def merge_then_quantize(model: str, scheme: str, out: Path | None = None) -> Path:
    """The artefact of `model` with its adapter merged in 16 bits, then quantized.

    Raises QwlibError as `merge` and `quantizing.quantize` do.
    """
    return quantizing.quantize(merge(model), scheme, out)
