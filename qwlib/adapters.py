"""LoRA adapters: found, put over a model, or merged into its weights.

An adapter is a low-rank correction to some linear layers. Over 4-bit weights it stays in 16 bits beside them, and costs a little
memory and time at every step. Merged, it is part of the weights: that is done in 16 bits and quantized afterwards, because added
to weights that are 4-bit already most of it would be rounded away. Which of the two loses less is measured, not known.

What it leaves out: training, and several adapters at once.
"""

import json
import warnings
from pathlib import Path

from . import artefacts, catalog, files, hub
from .errors import QwlibError
from .lm import quiet

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def folder(row: catalog.Model) -> str | None:
    """The sub-folder of `row.adapter` in which its files lie, None for the root, which is looked at first.

    Raises QwlibError where neither holds an adapter as safetensors: peft would open a pickle instead.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    over, there, missing = row.adapter, Path(row.adapter.source), None
    for place in dict.fromkeys((None, over.folder or None)):
        names = [f"{place}/{name}" if place else name for name in (CONFIG, WEIGHTS)]
        if there.is_dir():
            if all((there / name).is_file() for name in names):
                return place
            continue
        try:
            for name in names:
                hf_hub_download(over.source, name, revision=over.revision)
        except EntryNotFoundError as error:  # offline too, where the cache holds the other place
            missing = error
        else:
            return place
    if isinstance(missing, FileNotFoundError):
        raise missing
    raise QwlibError(f"{row.name}: its adapter has no {CONFIG} and {WEIGHTS}")


def put_over(lm):
    """The peft model of `lm` with its row's adapter over it, unmerged.

    Raises QwlibError where there is none, or it lacks weights, which peft would make up.
    """
    from peft import PeftModel

    over = lm.row.adapter
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = PeftModel.from_pretrained(
            lm.model,
            over.source,
            revision=over.revision,
            subfolder=folder(lm.row),
            autocast_adapter_dtype=False,  # else the adapter alone would be float32
        ).eval()
    if any("missing adapter keys" in str(warning.message) for warning in told):
        raise QwlibError(f"{lm.row.name}: its adapter lacks some of its weights, or is for another model")
    return model


def merge(model: str, out: Path | None = None) -> Path:
    """The folder of a 16-bit checkpoint with the adapter of `model` in its weights: made now, or found.

    `model` is `nemoguard-8b`, or a model and its adapter as `model+adapter`. `out` defaults to a folder in the cache.

    Raises QwlibError for a model without an adapter, what `load` raises, and an `out` that is there already.
    """
    from . import loading

    row = catalog.find(model)
    if not row.adapter:
        raise QwlibError(f"{row.name} has no adapter to merge: name it as model+adapter")
    with hub.explained(row):
        facts = artefacts.source(row)
    if out is None:
        place = files.cache_dir() / "merged" / f"{Path(row.name).name}-{files.sha256_text(repr(facts))[:16]}"
        if place.is_dir():
            return place
    else:
        place = Path(out).expanduser().absolute()
        if place.exists():
            raise QwlibError(f"{place} is there already: name a new folder")
    with loading.load(row, "bf16") as lm:
        merged = lm.model.merge_and_unload()
        with files.new_folder(place) as made, quiet():
            merged.save_pretrained(made)
            lm.tokenizer.save_pretrained(made)
            (made / artefacts.MERGED).write_text(json.dumps(facts), encoding="utf-8")
        del merged
    return place


def merge_then_quantize(model: str, scheme: str, out: Path | None = None) -> Path:
    """The artefact of `model` with its adapter merged in 16 bits, then quantized.

    Raises QwlibError as `merge` and `quantizing.quantize` do.
    """
    from . import quantizing

    return quantizing.quantize(str(merge(model)), scheme, out)


def version(row: catalog.Model) -> str:
    """The adapter of `row`: a hash of its files, or repository and revision."""
    place, there = folder(row), Path(row.adapter.source)
    if there.is_dir():
        held = sorted((there / (place or "")).glob("adapter*"))
        return files.sha256_text("".join(f"{file.name} {files.sha256(file)}\n" for file in held))
    return f"{row.adapter.source} {row.adapter.revision or 'unpinned'}"
