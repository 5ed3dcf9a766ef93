"""Engines: what reads token ids and gives scores; here the one for transformers' models, in `stepwise.py` everybody else's.

`Lm` asks an engine for the same few things whoever executes the model: how many words it knows and how many positions it
has, scores of given tokens, a greedy continuation that hands every token over, and how many bytes it holds.
"""

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import QwlibError
from ..machine import memory
from ..models import limits
from . import causal, padding


class NoGraph(QwlibError):
    """A decoder can't do this model's steps, or (`once`) this request's; nothing was handed over yet."""

    def __init__(self, message: str, once: bool = False):
        super().__init__(message)
        self.once = once


@dataclass
class Prefix:
    """Token ids that stand before every row, and their keys and values where an engine kept them; `why` where it could not."""

    ids: list[int]
    kept: Any = None
    why: str = ""


@dataclass
class Transformers:
    """A plain transformers model, continued by its `generate`, or by a `decoding.Decoder` where one is set.

    `must`: a decoder that fails is an error; else `generate` takes over, and `why` says so. It answers, too, a request that comes
    while the decoder is busy with another.
    """

    model: Any
    device: Any
    beside: Iterable = ()  # tensors of its state that no parameter or buffer tells of
    unhook: Callable | None = None  # takes off what `arithmetic.hook` has set
    decoder: Any = None
    must: bool = False
    reason: str = ""  # for what decodes
    kernel: str = ""  # what multiplies quantized layers, with the reason
    _manner: causal.Manner | None = None

    @property
    def manner(self) -> causal.Manner:
        """How this model is to be read, looked at before its first request.

        Raises QwlibError for a model that is no causal decoder.
        """
        if self._manner is None:
            self._manner = causal.look(self.model, self.device, self.vocabulary, self.longest, self.pad)
        return self._manner

    @property
    def why(self) -> str:
        """Why it decodes as it does, and why it reads rows one by one, if it was seen to have to."""
        return "; ".join(filter(None, (self.reason, self.kernel, self._manner.why if self._manner else "")))

    @property
    def name(self) -> str:
        if self.decoder is None:
            return "transformers generate, dynamic cache"
        return "compiled step, CUDA graph" if self.decoder.compiled else "CUDA graph, static cache"

    @property
    def vocabulary(self) -> int:
        return self.model.get_input_embeddings().num_embeddings

    @property
    def longest(self) -> int | None:
        return limits.positions(self.model.config)

    @property
    def stops(self) -> list[int]:
        """Token ids that end an answer, the one that also pads (where the model names one) first."""
        return [i for i in (self.model.generation_config.pad_token_id, *self.ends) if i in range(self.vocabulary)]

    @property
    def pad(self) -> int:
        """The token id that stands where a row has none."""
        return next(iter(self.stops), 0)

    @property
    def ends(self) -> list[int]:
        """Token ids that end an answer."""
        ends = self.model.generation_config.eos_token_id
        return [i for i in (ends if isinstance(ends, list) else [ends]) if i in range(self.vocabulary)]

    def logits(self, ids, mask, last: int | None = None, after: Prefix | None = None, precise: bool = False):
        """(batch × positions × vocabulary), or the `last` positions only, on the device and in the model's type.

        `precise`: in float32, where the head is a plain linear layer.
        """
        import torch

        if self.manner.why and not mask.all():
            return padding.scored_apart(
                ids, mask, last, lambda row, n: self.logits(row[None], torch.ones_like(row)[None], n, after, precise)[0]
            )
        if after and (after.kept is None or self._window < len(after.ids) + ids.shape[1]):
            last = last or ids.shape[1]
            first = torch.tensor([after.ids]).expand(len(ids), -1)  # read again with every row
            places = torch.cat([mask.new_ones(first.shape), mask], -1).sort(
                dim=-1, stable=True
            )  # pads to the left of all
            ids, mask, after = torch.cat([first, ids], -1).gather(-1, places.indices), places.values, None
        before, cache = len(after.ids) if after else 0, None
        positions = before + (mask.cumsum(-1) - 1).clamp(min=0)
        mask = torch.cat([mask.new_ones(len(mask), before), mask], -1)
        ids, mask, positions = (part.to(self.device) for part in (ids, mask, positions))
        wanted = {"logits_to_keep": last} if last and self.model._supports_logits_to_keep() else {}
        with torch.inference_mode():
            if before:
                cache = copy.deepcopy(after.kept)  # the forward appends to it
                cache.batch_repeat_interleave(len(ids))
            settings = {"past_key_values": cache, "use_cache": before > 0, **wanted}
            if self.manner.positions:
                settings["position_ids"] = positions
            with _float32_head(self.model) if precise else contextlib.nullcontext():
                scores = self.model(ids, attention_mask=mask, **settings).logits
        return scores[:, -last:] if last else scores

    def prefix(self, ids: list[int]) -> Prefix:
        """The ids with the keys and values of one row; a cache that holds anything else is not kept (see `Lm.prefix`)."""
        import torch
        from transformers.cache_utils import DynamicLayer

        self.manner  # noqa: B018 looked at before anything else is read
        wanted = {"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}
        with torch.inference_mode():
            read = self.model(torch.tensor([ids], device=self.device), use_cache=True, **wanted)
        kept = getattr(read, "past_key_values", None)
        layers = getattr(kept, "layers", [None])
        if not all(isinstance(layer, DynamicLayer) for layer in layers):  # a state, a convolution: no keys and values
            return Prefix(ids, None, f"its cache holds {' and '.join(sorted({type(one).__name__ for one in layers}))}")
        return Prefix(ids, kept)

    @property
    def _window(self) -> float:
        """How many positions back a layer looks: padding between a prefix and a row would take some of them away."""
        return limits.window(self.model.config) or float("inf")

    def generate(self, ids, mask, *, new_tokens: int, streamer=None, stop_at_eos: bool = False, sampling=None):
        """(batch × new) on the host, greedy unless `sampling` (`sampling.Sampling`) says otherwise.

        Raises QwlibError where a decoder that must be used can't do this model's steps, and for rows of other lengths where they
        have to be read one by one and are to be streamed or drawn.
        """
        if self.manner.why and not mask.all():
            if streamer or sampling:
                raise QwlibError(f"{self.manner.why}; ask for one row, or for rows of one length")
            return self._answers_one_by_one(ids, mask, new_tokens, stop_at_eos)
        if self.decoder is not None and not self.manner.positions:
            if self.must:
                raise QwlibError("no graph: the model counts positions in a way of its own; decode with engine='eager'")
            self.decoder, self.reason = None, "no graph: the model counts positions in a way of its own"
        if self.decoder is not None and self.decoder.lock.acquire(blocking=False):
            lock, settings = self.decoder.lock, {"streamer": streamer, "stop_at_eos": stop_at_eos, "sampling": sampling}
            ends, pad = self.ends, self.pad
            try:
                return self.decoder.generate(ids, mask, new_tokens=new_tokens, ends=ends, pad=pad, **settings)
            except NoGraph as error:
                if self.must:
                    raise QwlibError(f"{error}; decode with engine='eager'") from None
                self.decoder, self.reason = self.decoder if error.once else None, str(error)
            finally:
                lock.release()
            memory.give_back()
        return self._generate(ids, mask, new_tokens, streamer, stop_at_eos, sampling)

    def _answers_one_by_one(self, ids, mask, new_tokens, stop_at_eos):
        """`generate` of rows without their padding; one that ended early is padded behind its end."""
        import torch

        alone = [row[real][None] for row, real in zip(ids, mask.bool(), strict=True)]
        settings = {"new_tokens": new_tokens, "stop_at_eos": stop_at_eos}
        answers = [self.generate(row, torch.ones_like(row), **settings)[0] for row in alone]
        return torch.nn.utils.rnn.pad_sequence(answers, True, self.pad)

    def _generate(self, ids, mask, new_tokens, streamer, stop_at_eos, sampling):
        """transformers' own."""
        import torch
        from transformers import GenerationConfig

        drawn = (
            {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p} if sampling else {}
        )
        settings = GenerationConfig(
            do_sample=bool(sampling),
            **drawn,
            max_new_tokens=new_tokens,
            min_new_tokens=None if stop_at_eos else new_tokens,
            pad_token_id=self.pad,
            eos_token_id=self.ends or None,
        )
        ids, mask = ids.to(self.device), mask.to(self.device)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.inference_mode(), torch.random.fork_rng(devices, enabled=bool(sampling)):
            if sampling:
                torch.manual_seed(sampling.seed)
            out = self.model.generate(ids, attention_mask=mask, generation_config=settings, streamer=streamer)
        return out[:, ids.shape[1] :].cpu()

    @property
    def ready_s(self) -> float | None:
        """Seconds that the last capture of a graph took, compiling included; None where there is none."""
        return None if self.decoder is None else self.decoder.ready_s

    def forget(self) -> None:
        """Give back what was kept of requests."""
        if self.decoder is not None:
            self.decoder.close()

    def held(self) -> dict[str, int]:
        """`weights_bytes` and `state_bytes`."""
        return memory.measure(self.model, self.beside)

    def read_bytes(self) -> int:
        """What one decoding step reads."""
        return memory.read_bytes(self.model, self.beside)

    def close(self) -> None:
        self.forget()
        if self.unhook:
            self.unhook()
        self.model = self.decoder = self.unhook = None
        self.beside = ()


@contextlib.contextmanager
def _float32_head(model) -> Iterator[None]:
    """The head multiplies in float32 meanwhile, slice by slice; a quantized one stays as it is."""
    import torch

    head = model.get_output_embeddings()

    def again(module, inputs, _):
        hidden = inputs[0].float()
        parts = [hidden @ some.float().T for some in module.weight.split(16_384)]
        bias = 0 if module.bias is None else module.bias.float()
        return torch.cat(parts, -1) + bias

    plain = type(head) is torch.nn.Linear and head.weight.dtype != torch.float32
    hook = head.register_forward_hook(again) if plain else None
    try:
        yield
    finally:
        if hook:
            hook.remove()
