"""`finetune`: a model trained on examples, by LoRA, by QLoRA, or in full, with what it took as a record.

peft makes the adapters. `prepare_model_for_kbit_training` is not called: it would copy embedding and head to float32.
"""

import contextlib
import errno
import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from .. import files
from ..backends import bnb_ends
from ..errors import QwlibError
from ..loading.load import load
from ..machine import memory
from ..measuring import describing, record
from ..models import catalog, estimates
from ..running.lm import Lm, quiet
from . import examples, loop, predicted, ranks
from .adapting import adapted
from .settings import Settings

RECORD, SETTINGS = "training.json", "settings.json"


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
        if how.batch % own.world:
            raise QwlibError(
                f"a batch of {how.batch} can't be split over {own.world} processes: take a multiple of them"
            )
        with load(row, scheme, device=device, weights=weights, engine="eager") as lm:
            _check(lm, own)
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
    expected = _expected(lm, how, parts[0], how.batch // own.world)
    # import what training needs, so that it is not counted as memory that training takes
    for library in ("peft", f"{__package__}.trainer"):
        importlib.import_module(library)
    memory.give_back()
    used = memory.used_bytes(lm.device)
    lm.model = adapted(lm, how)
    place = out.with_name(f"{out.name}.unfinished")
    with _explained(place), files.alone(place) if own.first else contextlib.nullcontext():
        if own.first:
            _claim(place, lm, how, given)
        own.wait()
        found = _train(lm, how, *parts, place, used, own)
        told = record.new(
            "training",
            model=describing.describe_model(lm, estimates.estimate(lm.row, lm.scheme.name).parameters),
            scheme=describing.describe_scheme(lm.scheme, lm.manifest),
            memory=dict(lm.memory),
            training=found | expected | {"settings": how.told(), "data": _about(data, given, parts)},
        )
        told["env"] |= describing.describe_choices(lm)
        if own.first:
            record.write(told, place / "kept" / RECORD)
            (place / "kept").rename(out)
            shutil.rmtree(place, ignore_errors=True)
        own.wait()
    return told


def _expected(lm: Lm, how: Settings, rows, batch: int) -> dict:
    """The predicted peak for a record, empty for a model whose training can't be predicted."""
    with contextlib.suppress(QwlibError):
        return {"predicted_bytes": predicted.of_examples(lm.row, lm.scheme, how, rows, batch, lm.device.type).told()}
    return {}


@contextlib.contextmanager
def _explained(place: Path) -> Iterator[None]:
    """A folder that can't be written, a full disk, and a batch that does not fit as one line.

    torch and safetensors have errors of their own for a full disk.
    """
    import torch

    try:
        yield
    except QwlibError:
        raise
    except torch.OutOfMemoryError:
        raise QwlibError("a batch does not fit into the GPU: take fewer examples at once, or recompute=True") from None
    except Exception as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        if full or (place.parent.is_dir() and shutil.disk_usage(place.parent).free < 1 << 20):
            raise QwlibError(
                f"the disk of {place.parent} is full: make room and call again, which goes on from the last checkpoint"
            ) from None
        if isinstance(error, OSError):
            raise QwlibError(f"{place} can't be written: {error}") from None
        raise


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


def _claim(place: Path, lm: Lm, how: Settings, given) -> None:
    """Make the folder of an unfinished run ours.

    Raises QwlibError where it is one of other settings.
    """
    wanted = {"model": lm.row.name, "scheme": lm.scheme.name, "data": examples.sha256(given)} | how.told()
    file = place / SETTINGS
    if place.is_dir():
        with contextlib.suppress(OSError, ValueError):
            if json.loads(file.read_text(encoding="utf-8")) == wanted:
                return
        raise QwlibError(f"{place} holds an unfinished run of other settings: remove it, or name another folder")
    files.write_text(file, json.dumps(wanted, indent=1) + "\n")


def _train(lm: Lm, how: Settings, train, validation, place: Path, used: int, own: ranks.Ranks) -> dict:
    """Train, leave what is kept in `place`/kept, and say what happened. `used`: bytes before anything was made for training."""
    import torch

    from .trainer import Trainer

    # else bitsandbytes repacks the weights when a model is validated, and products with them can't be differentiated
    for module in lm.model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = lm.model
    frozen, learnt = [p for p in model.parameters() if not p.requires_grad], loop.trained(model)
    before, first = fingerprint(frozen), fingerprint(learnt.values())
    with loop.still():
        trainer = Trainer(model, lm, how, train, validation, place, own)
    if own.first:
        _remove_half(place)
    own.wait()
    metered, resumed = memory.reset_peak(lm.device), _last_checkpoint(place)
    with bnb_ends.left_out(), loop.still():
        if not (resumed and trainer.ended(resumed)):
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    peak = memory.peak_bytes(lm.device) if metered else None
    trainer.accelerator.free_memory()  # it holds the model
    if fingerprint(frozen) != before:
        raise QwlibError("training changed weights that are frozen: please report this")
    if fingerprint(learnt.values()) == first:
        raise QwlibError("training changed nothing: raise the learning rate or the steps")
    if not all(parameter.isfinite().all() for parameter in learnt.values()):
        raise QwlibError(
            f"the trained weights hold values that are no numbers: remove {place} and lower the learning rate"
        )
    for parameter in learnt.values():
        parameter.data = parameter.data.to(torch.bfloat16)
    told = trainer.told() | {
        "gpus" if lm.device.type == "cuda" else "processes": own.world,
        "trained_parameters": sum(parameter.numel() for parameter in learnt.values()),
        "trained_modules": len({name.partition(".lora_")[0] for name in learnt}),
        "frozen_fingerprint": before,
        "resumed_at": int(resumed.name.rpartition("-")[2]) if resumed else 0,
    }
    if peak:
        held = lm.memory["weights_bytes"] + lm.memory["state_bytes"]
        told["peak_bytes"] = int(own.most([held + max(0, peak - used)], lm.device)[0])
    if own.first:
        shutil.rmtree(place / "kept", ignore_errors=True)
        _save(model, lm, how, place / "kept")
        hashes = [files.sha256(file) for file in sorted((place / "kept").glob("*.safetensors"))]
        told["weights_sha256"] = hashes[0] if len(hashes) == 1 else files.sha256_text("".join(hashes))
    return told


def _save(model, lm: Lm, how: Settings, folder: Path) -> None:
    """Write what was trained: an adapter, or a checkpoint with its tokenizer."""
    with quiet():
        if how.method == "full":
            model.save_pretrained(folder)
            lm.tokenizer.save_pretrained(folder)
        else:
            model.peft_config["default"].base_model_name_or_path = catalog.base(lm.row).address
            model.save_pretrained(folder, state_dict=loop.trained(model), save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)  # a form that nobody has filled in
    for file in folder.iterdir():
        file.chmod(0o644)


def fingerprint(tensors) -> str:
    """A checksum of values and their places, computed where the tensors are. It is fast, and no proof against an attacker."""
    import torch

    found = []
    for tensor in tensors:
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
        for part in raw.split(1 << 24):
            numbers = part.long()
            weights = torch.arange(1, len(part) + 1, device=part.device) % 65521
            found.append((int(numbers.sum()), int((numbers * weights).sum())))
    return files.sha256_text(str(found))[:16]


def _checkpoints(place: Path) -> list[Path]:
    """Those of an unfinished run, the last first."""
    return sorted(place.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2]))


def _whole(checkpoint: Path) -> bool:
    """Whether it was written to the end: `trainer_state.json` is what Trainer writes last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _remove_half(place: Path) -> None:
    """Remove half-written checkpoints: Trainer would keep one and remove a whole one."""
    for path in _checkpoints(place):
        if not _whole(path):
            shutil.rmtree(path)


def _last_checkpoint(place: Path) -> Path | None:
    return next(iter(_checkpoints(place)), None)
