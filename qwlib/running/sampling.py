"""The next token from scores: the most probable one, or one that is drawn.

Drawing is the race of exponential clocks: argmax of p / e, with an e for each token from a standard exponential distribution,
draws with probabilities p. It needs no sums and waits for no one, so it can stand in a CUDA graph.
"""

import math
from dataclasses import astuple, dataclass

from ..errors import QwlibError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: scores over `temperature`, the `top_k` best (0: all), of which the most probable that
    together reach `top_p` stay; `seed` makes a run repeatable on the same machine.

    Raises QwlibError for values outside their ranges.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not (self.temperature > 0 and self.top_k >= 0 and 0 < self.top_p <= 1):
            raise QwlibError(
                f"temperature above 0, top_k 0 or more, top_p above 0 and at most 1 are needed, not {self}"
            )

    def warpers(self) -> list:
        """transformers' processors for it, in the order of its `generate`."""
        from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        made = [TemperatureLogitsWarper(float(self.temperature))] if self.temperature != 1 else []
        made += [TopKLogitsWarper(self.top_k)] if self.top_k else []
        return made + ([TopPLogitsWarper(self.top_p)] if self.top_p < 1 else [])


class Choice:
    """The next token from scores: the greatest, or one that is drawn; `never` are token ids that may not come."""

    def __init__(self, sampling: Sampling | None, never, generator, device):
        import torch

        self.warpers = None if sampling is None else sampling.warpers()
        self.generator = generator
        self.never = torch.tensor(list(never), dtype=torch.long, device=device) if never else None
        self.key = (astuple(sampling)[:3] if sampling else None, tuple(never))

    def __call__(self, scores):
        if self.never is not None:
            scores = scores.index_fill(-1, self.never, -math.inf)
        if self.warpers is None:
            return scores.argmax(-1)
        scores = scores.float()
        for warp in self.warpers:
            scores = warp(None, scores)
        clocks = scores.new_empty(scores.shape).exponential_(generator=self.generator)
        return (scores.softmax(-1) / clocks).argmax(-1)
