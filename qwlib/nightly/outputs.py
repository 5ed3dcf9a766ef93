"""The outputs that committed notebooks carry, so that they can be read without being run.

`take` puts the outputs of an executed copy under the cells of the notebook that it was made from, and notes the hash of the
source that they belong to. What differs from run to run for no reason is left out: counters, times, widgets, progress bars,
what is written to standard error, and the random names in pandas' styles. Pictures get a palette, which makes them smaller.

Cells with the tag `gpu` show two runs. On a machine without a GPU they print why they were skipped. Under that stands what a
run on a GPU gave, after a line that names the GPU, the packages and the parameters. A GPU's run writes into those cells only.
"""

import base64
import io
import json
import re
from datetime import date
from pathlib import Path

from .. import files
from ..errors import QwlibError
from . import runner

# of the notebook's metadata: {"source": hash, "size": …, "date": …, "gpu": the hash of the GPU's cells}
KEY = "qwlib"
GPU = "gpu"
KINDS = ("text/html", "text/markdown", "text/latex", "text/plain", "image/png")
INJECTED = "injected-parameters"  # the tag of the cell that papermill adds
COLOURS = 128  # of a picture's palette


def source_hash(notebook: dict) -> str:
    """Twelve hex digits of what a notebook's cells say, whatever stands under them.

    The badge in the first line and the set-up cell are left out: they name the address, which a fork changes.
    """
    cells = [cell for cell in notebook["cells"] if "setup" not in cell["metadata"].get("tags", [])]
    said = [[cell["cell_type"], "".join(cell["source"])] for cell in cells]
    said[0][1] = said[0][1].partition("\n")[2] if "colab-badge" in said[0][1] else said[0][1]
    return files.sha256_text(json.dumps(said))[:12]


def gpu_hash(notebook: dict) -> str | None:
    """Twelve hex digits of what the cells for a GPU say; None where there are none."""
    said = ["".join(cell["source"]) for cell in notebook["cells"] if GPU in cell["metadata"].get("tags", [])]
    return files.sha256_text(json.dumps(said))[:12] if said else None


def stale(path: Path, *, gpu: bool = False) -> bool:
    """Whether a notebook's source has changed since its outputs were made, or it has none; with `gpu`, those of a GPU."""
    notebook = json.loads(Path(path).read_text(encoding="utf-8"))
    known = notebook["metadata"].get(KEY, {})
    return known.get(GPU) != gpu_hash(notebook) if gpu else known.get("source") != source_hash(notebook)


def take(executed: Path, path: Path, size: str, *, gpu: str = "") -> None:
    """Write the outputs of an executed copy into the notebook at `path`.

    `gpu`: a line of Markdown on the GPU that the copy ran on; then only the outputs of the cells for a GPU are taken, and stand
    under that line. Without it, what a GPU gave stays if those cells have not changed since.

    Raises QwlibError where the copy is of another source, holds an error, or names a folder of this machine.
    """
    notebook = json.loads(Path(path).read_text(encoding="utf-8"))
    copy = json.loads(Path(executed).read_text(encoding="utf-8"))
    ran = [cell for cell in copy["cells"] if INJECTED not in cell["metadata"].get("tags", [])]
    if source_hash({"cells": ran}) != source_hash(notebook):
        raise QwlibError(f"{path.name} has changed since it was executed: run it again")
    known = notebook["metadata"].get(KEY, {})
    current = known.get(GPU) == gpu_hash(notebook)
    for number, (cell, done) in enumerate(zip(notebook["cells"], ran, strict=True)):
        tagged = GPU in cell["metadata"].get("tags", [])
        if cell["cell_type"] != "code" or (gpu and not tagged):
            continue
        new = [kept for each in done["outputs"] if (kept := _clean(each))]
        if tagged:
            here, there = _split(cell.get("outputs", []))
            marked = [{"output_type": "display_data", "data": {"text/markdown": [gpu]}, "metadata": {KEY: GPU}}, *new]
            new = [*here, *(marked if new else [])] if gpu else [*new, *(there if current else [])]
        cell |= {"execution_count": None, "outputs": new}
        said = json.dumps(cell["outputs"])
        if any(output["output_type"] == "error" for output in cell["outputs"]):
            raise QwlibError(f"{path.name}, cell {number}: an error is no output to show")
        if own := next((place for place in _places(path) if place in said), None):
            raise QwlibError(f"{path.name}, cell {number} shows a folder of this machine, {own}")
    if not gpu:
        known = known | {"source": source_hash(notebook), "size": size, "date": f"{date.today()}"}
    if gpu or not current:
        known = known | {GPU: gpu_hash(notebook) if gpu else None}
    notebook["metadata"][KEY] = {name: value for name, value in known.items() if value}
    files.write_text(path, json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")


def _split(shown: list[dict]) -> tuple[list[dict], list[dict]]:
    """(outputs of the run without a GPU, those of the run on one)."""
    place = next((n for n, output in enumerate(shown) if output.get("metadata", {}).get(KEY) == GPU), len(shown))
    return shown[:place], shown[place:]


def _places(path: Path) -> list[str]:
    """Folders that tell whose machine this is."""
    return [str(place) for place in (Path.home(), Path(path).resolve().parents[1]) if len(place.parts) > 1]


def _clean(output: dict) -> dict | None:
    kind = output["output_type"]
    if kind == "error":
        return output
    if kind == "stream":
        text = re.sub(r"[^\n]*\r(?!\n)", "", runner.hide_tokens("".join(output["text"])))
        return {"output_type": kind, "name": "stdout", "text": _lines(text)} if output["name"] == "stdout" else None
    if any("widget" in each for each in output["data"]):
        return None
    data = {name: output["data"][name] for name in KINDS if name in output["data"]}
    for name, content in data.items():
        if name == "image/png":
            data[name] = smaller("".join(content)) + "\n"
        else:
            data[name] = _lines(_renamed(runner.hide_tokens("".join(content))))
    counted = {"execution_count": None} if kind == "execute_result" else {}
    return {"output_type": kind, "data": data, "metadata": {}} | counted


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def _renamed(text: str) -> str:
    """The random names of pandas' styles, `T_3fa85`, in the order of their appearance."""
    names = list(dict.fromkeys(re.findall(r"\bT_[0-9a-f]{5}(?=[\s\"_#])", text)))
    for number, name in enumerate(names):
        text = text.replace(name, f"T_{number}")
    return text


def smaller(png: str) -> str:
    """A picture in base64 with a palette of `COLOURS`, where that makes it smaller."""
    from PIL import Image

    old, out = base64.b64decode(png), io.BytesIO()
    image = Image.open(io.BytesIO(old)).convert("RGB")
    image.quantize(COLOURS, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    new = out.getvalue()
    return base64.b64encode(min(old, new, key=len)).decode()


def refresh(plans: list[runner.Plan], out: Path, size: str, *, gpu: bool = False) -> list[runner.Outcome]:
    """Execute notebooks one by one, and take over the outputs of each that passes; with `gpu`, those of its cells for a GPU."""
    outcomes, _ = runner.run(plans, out)
    for plan, outcome in zip(plans, outcomes, strict=True):
        if outcome.status == "passed":
            take(outcome.executed, plan.path, size, gpu=_told(outcome.record["env"], plan.parameters) if gpu else "")
    return outcomes


def _told(env: dict, parameters: dict) -> str:
    versions = ", ".join(f"{name} {env['packages'][name]}" for name in ("torch", "transformers", "bitsandbytes"))
    chosen = ", ".join(f"`{name} = {json.dumps(value)}`" for name, value in parameters.items())
    return f"**On one {env['device']}** ({versions}; {date.today()}{chosen and '; with ' + chosen}):"
