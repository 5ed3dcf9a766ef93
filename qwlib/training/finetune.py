"""`finetune`: a model trained on examples, by LoRA, by QLoRA, or in full, with what it took as a record.

The loop is transformers' `Trainer`: it is installed already, it writes checkpoints from which a run goes on, and it is tested by
many. trl's `SFTTrainer` is built on it and brings its own handling of data, which `examples.py` does here with line numbers.
peft makes the adapters. `prepare_model_for_kbit_training` is not called: it would copy embedding and head to float32.
"""

import contextlib
import errno
import json
import math
import shutil
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from .. import files
from ..backends import bnb_ends
from ..errors import QwlibError, unknown, whole_number
from ..loading.load import load
from ..machine import memory
from ..measuring import describing, record
from ..models import catalog, estimates
from ..running.lm import Lm, quiet
from . import examples

METHODS = ("lora", "rslora", "dora", "full")
OPTIMIZERS = {"adamw": "adamw_torch", "adamw-8bit": "adamw_bnb_8bit", "paged": "paged_adamw_32bit"}
SHARED = 32  # tokens that all rows of a batch begin with, from which on they are read once
RECORD, SETTINGS = "training.json", "settings.json"


@dataclass(frozen=True)
class Settings:
    """How a model is trained.

    `method`: `lora`, `rslora` (scaled by 1/√rank, arXiv 2312.03732), `dora` (with learnt magnitudes, arXiv 2402.09353), or
    `full`, which trains all weights in float32. `rank`, `alpha`, `dropout`: of an adapter, whose output is multiplied by alpha ÷
    rank. `targets`: names of linear layers such as `q_proj`; without any, all of them but the output head, as in the QLoRA paper
    (arXiv 2305.14314).

    `steps` comes before `epochs`. A step is `accumulate` batches of `batch` examples. The learning rate rises for the share
    `warmup` of the steps and then falls along a cosine to 0. `longest`: tokens of an example. `optimizer`: `adamw`,
    `adamw-8bit`, or `paged`, which moves to the host what does not fit into a GPU. `recompute`: activations are computed again
    in the backward pass and not kept (gradient checkpointing).

    `validation`: the share of the examples that is held back; the weights with the lowest loss on it are kept. `every`: steps
    between two validations, and between two checkpoints; a tenth of the run if it is not given. `patience`: validations without
    a lower loss after which training stops.
    """

    method: str = "lora"
    rank: int = 16
    alpha: float = 32
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    epochs: float = 1
    steps: int | None = None
    batch: int = 8
    accumulate: int = 1
    learning_rate: float = 2e-4
    warmup: float = 0.05
    longest: int = 512
    validation: float = 0.1
    patience: int | None = None
    every: int | None = None
    optimizer: str = "adamw"
    recompute: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)
        for name in ("rank", "batch", "accumulate", "longest", "steps", "every", "patience"):
            if getattr(self, name) is not None:
                whole_number(getattr(self, name), name)
        whole_number(self.seed, "seed", 0)
        for name in ("epochs", "learning_rate", "alpha"):
            if not 0 < getattr(self, name) < math.inf:
                raise QwlibError(f"{name} must be more than 0, not {getattr(self, name)}")
        for name in ("dropout", "warmup", "validation"):
            if not 0 <= getattr(self, name) < 1:
                raise QwlibError(f"{name} is a share from 0 to less than 1, not {getattr(self, name)}")
        if self.patience and not self.validation:
            raise QwlibError("patience needs validation: a share of the examples to hold back")

    def told(self) -> dict:
        """The settings that are set, as JSON holds them."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if v is not None}


def finetune(
    model: str, scheme: str | None, data: Path, out: Path, *, device: str | None = None, **settings
) -> tuple[Path, dict]:
    """Train `model` under `scheme` on the examples in `data`. The folder `out` and its record of kind `training` come back.

    `settings` are those of `Settings`. The folder holds an adapter, to be loaded as `model+out`, or for `method="full"` a
    checkpoint in bfloat16. While it trains, checkpoints lie in `out` with `.unfinished` after its name. If the process is killed,
    the same call goes on from the last of them.

    Raises QwlibError in one line: an `out` that exists, unusable data, a scheme that can't be trained, an unknown target, a loss
    that is no number (with the step and the lines of the batch), a full disk, and what `load` raises.
    """
    try:
        how = Settings(**settings)
    except TypeError as error:
        known = ", ".join(Settings.__dataclass_fields__)
        raise QwlibError(f"{str(error).partition('() ')[2] or error}: settings are {known}") from None
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
    place = out.with_name(f"{out.name}.unfinished")
    with load(row, scheme, device=device, engine="eager") as lm:
        if lm.scheme.backend not in ("transformers", "bitsandbytes"):
            raise QwlibError(f"{lm.scheme.name} can't be trained: choose a 16-bit scheme, or one of bitsandbytes")
        kept, held = examples.split(given, how.validation, how.seed)
        if how.validation and not (kept and held):
            raise QwlibError(f"{len(given)} examples can't be split: give more, or validation=0")
        parts = [examples.tokenized(lm, part, how.longest) for part in (kept, held)]
        lm.model = adapted(lm, how)
        _claim(place, lm, how, given)
        found = _train(lm, how, *parts, place)
        told = record.new(
            "training",
            model=describing.describe_model(lm, estimates.estimate(row, lm.scheme.name).parameters),
            scheme=describing.describe_scheme(lm.scheme, lm.manifest),
            memory=dict(lm.memory),
            training=found | {"settings": how.told(), "data": _about(data, given, parts)},
        )
        told["env"] |= describing.describe_choices(lm)
        record.write(told, place / "kept" / RECORD)
        (place / "kept").rename(out)
        shutil.rmtree(place, ignore_errors=True)
    return out, told


def _about(data: Path, given, parts) -> dict:
    tokens = [each for part in parts for each in part]
    return {
        "file": Path(data).name,
        "sha256": examples.sha256(given),
        "examples": len(parts[0]),
        "validation_examples": len(parts[1]),
        "tokens": sum(len(each.ids) for each in tokens),
        "learnt_tokens": sum(each.learnt for each in tokens),
        "cut_examples": sum(each.cut > 0 for each in tokens),
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


def adapted(lm: Lm, how: Settings):
    """The model with trainable matrices beside its layers, all else frozen; for `full` the model itself, all of it trainable.

    Raises QwlibError for a target that the model has not.
    """
    import torch

    if how.method == "full":
        return lm.model.requires_grad_(True)
    from peft import LoraConfig, get_peft_model

    head = lm.model.get_output_embeddings()
    linear = {n for n, m in lm.model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
    names = sorted({name.rpartition(".")[2] for name in linear})
    for target in how.targets:
        if target not in names:
            raise unknown("target", target, names)
    torch.manual_seed(how.seed)  # the first matrix of each pair is drawn
    config = LoraConfig(
        r=how.rank,
        lora_alpha=how.alpha,
        lora_dropout=how.dropout,
        target_modules=list(how.targets) or names,
        use_rslora=how.method == "rslora",
        use_dora=how.method == "dora",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(lm.model, config)


def _train(lm: Lm, how: Settings, train, validation, place: Path) -> dict:
    """Train, leave what is kept in `place`/kept, and say what happened."""
    import torch

    for module in lm.model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = (
                False  # else validating repacks the weights, and they can't be differentiated
            )
    model = lm.model
    frozen, learnt = [p for p in model.parameters() if not p.requires_grad], trained(model)
    before, first = fingerprint(frozen), fingerprint(learnt.values())
    trainer = _trainer(model, lm, how, train, validation, place)
    used, metered = memory.used_bytes(lm.device), memory.reset_peak(lm.device)
    resumed = _last_checkpoint(place)
    try:
        with bnb_ends.left_out():
            trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise QwlibError(
            f"the disk of {place.parent} is full: make room and call again, which goes on from the last checkpoint"
        ) from None
    peak = memory.peak_bytes(lm.device) if metered else None
    trainer.accelerator.free_memory()  # it holds the model
    if fingerprint(frozen) != before:
        raise QwlibError("training changed weights that are frozen: please report this")
    if fingerprint(learnt.values()) == first:
        raise QwlibError("training changed nothing: raise the learning rate or the steps")
    shutil.rmtree(place / "kept", ignore_errors=True)
    for parameter in learnt.values():
        parameter.data = parameter.data.to(torch.bfloat16)
    _save(model, lm, how, place / "kept")
    held = lm.memory["weights_bytes"] + lm.memory["state_bytes"]
    hashes = [files.sha256(file) for file in sorted((place / "kept").glob("*.safetensors"))]
    return trainer.told() | {
        "trained_parameters": sum(parameter.numel() for parameter in learnt.values()),
        "trained_modules": len({name.partition(".lora_")[0] for name in learnt}),
        "frozen_fingerprint": before,
        "resumed_at": int(resumed.name.rpartition("-")[2]) if resumed else 0,
        "weights_sha256": hashes[0] if len(hashes) == 1 else files.sha256_text("".join(hashes)),
        **({"peak_bytes": held + max(0, peak - used)} if peak else {}),
    }


def _save(model, lm: Lm, how: Settings, folder: Path) -> None:
    """Write what was trained: an adapter, or a checkpoint with its tokenizer."""
    with quiet():
        if how.method == "full":
            model.save_pretrained(folder)
            lm.tokenizer.save_pretrained(folder)
        else:
            model.peft_config["default"].base_model_name_or_path = catalog.base(lm.row).address
            model.save_pretrained(folder, state_dict=trained(model), save_embedding_layers=False)
            (folder / "README.md").unlink(missing_ok=True)  # a form that nobody has filled in
    for file in folder.iterdir():
        file.chmod(0o644)


def loss(model, inputs: dict, tokens=None):
    """Cross-entropy of the labels that are learnt, in nats: summed and divided by `tokens`, or by their number in this batch.

    Scores are computed only where a label follows that is learnt in some row. With a large vocabulary and short answers, the
    scores of all positions would take most of the memory. What all rows of the batch begin with (a system message, a guard's long
    instructions) is read once, and its keys and values serve all rows; gradients flow through them.
    """
    from torch.nn.functional import cross_entropy

    ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"][:, 1:]
    places = (labels != examples.IGNORED).any(0).nonzero()[:, 0]
    wanted = labels[:, places]
    length = min(_shared(ids), int(places[0]))
    cache = None
    if length >= SHARED and not model.is_gradient_checkpointing:
        cache = model(input_ids=ids[:1, :length], use_cache=True, logits_to_keep=1).past_key_values
        if any(cache.is_sliding):
            cache = None
    if cache is None:
        length = 0
    else:
        cache.batch_repeat_interleave(len(ids))
    scores = model(
        input_ids=ids[:, length:],
        attention_mask=mask,
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=places - length,
    ).logits
    total = cross_entropy(
        scores.float().flatten(0, 1), wanted.flatten(), ignore_index=examples.IGNORED, reduction="sum"
    )
    return total / ((wanted != examples.IGNORED).sum() if tokens is None else tokens)


def _shared(ids) -> int:
    """How many tokens all rows (rows × length) begin with. One row shares none."""
    if len(ids) == 1:
        return 0
    same = (ids == ids[:1]).all(0).long()
    return int(same.cumprod(0).sum())


def trained(model) -> dict:
    """Name → parameter that is trained. Saving reads these alone, because quantized embeddings can't be saved."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


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


def _last_checkpoint(place: Path) -> Path | None:
    """The last checkpoint that is whole: `trainer_state.json` is what Trainer writes last."""
    for path in sorted(place.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2])):
        with contextlib.suppress(OSError, ValueError):
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return path
        shutil.rmtree(path)  # Trainer would keep half a checkpoint and remove a whole one
    return None


def _trainer(model, lm: Lm, how: Settings, train, validation, place: Path):
    """transformers' Trainer with our batches, which stops at the first loss that is no number."""
    import transformers

    class Trainer(transformers.Trainer):
        seconds, tokens = (), ()

        def training_step(self, model, inputs, num_items_in_batch=None):
            lines = inputs.pop("lines").tolist()
            loss = super().training_step(model, inputs, num_items_in_batch)
            if not loss.isfinite():
                shown = ", ".join(map(str, lines))
                raise QwlibError(
                    f"step {self.state.global_step + 1}: the loss of lines {shown} is {loss.item()}: lower the learning rate, or "
                    "look at these lines"
                )
            self.tokens = (*self.tokens, int(inputs["attention_mask"].sum()))
            return loss

        def prediction_step(self, model, inputs, *args, **kwargs):
            inputs.pop("lines")
            return super().prediction_step(model, inputs, *args, **kwargs)

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            found = loss(model, inputs, num_items_in_batch)
            return (found, {}) if return_outputs else found

        def _save(self, output_dir=None, state_dict=None):
            super()._save(output_dir, trained(model) if state_dict is None else state_dict)

        def told(self) -> dict:
            history = self.state.log_history
            losses = [{"step": e["step"], "loss": e["loss"]} for e in history if "loss" in e]
            checks = [{"step": e["step"], "loss": e["eval_loss"]} for e in history if "eval_loss" in e]
            found = {"steps": self.state.global_step, "losses": losses, "validation_losses": checks}
            if checks:
                found["kept_step"] = min(checks, key=lambda check: check["loss"])["step"]
            if self.seconds:
                found["step_s"] = statistics.median(self.seconds)
                found["tok_s"] = sum(self.tokens) / sum(self.seconds)
            return found

    class Clock(transformers.TrainerCallback):
        began = 0.0

        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            if lm.device.type == "cuda":
                import torch

                torch.cuda.synchronize()
            trainer.seconds = (*trainer.seconds, time.perf_counter() - self.began)

    per_step = how.batch * how.accumulate
    steps = how.steps or max(1, math.ceil(len(train) * how.epochs / per_step))
    every = min(how.every or max(1, steps // 10), steps)
    checked = bool(validation)
    recompute = {}
    if how.recompute:  # transformers 5.23 calls it so
        known = transformers.TrainingArguments.__dataclass_fields__
        called = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        recompute = {called: True, f"{called}_kwargs": {"use_reentrant": False}}
    arguments = transformers.TrainingArguments(
        output_dir=str(place),
        max_steps=steps,
        per_device_train_batch_size=how.batch,
        per_device_eval_batch_size=how.batch,
        gradient_accumulation_steps=how.accumulate,
        learning_rate=how.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(how.warmup * steps),
        optim=OPTIMIZERS[how.optimizer],
        **recompute,
        logging_steps=1,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if checked else "no",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=checked,
        metric_for_best_model="eval_loss" if checked else None,
        greater_is_better=False,
        prediction_loss_only=True,
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
        seed=how.seed,
        use_cpu=lm.device.type == "cpu",
    )
    pad = lm.tokenizer.pad_token_id if lm.tokenizer.pad_token_id is not None else lm.tokenizer.eos_token_id or 0
    callbacks = [Clock()]
    if how.patience:
        callbacks.append(transformers.EarlyStoppingCallback(how.patience))
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=list(train),
        eval_dataset=list(validation) if checked else None,
        data_collator=lambda rows: examples.batch(rows, pad),
        callbacks=callbacks,
    )
    trainer.model_accepts_loss_kwargs = True  # the loss of a step is the mean over the tokens of all its batches
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    return trainer
