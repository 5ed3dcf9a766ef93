"""Decoding on a GPU: one replay a token of everything that a step does, instead of a thousand calls from Python.

`generate` calls every kernel of a step from Python, 1,500 or so in an 8-billion model, and where they are as short as 4-bit
products the GPU waits for the next call most of the time. A CUDA graph records a step once and starts all of it at once.
For that a step must look alike each time: keys and values go to fixed addresses (`Slot`), token, position and mask stand in
tensors that the step itself moves on, and the next token is chosen inside. The prompt is read as `generate` reads it.

`Decoder(compiled=True)` runs the step through torch.compile first, which joins kernels: some 30 s once, faster from then on.

transformers has parts of it: static caches, a `generate` that compiles itself, but not where the weights are bitsandbytes' (their
quantizer does not declare itself compilable in 5.17 or 5.23), and continuous batching, which serves many requests at once.

What it leaves out: beams, and a batch whose rows join and leave.
"""

import contextlib
import threading
import time

import torch
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from . import attention
from .engines import NoGraph
from .sampling import Choice

ROUND = 256  # cache lengths are multiples: requests of like length share a graph


def obstacle(lm) -> str | None:
    """Why the steps of a loaded transformers model can't be a graph, None where they can as far as is known beforehand."""
    if lm.device.type != "cuda":
        return "a graph needs a CUDA device"
    if lm.scheme.backend not in ("transformers", "bitsandbytes"):
        return f"not tried with {lm.scheme.backend}"
    if any(getattr(getattr(module, "state", None), "threshold", 0) for module in lm.model.modules()):
        return "int8 layers look for outliers on the host at every step"  # Linear8bitLt with its default threshold, 6.0
    return changing(lm.model)


def changing(model) -> str | None:
    """Why a model's steps do not look alike, None where nothing says so."""
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"transformers says that {type(model).__name__} can't be compiled as a whole"
    rope = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    for part in (rope, *rope.values()):  # one for all layers, or one for each kind of them
        if isinstance(part, dict) and part.get("rope_type") in ("longrope", "dynamic"):
            return f"its positions ({part['rope_type']}) change with the length of a request"
    return None


class Slot(StaticLayer):
    """One layer's keys and values at fixed addresses; all layers write at the same `place`, a tensor of one element."""

    def __init__(self, like, length: int, place):
        super().__init__(length)
        self.place, self.is_initialized = place, True
        self.keys, self.values = (
            torch.zeros(*old.shape[:2], length, old.shape[3], dtype=old.dtype, device=old.device)
            for old in (like.keys, like.values)
        )
        self.dtype, self.device = self.keys.dtype, self.keys.device

    def fill(self, layer, end: int) -> None:
        """Take over what a growing layer holds, its last position before `end`."""
        held = layer.keys.shape[2]
        self.keys[:, :, end - held : end] = layer.keys
        self.values[:, :, end - held : end] = layer.values

    def update(self, key_states, value_states, *_, **__):
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        return self.keys, self.values

    def get_seq_length(self):
        return self.place[0]


class Decoder:
    """Greedy or sampled continuation with a transformers model, one captured graph for requests of one batch and length.

    `capture=False` runs the same steps without a graph, on any device. A request that is longer than the last, another batch
    size or another kind of sampling is captured anew, which takes 0.1 s (compiled: some seconds more). `ready_s` says how
    long the last capture took, compiling included.
    """

    def __init__(self, model, device, *, capture: bool = True, compiled: bool = False):
        self.model, self.device = model, torch.device(device)
        self.capture, self.compiled = capture, compiled
        self.lock = threading.Lock()  # one answer at a time: the tensors are its own
        self.generator = torch.Generator(device)
        # one stream of its own: two graphs captured on one share a workspace, which goes with the first
        self.aside = torch.cuda.Stream(self.device) if self._cuda else None
        self.forward = torch.compile(self._scores, fullgraph=True, dynamic=False) if compiled else self._scores
        self.ready_s, self.graph = 0.0, None
        self.close()

    @property
    def _cuda(self) -> bool:
        return self.device.type == "cuda"

    def generate(self, ids, mask, *, new_tokens: int, ends=(), pad=0, streamer=None, stop_at_eos=False, sampling=None):
        """Continue `ids` (batch × prompt, padded on the left where `mask` is 0): (batch × new) on the host.

        The streamer gets the prompt, then each step's (batch,) tokens as they arrive. With `stop_at_eos` a row ends with one of
        `ends` and is padded with `pad`, and all end with the last; else none of `ends` is given.

        Raises NoGraph, before anything is handed over, where the steps can't be had.
        """
        with torch.cuda.device(self.device) if self._cuda else contextlib.nullcontext(), torch.inference_mode():
            return self._generate(ids, mask, new_tokens, list(ends), pad, streamer, stop_at_eos, sampling)

    def _generate(self, ids, mask, new_tokens, ends, pad, streamer, stop_at_eos, sampling):
        batch, prompt = ids.shape
        choose = Choice(sampling, () if stop_at_eos else ends, self.generator, self.device)
        scores, layers = self._read(ids.to(self.device), mask.to(self.device))
        step = self._step(batch, prompt + new_tokens, choose, layers) if new_tokens > 1 else None
        if sampling:  # behind a capture, whose trial steps draw too
            self.generator.manual_seed(sampling.seed)
        token = choose(scores)
        if streamer:
            streamer.put(ids.cpu())
        out, arrived = self._host(new_tokens, batch), []
        finished, given = torch.zeros(batch, dtype=torch.bool), 0

        def give() -> bool:
            """Hand the next arrived step over; whether all rows have ended."""
            nonlocal finished, given
            if arrived[given] is not None:
                arrived[given].synchronize()
            if stop_at_eos and ends:
                out[given] = out[given].where(~finished, pad)
                finished = finished | torch.isin(out[given], torch.tensor(ends))
            given += 1
            if streamer:
                streamer.put(out[given - 1].clone())
            return bool(finished.all())

        arrived.append(self._fetch(out[0], token))
        done = give()
        if step and not done:
            self._begin(layers, token, mask.to(self.device), prompt)
            del layers
            for number in range(1, new_tokens):  # a step ahead of what is handed over, so that the GPU never waits
                step()
                arrived.append(self._fetch(out[number], self.token[:, 0]))
                if number > 1 and (done := give()):
                    break
            if not done:
                give()
        if streamer:
            streamer.end()
        return out[:given].T.contiguous()

    def _read(self, ids, mask):
        """The prompt, as `generate` reads it: scores of the last position, and the layers of its growing cache."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        wanted = {"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}
        read = self.model(ids, attention_mask=mask, position_ids=positions, use_cache=True, **wanted)
        layers = getattr(getattr(read, "past_key_values", None), "layers", [None])
        if other := {type(layer) for layer in layers} - {DynamicLayer, DynamicSlidingWindowLayer}:
            raise NoGraph(f"no graph: its cache is made of {other.pop().__name__}, not of keys and values alone")
        if any(layer.keys.shape[2] > ids.shape[1] for layer in layers):
            raise NoGraph("no graph: its cache holds more than the prompt")  # prefix tuning
        return read.logits[:, -1], layers

    def _step(self, batch: int, length: int, choose, layers):
        """A call that does one step on this object's tensors."""
        key = (batch, choose.key)
        if self.key is None or self.key != key or self.mask.shape[1] < length:
            began = time.perf_counter()
            self.close()
            try:
                self._tensors(batch, -(-length // ROUND) * ROUND, layers)
                self.choose = choose  # a graph reads its tensors where they lie: they must outlive it
                self.graph = self._captured() if self.capture else None
            except Exception as error:  # whatever capturing or compiling says; nothing was handed over yet
                self.close()
                why = (str(error).splitlines() or [type(error).__name__])[0]
                raise NoGraph(f"no graph: {why}", once=isinstance(error, torch.OutOfMemoryError)) from error
            self.key, self.ready_s = key, time.perf_counter() - began
        return self.graph.replay if self.graph else self._advance

    def _tensors(self, batch: int, length: int, layers) -> None:
        new = {"device": self.device, "dtype": torch.long}
        self.token, self.position = torch.zeros(batch, 1, **new), torch.zeros(batch, 1, **new)
        self.place = torch.zeros(1, **new)
        self.mask = torch.ones(batch, length, device=self.device, dtype=torch.bool)
        self.cache = Cache(layers=[Slot(layer, length, self.place) for layer in layers])

    def _begin(self, layers, token, mask, prompt: int) -> None:
        """Stand behind the prompt, about to read `token`."""
        for slot, layer in zip(self.cache.layers, layers, strict=True):
            slot.keys.zero_()  # what is masked counts as 0 times its value, and 0 times not-a-number is none
            slot.values.zero_()
            slot.fill(layer, prompt)
        self.token.copy_(token[:, None])
        self.position.copy_(mask.sum(-1, keepdim=True))
        self.place.fill_(prompt)
        self.mask.zero_()
        self.mask[:, :prompt] = mask
        self.mask[:, prompt] = True

    def _scores(self, token, position, mask, cache):
        read = self.model(token, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True)
        return read.logits[:, -1]

    def _advance(self) -> None:
        """One step: read the token, choose the next, move on."""
        with attention.stepping(self.model):
            scores = self.forward(self.token, self.position, self.mask, self.cache)
        self.token.copy_(self.choose(scores)[:, None])
        self.position.add_(1)
        self.place.add_(1)
        self.mask.index_fill_(1, self.place, True)

    def _captured(self):
        """The step as a graph, after two that settle what kernels and their workspaces will be."""
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        if self.choose.warpers is not None:
            graph.register_generator_state(self.generator)
        self.aside.wait_stream(here)
        with torch.cuda.stream(self.aside), torch._dynamo.config.patch(recompile_limit=64):
            for _ in range(2):
                self._advance()
            with torch.cuda.graph(graph, stream=self.aside, capture_error_mode="thread_local"):
                self._advance()
        here.wait_stream(self.aside)
        return graph

    def _host(self, new_tokens: int, batch: int):
        return torch.zeros(new_tokens, batch, dtype=torch.long, pin_memory=self._cuda)

    def _fetch(self, row, token):
        """Copy a step's tokens to the host; the event of their arrival, None where they are there."""
        row.copy_(token, non_blocking=True)
        if not self._cuda:
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    def close(self) -> None:
        """Give the graph and its cache back."""
        if self.graph is not None:
            torch.cuda.synchronize(self.device)
            self.graph.reset()
        self.key = self.graph = self.choose = self.cache = None
        self.token = self.position = self.place = self.mask = None
