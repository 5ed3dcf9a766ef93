"""The trainer of a model that is split over the GPUs (`sharded`): gradients, and checkpoints that hold whole weights.

accelerate would wrap the model in DistributedDataParallel, which takes no split weights. The arguments for FSDP that transformers
has would split an adapter with its layer, and it would have to be of one type with it.
"""

from functools import partial
from pathlib import Path

import safetensors.torch
import torch

from . import loop, sharded
from .trainer import Trainer

WEIGHTS, OPTIMIZER, SCHEDULER = "weights.safetensors", "optimizer.pt", "scheduler.pt"


class ShardedTrainer(Trainer):
    """`Trainer` for a model that `sharded.split` has split.

    All processes put split weights together for a checkpoint, and the first one writes it.
    """

    def __init__(self, model, *given):
        super().__init__(model, *given)
        self.share = False  # all processes have to call the model equally often
        self.full = self.how.method == "full"
        prepare = self.accelerator.prepare_model
        self.accelerator.prepare_model = lambda model, **_: prepare(model, device_placement=False, evaluation_mode=True)

    def _move_model_to_device(self, model, device):
        """Nothing: it is there."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        sharded.average(model.parameters(), self.own.world)
        return loss

    def _clip_grad_norm(self, model):
        return sharded.whole(super()._clip_grad_norm(model))

    def save_model(self, output_dir=None, _internal_call=False):
        self.gathered = sharded.gathered(loop.trained(self.model), self.own) if self.full else None
        super().save_model(output_dir, _internal_call)
        self.gathered = None

    def _save(self, output_dir=None, state_dict=None):
        if not self.full:
            return super()._save(output_dir, state_dict)
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        return safetensors.torch.save_file(self.gathered, Path(output_dir) / WEIGHTS)

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.full:
            told = self.optimizer.state_dict()
            state = {key: sharded.gathered(each, self.own) for key, each in told["state"].items()}
            self.optimizer.state_dict = lambda: told | {"state": state}
        super()._save_optimizer_and_scheduler(output_dir)
        vars(self.optimizer).pop("state_dict", None)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or not self.full:
            return super()._load_optimizer_and_scheduler(checkpoint)
        read = partial(torch.load, map_location="cpu", weights_only=True, mmap=True)
        told = read(Path(checkpoint) / OPTIMIZER)
        parameters = [each for group in self.optimizer.param_groups for each in group["params"]]
        for key, state in told["state"].items():
            told["state"][key] = {name: sharded.part(each, parameters[key]) for name, each in state.items()}
        self.optimizer.load_state_dict(told)
        return self.lr_scheduler.load_state_dict(read(Path(checkpoint) / SCHEDULER))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if not self.full:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        with safetensors.safe_open(Path(resume_from_checkpoint) / WEIGHTS, "pt") as file, torch.no_grad():
            for name, parameter in loop.trained(self.model).items():
                parameter.copy_(sharded.part(file.get_tensor(name), parameter))
        return None

    def _load_best_model(self):
        if not self.full:
            return super()._load_best_model()
        return self._load_from_checkpoint(self.state.best_model_checkpoint)
