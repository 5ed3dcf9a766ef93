"""Activations: what a forward pass keeps for the backward pass, in bytes.

Autograd keeps inputs and results of the operations that it will differentiate. `torch.autograd.graph.saved_tensors_hooks` shows
each of them. They are counted once for each storage, without the model's own parameters and buffers.

What it leaves out: tensors that live only for a moment, and what the allocator keeps for itself.
"""

from collections.abc import Callable


def kept_bytes(model, forward: Callable[[], object]) -> int:
    """Bytes that `forward()` (one pass through `model`, which returns its loss) keeps until its backward pass."""
    import torch

    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    found = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = forward()
    total = sum(found.values())
    del loss  # until here, so that no storage is freed and its place given to another
    return total
