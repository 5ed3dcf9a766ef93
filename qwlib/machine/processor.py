"""The processor: its name, and the widest instructions that PyTorch uses on it.

Two processors with the same name can differ in speed by a factor of seven: there is an "AMD EPYC" with AVX512-BF16, and one
without. So the capability is always given after the name.
"""

import functools
import platform


def name() -> str:
    """Name and capability: `AMD EPYC (AVX512-BF16)`."""
    told = _told("model name") or platform.processor() or platform.machine()
    return f"{told} ({capability()})"


@functools.cache
def capability() -> str:
    """The instructions that PyTorch multiplies with here: `AMX-BF16`, `AVX512-BF16`, `AVX512`, `AVX2`, `SVE256`, `NEON`, …

    The environment variable `ATEN_CPU_CAPABILITY` can restrict them. The result then is the restricted capability.
    Source: torch.backends.cpu.get_cpu_capability; the flags are from Linux's /proc/cpuinfo.
    """
    import torch

    used, flags = torch.backends.cpu.get_cpu_capability(), (_told("flags") or _told("Features")).split()
    if used == "DEFAULT" and platform.machine() in ("aarch64", "arm64"):
        used = "NEON"
    if used == "AVX512":
        return next((told for flag, told in _FLAGS.items() if flag in flags), used)
    return f"{used}-BF16" if "bf16" in flags else used


_FLAGS = {"amx_bf16": "AMX-BF16", "avx512_bf16": "AVX512-BF16"}
# the capabilities of x86 processors that have instructions for bfloat16
BF16 = tuple(_FLAGS.values())


def _told(key: str) -> str:
    """The entry `key` of the first processor in Linux's /proc/cpuinfo, or an empty text."""
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.partition(":")[2].strip() for line in file if line.startswith(key)), "")
    except OSError:
        return ""
