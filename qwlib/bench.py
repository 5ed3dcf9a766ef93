"""The rows of a comparison: one worker process a scheme or folder, the 16-bit reference first.

While the reference is measured its scores are kept on disk, so that every later row gets its divergence from one pass of
its own; they are removed when the last row is done. A row that fails is a record with its reason, and the next one runs.
Schemes that are read from files are quantized first, in a process of their own.
An artefact has to be made from the model of its rows; a foreign folder bears its own name, and so no ratios to the reference.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from . import artefacts, catalog, environment, files, loading, quality, quantizing, schemes, texts, worker
from .errors import QwlibError
from .reference import Reference


def names(wanted: list[str]) -> list[str]:
    """The schemes and folders of quantized models to measure: the reference first, each once.

    Raises QwlibError for an unknown scheme, and for a folder without a quantized model.
    """
    found = [_folder(name) or schemes.find(name).name for name in wanted]
    return list(dict.fromkeys([schemes.REFERENCE, *found]))


def _folder(name: str) -> str | None:
    """The path of a folder or GGUF file that holds a quantized model, None for a scheme's name.

    Raises QwlibError for another folder, or none where a path was meant.
    """
    if name in schemes.SCHEMES:
        return None
    if name.endswith(".gguf"):
        loading.saved_scheme(catalog.find(name))
        return str(Path(name).expanduser().resolve()) if Path(name).expanduser().is_file() else name
    path = Path(name).expanduser()
    if not path.is_dir():
        if "/" in name or name.startswith(("~", ".")):
            raise QwlibError(f"no such folder: {name}; name a scheme, or a folder that `quantize` wrote")
        return None
    if loading.saved_scheme(catalog.find(str(path.resolve()))) is None:
        raise QwlibError(f"{name} holds a 16-bit model: measure it with --model, or name a folder of a quantized one")
    return str(path.resolve())


def rows(model: str, wanted: list[str], folder: Path, **job) -> Iterator[dict]:
    """The records of `model` under each scheme, as they come; each is written into `folder`.

    `job` holds keys of a worker's job beside model and scheme; with `quality` every row but the first gets `quality.kld`.

    Raises QwlibError for a mistake in the job; what goes wrong while a row is measured is a record with a `failure`.
    """
    wanted = [_target(model, name) for name in names(wanted)]
    _check_folders(model, wanted, job)
    scored = job.pop("quality", None)
    if scored:
        quality.parse(scored.get("protocol", "gptq-512"))
        texts.read(scored.get("text"))
    with Reference.temporary() if scored else contextlib.nullcontext() as kept:
        for target in wanted:
            each = worker.complete(target | job)
            if scored:
                finished = (kept.folder / "facts.json").is_file()
                role = "keep" if target["scheme"] == schemes.REFERENCE else "reference" if finished else None
                each["quality"] = scored | ({role: str(kept.folder)} if role else {})
            path = Path(folder) / f"{_stem(each)}.json"
            try:
                if why := skipped(each):
                    yield worker.fail(each, why, path, skipped=True)
                    continue
                source = made(each)
            except QwlibError as error:
                yield worker.fail(each, str(error), path)
                continue
            yield worker.spawn(each | {"model": source}, path, called=each["model"])


def skipped(job: dict) -> str | None:
    """Why a job can't be done on this machine, None if it can: a backend or a device is not there."""
    scheme = schemes.find(job["scheme"])
    if scheme.maker and job.get("weights") == "random":
        return "is read from files: random weights have none"
    makes = _makes(job)
    for backend in (scheme.backend, scheme.maker) if makes else (scheme.backend,):
        python, why = environment.where(backend)
        if python is None:
            return why
    if scheme.made_on == "cuda" and (makes or not scheme.maker) and loading.pick_device()[0].type != "cuda":
        return f"{'is made' if scheme.maker else 'runs'} on a GPU only"
    return None


def made(job: dict) -> str:
    """What a job's worker loads: the model itself, or the artefact of a scheme that is read from files, made if it is not there.

    Raises QwlibError where it can't be made.
    """
    return str(quantizing.quantize(job["model"], job["scheme"])) if _makes(job) else job["model"]


def _makes(job: dict) -> bool:
    """Whether a row's files have to be quantized first."""
    return bool(schemes.find(job["scheme"]).maker) and loading.saved_scheme(catalog.find(job["model"])) is None


def _target(model: str, name: str) -> dict:
    """What to load for a row: `model` under a scheme, or a folder under the scheme that it was saved in."""
    if place := _folder(name):
        return {"model": place, "scheme": loading.saved_scheme(catalog.find(place))}
    return {"model": model, "scheme": name}


def _check_folders(model: str, targets: list[dict], job: dict) -> None:
    places = [target["model"] for target in targets if target["model"] != model]
    if places and job.get("weights") == "random":
        raise QwlibError("random weights have no folders: leave out --weights, or the folders")
    made = {place: manifest for place in places if (manifest := artefacts.read(place))}
    theirs = artefacts.source(catalog.find(model)) if made else None
    for place, manifest in made.items():
        if not artefacts.same(manifest["source"], theirs):
            raise QwlibError(f"{Path(place).name} was made from {manifest['source']['name']}, and not from {model}")


def _stem(job: dict) -> str:
    model = "+".join(Path(part).name if Path(part).is_dir() else part for part in job["model"].split("+"))
    model = model.replace("/", "--")
    if Path(job["model"]).exists():  # two folders of one name keep two records
        model = f"{Path(job['model']).name}-{files.sha256_text(str(Path(job['model']).resolve()))[:8]}"
    shape = f"{job['batch']}x{job['prompt_tokens']}+{job['new_tokens']}"
    parts = (model, job["weights"], job["scheme"], shape, job["engine"])
    return "-".join(part for part in parts if part).strip("-.")
