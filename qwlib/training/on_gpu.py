"""Fine-tuning of large models on a GPU: rows that were measured on an H100, for those who have none, and new ones.

`h100()` reads `h100.json`, which comes with the package and which `benchmarks/gpu_finetuning.py` wrote. `measured` makes rows of
the same form on this machine's GPU. Weights are random there: that changes neither bytes nor times.
"""

import json
import random
import tempfile
from collections.abc import Iterable
from pathlib import Path

from .. import files
from ..errors import QwlibError
from ..models import catalog, embedded
from .finetune import finetune

FILE = Path(__file__).with_name("h100.json")
LENGTH = 512  # tokens of each example
# a token each
WORDS = "the of and to in is for on with as by at from that this not are was be or"

_NUMBER, _TEXT = {"type": "number", "exclusiveMinimum": 0}, {"type": "string", "minLength": 1}
_COUNT = {"type": "integer", "minimum": 1}
JOB = {
    "model": _TEXT,
    "scheme": _TEXT,
    "method": _TEXT,
    "batch": _COUNT,
    "length": _COUNT,
    "recompute": {"type": "boolean"},
    "gpus": _COUNT,
}
FOUND = {
    "weights_bytes": _COUNT,
    "peak_bytes": _COUNT,
    "step_s": _NUMBER,
    "tok_s": _NUMBER,
    "trained_parameters": _COUNT,
}
ROW = {
    "type": "object",
    "properties": JOB | FOUND | {"failure": _TEXT},
    "required": list(JOB),
    "if": {"not": {"required": ["failure"]}},
    "then": {"required": list(FOUND)},
}
SCHEMA = {
    "type": "object",
    "properties": {
        "device": _TEXT,
        "date": {"type": "string", "pattern": r"^\d{4}-\d\d-\d\d$"},
        "packages": {"type": "object", "additionalProperties": _TEXT},
        "command": _TEXT,
        "rows": {"type": "array", "items": ROW, "minItems": 1},
    },
    "required": ["device", "date", "packages", "command", "rows"],
    "additionalProperties": False,
}


def h100(file: Path = FILE) -> dict:
    """The record that comes with the package: device, date, packages, command, and `rows`.

    A row is a run: `JOB` says what was trained, `FOUND` what was measured. `peak_bytes` includes the weights and is that of one
    GPU, `step_s` is the median step, and `tok_s` the tokens of all GPUs at that step. A row with `failure` has none of them.

    Raises QwlibError where the file is missing or not what `SCHEMA` says.
    """
    try:
        record = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise QwlibError(f"{file} can't be read ({error}): install qwlib again") from None
    if why := files.misfit(record, SCHEMA):
        raise QwlibError(f"{file} is not a valid record: {why}")
    return record


def pick(rows: Iterable[dict], **job) -> list[dict]:
    """The rows of those jobs that did not fail, by batch: `pick(rows, scheme="bf16", recompute=False)`."""
    found = [row for row in rows if "failure" not in row and all(row[key] == job[key] for key in job)]
    return sorted(found, key=lambda row: row["batch"])


def parts(row: dict) -> dict[str, int]:
    """Bytes of a row's peak by part. Adapter, gradients and AdamW's state follow from the numbers that are trained.

    `activations` are the rest: what lives only for a moment is counted among them.
    """
    count = row["trained_parameters"]
    known = {
        "weights": row["weights_bytes"],
        "adapter": 4 * count,
        "gradients": 4 * count,
        "optimizer": 8 * count,
    }
    return known | {"activations": row["peak_bytes"] - sum(known.values())}


def measured(jobs: Iterable[dict], steps: int = 8) -> list[dict]:
    """A row for each job on this machine's first GPU. A job has `model`, `scheme`, `batch` and `recompute`.

    One that fails, for want of memory say, becomes a row with `failure`.
    """
    found = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "words.jsonl"
        write(data)
        for number, job in enumerate(jobs):
            row = {"method": "lora", "length": LENGTH, "gpus": 1} | job
            try:
                _, told = finetune(
                    job["model"],
                    job["scheme"],
                    data,
                    Path(folder) / f"row{number}",
                    weights="random",
                    batch=job["batch"],
                    recompute=job["recompute"],
                    longest=LENGTH,
                    validation=0,
                    steps=steps,
                    every=steps,
                )
            except QwlibError as error:
                found.append(row | {"failure": str(error)})
                continue
            held, training = told["memory"], told["training"]
            row["weights_bytes"] = held["weights_bytes"] + held["state_bytes"]
            found.append(row | {key: training[key] for key in FOUND if key in training})
            found[-1]["tok_s"] = job["batch"] * LENGTH / training["step_s"]
    return found


def write(path: Path, count: int = 64, model: str = catalog.EMBEDDED) -> None:
    """Conversations of `LENGTH` tokens each, in the tokenizer of an embedded model, which random weights borrow."""
    import transformers

    tokenizer, draw = transformers.AutoTokenizer.from_pretrained(embedded.checkpoint(model)), random.Random(0)

    def line(words: int) -> dict:
        said = [" ".join(draw.choices(WORDS.split(), k=many)) for many in (4, words)]
        return dict(zip(("prompt", "answer"), said, strict=True))

    def tokens(row: dict) -> int:
        said = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]
        return len(tokenizer(tokenizer.apply_chat_template(said, tokenize=False).rstrip())["input_ids"])

    words = LENGTH - tokens(line(100)) + 100
    files.write_text(path, "\n".join(json.dumps(line(words)) for _ in range(count)))
