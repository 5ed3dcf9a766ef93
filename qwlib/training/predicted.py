"""The memory that training will take, from shapes alone: nothing is downloaded or loaded.

One step is run with tensors that have shapes and no data (`shapes`), and all bytes that are alive are counted (`alive`): forward,
backward, and the optimizer. So there is no formula for an architecture. The peak is at the largest sum of these parts:

- weights: those of the model, as `estimates` counts them, and the trained matrices beside them;
- gradients: float32, as the trained weights. Few are there at the usual peak, where the backward pass begins;
- optimizer: AdamW has two float32 numbers for each trained weight;
- activations: what the layers keep for the backward pass, and what a layer needs for a moment;
- scores: those of the learnt tokens in the model's type, and three times in float32 (probabilities and two gradients).

What it leaves out: the workspace of matrix products (67 MB on an H100), the gaps between allocations, Python and its libraries,
the copy of the gradients that several processes exchange (`ranks`), weights that are split (`sharded`), mixed precision on GPUs
without bfloat16, and masks. Sums of gradients, which PyTorch makes in place, are new tensors here.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import takewhile

from .. import schemes
from ..errors import QwlibError, whole_number
from ..machine import devices
from ..models import catalog, estimates, hub, limits
from . import examples, loop
from .settings import Settings

ROUND_UP = 512  # PyTorch's allocator on a GPU gives multiples of it
MIN_8BIT, MIN_PAGED, STATE_BLOCK = 4096, 100_000, 256  # bitsandbytes' optimizers: elements


@dataclass(frozen=True)
class TrainingEstimate:
    """Bytes at the moment of the peak, by part. `all_gradients`: those of all trained weights, whenever they are there."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    scores: int
    all_gradients: int

    @property
    def total(self) -> int:
        return self.weights + self.adapter + self.gradients + self.optimizer + self.activations + self.scores

    def told(self) -> dict:
        """The parts and the total, for a record."""
        return asdict(self) | {"total": self.total}


def estimate(
    model: str,
    scheme: str = "nf4-dq",
    *,
    batch: int = 8,
    length: int = 512,
    learnt: int | None = None,
    shared: int = 0,
    device: str | None = None,
    **settings,
) -> TrainingEstimate:
    """Bytes that a training step takes with `batch` rows of `length` tokens.

    `learnt`: how many of a row's tokens are learnt, all without it. `shared`: tokens that all rows begin with and that are not
    learnt, which are read once where `loop.loss` does that. `device`: `cpu` or `cuda`, which need not be there. The default is
    the one that training would take. `settings`: those of `Settings`.

    Raises QwlibError for unknown names and settings, more tokens than positions, and a model that can't be run without data.
    """
    row, scheme = catalog.find(model), schemes.find(scheme)
    how = Settings.of(batch=batch, longest=length, **settings)
    if how.shard:
        raise QwlibError("the memory of weights that are split over GPUs can't be predicted: leave out shard")
    learnt = length - 1 if learnt is None else min(whole_number(learnt, "learnt"), length - 1)
    whole_number(shared, "shared", 0)
    if scheme.backend not in ("transformers", "bitsandbytes"):
        raise QwlibError(f"{scheme.name} can't be trained: choose a 16-bit scheme, or one of bitsandbytes")
    if how.method == "full" and scheme.name != "fp32":
        raise QwlibError("method='full' trains the weights themselves: it needs the scheme fp32")
    most = limits.positions(row.config())
    if most and length > most:
        raise QwlibError(f"{row.name} has {most} positions: longest can't be {length}")
    device = device or devices.pick_device()[0].type
    return _counted(row, scheme, how, max(learnt, 1), min(shared, max(length - 1 - learnt, 0)), device != "cpu")


def of_examples(
    row, scheme, how: Settings, rows: Sequence[examples.Tokens], batch: int, device: str
) -> TrainingEstimate:
    """The estimate for the batch that the longest of those `rows` would make. Other batches need less."""
    some = sorted(rows, key=lambda each: -len(each.ids))[:batch]
    places = {place for each in some for place, label in enumerate(each.labels) if label != examples.IGNORED and place}
    ends = [min(each.ids for each in rows), max(each.ids for each in rows)]  # all others begin as these two do
    same = (a == b for a, b in zip(*ends, strict=False))
    shared = sum(takewhile(bool, same)) if len(some) > 1 else 0
    first = min(places, default=1) - 1
    how = replace(how, batch=len(some), longest=len(some[0].ids))
    return _counted(row, scheme, how, max(len(places), 1), min(shared, first), device != "cpu")


def _counted(row, scheme, how: Settings, learnt: int, shared: int, gpu: bool) -> TrainingEstimate:
    """`how.batch` rows of `how.longest` tokens, of which the first `shared` are the same and the last `learnt` are learnt."""
    from . import shapes
    from .alive import Alive

    model, head = shapes.model_of(row, scheme, how, gpu)
    trained = list(loop.trained(model).values())
    alive = Alive([*model.parameters(), *model.buffers()], ROUND_UP if gpu else 1)
    _watch(alive, head, trained)
    share = shared >= loop.SHARED and not how.recompute and not how.dropout and loop.keeps_all(model)
    with alive:
        try:
            for _ in range(min(how.accumulate, 2)):
                _step(alive, model, how, learnt, shared if share else 0)
        except Exception as error:  # code that looks at values
            why = f"the memory to train {row.name} can't be predicted from shapes ({hub.point(error)[:100]})"
            raise QwlibError(f"{why}: try it with few steps") from None
        first = alive.most
        alive.again()
        alive.kind = "optimizer"
        state = _optimize(how.optimizer, trained, gpu)
    first["optimizer"] += alive.now["optimizer"]
    del state
    peak = max(first, alive.most, key=lambda parts: parts.total())
    gradients = sum(each.nbytes for each in trained)
    return TrainingEstimate(
        weights=estimates.held_bytes(row, scheme),
        adapter=0 if how.method == "full" else gradients,
        **{part: peak[part] for part in ("gradients", "optimizer", "activations", "scores")},
        all_gradients=gradients,
    )


def _watch(alive, head, trained) -> None:
    """Count what is made from the head's product to its gradient as scores, and gradients of trained weights as such."""

    def begins(_, given):
        alive.kind = "scores"
        if given[0].requires_grad:
            given[0].register_hook(ends)

    def ends(_):
        alive.kind = "activations"

    head.register_forward_pre_hook(begins)
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda parameter: alive.call(parameter.grad, "gradients"))


def _step(alive, model, how: Settings, learnt: int, shared: int) -> None:
    """The forward and the backward pass of `loop.loss`, which looks at values to find what to do."""
    import torch
    from torch.nn.functional import cross_entropy

    with torch.device("meta"):
        batch, cache = how.batch, None
        ids = torch.zeros(batch, how.longest, dtype=torch.long)
        alive.kind = "activations"
        if shared:
            cache = model(input_ids=ids[:1, :shared], use_cache=True, logits_to_keep=1).past_key_values
            cache.batch_repeat_interleave(batch)
            alive.kind = "activations"
        scores = model(
            input_ids=ids[:, shared:],
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=torch.arange(learnt),
        ).logits
        wanted = torch.zeros(batch * learnt, dtype=torch.long)
        each = cross_entropy(scores.float().flatten(0, 1), wanted, reduction="none")
        del scores, cache
        (each * torch.ones(batch * learnt)).sum().backward()


def _optimize(optimizer: str, trained, gpu: bool) -> list:
    """What an optimizer keeps, once it has taken its first step."""
    import torch

    if optimizer == "adamw":
        made = torch.optim.AdamW(trained, foreach=gpu)
        made.step()
        return [made]
    kept = []
    for parameter in trained:
        n = parameter.numel()
        if optimizer == "paged" and gpu and n >= MIN_PAGED:
            continue  # it may leave the GPU
        small = optimizer == "paged" or n < MIN_8BIT
        sizes = [4 * n] if small else [n, 4 * -(-n // STATE_BLOCK)]
        kept += [torch.empty(size, dtype=torch.uint8, device="meta") for size in 2 * sizes]
    return kept
