"""Bytes that are alive while operations run: now, at the most, and what they were for at that moment.

PyTorch shows every operation to a `TorchDispatchMode`, in the backward pass too. The storages of the results are counted once
each, until the last tensor that needs them is gone, whoever holds it: a variable, or autograd for the backward pass. Tensors on
the meta device have sizes and no data, so a training step of a large model is counted within seconds and takes no memory.

What it leaves out: what a kernel allocates for itself (the workspace of matrix products), and the gaps between allocations. How
it differs from PyTorch's own `torch.distributed._tools.mem_tracker`: that sorts by module and needs its hooks on each of them.
"""

from collections import Counter
from functools import partial
from weakref import ref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class Alive(TorchDispatchMode):
    """Within it, storages are counted in `now` (kind → bytes), and `most` is `now` when its sum was the largest.

    What is made is counted as `kind`, which may be set at any time. `known`: tensors that are there already and do not count.
    `round_up`: bytes of which an allocation is a multiple.
    """

    def __init__(self, known=(), round_up: int = 1):
        super().__init__()
        self.round_up, self.kind = round_up, "activations"
        self.now, self.most = Counter(), Counter()
        self._held = {}  # number of a storage → (reference, kind, bytes); no bytes for those that are known
        for tensor in known:
            self._hold(tensor.untyped_storage(), "known", 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if id(storage) not in self._held:
                    self._hold(storage, self.kind, -(-storage.nbytes() // self.round_up) * self.round_up)
        return out

    def _hold(self, storage, kind: str, size: int) -> None:
        number = id(storage)
        self._held[number] = ref(storage, partial(self._let_go, number)), kind, size
        self.now[kind] += size
        if self.now.total() > self.most.total():
            self.most = self.now.copy()

    def _let_go(self, number: int, _) -> None:
        _, kind, size = self._held.pop(number)
        self.now[kind] -= size

    def call(self, tensor, kind: str) -> None:
        """Count a tensor's storage as `kind` from now on."""
        number = id(tensor.untyped_storage())
        if number in self._held:
            reference, before, size = self._held[number]
            self._held[number] = reference, kind, size
            self.now[before] -= size
            self.now[kind] += size

    def again(self) -> None:
        """Forget the largest sum so far."""
        self.most = self.now.copy()
