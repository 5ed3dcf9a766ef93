"""`Lm`: a loaded model with two doors, through which everything measures it.

`stream` continues token ids and hands every token over as it comes; `logits` scores every position. Token ids are batches of
rows; where rows differ in length the shorter ones are padded on the *left*, because new tokens must follow the last real one.
Padding is -1 until it meets the model, so that no real token is ever mistaken for it.

Measurements are greedy, so that a run can be repeated. `use` chooses what decodes: on a GPU a captured graph by itself.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .. import schemes
from ..errors import QwlibError, whole_number
from ..models import catalog, hub, texts
from . import chats, engines, padding, streaming


@dataclass
class Lm:
    """A loaded model. `memory` holds bytes (see `memory.py`), `load_s` seconds from the call to a model ready to use,
    `import_s` those that importing its backend took before (next to none the second time, minutes where it compiles).
    """

    row: catalog.Model
    scheme: schemes.Scheme
    weights: str
    device: Any
    device_reason: str
    dtype: Any
    dtype_reason: str
    model: Any = None  # the library's own object: a plain transformers model where the backend builds on transformers
    tokenizer: Any = None
    engine: Any = None  # what executes it (`engines.py`)
    waits: bool = False  # whether its weights stay on the host for now
    kernel: str | None = None  # whose kernels are to multiply 4-bit layers on a GPU, where one was asked for
    arithmetic: Any = None  # the type of products of several rows, where PyTorch calculates them (`arithmetic.py`)
    arithmetic_reason: str = ""
    folder: str | None = None  # where its files lie
    saved: str | None = None  # the scheme that its files were quantized in, None if that was done while loading
    manifest: dict | None = None  # of the artefact that it was read from (`artefacts.py`)
    import_s: float = 0.0
    load_s: float = 0.0
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def vocabulary(self) -> int:
        """How many token ids the model knows."""
        return self.engine.vocabulary

    @property
    def longest(self) -> int | None:
        """How many positions the model has, None where it names no limit."""
        return self.engine.longest

    def encode(self, text: str | list[str], *, special: bool = True):
        """Token ids (batch × longest) on the host, shorter rows padded on the left with -1.

        `special=False` leaves out the tokens that a tokenizer puts at the start: chat templates bring their own. What it puts
        at the end is left out always (see `text_ids`).
        """
        given = [texts.checked(each) for each in ([text] if isinstance(text, str) else text)]
        if not given:
            raise QwlibError("there is no text to encode")
        return padding.pad_left([text_ids(self.tokenizer, each, special=special)[0] for each in given])

    def chat(self, *questions: str):
        """Token ids of one user message a row, in the model's chat format if it has one."""
        if not self.tokenizer.chat_template:
            return self.encode(list(questions))
        asked = [[{"role": "user", "content": texts.checked(question, "a question")}] for question in questions]
        return self.encode([chats.rendered(self.tokenizer, each, self.row.name) for each in asked], special=False)

    def use(self, engine: str | None = None) -> "Lm":
        """Decode with `eager` (transformers' `generate`), `graph` (a captured CUDA graph a step) or `compiled` (torch.compile,
        then the graph). None takes a graph where there can be one, and says in `engine.why` why not elsewhere.

        A graph does not see what is changed in the model later (an adapter put off, a hook): call `use` again then.

        Raises QwlibError for another name, and where the one that is asked for can't be.
        """
        if engine not in (None, "eager", "graph", "compiled"):
            raise QwlibError(f"engine {engine!r}: it is eager, graph or compiled")
        plain = isinstance(self.engine, engines.Transformers)
        why = None if plain else f"{self.scheme.backend} {self.engine.why}"
        if plain:
            from . import decoding

            why = decoding.obstacle(self)
        if why and engine in ("graph", "compiled"):
            raise QwlibError(f"{self.row.name} in {self.scheme.name} can't decode by {engine}: {why}")
        if not plain:
            return self
        self.engine.forget()
        made = None
        if not why and engine != "eager":
            made = decoding.Decoder(self.model, self.device, compiled=engine == "compiled")
        self.engine.decoder, self.engine.must = made, engine is not None
        self.engine.reason = "asked for" if engine else why or "a graph where there can be one"
        return self

    def stream(
        self, ids, *, new_tokens: int, on_token: Callable | None = None, stop_at_eos: bool = False, sampling=None
    ):
        """Continuation of `ids` (batch × prompt, -1 pads on the left): a (batch × new) tensor on the host.

        `on_token` gets each step's (batch,) tokens as they reach the host. Without `stop_at_eos` exactly `new_tokens` come.
        Greedy, or drawn as a `sampling.Sampling` says.
        """
        streamer = streaming.token_streamer(on_token) if on_token else None
        return self.generate(ids, new_tokens=new_tokens, streamer=streamer, stop_at_eos=stop_at_eos, sampling=sampling)

    def generate(self, ids, *, new_tokens: int, streamer=None, stop_at_eos: bool = False, sampling=None):
        """The same with any of transformers' streamers; shapes as in `stream`. What a streamer raises comes out as it is."""
        ids, mask = self._prepare(ids, whole_number(new_tokens, "new_tokens"))
        watched = streaming.Watched(streamer) if streamer else None
        settings = {"streamer": watched, "stop_at_eos": stop_at_eos, "sampling": sampling}
        with self._read(watched):
            return self.engine.generate(ids, mask, new_tokens=new_tokens, **settings)

    def logits(self, ids, *, last: int | None = None, after=None, precise: bool = False):
        """Scores of the next token at every position, or at the `last` ones only, which spares the head the others.

        `after`: a `prefix` that stands before every row. `precise`: the head in float32, since scores of 16 bits come in steps of
        an eighth or so. (batch × positions × vocabulary), on the model's device and, unless precise, in its type.
        """
        ids, mask = self._prepare(ids, len(after.ids) if after else 0)
        with self._read():
            return self.engine.logits(ids, mask, last, after, precise)

    def prefix(self, ids: list[int]):
        """Token ids that many rows begin with, read once: `logits(rows, after=…)` takes the rows without them.

        Where the backend can't keep what it read, they are read again with every row, and only the answer is the same.
        """
        self._prepare([ids])
        with self._read():
            return self.engine.prefix(list(ids))

    @contextlib.contextmanager
    def _read(self, streamer=None) -> Iterator[None]:
        """What a model's own code raises while it reads, in one line; errors of the allocator and of a streamer stay theirs."""
        import torch

        try:
            yield
        except (QwlibError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if streamer and streamer.raised:
                raise
            instead = "" if self.scheme.backend == "transformers" else "; try it in bf16"
            said = f"{self.row.name} in {self.scheme.name} can't read these ids: {hub.point(error)}{instead}"
            raise QwlibError(said) from error

    def save(self, folder) -> None:
        """Write model and tokenizer with `save_pretrained`, quietly; `load(folder, scheme)` reads them back.

        Raises QwlibError for a scheme that can't be written, or that lies in files anyway, and once a CPU has
        repacked 4-bit weights for its kernel, which the first forward does: what would be saved then is not what was
        loaded (bitsandbytes 0.50.2).
        """
        if why := self.scheme.unsavable:
            raise QwlibError(why)
        if self.scheme.maker:
            raise QwlibError(f"{self.scheme.name} was read from files: copy their folder, whose manifest goes with it")
        if any(
            getattr(getattr(p, "quant_state", None), "packing_format_for_cpu", False) for p in self.model.parameters()
        ):
            raise QwlibError(
                "save a 4-bit model before its first forward: on this CPU that repacks the weights for good"
            )
        with quiet():
            self.model.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
        own = Path(self.folder or "") / "generation_config.json"
        if own.is_file():  # the publisher's, of which only the ids are used here: measuring is greedy
            shutil.copy(own, folder)

    def _prepare(self, ids, new_tokens: int = 0):
        import torch

        if not isinstance(ids, torch.Tensor):
            try:
                ids = padding.pad_left(ids)
            except (TypeError, ValueError, RuntimeError, OverflowError):
                raise QwlibError("token ids are rows of whole numbers: `encode` makes them of a text") from None
        if ids.dim() != 2 or not ids.numel():
            raise QwlibError(f"token ids must be a batch of rows with at least one token, not {tuple(ids.shape)}")
        if ids.is_floating_point() or ids.is_complex() or ids.dtype is torch.bool:
            raise QwlibError(f"token ids are whole numbers, not {ids.dtype}")
        if not bool((ids >= 0).any(1).all()):
            empty = int((ids >= 0).any(1).long().argmin())
            raise QwlibError(f"row {empty} (from 0) has no token: a model continues at least one")
        if int(ids.min()) < -1:
            raise QwlibError(f"token id {int(ids.min())} is no word: only -1, which pads on the left, is below 0")
        if int(ids.max()) >= self.vocabulary:
            raise QwlibError(f"token id {int(ids.max())} is outside the model's {self.vocabulary} words")
        mask = (ids >= 0).long()
        most = int(mask.sum(1).max())
        if self.longest and most + new_tokens > self.longest:
            raise QwlibError(f"{most} + {new_tokens} tokens are more than the model's {self.longest} positions")
        return ids.where(ids >= 0, next(iter(self.engine.stops), 0)), mask


def text_ids(tokenizer, text: str, *, special: bool = True, places: bool = False) -> tuple[list[int], list | None]:
    """(token ids of a text, where each stands in it if `places` are asked for), without what a tokenizer puts behind the text.

    Some end every text with their end-of-text token: it is no part of what was written, and nothing can follow it.
    """
    found = tokenizer(
        text,
        add_special_tokens=special,
        return_special_tokens_mask=True,
        return_offsets_mapping=places,
        verbose=False,
    )
    length = len(found.input_ids)
    while length and found.special_tokens_mask[length - 1] and any(not each for each in found.special_tokens_mask):
        length -= 1
    return found.input_ids[:length], found["offset_mapping"][:length] if places else None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers' weight-by-weight progress bar says nothing that the caller's own does not, nor does accelerate of parts
    that wait on the host.
    """
    import logging as python_logging

    from transformers.utils import logging

    shown, accelerate = logging.is_progress_bar_enabled(), python_logging.getLogger("accelerate")
    level = accelerate.level
    logging.disable_progress_bar()
    accelerate.setLevel(python_logging.ERROR)
    try:
        yield
    finally:
        accelerate.setLevel(level)
        if shown:
            logging.enable_progress_bar()
