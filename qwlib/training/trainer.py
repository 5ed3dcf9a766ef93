"""transformers' `Trainer` with our batches and our loss.

`Trainer` is installed already, it writes checkpoints from which a run goes on, and it is tested by many. trl's `SFTTrainer` is
built on it and brings its own handling of data, which `examples.py` does here with line numbers.
"""

import math
import statistics
import time
from functools import partial
from pathlib import Path

import torch
import transformers

from ..errors import QwlibError
from ..running.lm import Lm, quiet
from . import examples, loop
from .ranks import Ranks
from .settings import OPTIMIZERS, Settings


class Clock(transformers.TrainerCallback):
    """The seconds of each step, the tokens of each batch, and how many batches there were at the end of each step."""

    def __init__(self, device: torch.device):
        self.device, self.began = device, 0.0
        self.seconds, self.tokens, self.batches = [], [], []

    def on_step_begin(self, *_, **__):
        self.began = time.perf_counter()

    def on_step_end(self, *_, **__):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)
        self.batches.append(len(self.tokens))

    def told(self, own: Ranks) -> dict:
        """`step_s`, the median, and `tok_s` over all processes. The first of several steps is a warm-up and left out."""
        if not self.seconds:
            return {}
        first = 1 if len(self.seconds) > 1 else 0
        some, read = self.seconds[first:], sum(self.tokens[self.batches[0] if first else 0 :])
        return {"step_s": statistics.median(some), "tok_s": own.total([read], self.device)[0] / sum(some)}


class Trainer(transformers.Trainer):
    """transformers' Trainer with our batches, which stops at the first loss that is no number.

    All processes draw the same batches, and each takes its part of the rows. `Trainer` would fill the last batch of a pass up
    with rows from its beginning, so that a step was another one on two GPUs.
    """

    def __init__(self, model, lm: Lm, how: Settings, train, validation, place: Path, own: Ranks, **arguments):
        self.how, self.validation, self.own, self.clock = how, validation, own, Clock(lm.device)
        self.share = not how.recompute and not how.dropout and loop.keeps_all(model)
        pad = lm.tokenizer.pad_token_id if lm.tokenizer.pad_token_id is not None else lm.tokenizer.eos_token_id or 0
        self.part = partial(_part, own=own, pad=pad, emphasis=how.emphasis)
        super().__init__(
            model=model,
            args=_arguments(lm, how, how.steps_over(len(train)), place, checked=bool(validation), **arguments),
            train_dataset=list(train),
            eval_dataset=list(validation) or None,
            data_collator=self.part,
            callbacks=[self.clock, *([transformers.EarlyStoppingCallback(how.patience)] if how.patience else [])],
        )
        self.model_accepts_loss_kwargs = True  # the loss of a step is the mean over the tokens of all its batches
        self.remove_callback(transformers.trainer_callback.PrinterCallback)

    def training_step(self, model, inputs, num_items_in_batch=None):
        lines = inputs.pop("lines").tolist()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not loss.isfinite():
            shown = ", ".join(map(str, lines))
            raise QwlibError(
                f"step {self.state.global_step + 1}: the loss of lines {shown} is {loss.item()}: lower the learning rate, or "
                "look at these lines"
            )
        self.clock.tokens.append(int(inputs["attention_mask"].sum()))
        return loss

    def get_train_dataloader(self):
        made = super().get_train_dataloader()
        # accelerate's sampler would give each process other batches, and fill up the last
        if self.own.world > 1:
            shard = made.batch_sampler
            shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        return made

    def _get_num_items_in_batch(self, batch_samples, device):
        """What the losses of a step are divided by: the weights of all tokens that are learnt, over all processes."""
        found = sum(inputs["weights"][:, 1:].sum().item() for inputs in batch_samples)
        return torch.tensor(self.own.total([found], device)[0], device=device)

    def evaluate(self, *_, **__):
        """The mean loss over all tokens that are learnt, so that it does not depend on how rows fall into batches."""
        self.model.eval()
        total = count = 0
        with torch.no_grad():
            for first in range(0, len(self.validation), self.how.batch):
                inputs = self._prepare_inputs(self.part(self.validation[first : first + self.how.batch]))
                total += self.loss(self.model, inputs, 1).item()
                count += inputs["weights"][:, 1:].sum().item()
        total, count = self.own.total([total, count], self.clock.device)
        if not math.isfinite(total):
            raise QwlibError(
                f"the validation loss is {total} at step {self.state.global_step}: lower the learning rate"
            )
        metrics = {"eval_loss": total / count}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def loss(self, model, inputs: dict, tokens):
        """The loss of a batch, summed over what is learnt and divided by `tokens`."""
        return loop.loss(model, inputs, tokens, share=self.share)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # the tokens of all processes are counted, and their gradients averaged
        found = self.loss(model, inputs, num_items_in_batch) * self.own.world
        return (found, {}) if return_outputs else found

    def _save(self, output_dir=None, state_dict=None):
        with quiet():
            super()._save(output_dir, loop.trained(self.model) if state_dict is None else state_dict)

    def ended(self, checkpoint: Path) -> bool:
        """Whether a run had ended when it wrote that checkpoint. If so, the weights that are to be kept are loaded."""
        state = transformers.TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        stopped = state.stateful_callbacks.get("TrainerControl", {}).get("args", {}).get("should_training_stop", False)
        if state.global_step < self.args.max_steps and not stopped:
            return False
        self.state = state
        self._load_from_checkpoint(state.best_model_checkpoint or str(checkpoint))
        return True

    def told(self) -> dict:
        """For a record: the steps, their losses, the validation losses with the step that is kept, and the times."""
        history = self.state.log_history
        losses = [{"step": e["step"], "loss": e["loss"]} for e in history if "loss" in e]
        checks = [{"step": e["step"], "loss": e["eval_loss"]} for e in history if "eval_loss" in e]
        found = {"steps": self.state.global_step, "losses": losses, "validation_losses": checks}
        if checks:
            found["kept_step"] = min(checks, key=lambda check: check["loss"])["step"]
        return found | self.clock.told(self.own)


def _part(rows, *, own: Ranks, pad: int, emphasis: float) -> dict:
    """This process's part of a batch as tensors. A process without rows reads the first one and learns nothing from it."""
    part = own.part(rows)
    if not part:
        part = [examples.Tokens(rows[0].ids, [examples.IGNORED] * len(rows[0].ids), rows[0].line)]
    return examples.batch(part, pad, emphasis)


def _arguments(lm: Lm, how: Settings, steps: int, place: Path, *, checked: bool, **more):
    """The settings in transformers' words; `checked`: whether there are examples to validate on. `more`: other arguments."""
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
        **more,
    )
    # else Trainer of one process would spread batches over all GPUs, with more examples a step than were asked for
    made._n_gpu = 1
    return made
