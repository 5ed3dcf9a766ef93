"""What decoding took on an H100, for those who have no GPU, and the kernels of a step on a GPU.

`h100()` reads `h100.json`, which comes with the package: a part of what `benchmarks/gpu.py` measured. `by_kind` sorts the kernels
of a profile into a few kinds of work, by their names, and `measured` takes such a profile of a loaded model.
"""

import json
import re
from pathlib import Path

from .. import files
from ..errors import QwlibError

FILE = Path(__file__).with_name("h100.json")
KINDS = ("4-bit products", "16-bit products", "attention", "norms and the rest")
# the first whose pattern a kernel's name has; libraries change their names, so new ones may have to be added
PATTERNS = {
    "4-bit products": r"4bit|quantize",
    "attention": r"fmha|flash|attention|sdpa|softmax",
    "16-bit products": r"gemm|gemv|nvjet|cutlass|cublas|splitk",
    "norms and the rest": "",
}
IDLE = "idle"
WAYS = ("bf16", "bitsandbytes", "our kernel")  # 16 bits, and nf4-dq by two libraries' kernels

_NUMBER, _TEXT = {"type": "number", "exclusiveMinimum": 0}, {"type": "string", "minLength": 1}
_COUNT = {"type": "number", "minimum": 0}


def _object(**properties) -> dict:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def _list(**properties) -> dict:
    return {"type": "array", "items": _object(**properties), "minItems": 1}


SCHEMA = _object(
    device=_TEXT,
    date={"type": "string", "pattern": r"^\d{4}-\d\d-\d\d$"},
    packages={"type": "object", "additionalProperties": _TEXT},
    command=_TEXT,
    model=_TEXT,
    copy_bytes_per_s=_NUMBER,
    bytes=_NUMBER,
    products=_list(rows=_NUMBER, bf16_ms=_NUMBER, bitsandbytes_ms=_NUMBER, apart_ms=_NUMBER, joined_ms=_NUMBER),
    profiles={
        "type": "object",
        "additionalProperties": _list(kind={"enum": [*KINDS, IDLE]}, count=_COUNT, ms=_COUNT),
        "required": list(WAYS),
    },
    speeds=_list(way={"enum": list(WAYS)}, engine=_TEXT, batch=_NUMBER, tok_s=_NUMBER),
)


def h100(file: Path = FILE) -> dict:
    """The record that comes with the package.

    `products`: ms of all linear layers of one token, by rows of x; `apart` is a launch for each layer, `joined` as few as there
    can be. `bytes`: of those weights in 4 bits. `profiles`: `by_kind` of a step by a CUDA graph, for each of `WAYS`. `speeds`:
    tokens/s of the whole model.

    Raises QwlibError where the file is not what `SCHEMA` says.
    """
    record = json.loads(Path(file).read_text(encoding="utf-8"))
    if why := files.misfit(record, SCHEMA):
        raise QwlibError(f"{file} is not a valid record: {why}")
    return record


def by_kind(kernels: dict[str, tuple[int, float]], step_ms: float) -> list[dict]:
    """The kernels of one step, by name (how many, their ms together), as a list of `kind`, `count` and `ms`.

    `ms` of `idle` is what is left of `step_ms`: no kernel ran then. It is 0 where kernels overlap and add up to more. In a model
    whose linear layers have 4 bits, the products in 16 bits are those of the output head.
    """
    found = {kind: {"kind": kind, "count": 0, "ms": 0.0} for kind in (*KINDS, IDLE)}
    for name, (count, ms) in kernels.items():
        kind = next(kind for kind, pattern in PATTERNS.items() if re.search(pattern, name, re.IGNORECASE))
        found[kind]["count"] += count
        found[kind]["ms"] += ms
    found[IDLE]["ms"] = max(0.0, step_ms - sum(each["ms"] for each in found.values()))
    return list(found.values())


def measured(lm, ids, *, new_tokens: int, step_ms: float) -> list[dict]:
    """`by_kind` of a decoding step of a model on a GPU, on average over a request; `step_ms`: its time without a profiler.

    The kernels of a request for one token, which reads the prompt alone, are taken off.
    """
    whole = _kernels(lm, ids, new_tokens)
    prompt = _kernels(lm, ids, 1)
    steps, found = new_tokens - 1, {}
    for name, (count, ms) in whole.items():
        count, ms = count - prompt.get(name, (0, 0.0))[0], ms - prompt.get(name, (0, 0.0))[1]
        if count > 0:
            found[name] = (round(count / steps), max(0.0, ms) / steps)
    return by_kind(found, step_ms)


def _kernels(lm, ids, new_tokens: int) -> dict[str, tuple[int, float]]:
    """Name → (how often a kernel ran, ms) in one request, after one that captures its graph."""
    from torch.profiler import ProfilerActivity, profile

    lm.stream(ids, new_tokens=new_tokens)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        lm.stream(ids, new_tokens=new_tokens)
    averages = [each for each in seen.key_averages() if each.device_type.name == "CUDA"]
    return {each.key: (each.count, each.self_device_time_total / 1e3) for each in averages}
