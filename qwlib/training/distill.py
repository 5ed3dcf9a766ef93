"""`distill`: a model in a smaller form learns to give the scores of the 16-bit model that it was made from.

The teacher is the model itself in 16 bits. The student begins with its weights, in a form that rounds them (`forms.py`), and the
loss is the KL divergence of its probabilities from the teacher's at every position. So no labels are needed: any text will do
(`corpus.py`). This is distillation, and where the form rounds weights it is quantization-aware training.
"""

from collections.abc import Iterable
from pathlib import Path

from .. import files
from ..errors import QwlibError
from ..loading.load import load
from ..models import catalog
from . import corpus, forms, ranks, runs
from .examples import Tokens, split
from .settings import Settings

SOURCES = ("docstrings", "own")
WORTH_COMPILING = 200  # steps
CALIBRATION = 32  # rows that decide what is pruned
# the fewer levels, the further the weights have to move
RATES = {"int2": 3e-4, "ternary": 5e-4, "binary": 5e-4}


def distill(
    model: str,
    form: str,
    out: Path,
    *,
    data: Iterable[str] = SOURCES,
    rows: int = 8192,
    temperature: float = 1.0,
    device: str | None = None,
    compiled: bool | None = None,
    **settings,
) -> tuple[Path, dict]:
    """Train `model` in the form `form` (`forms.FORMS`) to give its own 16-bit scores. The folder `out` and its record come back.

    `data`: sources of text, each `docstrings`, `own` or a file (`corpus`). Each gives an equal part of `rows` rows of `longest`
    tokens.
    `temperature`: scores of both are divided by it before they are compared (arXiv 1503.02531). `compiled`: layers and loss go
    through torch.compile, which is the default on a GPU from 200 steps on. `settings` are those of
    `training.Settings`: `steps`, `batch`, `learning_rate`, …. The folder is a checkpoint in bfloat16. For `nf4-dq` it is to be
    quantized or loaded in that scheme. It has the values then that it was trained with, but for a few scales whose 8-bit code
    bitsandbytes rounds otherwise on a CPU. In the other forms its weights have these values already. A run that was killed goes
    on when the same call is made again.

    Raises QwlibError in one line for what `finetune` refuses, an unknown form or setting, and a text that can't be read.
    """
    form = forms.find(form)
    steps = {"steps": 400} if "epochs" not in settings else {}
    first = {"batch": 32, "learning_rate": RATES.get(form.name, 1e-4), "validation": 0.02}
    how = Settings.of(**(steps | first | settings | {"method": "full"}))
    if not 0 < temperature < 100:
        raise QwlibError(f"temperature must be more than 0 and less than 100, not {temperature}")
    out = Path(out).expanduser().absolute()
    if out.exists():
        raise QwlibError(f"{out} is there already: name a new folder")
    if how.shard:
        raise QwlibError("a student's weights can't be split over GPUs: leave out shard")
    if not (data := list(dict.fromkeys(data))):
        raise QwlibError(f"name a source of text: {' or '.join(SOURCES)}, or a file")
    row = catalog.find(model)
    if row.adapter:
        raise QwlibError(f"{row.name} has an adapter: `python -m qwlib merge` first, then distill the merged model")
    with (
        ranks.connected(device) as (own, device),
        load(row, "bf16", device=device, engine="eager") as teacher,
        load(row, "fp32", device=device, engine="eager") as lm,
    ):
        found = {source: corpus.rows(teacher, source, rows // len(data), how.longest, how.seed) for source in data}
        parts = _parts(_tokens(found.values()), how)
        import torch

        from .student import Distilled

        if compiled is None:
            compiled = lm.device.type == "cuda" and how.steps_over(len(parts[0])) >= WORTH_COMPILING
        seen = torch.tensor([row.ids for row in parts[0][:CALIBRATION]])
        student = Distilled(teacher, form, seen, temperature, compiled)
        return out, runs.run(lm, how, parts, out, own, data=_about(found, parts), found={}, student=student)


def _parts(rows: list[Tokens], how: Settings) -> list[list[Tokens]]:
    """(training, validation), each of whole batches, so that every batch has the same shape."""
    parts = split(rows, how.validation, how.seed)
    short = len(parts[1]) % how.batch
    parts = [parts[0], parts[1][short:]] if len(parts[1]) > short else [parts[0], parts[1]]
    parts[0] = parts[0][len(parts[0]) % how.batch :]
    if how.validation and not all(parts):
        raise QwlibError("there are too few rows to hold some back: give more, or validation=0")
    return parts


def _tokens(sources) -> list[Tokens]:
    """Rows of the sources as examples all of whose tokens are learnt."""
    found = [row.tolist() for rows in sources for row in rows]
    return [Tokens(row, row, line) for line, row in enumerate(found, start=1)]


def _about(found: dict, parts) -> dict:
    """The `data` of a record."""
    count = sum(rows.numel() for rows in found.values())
    told = "".join(files.sha256_text(rows.numpy().tobytes().hex()) for rows in found.values())
    return {
        "file": ", ".join(f"{Path(source).name} ({len(rows)} rows)" for source, rows in found.items()),
        "sha256": files.sha256_text(told),
        "examples": len(parts[0]),
        "validation_examples": len(parts[1]),
        "tokens": count,
        "learnt_tokens": count,
    }
