"""AutoRound: rounding up or down learnt by signed gradient steps, a layer block at a time; written in others' formats.

One calibration, three files: GPTQ's and AWQ's, which transformers loads with GPTQModel's kernels, and llama.cpp's. The format
is not the method: this AWQ file holds AutoRound's rounding and none of AWQ's scaling by activations.
"""

import json
from pathlib import Path

from ..machine import arithmetic
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
    narrow = arithmetic.choose(torch.bfloat16, device)[0] is torch.bfloat16
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
        amp=narrow,
        enable_torch_compile=False,
    )
    tool.quantize_and_save(str(out), format=FORMATS[scheme.name])
    _lift(out)
    if not narrow:
        _in_bfloat16(out)
    if scheme.group is None:
        (out / catalog.gguf_file(out)).rename(out / llamacpp.FILE)
        hf.copy_texts(source, out)
    return {"steps": STEPS[device.type]} | ({"symmetric": True} if shape else {})


def _in_bfloat16(out: Path) -> None:
    """What is not quantized, back in the 16-bit type: after steps in float32 auto-round writes it in float32."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    for path in out.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            facts, held = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 no mapping
        save_file({name: w.bfloat16() if w.dtype == torch.float32 else w for name, w in held.items()}, path, facts)
    config = out / "config.json"
    if config.is_file():
        config.write_text(json.dumps(json.loads(config.read_text()) | {"dtype": "bfloat16"}, indent=2) + "\n")


def _lift(out: Path) -> None:
    """auto-round 0.16 puts everything into a folder named after the model: bring it up."""
    for path in out.glob("*/*"):
        path.rename(out / path.name)
    for folder in out.glob("*/"):
        folder.rmdir()
