"""The rows of a comparison: one worker process a scheme or folder, the 16-bit reference first.

While the reference is measured its scores are kept on disk, so that every later row gets its divergence from one pass of
its own; they are removed when the last row is done. A row that fails is a record with its reason, and the next one runs.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from . import catalog, loading, quality, schemes, texts, worker
from .errors import QwlibError
from .reference import Reference


def names(wanted: list[str]) -> list[str]:
    """The schemes and folders of quantized models to measure: the reference first, each once.

    Raises QwlibError for an unknown scheme, and for a folder without a quantized model.
    """
    found = [str(Path(name)) if _is_folder(name) else schemes.find(name).name for name in wanted]
    return list(dict.fromkeys([schemes.REFERENCE, *found]))


def _is_folder(name: str) -> bool:
    """Whether this is a folder that holds a quantized model, and no scheme.

    Raises QwlibError for another folder.
    """
    if name in schemes.SCHEMES or not Path(name).is_dir():
        return False
    if loading.saved_scheme(catalog.find(name)) is None:
        raise QwlibError(f"{name} holds a 16-bit model: measure it with --model, or name a folder of a quantized one")
    return True


def rows(model: str, wanted: list[str], folder: Path, **job) -> Iterator[dict]:
    """The records of `model` under each scheme, as they come; each is written into `folder`.

    `job` holds keys of a worker's job beside model and scheme; with `quality` every row but the first gets `quality.kld`.

    Raises QwlibError for a mistake in the job; what goes wrong while a row is measured is a record with a `failure`.
    """
    scored = job.pop("quality", None)
    if scored:
        quality.parse(scored.get("protocol", "gptq-512"))
        texts.read(scored.get("text"))
    with Reference.temporary() if scored else contextlib.nullcontext() as kept:
        for name in names(wanted):
            row = {"model": model, "scheme": name}
            if _is_folder(name):
                row = {"model": name, "scheme": loading.saved_scheme(catalog.find(name))}
            each = worker.complete(row | job)
            if scored:
                finished = (kept.folder / "facts.json").is_file()
                role = "keep" if name == schemes.REFERENCE else "reference" if finished else None
                each["quality"] = scored | ({role: str(kept.folder)} if role else {})
            yield worker.spawn(each, Path(folder) / f"{_stem(each)}.json")


def _stem(job: dict) -> str:
    model = Path(job["model"]).name if Path(job["model"]).is_dir() else job["model"].replace("/", "--")
    shape = f"{job['batch']}x{job['prompt_tokens']}+{job['new_tokens']}"
    return f"{model}-{job['weights']}-{job['scheme']}-{shape}".strip("-.")
