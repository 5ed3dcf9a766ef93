"""LoRA adapters: where their files lie, and how one is put over a loaded model.

An adapter is a low-rank correction to some linear layers. Over 4-bit weights it stays in 16 bits beside them, and costs a little
memory and time at every step; `loading/merging.py` makes it a part of the weights instead.

What it leaves out: training, and several adapters at once.
"""

import warnings
from pathlib import Path

from .. import files
from ..errors import QwlibError
from . import catalog

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@catalog.once
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


@catalog.once
def version(row: catalog.Model) -> str:
    """The adapter of `row`: a hash of its files, or repository and revision."""
    place, there = folder(row), Path(row.adapter.source)
    if there.is_dir():
        held = sorted((there / (place or "")).glob("adapter*"))
        return files.sha256_text("".join(f"{file.name} {files.sha256(file)}\n" for file in held))
    return f"{row.adapter.source} {row.adapter.revision or 'unpinned'}"
