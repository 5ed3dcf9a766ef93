"""Records: one JSON file a measurement, with what was measured, where, when and how.

The schema stands below as data and is checked on writing and on reading, so a record that exists can be trusted. What was
not measured is absent: no null, no zero in its place, no NaN. New keys may come; the ones here keep their meaning.
Bytes are bytes, `_s` is seconds, `tok_s` is tokens a second.
"""

import json
from datetime import UTC, datetime
from pathlib import Path

from .. import files
from ..errors import QwlibError
from ..machine import about

SCHEMA = 1

_NUMBER, _TEXT, _COUNT = {"type": "number"}, {"type": "string"}, {"type": "integer", "minimum": 0}
_SUMMARY = {
    "type": "object",
    "properties": {"p50": _NUMBER, "p90": _NUMBER, "p95": _NUMBER, "p99": _NUMBER, "n": _COUNT},
    "required": ["p50", "p90", "p95", "n"],
}


def _part(required: str = "", **properties) -> dict:
    return {"type": "object", "properties": properties, "required": required.split()}


_SPEED = _part(
    "engine batch prompt_tokens new_tokens runs warmup load_s ttft_s e2e_s output_tok_s",
    engine=_TEXT,
    batch=_COUNT,
    prompt_tokens=_COUNT,
    new_tokens=_COUNT,
    runs=_COUNT,
    warmup=_COUNT,
    import_s=_NUMBER,
    load_s=_NUMBER,
    first_call_s=_NUMBER,
    engine_ready_s=_NUMBER,
    ttft_s=_SUMMARY,
    itl_s=_SUMMARY,
    tpot_s=_SUMMARY,
    e2e_s=_SUMMARY,
    output_tok_s=_NUMBER,
    decode_tok_s=_NUMBER,
    copy_bytes_per_s=_NUMBER,
    roofline_share=_NUMBER,
)
_LOSSES = {"type": "array", "items": _part("step loss", step=_COUNT, loss=_NUMBER)}
RECORD = _part(
    "schema kind created env",
    schema={"const": SCHEMA},
    kind={"type": "string", "minLength": 1},
    created={"type": "string", "pattern": r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00$"},
    model=_part(
        "name weights",
        artefact={"enum": ["qwlib", "foreign"]},
        name=_TEXT,
        source=_TEXT,
        revision=_TEXT,
        sha256=_TEXT,
        parameters=_COUNT,
        weights=_TEXT,
    ),
    scheme=_part("name backend bits_per_weight", name=_TEXT, backend=_TEXT, bits_per_weight=_NUMBER),
    env=_part(
        "python platform cpu device packages",
        python=_TEXT,
        platform=_TEXT,
        cpu=_TEXT,
        device=_TEXT,
        device_reason=_TEXT,
        engine_reason=_TEXT,
        dtype=_TEXT,
        dtype_reason=_TEXT,
        arithmetic=_TEXT,
        arithmetic_reason=_TEXT,
        threads=_COUNT,
        packages={"type": "object", "additionalProperties": _TEXT},
    ),
    memory=_part(
        "weights_bytes state_bytes",
        weights_bytes=_COUNT,
        state_bytes=_COUNT,
        repacked_bytes=_COUNT,
        load_peak_bytes=_COUNT,
        steady_bytes=_COUNT,
        request_peak_bytes=_COUNT,
        kv_bytes_per_token=_COUNT,
    ),
    artefact=_part(
        "file_bytes tools",
        file_bytes=_COUNT,
        sha256=_TEXT,
        seconds=_NUMBER,
        made_on=_TEXT,
        tools={"type": "object", "additionalProperties": _TEXT},
        settings={"type": "object"},
        calibration=_part(
            "text text_sha256 samples length tokens",
            text=_TEXT,
            text_sha256=_TEXT,
            samples=_COUNT,
            length=_COUNT,
            tokens=_COUNT,
        ),
    ),
    speed=_SPEED,
    sweep={"type": "array", "items": _SPEED},
    quality=_part(
        "protocol text text_sha256 tokens ppl ppl_stderr",
        protocol=_TEXT,
        text=_TEXT,
        text_sha256=_TEXT,
        tokens=_COUNT,
        ppl=_NUMBER,
        ppl_stderr=_NUMBER,
        bits_per_byte=_NUMBER,
        kld=_part(
            "reference tokens mean stderr median p99 top1 noise_floor",
            reference=_TEXT,
            tokens=_COUNT,
            mean=_NUMBER,
            stderr=_NUMBER,
            median=_NUMBER,
            p99=_NUMBER,
            top1=_NUMBER,
            noise_floor=_NUMBER,
            ppl_ratio=_NUMBER,
            ppl_ratio_stderr=_NUMBER,
        ),
    ),
    tasks={
        "type": "array",
        "items": _part(
            "model scheme task metric value n harness",
            model=_TEXT,
            scheme=_TEXT,
            task=_TEXT,
            metric=_TEXT,
            value=_NUMBER,
            stderr=_NUMBER,
            n=_COUNT,
            shots=_COUNT,
            batch=_COUNT,
            harness=_TEXT,
            sha256=_TEXT,
        ),
    },
    training=_part(
        "settings data steps losses trained_parameters frozen_fingerprint weights_sha256",
        settings={"type": "object"},
        data=_part(
            "file sha256 examples tokens learnt_tokens",
            file=_TEXT,
            sha256=_TEXT,
            examples=_COUNT,
            validation_examples=_COUNT,
            tokens=_COUNT,
            learnt_tokens=_COUNT,
        ),
        steps=_COUNT,
        resumed_at=_COUNT,
        sharded={"type": "boolean"},
        kept_step=_COUNT,
        losses=_LOSSES,
        validation_losses=_LOSSES,
        step_s=_NUMBER,
        tok_s=_NUMBER,
        peak_bytes=_COUNT,
        predicted_bytes=_part(
            "total weights adapter gradients optimizer activations scores",
            weights=_COUNT,
            adapter=_COUNT,
            gradients=_COUNT,
            optimizer=_COUNT,
            activations=_COUNT,
            scores=_COUNT,
            all_gradients=_COUNT,
            total=_COUNT,
        ),
        trained_parameters=_COUNT,
        trained_modules=_COUNT,
        form=_TEXT,
        temperature=_NUMBER,
        teacher_bytes=_COUNT,
        packed=_part("zeros bits_per_weight", levels=_COUNT, zeros=_NUMBER, bits_per_weight=_NUMBER),
        frozen_fingerprint=_TEXT,
        weights_sha256=_TEXT,
    ),
    notes={"type": "array", "items": _TEXT},
    answer=_part("question text tokens", question=_TEXT, text=_TEXT, tokens=_COUNT),
    failure=_part("reason", reason=_TEXT, skipped={"type": "boolean"}),
    rows={"type": "array", "items": {"type": "object"}},
) | {
    "if": {"properties": {"kind": {"const": "bench"}}},
    "then": {"required": ["model", "scheme"], "anyOf": [{"required": ["failure"]}, {"required": ["memory", "speed"]}]},
}


def validate(record: dict, where: str = "record") -> dict:
    """The record itself if it follows the schema.

    Raises QwlibError that names the first place where it does not.
    """
    if why := files.misfit(record, RECORD):
        raise QwlibError(f"{where} is not a valid record: {why}")
    if bad := next(_unmeasured(record), None):
        raise QwlibError(f"{where} is not a valid record: {bad} (leave out what was not measured)")
    return record


def _unmeasured(value, place: str = ""):
    if value is None:
        yield f"{place} is null"
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _unmeasured(inner, f"{place}.{key}".lstrip("."))


def write(record: dict, path: Path) -> Path:
    """Validate and write atomically; the path comes back."""
    validate(record)
    return files.write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")


def read(path: Path) -> dict:
    """Read and validate.

    Raises QwlibError for a missing, damaged, half-written or foreign file.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise QwlibError(f"there is no record at {path}") from None
    except (OSError, ValueError) as error:
        raise QwlibError(f"{path} is damaged or half-written ({error}): measure again") from None
    return validate(record, str(path))


def new(kind: str, **parts) -> dict:
    """A record of this moment and this machine; parts that are None are left out."""
    base = {"schema": SCHEMA, "kind": kind, "created": datetime.now(UTC).isoformat(), "env": about.environment()}
    return base | {name: part for name, part in parts.items() if part is not None}
