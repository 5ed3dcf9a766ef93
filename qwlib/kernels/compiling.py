"""From CUDA source to a loaded kernel, without nvcc: NVRTC, which comes with torch, compiles it when it is first used.

torch has the two calls that are needed, to compile and to load (`torch.cuda._utils`; `torch.cuda.compile_kernel` is both of
them). They are not public. So everything that they do is done here, in one place, and a torch without them gives a reason.

A binary is kept on disk under a hash of all that it depends on: source, options, architecture, driver and NVRTC.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .. import files
from ..errors import QwlibError

SERIALIZED = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION of cuda.h: PDL


def obstacle() -> str | None:
    """Why no kernel can be compiled here, None where it can as far as is known beforehand."""
    import torch

    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA device"
    if torch.version.hip:
        return "the kernel is CUDA, and this torch is for ROCm"
    try:
        from torch.cuda._utils import _cuda_load_module, _nvrtc_compile  # noqa: F401
    except ImportError:
        return f"torch {torch.__version__} has no call that compiles a kernel"
    return None


@dataclass
class Kernel:
    """A loaded kernel, and the threads and the shared memory of its blocks. `launch` puts it onto the current stream."""

    loaded: Any
    threads: int
    shared_bytes: int
    pdl: bool

    def launch(self, blocks: int, arguments) -> None:
        """Start `blocks` blocks with arguments: a tensor as its pointer (None is a null pointer), a float in 32 bits.

        An int goes as int, and what ctypes has made as it is. Raises QwlibError where the driver refuses.
        """
        import torch

        values = [_value(each) for each in arguments]
        pointers = (ctypes.c_void_p * len(values))(*map(ctypes.addressof, values))
        stream = torch.cuda.current_stream().cuda_stream
        sizes = (blocks, 1, 1), (self.threads, 1, 1), self.shared_bytes
        how = _Launch(*sizes, stream, ctypes.pointer(_SERIALIZED), int(self.pdl))
        if code := _driver().cuLaunchKernelEx(ctypes.byref(how), self.loaded.func, pointers, None):
            raise QwlibError(
                f"the driver refused to start a kernel (CUDA error {code}): load with kernel='bitsandbytes'"
            )


def _value(argument):
    if argument is None or hasattr(argument, "data_ptr"):
        return ctypes.c_void_p(None if argument is None else argument.data_ptr())
    if isinstance(argument, (ctypes.Structure, ctypes.Array, ctypes.c_void_p)):
        return argument
    return (ctypes.c_int if type(argument) is int else ctypes.c_float)(argument)


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class _Launch(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


_SERIALIZED = _Attribute(SERIALIZED, b"", 1)


@cache
def _driver():
    from torch.cuda._utils import _get_gpu_runtime_library

    return _get_gpu_runtime_library()


def build(
    source: str, name: str, options: dict[str, int], *, threads: int, shared_bytes: int, capability: str, pdl: bool
) -> Kernel:
    """The kernel `name` of `source`, compiled with `options` as macros for a compute capability such as "90", or from disk.

    Raises QwlibError where it does not compile or load.
    """
    from torch.cuda._utils import _cuda_load_module, _nvrtc_compile

    defined = [f"-D{option}={value}" for option, value in sorted(options.items())]
    place = _folder() / f"{name}-{_key(source, defined, capability)}.cubin"
    try:
        if place.is_file():
            binary = place.read_bytes()
        else:
            binary, _ = _nvrtc_compile(source, name, capability, None, defined)
            place.parent.mkdir(parents=True, exist_ok=True)
            files.write_bytes(place, binary)
        loaded = _cuda_load_module(binary, [name])[name]
        loaded.set_shared_memory_config(shared_bytes)
    except (RuntimeError, OSError) as error:
        raise QwlibError(f"the kernel {name} can't be had: {str(error).splitlines()[0]}") from error
    return Kernel(loaded, threads, shared_bytes, pdl)


def _folder() -> Path:
    return files.cache_dir() / "kernels"


def _key(source: str, defined: list[str], capability: str) -> str:
    import torch

    version = ctypes.c_int()
    _driver().cuDriverGetVersion(ctypes.byref(version))
    parts = [source, *defined, capability, str(version.value), str(torch.version.cuda)]
    return files.sha256_text("\n".join(parts))[:16]
