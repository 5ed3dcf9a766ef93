"""How a student is trained by `training.runs`: its form, its loss, and what becomes of its weights."""

import json

import torch
from torch import nn

from .. import files
from ..models import checkpoints
from ..running.lm import Lm
from . import forms, pruned
from .trainer import Trainer

# AdamW's mean of squared gradients covers some 20 steps: the usual choice for runs of few steps on large batches
BETA2 = 0.95


class Distilled:
    """A student in a form of `forms.py` that learns from its 16-bit teacher."""

    def __init__(self, teacher: Lm, form: forms.Form, rows: torch.Tensor, temperature: float, compiled: bool):
        self.teacher, self.form, self.rows, self.temperature = teacher, form, rows, temperature
        self.told = {"form": form.name, "temperature": temperature}
        self.divergence = torch.compile(divergence) if compiled else divergence
        self.compiled = compiled

    def dressed(self, model):
        shaped(model.requires_grad_(True), self.form, self.teacher.model, self.rows)
        if self.compiled:
            # layer by layer: all layers share what is compiled for the first
            for each in (model, self.teacher.model):
                for module in each.modules():
                    if type(module).__name__ in (each._no_split_modules or ()):
                        module.compile(dynamic=False)
        return model

    def trainer(self, model, lm: Lm, *rest):
        # products in 16 bits; a CPU without instructions for them is faster in 32
        more = {"bf16": lm.device.type == "cuda", "adam_beta2": BETA2}
        return _Trainer(self, model, lm, *rest, **more)

    def settled(self, model) -> dict:
        layers = forms.undress(model, self.form)
        held = self.teacher.memory
        return self.told | {
            "teacher_bytes": held["weights_bytes"] + held["state_bytes"],
            **({"packed": forms.counted(layers, self.form)} if layers else {}),
        }

    def finished(self, folder) -> None:
        origin = checkpoints.source(self.teacher.row) | {"trained": self.form.name}
        files.write_text(folder / checkpoints.MERGED, json.dumps(origin))


def shaped(model, form: forms.Form, teacher, rows: torch.Tensor) -> None:
    """Give a model, whose weights are the teacher's, its form. `rows` of tokens decide what is left out of it."""
    if form.layers:
        pruned.drop(model, pruned.influences(teacher, rows), form.layers)
    else:
        forms.dress(model, form, pruned.norms(teacher, rows) if form.sparsity else None)


class _Trainer(Trainer):
    """`Trainer` with the divergence from the teacher as its loss."""

    def __init__(self, student: Distilled, *rest, **more):
        self.student = student
        super().__init__(*rest, **more)

    def loss(self, model, inputs: dict, tokens):
        ids, student = inputs["input_ids"], self.student
        with torch.no_grad():
            theirs = student.teacher.model(input_ids=ids, use_cache=False).logits
        with self.compute_loss_context_manager():
            ours = model(input_ids=ids, use_cache=False).logits
        return student.divergence(ours, theirs, student.temperature) * inputs["weights"][:, 1:].sum() / tokens


def divergence(ours: torch.Tensor, theirs: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """The mean KL divergence of our probabilities from theirs, in nats a token, times temperature² (arXiv 1503.02531).

    Scores: rows × positions × vocabulary.
    """
    ours, theirs = ((each.float() / temperature).flatten(0, 1).log_softmax(-1) for each in (ours, theirs))
    return nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean") * temperature**2
