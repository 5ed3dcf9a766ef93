"""The training loop: transformers' `Trainer` with our batches and our loss.

`Trainer` is installed already, it writes checkpoints from which a run goes on, and it is tested by many. trl's `SFTTrainer` is
built on it and brings its own handling of data, which `examples.py` does here with line numbers.
"""

import contextlib
import logging
import math
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

from ..errors import QwlibError
from ..running.lm import Lm, quiet
from . import examples
from .ranks import Ranks
from .settings import OPTIMIZERS, Settings

SHARED = 32  # tokens that all rows of a batch begin with, from which on they are read once


@contextlib.contextmanager
def still() -> Iterator[None]:
    """Without what transformers and accelerate tell about names of their own that are going to change, and about devices."""
    logger = logging.getLogger("transformers.trainer")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|accelerate")
            yield
    finally:
        logger.setLevel(level)


def imported() -> None:
    """Import the libraries that training needs, so that their memory is not taken for what training takes."""
    import peft
    import transformers

    # transformers imports a part of it when it is asked for it
    for asked in (peft.get_peft_model, transformers.Trainer, transformers.TrainingArguments):
        assert asked


def trainer(model, lm: Lm, how: Settings, train, validation, place: Path, ranks: Ranks):
    """transformers' Trainer with our batches, which stops at the first loss that is no number.

    All processes draw the same batches, and each takes its part of the rows. `Trainer` would fill the last batch of a pass up
    with rows from its beginning, so that a step was another one on two GPUs.
    """
    import torch
    import transformers

    # seconds of each step, tokens of each batch, and how many batches there were at the end of each step
    seconds, tokens, batches = [], [], []

    class Trainer(transformers.Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            lines = inputs.pop("lines").tolist()
            loss = super().training_step(model, inputs, num_items_in_batch)
            if not loss.isfinite():
                shown = ", ".join(map(str, lines))
                raise QwlibError(
                    f"step {self.state.global_step + 1}: the loss of lines {shown} is {loss.item()}: lower the learning rate, or "
                    "look at these lines"
                )
            tokens.append(int(inputs["attention_mask"].sum()))
            return loss

        def get_train_dataloader(self):
            made = super().get_train_dataloader()
            if (
                ranks.world > 1
            ):  # accelerate's sampler, which would give each process other batches and fill up the last
                shard = made.batch_sampler
                shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
            return made

        def _get_num_items_in_batch(self, batch_samples, device):
            """What the losses of a step are divided by: the weights of all tokens that are learnt, over all processes."""
            found = sum(inputs["weights"][:, 1:].sum().item() for inputs in batch_samples)
            return torch.tensor(ranks.total([found], device)[0], device=device)

        def evaluate(self, *_, **__):
            """The mean loss over all tokens that are learnt, so that it does not depend on how rows fall into batches."""
            self.model.eval()
            total = count = 0
            with torch.no_grad():
                for first in range(0, len(validation), how.batch):
                    inputs = self._prepare_inputs(mine(validation[first : first + how.batch]))
                    total += loss(self.model, inputs, 1, share=share).item()
                    count += inputs["weights"][:, 1:].sum().item()
            total, count = ranks.total([total, count], lm.device)
            if not math.isfinite(total):
                raise QwlibError(
                    f"the validation loss is {total} at step {self.state.global_step}: lower the learning rate"
                )
            metrics = {"eval_loss": total / count}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            return metrics

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            # the tokens of all processes are counted, and their gradients averaged
            found = loss(model, inputs, num_items_in_batch, share=share) * ranks.world
            return (found, {}) if return_outputs else found

        def _save(self, output_dir=None, state_dict=None):
            with quiet():
                super()._save(output_dir, trained(model) if state_dict is None else state_dict)

        def told(self) -> dict:
            history = self.state.log_history
            losses = [{"step": e["step"], "loss": e["loss"]} for e in history if "loss" in e]
            checks = [{"step": e["step"], "loss": e["eval_loss"]} for e in history if "eval_loss" in e]
            found = {"steps": self.state.global_step, "losses": losses, "validation_losses": checks}
            if checks:
                found["kept_step"] = min(checks, key=lambda check: check["loss"])["step"]
            if seconds:
                some = slice(1, None) if len(seconds) > 1 else slice(None)  # the first step is a warm-up
                read = sum(tokens[batches[0] if len(seconds) > 1 else 0 :])
                found["step_s"] = statistics.median(seconds[some])
                found["tok_s"] = ranks.total([read], lm.device)[0] / sum(seconds[some])
            return found

    class Clock(transformers.TrainerCallback):
        began = 0.0

        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            if lm.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - self.began)
            batches.append(len(tokens))

    arguments = _arguments(lm, how, how.steps_over(len(train)), place, checked=bool(validation))
    share = not how.recompute and not how.dropout and keeps_all(model)
    pad = lm.tokenizer.pad_token_id if lm.tokenizer.pad_token_id is not None else lm.tokenizer.eos_token_id or 0

    def mine(rows):
        """This process's part of a batch. One without rows reads the first and learns nothing from it."""
        part = ranks.part(rows)
        if not part:
            part = [examples.Tokens(rows[0].ids, [examples.IGNORED] * len(rows[0].ids), rows[0].line)]
        return examples.batch(part, pad, how.emphasis)

    callbacks = [Clock()]
    if how.patience:
        callbacks.append(transformers.EarlyStoppingCallback(how.patience))
    made = Trainer(
        model=model,
        args=arguments,
        train_dataset=list(train),
        eval_dataset=list(validation) or None,
        data_collator=mine,
        callbacks=callbacks,
    )
    made.model_accepts_loss_kwargs = True  # the loss of a step is the mean over the tokens of all its batches
    made.remove_callback(transformers.trainer_callback.PrinterCallback)
    return made


def _arguments(lm: Lm, how: Settings, steps: int, place: Path, *, checked: bool):
    """The settings in transformers' words; `checked`: whether there are examples to validate on."""
    import torch
    import transformers

    every = min(how.every or max(1, steps // 10), steps)
    recompute = {}
    if how.recompute:  # transformers 5.23 calls it so
        known = transformers.TrainingArguments.__dataclass_fields__
        called = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        recompute = {called: True, f"{called}_kwargs": {"use_reentrant": False}}
    made = transformers.TrainingArguments(
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
        restore_callback_states_from_checkpoint=True,
        fp16=lm.dtype == torch.float16,  # scaled, else small gradients would be 0
        remove_unused_columns=False,
        label_names=["labels"],
        dataloader_pin_memory=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        report_to="none",
        disable_tqdm=True,
        seed=how.seed,
        use_cpu=lm.device.type == "cpu",
    )
    # else Trainer of one process would spread batches over all GPUs, with more examples a step than were asked for
    made._n_gpu = 1
    return made


def loss(model, inputs: dict, tokens=None, *, share: bool = True):
    """Cross-entropy of the labels that are learnt, in nats: summed with their `weights` and divided by `tokens`.

    Without `tokens` it is divided by the sum of this batch's weights, and without `weights` each label counts once.

    Scores are computed only where a label follows that is learnt in some row. With a large vocabulary and short answers, the
    scores of all positions would take most of the memory. What all rows of the batch begin with (a system message, a guard's long
    instructions) is read once with `share`, and its keys and values serve all rows; gradients flow through them. It needs a model
    that keeps keys and values of all positions (`keeps_all`).
    """
    import torch
    from torch.nn.functional import cross_entropy

    ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs["labels"][:, 1:]
    places = (labels != examples.IGNORED).any(0).nonzero()[:, 0]
    if not len(places):
        places = torch.tensor([labels.shape[1] - 1], device=labels.device)
    wanted = labels[:, places]
    weights = (wanted != examples.IGNORED).float()
    if "weights" in inputs:
        weights = weights * inputs["weights"][:, 1:][:, places]
    length, cache = min(_shared(ids), int(places[0])), None
    if share and length >= SHARED:
        cache = model(input_ids=ids[:1, :length], use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(ids))
    else:
        length = 0
    scores = model(
        input_ids=ids[:, length:],
        attention_mask=mask,
        past_key_values=cache,
        use_cache=cache is not None,
        logits_to_keep=places - length,
    ).logits
    each = cross_entropy(
        scores.float().flatten(0, 1), wanted.flatten(), ignore_index=examples.IGNORED, reduction="none"
    )
    return (each * weights.flatten()).sum() / (weights.sum() if tokens is None else tokens)


def keeps_all(model) -> bool:
    """Whether a model's cache has keys and values of all positions in every layer: no sliding windows, no recurrent layers."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    layers = DynamicCache(config=model.config.get_text_config(decoder=True)).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def _shared(ids) -> int:
    """How many tokens all rows (rows × length) begin with. One row shares none."""
    if len(ids) == 1:
        return 0
    same = (ids == ids[:1]).all(0).long()
    return int(same.cumprod(0).sum())


def trained(model) -> dict:
    """Name → parameter that is trained. Saving reads these alone, because quantized embeddings can't be saved."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def ended(trainer, checkpoint: Path) -> bool:
    """Whether a run had ended when it wrote that checkpoint. If so, the weights that are to be kept are loaded."""
    import transformers

    state = transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    stopped = state.stateful_callbacks.get("TrainerControl", {}).get("args", {}).get("should_training_stop", False)
    if state.global_step < trainer.args.max_steps and not stopped:
        return False
    trainer.state = state
    trainer._load_from_checkpoint(state.best_model_checkpoint or str(checkpoint))
    return True
