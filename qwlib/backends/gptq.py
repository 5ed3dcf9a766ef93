"""GPTQModel: GPTQ and AWQ, quantized a layer at a time against the activations of a calibration text.

What it writes, transformers loads, with GPTQModel's kernels under it. AWQ is quantized on a GPU only; its files run on a CPU
too. On a GPU this takes the Triton kernels: left to choose, GPTQModel 7.6 compiles CUDA code first, some of it fetched from
GitHub, and is faster afterwards.
"""

import os
from pathlib import Path

from . import hf

DAMP = 0.05  # share of the mean diagonal added to the Hessian, GPTQModel 7.6's default


def fill(lm, source: str) -> None:
    """Load a folder that GPTQModel, AutoRound or anybody else wrote in GPTQ's or AWQ's format."""
    import torch
    from transformers import AwqConfig, GPTQConfig

    wanted = None
    if lm.device.type == "cuda":
        lm.dtype, lm.dtype_reason = torch.float16, "GPTQModel's Triton kernels compute in it"
        told = lm.row.config().quantization_config
        told = told if isinstance(told, dict) else told.to_dict()
        shape = {"bits": told["bits"], "group_size": told["group_size"]}
        awq = told["quant_method"] == "awq"
        wanted = AwqConfig(**shape, backend="gemm_triton") if awq else GPTQConfig(**shape, backend="gptq_triton")
    hf.read(lm, source, wanted)
    hf.finish(lm)


def quantize(source: str, scheme, out: Path, calibration, device) -> dict:
    """Write the quantized checkpoint into `out`: 4-bit codes, a scale and (AWQ) a zero point a group, as safetensors."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # 7.6.0 asks its pool for two and gives it one a core group
    os.environ.setdefault("GPTQMODEL_DISABLE_GPTQ_CUDA", "1")  # else a kernel is compiled first
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization import AWQConfig, GPTQConfig

    wanted = {"bits": 4, "group_size": scheme.group, "device": device.type}
    if scheme.linear.startswith("awq"):
        settings, kernel = {"symmetric": False}, {"backend": BACKEND.AWQ_TORCH} if device.type == "cuda" else {}
        config = AWQConfig(**wanted, sym=False)  # the paper's, with zero points; GPTQModel's default leaves them out
    else:
        settings, kernel = {"symmetric": True, "damp": DAMP}, {}
        config = GPTQConfig(**wanted, sym=True, damp_percent=DAMP)
    model = GPTQModel.load(source, config)
    rows = [{"input_ids": row, "attention_mask": [1] * len(row)} for row in calibration.rows]
    model.quantize(rows, batch_size=4, **kernel)
    model.save(str(out))
    return settings
