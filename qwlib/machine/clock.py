"""What a device does in a second: calls timed in turn, and the rate at which it copies memory.

Ways that are compared take turns, so that a busy moment hits all of them, and the best round of each counts: whatever else
runs on a machine makes a call slower, and never faster.
"""

import time
from collections.abc import Callable

from . import memory

Clock = Callable[[], float]


def wait(device) -> None:
    """Return when the device has done all that it was asked for: a GPU works on while its caller goes on."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def best(ways: dict, rounds: int, device, *, clock: Clock = time.perf_counter) -> dict[str, float]:
    """Seconds of the best of `rounds` calls of each way, after one that warms up; the ways take turns.

    `ways` maps a name to a function without arguments; on a GPU its work is waited for.
    """
    seconds = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            wait(device)
            began = clock()
            way()
            wait(device)
            if turn:
                seconds[name].append(clock() - began)
    return {name: min(times) for name, times in seconds.items()}


def copy_bandwidth(device, *, size: int = 1 << 28, repeats: int = 10, clock: Clock = time.perf_counter) -> float:
    """Bytes a second (read + written) of copying `size` bytes on the device: the best of `repeats`."""
    import torch

    size = min(size, memory.free_bytes(torch.device(device)) // 4)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(repeats):
        wait(device)
        began = clock()
        target.copy_(source)
        wait(device)
        best = max(best, 2 * size / (clock() - began))
    return best
