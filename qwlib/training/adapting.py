"""The matrices that are trained beside a model's layers: made by peft, and all else frozen."""

from ..errors import unknown
from . import loop
from .settings import Settings


def adapted(lm, how: Settings):
    """The model with trainable matrices beside its layers, all else frozen; for `full` the model itself, all of it trainable.

    Raises QwlibError for a target that the model has not.
    """
    import torch

    if how.method == "full":
        return lm.model.requires_grad_(True)
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    # parts that waited on the host while they were quantized are on the GPU by now, and peft would place them again
    lm.model.hf_device_map = {"": lm.device}
    head, kinds = lm.model.get_output_embeddings(), (torch.nn.Linear, Conv1D)
    linear = {n for n, m in lm.model.named_modules() if isinstance(m, kinds) and m is not head}
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
    with loop.still():
        return get_peft_model(lm.model, config)
