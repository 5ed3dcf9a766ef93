"""Which device a model goes to and which type it computes in, each with its reason.

One GPU if there is one, never spread over CPU and disk: `device_map="auto"` does that silently. bfloat16 only where the GPU has
it in hardware, which is compute capability 8.0 (NVIDIA, Ampere); `torch.cuda.is_bf16_supported()` says yes to a T4, which
emulates it.
"""

from .. import schemes
from ..errors import QwlibError


def pick_device(device: str | None = None):
    """(torch device, why)."""
    import torch

    if device is not None:
        if str(device).partition(":")[0] not in ("cpu", "cuda"):
            raise QwlibError(f"device {device!r}: qwlib runs on cpu, cuda or cuda:N")
        try:
            chosen = torch.device(device)
        except RuntimeError:
            raise QwlibError(f"device {device!r}: qwlib runs on cpu, cuda or cuda:N") from None
        if chosen.type == "cuda" and not torch.cuda.is_available():
            raise QwlibError("a GPU was asked for and PyTorch sees none: leave device out to use the CPU")
        if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
            raise QwlibError(f"device {device!r}: PyTorch sees {torch.cuda.device_count()} CUDA device(s), from cuda:0")
        return chosen, "asked for"
    if torch.cuda.is_available():
        return torch.device("cuda", 0), f"the first of {torch.cuda.device_count()} CUDA device(s)"
    return torch.device("cpu"), "PyTorch sees no CUDA device"


def pick_dtype(scheme: schemes.Scheme, device, capability: tuple[int, int] | None = None):
    """(compute type, why). `capability` is the GPU's compute capability; it is asked of the device where not given."""
    import torch

    if scheme.base in ("fp32", "fp16"):
        return {"fp32": torch.float32, "fp16": torch.float16}[scheme.base], f"scheme {scheme.name} says so"
    if device.type != "cuda":
        return torch.bfloat16, "the 16-bit reference type"
    major, minor = capability or torch.cuda.get_device_capability(device)
    if major >= 8:
        return torch.bfloat16, f"compute capability {major}.{minor} has bfloat16"
    return torch.float16, f"compute capability {major}.{minor} only emulates bfloat16 (hardware has it from 8.0)"
