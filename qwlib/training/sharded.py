"""A model split over the GPUs (FSDP2, `fully_shard` of PyTorch): each process keeps a part of every weight.

A layer's weights are put together on every GPU while the layer is calculated, and given back after it, forward and backward. That
takes less memory a GPU, and more time. It splits:

- beside an adapter: the frozen weights. The adapter is small and in float32. It stays whole in every process, and `average` does
  to its gradients what DistributedDataParallel does;
- for `full`: all weights, their gradients and the optimizer's state.

What it leaves whole: scales of 4-bit weights, and embeddings and heads that bitsandbytes has quantized.
"""

from ..errors import QwlibError
from . import loop


def wanted(how, own) -> bool:
    """Whether the settings `how` ask for it, and there are several processes."""
    return how.shard and own.world > 1


def possible(scheme, method: str, optimizer: str) -> None:
    """Raise QwlibError for what can't be split."""
    if scheme.linear == "int8":
        raise QwlibError(f"{scheme.name} can't be split over GPUs: choose nf4-dq or bf16, or leave out shard")
    if method == "dora" and scheme.backend == "bitsandbytes":
        raise QwlibError(f"dora reads whole weights of {scheme.name}: choose lora, or leave out shard")
    if method == "full" and optimizer != "adamw":
        raise QwlibError(f"the optimizer {optimizer} keeps no split state: choose adamw, or leave out shard")


def split(model, device) -> None:
    """Split a model over all processes, and move what stays whole to `device`; weights may lie on the host before.

    Raises QwlibError for a model that names no layers.
    """
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    trained = list(loop.trained(model).values())
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = set(base._no_split_modules or ())
    parts = [module for module in base.modules() if type(module).__name__ in names]
    if not parts:
        raise QwlibError(f"{type(base).__name__} names no layers that could be split: leave out shard")
    ends = [base.get_input_embeddings(), base.get_output_embeddings()]
    if all(ends) and ends[0].weight is not ends[1].weight:
        parts += ends
    for module in base.modules():
        _as_numbers(module)
    whole = {each for each in base.parameters() if not each.is_floating_point()}
    if len(trained) < len(list(model.parameters())):
        whole |= set(trained)
    for parameter in whole:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for part in [*parts, base]:
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=whole)


def _as_numbers(module) -> None:
    """Hold a 4-bit layer's bytes as numbers of bfloat16, because whole numbers are not split. They are the same bytes."""
    import torch

    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is None or not isinstance(module, torch.nn.Linear) or module.weight.numel() % 2:
        return
    codes = module.weight.data.view(-1).view(torch.bfloat16).view(-1, 1)
    module.weight = torch.nn.Parameter(codes, requires_grad=False)

    def prepare(module, _):  # a weight that has been put together knows nothing of its scales
        module.weight.quant_state = state

    module.register_forward_pre_hook(prepare)


def whole(tensor):
    """A tensor that was split, put together: all processes have to ask for it. Others are as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gathered(tensors: dict, own, dtype=None) -> dict:
    """Tensors put together one after the other, on the host of the first process; all processes have to call it."""
    found = {}
    for name, tensor in tensors.items():
        each = whole(tensor.detach())
        if own.first:
            found[name] = each.to("cpu", dtype)
    return found


def part(tensor, like):
    """What this process has of a whole tensor that is split as `like` is; others (a number of steps) are as they are."""
    from torch.distributed.tensor import distribute_tensor

    if tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def average(parameters, world: int) -> None:
    """Let gradients of weights that are not split be their means over all processes."""
    import torch

    found = [each.grad for each in parameters if each.grad is not None and not hasattr(each.grad, "to_local")]
    if not found:
        return
    flat = torch.cat([each.view(-1) for each in found])
    torch.distributed.all_reduce(flat)
    for each, mean in zip(found, (flat / world).split([each.numel() for each in found]), strict=True):
        each.copy_(mean.view_as(each))
