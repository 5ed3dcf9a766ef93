"""AutoRound: rounding up or down learnt by signed gradient steps, a layer block at a time; written in others' formats.

One calibration, three files: GPTQ's and AWQ's, which transformers loads with GPTQModel's kernels, and llama.cpp's. The format
is not the method: this AWQ file holds AutoRound's rounding and none of AWQ's scaling by activations.
"""

from pathlib import Path

from ..models import catalog
from . import hf, llamacpp

FORMATS = {
    "autoround-4bit": "auto_gptq",
    "autoround-4bit-awq": "auto_awq",
    "autoround-4bit-gguf": "gguf:q4_k_m",
}
STEPS = {"cuda": 200, "cpu": 20}  # 200 is the paper's (arXiv 2309.05516); on a CPU they would take most of an hour


def quantize(source: str, scheme, out: Path, calibration, device) -> dict:
    """Write the checkpoint, or `model.gguf`, into `out`."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoTokenizer

    shape = {} if scheme.group is None else {"bits": 4, "group_size": scheme.group, "sym": True}
    rows = torch.tensor(calibration.rows)
    tool = AutoRound(
        source,
        AutoTokenizer.from_pretrained(source),
        **shape,
        iters=STEPS[device.type],
        nsamples=len(rows),
        seqlen=rows.shape[1],
        batch_size=4,
        dataset=torch.utils.data.DataLoader([{"input_ids": row} for row in rows], batch_size=4),
        device_map=device.type,
        enable_torch_compile=False,
    )
    tool.quantize_and_save(str(out), format=FORMATS[scheme.name])
    _lift(out)
    if scheme.group is None:
        (out / catalog.gguf_file(out)).rename(out / llamacpp.FILE)
        hf.copy_texts(source, out)
    return {"steps": STEPS[device.type]} | ({"symmetric": True} if shape else {})


def _lift(out: Path) -> None:
    """auto-round 0.16 puts everything into a folder named after the model: bring it up."""
    for path in out.glob("*/*"):
        path.rename(out / path.name)
    for folder in out.glob("*/"):
        folder.rmdir()
