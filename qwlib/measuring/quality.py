"""Quality: perplexity under a named protocol, and divergence from a 16-bit reference on the same tokens.

One model has as many perplexities as there are ways to cut a text, so a value stands with its protocol, its text's hash
and its number of tokens, or it says nothing. A protocol says which windows of the tokenized text the model reads, and
which tokens of a window count:

    gptq-N        blocks of N tokens without overlap, remainder dropped, all but a block's first token scored. The rule of
                  the GPTQ paper's code (arXiv 2210.17323), which papers on 4 bits have shared since. N is mostly 2048.
    hf-sliding    windows as long as the model allows, each 512 tokens on, every token scored once, in the window where it
                  has most to look back on. The rule of transformers' page "Perplexity of fixed-length models".
                  `hf-sliding-N` takes windows of N tokens. A text shorter than a window is one short window.
    llamacpp-N    chunks of N tokens without overlap, each chunk's first token replaced by the BOS token where the tokenizer
                  sets one, and only the second half scored, without its first token. The rule of llama.cpp's
                  `llama-perplexity`. N is mostly 512.

Under `gptq` and `llamacpp` a text shorter than one window is an error. Divergence is KL(16-bit ‖ quantized) a token over
the whole vocabulary: 0 where the quantized model spreads its bets exactly like the reference. It needs no right answers
and no luck: errors that cancel in a perplexity add up here.

What it leaves out: word perplexity (lm-evaluation-harness has it). How it differs from transformers' loop: windows of one
length are read in batches, the head runs only where something is scored, and scores become float32 a slice at a time, so
that a window of 2048 tokens takes little more memory than its plain forward pass. That loop also weights a window by one
token less than it scores, which moves the fifth digit.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Iterator

from ..errors import QwlibError, whole_number
from ..models import texts
from ..running.lm import text_ids
from .reference import Reference

STRIDE = 512  # of hf-sliding
SLICE = 64  # positions whose scores are float32 at once
PADS = 8  # on the left of each row, for the reference's second path


def perplexity(
    lm, text: str, *, protocol: str = "gptq-512", blocks: int | None = None, batch: int | None = None
) -> dict:
    """Perplexity of `text`, with its standard error, and bits per byte of the text that was scored.

    `blocks` limits how many windows are read, `batch` how many at once (default: what keeps the scores under half a GB).
    Returns the fields `protocol, tokens, ppl, ppl_stderr, bits_per_byte, text_sha256`. The standard error treats tokens as
    independent, as llama.cpp's does.

    Raises QwlibError for random weights, an unknown protocol, or a text too short for it.
    """
    return measure(lm, text, protocol=protocol, blocks=blocks, batch=batch)


def divergence(
    lm, reference, text: str, *, protocol: str = "gptq-512", blocks: int | None = None, batch: int | None = None
) -> dict:
    """KL divergence a token, in nats, of a quantized model from `reference`: another `Lm`, or a `Reference` kept on disk.

    Returns the fields `reference, tokens, mean, stderr, median, p99, top1` (share of tokens where both like the same word
    best), `noise_floor` (mean divergence of the reference from itself with each row padded on the left, which takes other
    kernels) and `ppl_ratio, ppl_ratio_stderr` (quantized over reference, paired token by token, which cancels the luck of
    the text). `tokens` can be fewer than were scored: the reference's scores are kept on disk, up to a limit.

    Raises QwlibError where `perplexity` does, and where the two can't be compared.
    """
    options = {"protocol": protocol, "blocks": blocks, "batch": batch}
    if isinstance(reference, Reference):
        return measure(lm, text, reference=reference, **options)["kld"]
    with Reference.temporary() as kept:
        measure(reference, text, keep=kept, **options)
        if not kept.tokens:
            raise QwlibError(f"no room for the reference's scores in {kept.folder}: set QWLIB_CACHE to a larger disk")
        return measure(lm, text, reference=kept, **options)["kld"]


def measure(
    lm,
    text: str,
    *,
    protocol: str,
    blocks: int | None = None,
    batch: int | None = None,
    reference: Reference | None = None,
    keep: Reference | None = None,
) -> dict:
    """`perplexity`'s fields from one pass; with `reference` also `kld`; with `keep` the scores are kept there.

    Keeping costs a second pass, for the noise floor.
    """
    import torch

    if lm.weights == "random":
        raise QwlibError("random weights have no quality: load trained ones to measure perplexity")
    scan = _Scan(lm, text, protocol, blocks, batch)
    facts = {"protocol": protocol, "text_sha256": hashlib.sha256(text.encode()).hexdigest()}
    if keep:
        keep.start(lm, **facts)
    if reference:
        reference.check(lm, **facts)
        reference.rewind()
    # loss, divergence, same favourite or not, difference of losses
    found = torch.empty(4, scan.tokens, dtype=torch.float64, device=lm.device)
    done = compared = 0
    for scores, targets in scan.slices():
        place = slice(done, done := done + len(targets))
        if keep:
            keep.add(scores)
        logs = _logs(scores)
        found[0, place] = _losses(logs, targets)
        if reference and (theirs := reference.take(len(targets), logs.device)) is not None:
            found[1:, place] = torch.stack(_compare(logs, _logs(theirs), targets)).double()
            compared = done
    found = found.cpu()
    if not found[0].isfinite().all():
        raise QwlibError(
            f"{lm.row.name} in {lm.scheme.name} gives scores that are no numbers: {lm.dtype} overflows in it"
        )
    mean, error = _mean(found[0])
    out = facts | {
        "tokens": scan.tokens,
        "ppl": math.exp(mean),
        "ppl_stderr": math.exp(mean) * error,
        "bits_per_byte": found[0].sum().item() / math.log(2) / scan.scored_bytes(),
    }
    if keep:
        keep.finish(_noise(scan, keep))
    if compared:
        kld = _divergence(*found[1:, :compared])
        out["kld"] = {"reference": reference.name, **kld, "noise_floor": reference.noise_floor}
    return out


def windows(protocol: str, tokens: int, longest: int | None = None) -> list[tuple[int, int, int]]:
    """(begin, first, end) of each window over `tokens` ids: the model reads begin…end and is scored on first…end.

    `longest` is the model's own limit, which `hf-sliding` without a number takes. The list is empty where the text is too
    short.

    Raises QwlibError for an unknown protocol.
    """
    kind, length = parse(protocol)
    if kind == "gptq":
        return [(at, at + 1, at + length) for at in range(0, tokens - length + 1, length)]
    if kind == "llamacpp":
        return [(at, at + length // 2 + 1, at + length) for at in range(0, tokens - length + 1, length)]
    if (length := length or longest) is None:
        raise QwlibError("the model names no longest window: use hf-sliding-N with a length, such as hf-sliding-2048")
    spans, scored = [], 0
    while scored < tokens and tokens > 1:
        begin = len(spans) * min(STRIDE, length)
        end = min(begin + length, tokens)
        spans.append((begin, max(scored, begin + 1), end))
        scored = end
    return [span for span in spans if span[1] < span[2]]


def parse(protocol: str) -> tuple[str, int | None]:
    """(kind, N) of a protocol's name; N is None for plain `hf-sliding`.

    Raises QwlibError for an unknown one.
    """
    match = re.fullmatch(r"(gptq|llamacpp|hf-sliding)(?:-([1-9]\d*))?", str(protocol))
    kind, number = match.groups() if match else (None, None)
    least = 4 if kind == "llamacpp" else 2
    if kind is None or (number is None) != (protocol == "hf-sliding") or int(number or least) < least:
        raise QwlibError(f"unknown protocol {protocol!r}: use gptq-2048, hf-sliding, llamacpp-512, or other lengths")
    return kind, number and int(number)


class _Scan:
    """The windows of a text for one model, and the scores that it gives in them."""

    def __init__(self, lm, text, protocol, blocks, batch):
        import torch

        if not lm.tokenizer.is_fast:
            raise QwlibError("perplexity needs a tokenizer that tells where tokens stand in the text (a fast one)")
        blocks = blocks if blocks is None else whole_number(blocks, "blocks")
        self.batch = batch if batch is None else whole_number(batch, "batch")
        ids, self.places = text_ids(lm.tokenizer, texts.checked(text), places=True)
        self.lm, self.text, self.protocol = lm, text, protocol
        self.ids = torch.tensor(ids, dtype=torch.long)
        self.spans = windows(protocol, len(self.ids), lm.longest)[:blocks]
        self.tokens = sum(end - first for _, first, end in self.spans)
        if self.tokens < 2:
            raise QwlibError(
                f"the text has {len(self.ids)} tokens, {protocol} needs at least {parse(protocol)[1] or 3}"
            )
        first = lm.tokenizer("word", verbose=False).input_ids[0]
        self.bos = first if parse(protocol)[0] == "llamacpp" and first == lm.tokenizer.bos_token_id else None

    def slices(self, pads: int = 0) -> Iterator[tuple]:
        """(scores: positions × vocabulary, float32, on the device; the tokens that came) a slice, in the text's order.

        The scores lie in one buffer, which the next slice overwrites: memory that is allocated anew each time can't be
        reused once something small lies in it, and grows.
        """
        import torch
        from tqdm.auto import tqdm

        buffer = torch.empty(SLICE, self.lm.vocabulary, device=self.lm.device)
        with tqdm(total=len(self.spans), desc=self.protocol, disable=None, delay=2, leave=False) as told:
            for (length, scored), group in itertools.groupby(self.spans, lambda s: (s[2] - s[0], s[2] - s[1])):
                rows = [self._row(begin, end) for begin, _, end in group]
                for ids in torch.stack(rows).split(self._rows(length, scored)):
                    padded = torch.nn.functional.pad(ids, (pads, 0), value=-1)
                    scores = self.lm.logits(padded, last=scored + 1)
                    for row, given in zip(scores, ids[:, -scored:].to(scores.device), strict=True):
                        for at in range(0, scored, SLICE):
                            stop = min(at + SLICE, scored)
                            yield buffer[: stop - at].copy_(row[at:stop]), given[at:stop]
                    del scores, row  # else they would stay through the next forward pass
                    told.update(len(ids))

    def _rows(self, length: int, scored: int) -> int:
        room = 2048 if self.lm.device.type == "cpu" else 16384  # tokens at once
        held = 5e8 / (scored + 1) / self.lm.vocabulary / self.lm.dtype.itemsize
        return self.batch or max(1, min(room // length, int(held)))

    def _row(self, begin, end):
        row = self.ids[begin:end]
        if self.bos is not None:
            row = row.clone()
            row[0] = self.bos
        return row

    def scored_bytes(self) -> int:
        """UTF-8 bytes of the text between each window's first scored token and its last."""
        return sum(
            len(self.text[self.places[first][0] : self.places[end - 1][1]].encode()) for _, first, end in self.spans
        )


def _logs(scores):
    """Log-probabilities, in the scores' own memory."""
    return scores.sub_(scores.logsumexp(-1, keepdim=True))


def _losses(logs, targets):
    return -logs.gather(-1, targets[:, None])[:, 0]


def _compare(ours, theirs, targets) -> tuple:
    """(divergence, same favourite or not, difference of losses), one value a position, from log-probabilities."""
    kld = (theirs.exp() * (theirs - ours)).sum(-1)
    return kld, (theirs.argmax(-1) == ours.argmax(-1)).float(), _losses(ours, targets) - _losses(theirs, targets)


def _noise(scan: _Scan, kept: Reference) -> float:
    """Mean divergence between the kept scores and those of the same model along another path, 0 where none were kept."""
    kept.rewind()
    found = []
    for scores, targets in scan.slices(pads=PADS):
        if (theirs := kept.take(len(targets), scores.device)) is None:
            break
        found.append(_compare(_logs(scores), _logs(theirs), targets)[0].double().sum().item())
    return sum(found) / max(kept.tokens, 1)


def _mean(values) -> tuple[float, float]:
    return values.mean().item(), values.std().item() / math.sqrt(values.numel())


def _divergence(kld, same, shift) -> dict:
    (mean, error), (moved, moved_error) = _mean(kld), _mean(shift)
    return {
        "tokens": kld.numel(),
        "mean": mean,
        "stderr": error,
        "median": kld.quantile(0.5).item(),
        "p99": kld.quantile(0.99).item(),
        "top1": same.mean().item(),
        "ppl_ratio": math.exp(moved),
        "ppl_ratio_stderr": math.exp(moved) * moved_error,
    }
