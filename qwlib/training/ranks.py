"""Several GPUs: one process for each, as torchrun starts them, all with the same weights and each with a part of every batch.

The gradients are added up over the processes (DistributedDataParallel), so a step is the same as on one GPU but for rounding.
Every process holds all weights. With the setting `shard` they are split over the processes (`sharded`).
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import QwlibError


@dataclass(frozen=True)
class Ranks:
    """Which of how many processes this is (`rank` of `world`), and its number on this machine (`local`)."""

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def first(self) -> bool:
        """Whether it is the one process that writes files."""
        return self.rank == 0

    def part(self, rows: list) -> list:
        """This process's part of a batch: none of the others have it, and together they have all."""
        return rows[self.rank :: self.world]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            import torch

            torch.distributed.barrier()

    def total(self, values: list[float], device) -> list[float]:
        """The sums of numbers over all processes."""
        return self._reduced(values, device, "SUM")

    def most(self, values: list[float], device) -> list[float]:
        """The largest of each number over all processes."""
        return self._reduced(values, device, "MAX")

    def _reduced(self, values: list[float], device, how: str) -> list[float]:
        if self.world == 1:
            return values
        import torch

        held = torch.tensor(values, dtype=torch.float64, device=device)
        torch.distributed.all_reduce(held, getattr(torch.distributed.ReduceOp, how))
        return held.tolist()


def this() -> Ranks:
    """What torchrun has said to this process: one of one without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return Ranks()
    return Ranks(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def started(device: str | None) -> tuple[Ranks, str | None]:
    """This process, connected with the others, and its device; without torchrun the `device` that was asked for.

    Raises QwlibError where there are fewer GPUs than processes.
    """
    found = this()
    if found.world == 1:
        return found, device
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        where, by = "cpu", "gloo"
    else:
        where, by = f"cuda:{found.local}", "nccl"
        if found.local >= torch.cuda.device_count():
            raise QwlibError(f"torchrun started more processes than there are GPUs: {torch.cuda.device_count()}")
        torch.cuda.set_device(found.local)
    if not _initialized():
        torch.distributed.init_process_group(by)
    return found, where


@contextlib.contextmanager
def connected(device: str | None) -> Iterator[tuple[Ranks, str | None]]:
    """What `started` returns, for a block. At its end the processes are disconnected, if they were not connected before it.

    After an error they stay connected until they exit. NCCL disconnects all processes together: one that failed would wait here
    for the others, and they for its part of the gradients. When it exits, torchrun ends the others.
    """
    before = this().world == 1 or _initialized()
    yield started(device)
    if not before:
        import torch

        torch.distributed.destroy_process_group()


def _initialized() -> bool:
    import torch

    return torch.distributed.is_initialized()
