"""The rows of a comparison: one worker process a scheme or folder, the 16-bit reference first.

While the reference is measured its scores are kept on disk, so that every later row gets its divergence from one pass of
its own; they are removed when the last row is done. A row that fails is a record with its reason, and the next one runs.
Schemes that are read from files are quantized first, in a process of their own.
An artefact has to be made from the model of its rows; a foreign folder bears its own name, and so no ratios to the reference.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from .. import files, schemes
from ..backends import environment
from ..errors import QwlibError
from ..loading import quantizing
from ..machine import devices
from ..models import artefacts, catalog, checkpoints, texts
from ..schemes import Scheme
from . import quality, worker
from .reference import Reference

Target = tuple[catalog.Model, Scheme]  # what one row measures


def bench(model: str, wanted: list[str], folder: Path, **job) -> Iterator[dict]:
    """The records of `model` under each scheme, as they come; each is written into `folder`.

    `wanted` names schemes and folders or GGUF files of quantized models; `job` holds keys of a worker's job beside model and
    scheme. With `quality` every row but the first gets `quality.kld`.

    Raises QwlibError for a mistake in the job; what goes wrong while a row is measured is a record with a `failure`.
    """
    row = catalog.find(model)
    rows = targets(row, wanted)
    _check_folders(row, rows, job)
    scored = job.pop("quality", None)
    if scored:
        quality.parse(scored.get("protocol", "gptq-512"))
        texts.read(scored.get("text"))
    with Reference.temporary() if scored else contextlib.nullcontext() as kept:
        for row, scheme in rows:
            each = worker.complete({"model": row.address, "scheme": scheme.name} | job)
            if scored:
                finished = (kept.folder / "facts.json").is_file()
                role = "keep" if scheme.name == schemes.REFERENCE else "reference" if finished else None
                each["quality"] = scored | ({role: str(kept.folder)} if role else {})
            path = Path(folder) / f"{_stem(each)}.json"
            try:
                if why := skipped(row, scheme, each["weights"]):
                    yield worker.fail(each, scheme, why, path, skipped=True)
                    continue
                source = made(row, scheme)
            except QwlibError as error:
                yield worker.fail(each, scheme, str(error), path)
                continue
            yield worker.measured(each | {"model": source}, scheme, path, called=row.address)


def targets(row: catalog.Model, wanted: list[str]) -> list[Target]:
    """The model of `row` under each scheme, and each quantized folder or file under its own: the reference first, each once.

    Raises QwlibError for an unknown scheme, and for a folder without a quantized model.
    """
    found = [(row, schemes.find(schemes.REFERENCE))]
    for name in wanted:
        held = None if name in schemes.SCHEMES else _quantized(name)
        found.append((held, schemes.find(checkpoints.saved_scheme(held))) if held else (row, schemes.find(name)))
    return list({(each.address, scheme.name): (each, scheme) for each, scheme in found}.values())


def _quantized(name: str) -> catalog.Model | None:
    """The row of a folder or GGUF file that holds a quantized model, None where a scheme was meant.

    Raises QwlibError for another folder, or none where a path was meant.
    """
    path = Path(name).expanduser()
    if catalog.is_gguf(name):
        return catalog.find(str(path.resolve()) if path.is_file() else name)
    if not path.is_dir():
        if "/" in name or name.startswith(("~", ".")):
            raise QwlibError(f"no such folder: {name}; name a scheme, or a folder that `quantize` wrote")
        return None
    row = catalog.find(str(path.resolve()))
    if checkpoints.saved_scheme(row) is None:
        raise QwlibError(f"{name} holds a 16-bit model: measure it with --model, or name a folder of a quantized one")
    return row


def skipped(row: catalog.Model, scheme: Scheme, weights: str = "trained") -> str | None:
    """Why a row can't be measured on this machine, None if it can: a backend or a device is not there."""
    if scheme.maker and weights == "random":
        return "is read from files: random weights have none"
    makes = _makes(row, scheme)
    for backend in (scheme.backend, scheme.maker) if makes else (scheme.backend,):
        python, why = environment.where(backend)
        if python is None:
            return why
    if scheme.made_on == "cuda" and (makes or not scheme.maker) and devices.pick_device()[0].type != "cuda":
        return f"{'is made' if scheme.maker else 'runs'} on a GPU only"
    return None


def made(row: catalog.Model, scheme: Scheme) -> str:
    """What a row's worker loads: the model itself, or the artefact of a scheme that is read from files, made if it is not there.

    Raises QwlibError where it can't be made.
    """
    return str(quantizing.quantize(row, scheme)) if _makes(row, scheme) else row.address


def _makes(row: catalog.Model, scheme: Scheme) -> bool:
    """Whether a row's files have to be quantized first."""
    return bool(scheme.maker) and checkpoints.saved_scheme(row) is None


def _check_folders(model: catalog.Model, rows: list[Target], job: dict) -> None:
    folders = [row for row, _ in rows if row is not model]
    if folders and job.get("weights") == "random":
        raise QwlibError("random weights have no folders: leave out --weights, or the folders")
    for row in folders:
        held = checkpoints.manifest(row)
        if held and not artefacts.same(held["source"], checkpoints.source(model)):
            raise QwlibError(
                f"{Path(row.address).name} was made from {held['source']['name']}, and not from {model.address}"
            )


def _stem(job: dict) -> str:
    model = "+".join(Path(part).name if Path(part).is_dir() else part for part in job["model"].split("+"))
    model = model.replace("/", "--")
    if Path(job["model"]).exists():  # two folders of one name keep two records
        model = f"{Path(job['model']).name}-{files.sha256_text(str(Path(job['model']).resolve()))[:8]}"
    shape = f"{job['batch']}x{job['prompt_tokens']}+{job['new_tokens']}"
    parts = (model, job["weights"], job["scheme"], shape, job["engine"])
    return "-".join(part for part in parts if part).strip("-.")
