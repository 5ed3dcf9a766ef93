"""Token streams: when did each token reach the host?

`generate` hands every new token to a streamer's `put` the moment it has been copied to the host. `Timeline` holds one
stamp a token and derives the figures of record:

- `ttft_s`: from the call to the first token; `itl_s`: the gaps between successive tokens;
- `tpot_s` = (e2e − ttft) / (n − 1), one figure a request; `e2e_s`: from the call to the last token;
- `output_tok_s` = batch × n / e2e; `decode_tok_s` = batch × (n − 1) / (e2e − ttft).

(vLLM names them so; NVIDIA's AIPerf calls our `itl_s` ICL and our `tpot_s` ITL.)

transformers' `TextStreamer` and `TextIteratorStreamer` are for people to read: they decode the whole text again at each
token, hold it back to the last space, and pass the prompt through first. The gaps between their chunks are not
inter-token latencies; `text_chunks` is here to show the difference.

What it leaves out: on Apple's MPS, transformers 5.23 hands tokens over one step late (`DeferredStopCheck`), so stamps
there would be shifted by a step.
"""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ..errors import QwlibError
from ..machine.clock import Clock


@dataclass
class Timeline:
    """When a request was made and when each of its tokens came, in seconds of `clock`.

    Call `start()`, then pass the object itself as the callback that takes each token.
    """

    batch: int = 1
    clock: Clock = time.perf_counter
    began: float = 0.0
    stamps: list[float] = field(default_factory=list)

    def start(self) -> "Timeline":
        self.stamps.clear()
        self.began = self.clock()
        return self

    def __call__(self, token) -> None:
        self.stamps.append(self.clock())

    @property
    def ttft_s(self) -> float:
        return self.stamps[0] - self.began

    @property
    def itl_s(self) -> list[float]:
        return [b - a for a, b in itertools.pairwise(self.stamps)]

    @property
    def e2e_s(self) -> float:
        return self.stamps[-1] - self.began

    @property
    def tpot_s(self) -> float | None:
        """None for a single token: it has no gap."""
        n = len(self.stamps)
        return (self.e2e_s - self.ttft_s) / (n - 1) if n > 1 else None

    @property
    def output_tok_s(self) -> float:
        return self.batch * len(self.stamps) / self.e2e_s

    @property
    def decode_tok_s(self) -> float | None:
        return None if self.tpot_s is None else self.batch / self.tpot_s


class Watched:
    """A streamer of which one sees whether an error was its own: `raised`."""

    def __init__(self, streamer):
        self.streamer, self.raised = streamer, False

    def put(self, value) -> None:
        self.raised = True
        self.streamer.put(value)
        self.raised = False

    def end(self) -> None:
        self.raised = True
        self.streamer.end()
        self.raised = False


def token_streamer(on_token: Callable):
    """A transformers streamer that calls `on_token(tokens)` for each step, `tokens` a (batch,) tensor on the host.

    The first `put` of `generate` is the prompt; it is skipped.
    """
    from transformers.generation.streamers import BaseStreamer

    class Tokens(BaseStreamer):
        prompt_seen = False

        def put(self, value):
            if self.prompt_seen:
                on_token(value)
            self.prompt_seen = True

        def end(self):
            pass

    return Tokens()


def time_stream(lm, ids, *, new_tokens: int, clock: Clock = time.perf_counter) -> Timeline:
    """Generate exactly `new_tokens` tokens after `ids` (batch × prompt) and return when each one came."""
    timeline = Timeline(batch=len(ids), clock=clock).start()
    lm.stream(ids, new_tokens=new_tokens, on_token=timeline)
    return timeline


def text_chunks(lm, ids, *, new_tokens: int) -> Iterator[str]:
    """Text as transformers' `TextIteratorStreamer` yields it, while a thread generates after `ids` (one row).

    An error in the thread is raised here: left alone, it would leave the iterator waiting for ever. An iterator that is
    abandoned stops the thread at its next token.
    """
    import threading

    from transformers import TextIteratorStreamer

    if len(ids) != 1:
        raise QwlibError(f"text_chunks follows one row, not {len(ids)}: call it for each")

    abandoned, failure = threading.Event(), []

    class Pieces(TextIteratorStreamer):
        def put(self, value):
            if abandoned.is_set():
                raise GeneratorExit
            super().put(value)

    streamer = Pieces(lm.tokenizer, skip_prompt=True, skip_special_tokens=True)

    def work():
        try:
            lm.generate(ids, new_tokens=new_tokens, streamer=streamer)
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        abandoned.set()
        thread.join()
    if failure:
        raise failure[0]
