"""A model quantized into an artefact: the folder that can be loaded, measured and passed on.

What bitsandbytes quantizes while it loads is loaded and saved. Every other maker reads files and writes files, in a process
of its own, in whichever environment has it: it may crash, take all memory or change settings of the libraries it uses, and
nobody else notices.

    python -m qwlib.loading.quantizing JOB.json
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

from .. import files, schemes
from ..backends import BACKENDS, environment
from ..errors import QwlibError
from ..guard import guards, judging
from ..machine import about, devices
from ..machine.processes import last_word
from ..models import artefacts, catalog, checkpoints, estimates
from . import calibration
from .load import load


def quantize(
    model: str,
    scheme: str,
    out: Path | None = None,
    *,
    group_size: int | None = None,
    text: str | None = None,
    timeout: float = 6 * 3600,
) -> Path:
    """The folder of `model` quantized under `scheme`: made now, or found where the same request made it before.

    `out` defaults to a folder in the cache. `group_size`: weights that share a scale, for schemes where it can be chosen.
    `text`: what a calibrated scheme reads, a file, `wikitext2`, or a guard's name for its own prompts
    (`judging.calibration_text`); else the standard library's docstrings.

    Raises QwlibError for an unknown model or scheme, one that can't be saved or is not quantized, a group size that does not
    divide, a model that is quantized already or has an adapter, a backend or device that is not there, a disk without room, an
    `out` that holds something else, and a maker that failed.
    """
    row, scheme = catalog.find(model), schemes.find(scheme).grouped(group_size)
    _check(row, scheme, text)
    device, _ = devices.pick_device()
    dtype, _ = devices.pick_dtype(scheme, device)
    wanted = {"source": checkpoints.source(row), "scheme": scheme.name, "dtype": str(dtype).removeprefix("torch.")}
    if scheme.group:
        wanted["group_size"] = scheme.group
    if scheme.calibrated:
        text, wanted["calibration"] = _calibration(row, text, device.type)
    folder = Path(out).expanduser().absolute() if out is not None else _place(wanted)
    try:
        with files.alone(folder):
            if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
                _make(row, scheme, folder, wanted, text, timeout)
        return _found(folder, wanted)
    except OSError as error:
        raise QwlibError(f"{folder} can't be written: {error.strerror or error}") from None


def _make(row: catalog.Model, scheme: schemes.Scheme, folder: Path, wanted: dict, text: str | None, timeout) -> None:
    """Fill `folder` with what is wanted, its manifest last."""
    device = devices.pick_device()[0]
    _check_disk(row, scheme, folder)
    with files.new_folder(folder) as made:
        began = time.perf_counter()
        if scheme.maker:
            found = _apart(row, scheme, made, wanted | {"text": text, "device": str(device)}, timeout)
        else:
            found = {}
            with load(row, scheme) as lm:
                lm.save(made)
        if not artefacts.is_complete(artefacts.parts(made)):
            raise QwlibError(f"{scheme.name} could not be made: its maker wrote no weights")
        _tidy(made)
        found["seconds"] = round(time.perf_counter() - began, 1)
        if "calibration" in wanted:
            found["calibration"] = wanted["calibration"] | {"sequences": found.pop("sequences")}
        artefacts.seal(made, **(wanted | found), made_on=device.type)


def _tidy(made: Path) -> None:
    """Take out what loading never reads: makers leave logs."""
    kept = {made / name for name in artefacts.parts(made)}
    for path in set(made.iterdir()) - kept - {path.parent for path in kept}:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _check(row: catalog.Model, scheme: schemes.Scheme, text: str | None) -> None:
    if scheme.bits_per_weight >= 16 and not scheme.maker:
        raise QwlibError(f"{scheme.name} quantizes nothing: choose a scheme with fewer bits")
    if scheme.unsavable:
        raise QwlibError(scheme.unsavable)
    if text and not scheme.calibrated:
        raise QwlibError(f"{scheme.name} reads no text while it quantizes: leave out the calibration text")
    if row.adapter:
        base = row.source or catalog.base(row).name
        raise QwlibError(f"{row.name} is an adapter over {base}: `python -m qwlib merge` first, and name its folder")
    if saved := checkpoints.saved_scheme(row):
        raise QwlibError(f"{row.name} is {saved} already: name the 16-bit model that it was made from")
    if scheme.made_on == "cuda" and devices.pick_device()[0].type != "cuda":
        raise QwlibError(
            f"{scheme.name} is made on a GPU only, and PyTorch sees none: load an artefact that was made on one"
        )
    if scheme.group:
        _check_groups(row, scheme)


def _calibration(row: catalog.Model, text: str | None, device: str) -> tuple[str, dict]:
    """The text that a calibrated scheme reads, and the facts on it."""
    if text not in guards.GUARDS:
        text, name = calibration.read(text)
        return text, calibration.facts(name, device, text)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoints.folder(row))
    name, text = f"{text}'s prompts", judging.calibration_text(text, tokenizer)
    return text, calibration.facts(name, device, text, tokenizer)


def _check_groups(row: catalog.Model, scheme: schemes.Scheme) -> None:
    shapes = estimates.meta_model(row)
    for name, fmt in schemes.plan(shapes, scheme).items():
        width = shapes.get_submodule(name).weight.shape[-1]
        if fmt == scheme.linear and width % scheme.group:
            fits = " or ".join(str(size) for size in (128, 64, 32, 16) if width % size == 0) or "another scheme"
            raise QwlibError(f"groups of {scheme.group} do not divide the {width} inputs of {name}: choose {fits}")


def _apart(row, scheme, made: Path, job: dict, timeout: float) -> dict:
    """Quantize in a process of its own; the facts for the manifest come back."""
    job = job | {"folder": checkpoints.folder(row), "out": str(made)}
    with tempfile.TemporaryDirectory() as folder:
        source, result = files.write_text(Path(folder) / "job.json", json.dumps(job)), Path(folder) / "result.json"
        call = environment.command(scheme.maker, "qwlib.loading.quantizing", str(source), str(result))
        # a session of its own, so that the converters that it starts end with it; logs that makers write go to `folder`
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(**call, **pipes, cwd=folder, start_new_session=True) as process:
            try:
                _, said = process.communicate(timeout=timeout)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, subprocess.TimeoutExpired):
                    raise QwlibError(f"{scheme.name} was stopped after {timeout:.0f} s") from None
                raise
        if why := last_word(process.returncode, said):
            raise QwlibError(f"{scheme.name} could not be made: {why}")
        return json.loads(result.read_text()) if result.is_file() else {}


def main() -> None:
    """The other side of `_apart`."""
    import torch
    from transformers import AutoTokenizer

    job = json.loads(Path(sys.argv[1]).read_text())
    scheme = schemes.find(job["scheme"]).grouped(job.get("group_size"))
    facts, chosen = {"tools": about.packages()}, None
    try:
        if scheme.calibrated:
            tokenizer = AutoTokenizer.from_pretrained(job["folder"])
            chosen = calibration.make(tokenizer, job["text"], job["calibration"])
            facts["sequences"] = chosen.facts["sequences"]
        module = BACKENDS[scheme.maker].load_module()
        made = module.quantize(job["folder"], scheme, Path(job["out"]), chosen, torch.device(job["device"]))
    except QwlibError as error:
        sys.exit(str(error))
    except Exception as error:  # whatever a maker raises is told in one line, the trace before it
        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
    files.write_text(Path(sys.argv[2]), json.dumps(facts | ({"settings": made} if made else {})))


def _found(folder: Path, wanted: dict) -> Path:
    """`folder` if it holds what is wanted: made just now, at an earlier time, or by another process that was faster."""
    found = artefacts.verify(folder) if folder.is_dir() else None
    if found is None or not artefacts.same(found["source"], wanted["source"]) or not _contains(found, wanted):
        raise QwlibError(f"{folder} holds something else: name another folder, or remove that one")
    return folder


def _contains(found: dict, wanted: dict) -> bool:
    asked = {key: value for key, value in wanted.items() if key != "source"}
    return all(
        _contains(found.get(key, {}), value) if isinstance(value, dict) else found.get(key) == value
        for key, value in asked.items()
    )


def _place(wanted: dict) -> Path:
    key = files.sha256_text(json.dumps(wanted, sort_keys=True))[:16]
    return files.cache_dir() / "artefacts" / f"{wanted['source']['name'].replace('/', '--')}-{wanted['scheme']}-{key}"


def _check_disk(row: catalog.Model, scheme: schemes.Scheme, folder: Path) -> None:
    need = 1.1 * estimates.held_bytes(row, scheme) + 5e7  # names, tokenizer
    if scheme.maker == "llama.cpp":
        need += estimates.held_bytes(row, "bf16")  # the 16-bit file that it quantizes
    above = next(parent for parent in folder.parents if parent.is_dir())
    free = shutil.disk_usage(above).free
    if need > free:
        raise QwlibError(
            f"{row.name} in {scheme.name} takes {need / 1e9:.1f} GB on disk, {above} has {free / 1e9:.1f} free"
        )


if __name__ == "__main__":
    main()
