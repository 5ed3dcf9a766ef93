"""What notebook 08 does beside the library: batches in Trainer's order, and what is lost by merging.

`batches` says what a run of `finetune` will read. `answers` and `compare` score the same model in several forms on the same
examples.
"""

import time
from collections.abc import Mapping, Sequence

from ..loading.load import load
from . import examples
from .settings import Settings


def batches(rows: Sequence[examples.Tokens], how: Settings) -> list[list[examples.Tokens]]:
    """The batches of a run of `how.steps` steps, in the order that Trainer draws; at most one pass over `rows`."""
    import torch

    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(how.seed)).tolist()
    drawn = [[rows[place] for place in order[at : at + how.batch]] for at in range(0, len(rows), how.batch)]
    return drawn[: how.steps]


def tensors(lm, rows: Sequence[examples.Tokens]) -> dict:
    """A batch on the model's device."""
    pad = lm.tokenizer.pad_token_id if lm.tokenizer.pad_token_id is not None else lm.tokenizer.eos_token_id or 0
    return {key: value.to(lm.device) for key, value in examples.batch(rows, pad).items()}


def answers(lm, rows: Sequence[examples.Tokens]):
    """Log-probabilities where an answer's tokens follow (positions × vocabulary, float32, on the host), and these tokens."""
    import torch

    found, right = [], []
    for row in rows:
        learnt = [label != examples.IGNORED for label in row.labels[1:]]
        found.append(lm.logits(torch.tensor([row.ids]))[0, :-1][learnt].float().log_softmax(-1).cpu())
        right += [label for label in row.labels[1:] if label != examples.IGNORED]
    return torch.cat(found), torch.tensor(right)


def compare(ways: Mapping[str, tuple[str, str]], rows: Sequence[examples.Tokens]) -> dict[str, dict[str, float]]:
    """For each way (name → model, scheme): `loss` on the answers in nats, `kl` from the first way, and `seconds` for all rows.

    Both are means over tokens. One row is read first, so that the time has no warm-up.
    """
    found, reference = {}, None
    for name, (model, scheme) in ways.items():
        with load(model, scheme) as lm:
            answers(lm, rows[:1])
            began = time.perf_counter()
            logs, right = answers(lm, rows)
            seconds = time.perf_counter() - began
        reference = logs if reference is None else reference
        loss = -logs.gather(1, right[:, None]).mean().item()
        kl = (reference.exp() * (reference - logs)).sum(-1).mean().item()
        found[name] = {"loss": loss, "kl": kl, "seconds": seconds}
    return found
