"""Bytes measured: what a loaded model's tensors take, and what the process and the device hold.

`measure` counts every tensor storage once, however many names share it. How it differs from transformers'
`get_memory_footprint`: that counts parameters and buffers only and leaves out the quantization state (the scales): of the
4.5 bits that a weight takes in NF4, half a bit. What was to be expected beforehand says `estimates`.
"""

import contextlib
import ctypes
import gc
import os
from pathlib import Path


def measure(model, beside=()) -> dict[str, int]:
    """`weights_bytes` and `state_bytes` of a loaded model: every tensor storage once, however many names share it.

    `beside` are tensors of its state that lie where no parameter or buffer tells of them.
    """
    weights, state = {}, {}

    def add(where, tensor):
        if hasattr(tensor, "to_local"):  # a weight that is split over GPUs: this process's part
            tensor = tensor.to_local()
        if hasattr(tensor, "__tensor_flatten__"):  # torchao's tensors are made of plain ones
            for name in tensor.__tensor_flatten__()[0]:
                add(where, getattr(tensor, name))
        elif tensor is not None and tensor.device.type != "meta":
            where[pointer(tensor)] = tensor.untyped_storage().nbytes()

    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for _, tensor in tensors:
        add(weights, tensor)
    for _, tensor in tensors:
        for part in _state_tensors(tensor):
            add(state, part)
    for module in model.modules():
        if hasattr(module, "state"):  # Linear8bitLt moves its scales here at the first forward
            add(state, getattr(module.state, "SCB", None))
    for tensor in beside:
        add(state, tensor)
    return {"weights_bytes": sum(weights.values()), "state_bytes": sum(n for p, n in state.items() if p not in weights)}


def own(model) -> None:
    """Copy whatever lies in the mapped checkpoint file, so that resident memory on a CPU says what the model takes."""
    for buffer in model.buffers():
        buffer.data = buffer.data.clone()
    for parameter in model.parameters():
        if hasattr(parameter, "__tensor_flatten__"):
            continue  # quantized just now, so it lies in no file
        parameter.data = parameter.data.clone()
        if getattr(parameter, "CB", None) is not None:
            parameter.CB, parameter.SCB = parameter.data, parameter.SCB.clone()
        outer = getattr(parameter, "quant_state", None)
        for level in (outer, getattr(outer, "state2", None)):
            if level is not None:
                level.absmax, level.code = level.absmax.clone(), level.code.clone()


def read_bytes(model, beside=()) -> int:
    """What one decoding step reads: all weights and state, but of an untied embedding only a row, counted as nothing."""
    total = sum(measure(model, beside).values())
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = head is not None and pointer(head.weight) == pointer(embedding.weight)
    return total if shared else total - sum(measure(embedding).values())


def pointer(tensor) -> int:
    """Where a tensor's storage begins: tensors of the same place share their bytes."""
    return tensor.untyped_storage().data_ptr()


def _state_tensors(parameter):
    yield getattr(parameter, "SCB", None)
    outer = getattr(parameter, "quant_state", None)
    for level in (outer, getattr(outer, "state2", None)):
        if level is not None:
            yield from (level.absmax, level.code, level.offset)


# the process and the device


def rss_bytes() -> int:
    """Resident memory of this process."""
    import psutil

    return psutil.Process().memory_info().rss


def reset_peak(device) -> bool:
    """Start the peak meter again: the allocator's on a GPU, the kernel's high-water mark (Linux) on a CPU."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # Linux, proc_pid_clear_refs(5): resets VmHWM
    except OSError:
        return False
    return True


def peak_bytes(device) -> int | None:
    """Highest use since `reset_peak`: allocated bytes on a GPU, resident bytes on a CPU, None where no meter exists."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    with contextlib.suppress(OSError), open("/proc/self/status") as file:
        for line in file:
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    return None


def used_bytes(device) -> int:
    """Bytes in use now: allocated on a GPU, resident on a CPU."""
    if device.type == "cuda":
        import torch

        return torch.cuda.memory_allocated(device)
    return rss_bytes()


def free_bytes(device) -> int:
    """Bytes that a load may take: free on the GPU, available on the host."""
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil

    free = psutil.virtual_memory().available
    with contextlib.suppress(OSError, ValueError):  # a container's own limit: cgroup v2, "max" where there is none
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        held = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        free = min(free, limit - int(held["anon"]))
    return free


def give_back() -> None:
    """Collect garbage, empty CUDA's cache, and return the C library's free pages to the system."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if os.name == "posix":
        with contextlib.suppress(OSError, AttributeError):  # only glibc has malloc_trim
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def forget(model) -> None:
    """IPython keeps what cells returned: `_`, `__`, `___`, `_12` and the dictionary `Out`; drop `model` from all of them."""
    import sys

    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    if shell is None or model is None:
        return
    for name in ("_", "__", "___"):
        if getattr(shell.displayhook, name, None) is model:
            # both places alike: where they differ IPython takes the name for the user's own and never updates it again
            shell.user_ns[name] = shell.user_ns_hidden[name] = ""
            setattr(shell.displayhook, name, "")
    for names in (shell.user_ns, shell.user_ns_hidden, shell.user_ns.get("_oh", {})):
        for name in [n for n, value in names.items() if value is model and str(n).lstrip("_").isdigit()]:
            del names[name]
