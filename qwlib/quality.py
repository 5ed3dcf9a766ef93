"""Perplexity under a named protocol.

One model has as many perplexities as there are ways to cut a text, so a value stands with its protocol, its text's hash
and its number of tokens, or it says nothing. Protocol `gptq-N` (the evaluation loop of the GPTQ paper's code, which
4-bit papers since have shared): the whole text is tokenized at once, cut into blocks of N tokens without overlap, the
remainder dropped; each block is read by itself and its N − 1 predicted tokens are scored; the mean is over all of them.

What it leaves out for now: sliding windows, llama.cpp's protocol, and the divergence from a reference model.
"""

import hashlib
import math
import re
from pathlib import Path

from . import embedded
from .errors import QwlibError


def perplexity(
    lm, text: str, *, protocol: str = "gptq-512", blocks: int | None = None, batch: int | None = None
) -> dict:
    """Perplexity of `text`, with its standard error, and bits per byte of the text that was scored.

    `blocks` limits how many blocks are read, `batch` (default: 2048 tokens' worth) how many at once. Returns the fields
    `protocol, tokens, ppl, ppl_stderr, bits_per_byte, text_sha256`. The standard error treats tokens as independent, as
    llama.cpp's does.

    Raises QwlibError for random weights, an unknown protocol, or a text shorter than one block.
    """
    import torch
    from tqdm.auto import tqdm

    if lm.weights == "random":
        raise QwlibError("random weights have no quality: load trained ones to measure perplexity")
    length = block_length(protocol)
    if not lm.tokenizer.is_fast:
        raise QwlibError("perplexity needs a tokenizer that tells where tokens stand in the text (a fast one)")
    encoded = lm.tokenizer(text, return_offsets_mapping=True, verbose=False)
    count = min(len(encoded.input_ids) // length, blocks or len(encoded.input_ids))
    if count == 0:
        raise QwlibError(f"the text has {len(encoded.input_ids)} tokens, {protocol} needs at least {length}")
    ids = torch.tensor(encoded.input_ids[: count * length]).view(count, length)
    pieces = tqdm(ids.split(batch or max(1, 2048 // length)), desc=protocol, disable=None, delay=2, leave=False)
    losses = torch.cat([_losses(lm, rows) for rows in pieces])
    mean, error = losses.mean().item(), losses.std().item() / math.sqrt(losses.numel())
    return {
        "protocol": protocol,
        "tokens": losses.numel(),
        "ppl": math.exp(mean),
        "ppl_stderr": math.exp(mean) * error,
        "bits_per_byte": losses.sum().item()
        / math.log(2)
        / _scored_bytes(text, encoded["offset_mapping"], count, length),
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def block_length(protocol: str) -> int:
    """N of `gptq-N`.

    Raises QwlibError for any other protocol.
    """
    match = re.fullmatch(r"gptq-(\d+)", protocol)
    if not match or int(match[1]) < 2:
        raise QwlibError(f"unknown protocol {protocol!r}: use gptq-N with a block length N, such as gptq-512")
    return int(match[1])


def _losses(lm, ids):
    """Negative log-likelihood in nats of every token but each row's first, float64, on the host."""
    import torch

    logits = lm.logits(ids)
    rows = [
        torch.nn.functional.cross_entropy(row[:-1].float(), target[1:].to(row.device), reduction="none")
        for row, target in zip(logits, ids, strict=True)
    ]
    return torch.cat(rows).double().cpu()


def _scored_bytes(text: str, spans: list[tuple[int, int]], count: int, length: int) -> int:
    """UTF-8 bytes between the start of each block's second token and the end of its last one."""
    return sum(len(text[spans[b * length + 1][0] : spans[(b + 1) * length - 1][1]].encode()) for b in range(count))


def read_text(path: str | None = None) -> tuple[str, str]:
    """(text, its name): a UTF-8 file that the user names, else the embedded text.

    Raises QwlibError where the file can't be read or is empty.
    """
    if path is None:
        return embedded.text(), embedded.text_name()
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise QwlibError(f"can't read the text {path}: {error}") from None
    if not text.strip():
        raise QwlibError(f"the text {path} is empty")
    return text, Path(path).name
