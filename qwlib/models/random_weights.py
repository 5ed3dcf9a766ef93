"""Checkpoints of a true shape with random values: the bytes and the times of a model that was never downloaded.

Memory depends on shapes and types alone, and so does speed, but for int8, whose outlier path depends on activations. So a
random checkpoint measures both through the same loading path as a real one. Quality it has none: the configuration is
marked, and whatever reads it refuses to print a perplexity.

The values are one block of normal noise (standard deviation 0.02) repeated: drawing eight billion numbers would take
longer than writing them. Norm weights are 1 and biases 0, so that activations stay finite.
"""

import json
import shutil
from pathlib import Path

from .. import files
from ..errors import QwlibError
from . import catalog, embedded, estimates

MARK = "qwlib_weights"  # key of config.json that tells random weights from trained ones

_SHARD_BYTES = 2 * 10**9
_POOL = 1 << 22  # values drawn


def checkpoint(row: catalog.Model) -> Path:
    """Folder of a bfloat16 checkpoint with the shape of `row` and the embedded tokenizer, made at the first call.

    Raises QwlibError where the disk has no room for it.
    """
    import hashlib

    shapes = estimates.meta_model(row)
    key = hashlib.sha256(shapes.config.to_json_string().encode()).hexdigest()[:16]
    folder = files.cache_dir() / f"random-{shapes.config.model_type}-{key}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        need, free = 2 * shapes.num_parameters(), shutil.disk_usage(folder.parent).free
        if need > free:
            raise QwlibError(
                f"a random checkpoint of {row.name} takes {need / 1e9:.1f} GB, {folder.parent} has {free / 1e9:.1f}"
            )
        with files.new_folder(folder) as out:
            write(shapes, out)
    return folder


@catalog.once
def is_random(row: catalog.Model) -> bool:
    """Whether a folder holds random weights: written here, or saved from a model that was."""
    return row.config_name is None and getattr(row.config(), MARK, None) == "random"


def write(shapes, out: Path) -> None:
    """Write a checkpoint of the shape of `shapes`, a meta-device model, into the folder `out`."""
    import torch
    from safetensors.torch import save_file
    from tqdm.auto import tqdm

    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    tied = set(shapes.all_tied_weights_keys)
    pending = [(name, t.shape) for name, t in shapes.state_dict().items() if name not in tied]
    index, total, number = {}, 0, 0
    bar = tqdm(total=len(pending), desc="writing random weights", unit="tensor", disable=None, delay=2, leave=False)
    while pending:
        shard, size = {}, 0
        while pending and (size == 0 or size + 2 * pending[0][1].numel() <= _SHARD_BYTES):
            name, shape = pending.pop(0)
            shard[name] = _values(name, shape, pool)
            bar.update()
            size += shard[name].nbytes
        number += 1
        file = f"model-{number:05d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        index |= dict.fromkeys(shard, file)
        total += size
    bar.close()
    shapes.config.dtype = torch.bfloat16
    setattr(shapes.config, MARK, "random")
    shapes.config.save_pretrained(out)
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    for file in embedded.checkpoint().glob("*token*.json"):
        shutil.copy(file, out)


def _values(name: str, shape, pool):
    import torch

    if len(shape) == 1:
        return torch.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=torch.bfloat16)
    n = shape.numel()
    return pool.repeat(-(-n // pool.numel()))[:n].reshape(shape).contiguous()
