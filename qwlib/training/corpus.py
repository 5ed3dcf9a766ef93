"""What a student reads while it learns to give its teacher's scores: rows of tokens, without labels.

- `docstrings`: the docstrings of all Python packages that are installed, without `pydoc_data`, whose text measures quality.
- `own`: the teacher's own words. Each text begins with a token that is drawn from the whole vocabulary, and goes on as the
  teacher's probabilities say (LLM-QAT, arXiv 2305.17888). It needs no data, and it is what the teacher has learnt to say.
- a file: any text in UTF-8.

Texts follow each other with an end-of-text token between them, and are cut into rows of one length. Both sources that are made
here are kept in the cache folder, because making them takes a minute or more.
"""

import ast
import itertools
import random
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from .. import files
from ..errors import QwlibError
from ..models import checkpoints, texts
from ..running.lm import text_ids
from ..running.sampling import Sampling

SHORTEST = 200  # characters of a docstring: shorter ones say little
AT_ONCE = 2048  # texts that the teacher writes at once on a GPU


def rows(lm, name: str, count: int, length: int, seed: int = 0):
    """`count` rows of `length` tokens (int32, on the host) from `docstrings`, `own` or a text file; fewer if there are no more.

    `lm` is the teacher. `seed` draws the order of docstrings, and the teacher's words.

    Raises QwlibError where a file can't be read, or has less than a row.
    """
    import torch

    if name not in ("docstrings", "own"):
        found = _cut([text_ids(lm.tokenizer, texts.read(name)[0])[0]], count, length)
        if not found:
            raise QwlibError(f"{name} has less than {length} tokens: name a longer text, or take shorter rows")
        return torch.tensor(found, dtype=torch.int32)
    from safetensors.torch import load_file, save_file

    key = repr((name, count, length, seed, _version(lm) if name == "own" else _packages(), lm.tokenizer.name_or_path))
    folder = files.cache_dir() / "corpus" / f"{name}-{files.sha256_text(key)[:16]}"
    with files.alone(folder):
        if not folder.is_dir():
            said = own_words(lm, length, seed) if name == "own" else _tokenized(lm, docstrings(seed))
            with files.new_folder(folder) as made:
                made_rows = torch.tensor(_cut(said, count, length), dtype=torch.int32)
                save_file({"rows": made_rows}, made / "rows.safetensors")
    return load_file(folder / "rows.safetensors")["rows"]


def _cut(streams: Iterable[list[int]], count: int, length: int) -> list[list[int]]:
    """The first `count` rows of `length` from the streams' tokens one after another; what is left over at the end is dropped."""
    found, held = [], []
    for stream in streams:
        held += stream
        while len(held) >= length:
            found.append(held[:length])
            held = held[length:]
            if len(found) == count:
                return found
    return found


def _version(lm) -> str:
    return repr(checkpoints.source(lm.row))


def _packages() -> str:
    import importlib.metadata

    return repr(sorted({(each.name, each.version) for each in importlib.metadata.distributions()}))


def docstrings(seed: int = 0) -> Iterator[str]:
    """Docstrings of the standard library and of all installed packages, file by file in an order drawn by `seed`, each once."""
    places = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    found = sorted({path for place in places for path in place.rglob("*.py") if "pydoc_data" not in path.parts})
    random.Random(seed).shuffle(found)
    seen = set()
    for path in found:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes in other people's strings
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError, RecursionError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= SHORTEST and text not in seen:
                    seen.add(text)
                    yield text


def _tokenized(lm, said: Iterable[str]) -> Iterator[list[int]]:
    for text in said:
        yield [*lm.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], lm.tokenizer.eos_token_id]


def own_words(lm, length: int, seed: int = 0) -> Iterator[list[int]]:
    """Texts of up to `length` tokens that the teacher writes, without end; each begins with any token that is not special."""
    import torch

    first = torch.tensor(sorted(set(range(len(lm.tokenizer))) - set(lm.tokenizer.all_special_ids)))
    draw = torch.Generator().manual_seed(seed)
    end, many = lm.tokenizer.eos_token_id, AT_ONCE if lm.device.type == "cuda" else 16
    for turn in itertools.count():
        begin = first[torch.randint(len(first), (many, 1), generator=draw)]
        sampling = Sampling(seed=seed + turn)
        found = lm.stream(begin, new_tokens=length - 1, stop_at_eos=True, sampling=sampling)
        for row in torch.cat([begin, found], 1).tolist():
            yield [*(row[: row.index(end)] if end in row else row), end]
