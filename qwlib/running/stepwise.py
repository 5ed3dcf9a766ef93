"""The engine for libraries with a model of their own: llama.cpp, ONNX Runtime, ExLlama.

Such a library only has to bring a `Reader`, which reads a few more tokens of one row; `Stepwise` makes scores of batches and
token streams out of that.

What it leaves out: batches while it answers. The libraries can answer many requests at once, each in a way of its own.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import QwlibError
from . import padding
from .engines import Prefix


class Reader(Protocol):
    """A model of another library, with one row of tokens in its cache."""

    vocabulary: int
    longest: int | None
    weights_bytes: int  # of all tensors
    read_bytes: int  # of those that one decoding step reads

    def begin(self, tokens: int) -> None:
        """Forget what was read; so many tokens will come."""

    def read(self, ids: list[int], last: int):
        """Read these tokens after those before them: scores at the `last` of them (last × vocabulary), a float tensor."""

    def close(self) -> None: ...


@dataclass
class Stepwise:
    """Scores and token streams out of a `Reader`; `stops` are the token ids that end an answer."""

    reader: Any
    name: str
    stops: Iterable[int] = ()
    why: str = "decodes in a way of its own"
    ready_s: float | None = None  # nothing is captured

    @property
    def vocabulary(self) -> int:
        return self.reader.vocabulary

    @property
    def longest(self) -> int | None:
        return self.reader.longest

    def prefix(self, ids: list[int]) -> Prefix:
        """The ids alone: a reader goes forward only."""
        return Prefix(ids)

    def logits(self, ids, mask, last: int | None = None, after: Prefix | None = None, precise: bool = False):
        """As `Transformers.logits`, row by row, in the type that the reader gives."""
        before = after.ids if after else []

        def read(row, wanted: int):
            self.reader.begin(len(before) + len(row))
            return self.reader.read(before + row.tolist(), wanted)

        return padding.scored_apart(ids, mask, last, read)

    def generate(self, ids, mask, *, new_tokens: int, streamer=None, stop_at_eos: bool = False, sampling=None):
        """As `Transformers.generate`, for one row, greedy.

        Raises QwlibError for more.
        """
        import torch

        if sampling:
            raise QwlibError(f"{self.name} answers greedily here: leave out sampling")
        if len(ids) > 1:
            raise QwlibError(f"{self.name} answers one request at a time here: ask for a batch of 1, not {len(ids)}")
        fresh, stops, out = ids[0][mask[0].bool()].tolist(), list(self.stops), []
        self.reader.begin(len(fresh) + new_tokens)
        if streamer:
            streamer.put(ids.cpu())
        while len(out) < new_tokens:
            scores = self.reader.read(fresh, 1)[0]
            if not stop_at_eos:
                scores[stops] = -torch.inf
            fresh = [int(scores.argmax())]
            out += fresh
            if streamer:
                streamer.put(torch.tensor(fresh))
            if stop_at_eos and fresh[0] in stops:
                break
        if streamer:
            streamer.end()
        return torch.tensor([out])

    def forget(self) -> None:
        """Nothing is kept of requests."""

    def held(self) -> dict[str, int]:
        """All of it as `weights_bytes`: a file's scales lie among its codes."""
        return {"weights_bytes": self.reader.weights_bytes, "state_bytes": 0}

    def read_bytes(self) -> int:
        """What one decoding step reads."""
        return self.reader.read_bytes

    def close(self) -> None:
        self.reader.close()
