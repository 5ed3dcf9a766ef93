"""`finetune`: a model trained on examples, by LoRA, by QLoRA, or in full, with what it took as a record.

peft makes the adapters. `prepare_model_for_kbit_training` is not called: it would copy embedding and head to float32.
"""

import contextlib
from pathlib import Path

from ..errors import QwlibError
from ..loading.load import load
from ..models import catalog
from ..running.lm import Lm
from . import examples, predicted, ranks, runs, sharded
from .settings import Settings


def finetune(
    model: str,
    scheme: str | None,
    data: Path,
    out: Path,
    *,
    device: str | None = None,
    weights: str = "trained",
    **settings,
) -> tuple[Path, dict]:
    """Train `model` under `scheme` on the examples in `data`. The folder `out` and its record of kind `training` come back.

    `settings` are those of `Settings`; `weights="random"` takes the model's shape without a download. Under `torchrun` every
    process has a GPU and a part of each batch (`ranks`). The folder holds an adapter, to be loaded as `model+out`, or for
    `method="full"` a checkpoint in bfloat16. While it trains, checkpoints lie in `out` with `.unfinished` after its name. If the
    process is killed, the same call goes on from the last of them.

    Raises QwlibError in one line: an `out` that exists, unusable data, a scheme that can't be trained, an unknown target, a loss
    that is no number (with the step and the lines of the batch), a full disk, and what `load` raises.
    """
    how = Settings.of(**settings)
    out = Path(out).expanduser().absolute()
    if out.exists():
        raise QwlibError(f"{out} is there already: name a new folder")
    given = examples.read(data)
    row = catalog.find(model)
    if row.adapter:
        raise QwlibError(
            f"{row.name} has an adapter already: `python -m qwlib merge` first, then train the merged model"
        )
    if how.method == "full" and scheme != "fp32":
        raise QwlibError("method='full' trains the weights themselves: it needs the scheme fp32")
    with ranks.connected(device) as (own, device):
        parted = sharded.wanted(how, own)
        if how.batch % own.world:
            raise QwlibError(
                f"a batch of {how.batch} can't be split over {own.world} processes: take a multiple of them"
            )
        with load(row, scheme, device=device, weights=weights, engine="eager", split=parted) as lm:
            _check(lm, own)
            if parted:
                sharded.possible(lm.scheme, how.method, how.optimizer)
            return out, _run(lm, how, data, given, out, own)


def _check(lm: Lm, own: ranks.Ranks) -> None:
    """Raise QwlibError for a loaded model that can't be trained."""
    if lm.scheme.backend not in ("transformers", "bitsandbytes"):
        raise QwlibError(f"{lm.scheme.name} can't be trained: choose a 16-bit scheme, or one of bitsandbytes")
    if lm.device.type == "cpu" and str(lm.dtype) == "torch.float16":
        raise QwlibError(f"{lm.scheme.name} can't be trained on a CPU in float16: choose bf16 or fp32")
    if lm.device.index not in (None, own.local):
        raise QwlibError(f"training runs on the first GPU, not on {lm.device}: choose it with CUDA_VISIBLE_DEVICES")


def _run(lm: Lm, how: Settings, data: Path, given, out: Path, own: ranks.Ranks) -> dict:
    """Train on the examples `given`, which were read from `data`, write the folder `out`, and return its record."""
    kept, held = examples.split(given, how.validation, how.seed)
    if how.validation and not (kept and held):
        raise QwlibError(f"{len(given)} examples can't be split: give more, or validation=0")
    parts = [examples.tokenized(lm, part, how.longest) for part in (kept, held)]
    found = {} if sharded.wanted(how, own) else _expected(lm, how, parts[0], how.batch // own.world)
    return runs.run(lm, how, parts, out, own, data=_about(data, given, parts), found=found)


def _expected(lm: Lm, how: Settings, rows, batch: int) -> dict:
    """The predicted peak for a record, empty for a model whose training can't be predicted."""
    with contextlib.suppress(QwlibError):
        return {"predicted_bytes": predicted.of_examples(lm.row, lm.scheme, how, rows, batch, lm.device.type).told()}
    return {}


def _about(data: Path, given, parts) -> dict:
    tokens = [each for part in parts for each in part]
    return {
        "file": Path(data).name,
        "sha256": examples.sha256(given),
        "examples": len(parts[0]),
        "validation_examples": len(parts[1]),
        "tokens": sum(len(each.ids) for each in tokens),
        "learnt_tokens": sum(each.learnt for each in tokens),
    }
