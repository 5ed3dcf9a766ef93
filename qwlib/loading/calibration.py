"""Calibration: the text that GPTQ, AWQ, AutoRound and ExLlama read while they quantize, and what it may not be.

Their methods weigh a layer's errors by the activations that a text causes, so a model quantized on its own test answers
better there than elsewhere. A manifest therefore says which text it was, and keeps a sample of its word sequences: before a
perplexity is measured, they are looked up in the text it is measured on, and shared ones are refused.

By default it is the docstrings of Python's standard library, which every machine has: prose about code, near in style to the
embedded evaluation text and none of its sentences. Name a file to calibrate for what a model is used for, or a guard for
its prompts.

Thirteen words in a row count as copied; source: the GPT-3 paper's rule for test data in training data (arXiv 2005.14165,
appendix C). One sequence in 16 is kept, chosen by its hash, so that a sample of another text picks the same ones.
"""

import ast
import functools
import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from .. import files
from ..errors import QwlibError
from ..models import texts

SIZES = {"cuda": (128, 512), "cpu": (32, 256)}  # samples × tokens; the GPTQ paper took 128 (× 2048)
WORDS = 13
KEPT = 16  # one of so many sequences
SHARED = 0.01  # share of copied sequences above which a text is refused


@dataclass(frozen=True)
class Calibration:
    """`rows`: token ids, samples × length. `facts` go into the manifest."""

    rows: list[list[int]]
    facts: dict


def facts(name: str | None, device: str, text: str | None = None, tokenizer=None) -> dict:
    """What is known before anything is quantized: text and its hash, samples, tokens a sample and in all.

    `name` is a file, `wikitext2` or None for the standard library's docstrings; `device` is cuda or cpu; `text` is what `read`
    gave, where it was read already. With a `tokenizer` a text that is too short for all samples gives as many as it has.

    Raises QwlibError where the text can't be read.
    """
    if text is None:
        text, name = read(name)
    samples, length = SIZES[device]
    if tokenizer is not None:
        samples = min(samples, len(_encoded(tokenizer, text).input_ids) // length)
    return {
        "text": name,
        "text_sha256": files.sha256_text(text),
        "samples": samples,
        "length": length,
        "tokens": samples * length,
    }


def read(name: str | None) -> tuple[str, str]:
    """(text, what it is called)."""
    if name is not None:
        return texts.read(name)
    return docstrings(), f"docstrings of Python {sysconfig.get_python_version()}'s standard library"


@functools.cache
def docstrings() -> str:
    """Docstrings of the standard library's top-level modules, in the order of their names, two newlines between them."""
    found = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_bytes())
        nodes = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
        found += [doc for node in nodes if (doc := ast.get_docstring(node)) and len(doc) > 200]
    return "\n\n".join(found)


def make(tokenizer, text: str, told: dict) -> Calibration:
    """Samples spread evenly over the text that `facts` told of.

    Raises QwlibError where the text is too short for as many.
    """
    samples, length = told["samples"], told["length"]
    encoded = _encoded(tokenizer, text)
    whole = len(encoded.input_ids) // length
    if whole < samples:
        raise QwlibError(f"{told['text']} has {whole} pieces of {length} tokens, calibration needs {samples}")
    starts = [whole * i // samples * length for i in range(samples)]
    places = encoded["offset_mapping"]
    used = [text[places[at][0] : places[at + length - 1][1]] for at in starts]
    rows = [encoded.input_ids[at : at + length] for at in starts]
    return Calibration(rows, told | {"sequences": sorted(set().union(*map(sequences, used)))})


def _encoded(tokenizer, text: str):
    return tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)


def sequences(text: str) -> set[str]:
    """Hashes of one in `KEPT` of the text's sequences of `WORDS` words."""
    words = text.split()
    hashes = (
        hashlib.sha256(" ".join(words[i : i + WORDS]).encode()).hexdigest()[:12] for i in range(len(words) - WORDS + 1)
    )
    return {digest for digest in hashes if int(digest, 16) % KEPT == 0}


def check(told: dict, text: str) -> None:
    """Raises QwlibError where more than `SHARED` of a calibration's kept sequences stand in `text`."""
    kept = set(told["sequences"])
    share = len(kept & sequences(text)) / max(len(kept), 1)
    if share > SHARED or told["text_sha256"] == files.sha256_text(text):
        raise QwlibError(
            f"{share:.0%} of what this model was calibrated on ({told['text']}) stands in the text it is to be measured on: "
            "name another text"
        )
