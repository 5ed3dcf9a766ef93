"""A run of training: its folder, from which it goes on if it is killed, the training itself, what is kept, and the record.

While it trains, checkpoints lie in the folder with `.unfinished` after its name.
"""

import contextlib
import errno
import importlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from .. import files
from ..backends import bnb_ends
from ..errors import QwlibError
from ..machine import memory
from ..measuring import describing, record
from ..models import catalog, estimates
from ..running.lm import Lm, quiet
from . import loop, ranks, sharded
from .adapting import adapted
from .settings import Settings

RECORD, SETTINGS = "training.json", "settings.json"


class Student(Protocol):
    """How a model is trained to be another form of itself (`student.py`).

    `told`: its own settings. A run goes on only with the same ones.
    """

    told: dict

    def dressed(self, model):
        """The model as it is trained, all of whose parameters that learn have gradients."""

    def trainer(self, model, lm: Lm, how: Settings, train, validation, place: Path, own: ranks.Ranks):
        """A `Trainer` for it."""

    def settled(self, model) -> dict:
        """Make its weights what is saved; what was found while doing so is for the record."""

    def finished(self, folder: Path) -> None:
        """Add files to the folder of what was trained."""


def run(
    lm: Lm,
    how: Settings,
    parts: list,
    out: Path,
    own: ranks.Ranks,
    *,
    data: dict,
    found: dict,
    student: Student | None = None,
) -> dict:
    """Train on the tokens in `parts` (training, validation), write the folder `out`, and return its record.

    `data` describes them, and `found` is what the record's `training` says besides. `student`: how a student learns, if it does.
    """
    # import what training needs, so that it is not counted as memory that training takes
    for library in ("peft", f"{__package__}.trainer"):
        importlib.import_module(library)
    memory.give_back()
    used = memory.used_bytes(lm.device)
    lm.model = student.dressed(lm.model) if student else adapted(lm, how)
    held = lm.memory["weights_bytes"] + lm.memory["state_bytes"]
    if sharded.wanted(how, own):
        sharded.split(lm.model, lm.device)
        memory.give_back()
        held = memory.measure(lm.model)["weights_bytes"] + lm.memory["state_bytes"]
        used = memory.used_bytes(lm.device)
    place = out.with_name(f"{out.name}.unfinished")
    with _explained(place), files.alone(place) if own.first else contextlib.nullcontext():
        if own.first:
            wanted = {"model": lm.row.name, "scheme": lm.scheme.name, "data": data["sha256"]} | how.told()
            _claim(place, wanted | (student.told if student else {}))
        own.wait()
        found = _train(lm, how, *parts, place, held, used, own, student) | found
        told = record.new(
            "training",
            model=describing.describe_model(lm, estimates.estimate(lm.row, lm.scheme.name).parameters),
            scheme=describing.describe_scheme(lm.scheme, lm.manifest),
            memory=dict(lm.memory),
            training=found | {"settings": how.told(), "data": data},
        )
        told["env"] |= describing.describe_choices(lm)
        if own.first:
            record.write(told, place / "kept" / RECORD)
            if student:
                student.finished(place / "kept")
            (place / "kept").rename(out)
            shutil.rmtree(place, ignore_errors=True)
        own.wait()
    return told


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


def _claim(place: Path, wanted: dict) -> None:
    """Make the folder of an unfinished run ours.

    Raises QwlibError where it is one of other settings.
    """
    file = place / SETTINGS
    if place.is_dir():
        with contextlib.suppress(OSError, ValueError):
            if json.loads(file.read_text(encoding="utf-8")) == wanted:
                return
        raise QwlibError(f"{place} holds an unfinished run of other settings: remove it, or name another folder")
    files.write_text(file, json.dumps(wanted, indent=1) + "\n")


def _train(
    lm: Lm, how: Settings, train, validation, place: Path, held: int, used: int, own: ranks.Ranks, student
) -> dict:
    """Train, leave what is kept in `place`/kept, and say what happened.

    `held`: bytes of the model in this process. `used`: bytes before anything was made for training.
    """
    import torch

    from .sharded_trainer import ShardedTrainer
    from .trainer import Trainer

    # else bitsandbytes repacks the weights when a model is validated, and products with them can't be differentiated
    for module in lm.model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    model = lm.model
    frozen, learnt = [p for p in model.parameters() if not p.requires_grad], loop.trained(model)
    before, first = fingerprint(frozen), fingerprint(learnt.values())
    with loop.still():
        made = student.trainer if student else ShardedTrainer if sharded.wanted(how, own) else Trainer
        trainer = made(model, lm, how, train, validation, place, own)
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
    if not all(sharded.whole(parameter.detach()).isfinite().all() for parameter in learnt.values()):
        raise QwlibError(
            f"the trained weights hold values that are no numbers: remove {place} and lower the learning rate"
        )
    counts = {
        "trained_parameters": sum(parameter.numel() for parameter in learnt.values()),
        "trained_modules": len({name.partition(".lora_")[0] for name in learnt}),
    }
    if student:
        counts |= student.settled(model)
        learnt = loop.trained(model)
    weights = sharded.gathered(learnt, own, torch.bfloat16)
    told = trainer.told() | {
        "gpus" if lm.device.type == "cuda" else "processes": own.world,
        **counts,
        "frozen_fingerprint": before,
        **({"sharded": True} if sharded.wanted(how, own) else {}),
        "resumed_at": int(resumed.name.rpartition("-")[2]) if resumed else 0,
    }
    if peak:
        told["peak_bytes"] = int(own.most([held + max(0, peak - used)], lm.device)[0])
    if own.first:
        shutil.rmtree(place / "kept", ignore_errors=True)
        _save(model, lm, how, weights, place / "kept")
        hashes = [files.sha256(file) for file in sorted((place / "kept").glob("*.safetensors"))]
        told["weights_sha256"] = hashes[0] if len(hashes) == 1 else files.sha256_text("".join(hashes))
    return told


def _save(model, lm: Lm, how: Settings, weights: dict, folder: Path) -> None:
    """Write what was trained: an adapter, or a checkpoint with its tokenizer. `weights`: what `sharded.gathered` returned."""
    import torch

    with quiet():
        if how.method == "full":
            names = dict(model.named_parameters(remove_duplicate=False))
            buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in names}
            for parameter in model.parameters():  # config.json names their type
                parameter.data = parameter.data.to(torch.bfloat16)
            model.save_pretrained(folder, state_dict=weights | buffers)
            lm.tokenizer.save_pretrained(folder)
        else:
            model.peft_config["default"].base_model_name_or_path = catalog.base(lm.row).address
            model.save_pretrained(folder, state_dict=weights, save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)  # a form that nobody has filled in
    for file in folder.iterdir():
        file.chmod(0o644)


def fingerprint(tensors) -> str:
    """A checksum of values and their places, computed where the tensors are. It is fast, and no proof against an attacker."""
    import torch

    found = []
    for tensor in tensors:
        raw = sharded.whole(tensor.detach()).contiguous().view(-1).view(torch.uint8)
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
