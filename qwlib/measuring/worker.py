"""One job, one process, one record.

A job is plain JSON: `{"model", "scheme", "weights", "batch", "prompt_tokens", "new_tokens", "runs", "warmup", "batches", "ask",
"engine", "quality": {"protocol", "blocks", "text", "keep", "reference"}}`, all but the first two optional. `batches` are more
batch sizes to time; `ask` is a question to answer; `engine` as in `Lm.use`; `keep` is an empty folder for the scores of a
reference, `reference` a folder where they were kept. `run` does a job in this process; `spawn` does it in a fresh one, in
whichever environment has the backend, so that peaks of memory are the job's own, jobs can't disturb each other, and a crash or
an out-of-memory kill becomes a record with its reason. Another environment or machine can run the same line:

    python -m qwlib.measuring.worker JOB.json RECORD.json
"""

import json
import subprocess
import sys
import traceback
from pathlib import Path

from .. import files, schemes
from ..backends import environment
from ..errors import QwlibError
from ..loading import calibration
from ..loading.load import load
from ..machine import clock, processes
from ..models import catalog, checkpoints, estimates, texts
from . import describing, quality, record, timing
from .reference import Reference

DEFAULTS = {
    "weights": "trained",
    "batch": 1,
    "prompt_tokens": 64,
    "new_tokens": 64,
    "runs": 5,
    "warmup": 1,
    "batches": [],
    "ask": None,
    "engine": None,
    "quality": None,
}


def complete(job: dict) -> dict:
    """The job with defaults filled in.

    Raises QwlibError for an unknown key or a value of the wrong kind.
    """
    known = {"model": str, "scheme": str, "weights": str, "batches": list, "quality": dict | None}
    known |= {"ask": str | None, "engine": str | None}
    for key, value in job.items():
        if key not in known | DEFAULTS:
            raise QwlibError(f"unknown key {key!r} in a job: known are {', '.join(dict.fromkeys([*known, *DEFAULTS]))}")
        if not isinstance(value, known.get(key, int)):
            raise QwlibError(f"job key {key!r} must be {known.get(key, int)}, not {value!r}")
    if missing := {"model", "scheme"} - set(job):
        raise QwlibError(f"a job needs {' and '.join(sorted(missing))}")
    return DEFAULTS | job


def run(job: dict) -> dict:
    """Load, measure memory, speed and (where asked) quality; the record comes back."""
    job = complete(job)
    wanted = _text(job["quality"]) if job["quality"] is not None else None  # a mistake shows before anything is loaded
    row, scheme = catalog.find(job["model"]), schemes.find(job["scheme"])
    held = checkpoints.manifest(row)
    if wanted and held and "calibration" in held:
        calibration.check(held["calibration"], wanted["text"])
    with processes.importing():
        estimate = estimates.estimate(row, scheme)
    shape = {key: job[key] for key in ("batch", "prompt_tokens", "new_tokens")}
    with load(row, scheme, weights=job["weights"], engine=job["engine"]) as lm:
        speed = timing.measure_speed(lm, **shape, runs=job["runs"], warmup=job["warmup"])
        bandwidth = clock.copy_bandwidth(lm.device)
        if "decode_tok_s" in speed:
            steps_per_s = speed["decode_tok_s"] / job["batch"]
            speed["copy_bytes_per_s"] = bandwidth
            speed["roofline_share"] = steps_per_s / timing.roofline(lm, bandwidth)
        measured = dict(lm.memory)
        measured["kv_bytes_per_token"] = estimate.kv_bytes_per_token
        after = sum(lm.engine.held().values())
        if after != measured["weights_bytes"] + measured["state_bytes"]:
            measured["repacked_bytes"] = after
        peak = timing.request_peak(lm, **shape)
        if peak is not None:
            measured["request_peak_bytes"] = peak
        scored = _quality(lm, **wanted) if wanted else None
        timed = {"runs": job["runs"], "warmup": job["warmup"]}
        answer = _ask(lm, job["ask"], job["new_tokens"]) if job["ask"] else None
        sweep = [timing.measure_speed(lm, **(shape | {"batch": size}), **timed) for size in job["batches"]]
        result = record.new(
            "bench",
            model=describing.describe_model(lm, estimate.parameters),
            scheme=describing.describe_scheme(lm.scheme, lm.manifest),
            artefact=describing.describe_artefact(lm.manifest) if lm.manifest else None,
            memory=measured,
            speed=speed,
            quality=scored,
            sweep=sweep or None,
            answer=answer,
        )
        for key in ("arithmetic", "arithmetic_reason"):  # of a library that is not PyTorch nothing is known
            result["env"].pop(key, None)
        result["env"] |= describing.describe_choices(lm)
    return record.validate(result)


def _text(wanted: dict) -> dict:
    if unknown := set(wanted) - {"protocol", "blocks", "text", "keep", "reference"}:
        raise QwlibError(f"unknown key {min(unknown)!r} in a job's quality")
    text, name = texts.read(wanted.get("text"))
    quality.parse(protocol := wanted.get("protocol", "gptq-512"))
    out = {"text": text, "name": name, "protocol": protocol, "blocks": wanted.get("blocks")}
    if wanted.get("reference"):
        out["reference"] = Reference.read(wanted["reference"])
    if wanted.get("keep"):
        out["keep"] = Reference(wanted["keep"])
    return out


def _quality(lm, *, text: str, name: str, **options) -> dict:
    return {"text": name} | quality.measure(lm, text, **options)


def _ask(lm, question: str, new_tokens: int) -> dict:
    """The answer, greedy, up to the end of its text or `new_tokens`."""
    ids = lm.stream(lm.chat(question), new_tokens=new_tokens, stop_at_eos=True)[0]
    return {"question": question, "text": lm.tokenizer.decode(ids, skip_special_tokens=True), "tokens": len(ids)}


def spawn(job: dict, path: Path, *, timeout: float = 3600) -> dict:
    """Run the job in a fresh process; the record that it wrote, or one whose `failure` says why there is none.

    Either way it is written to `path`.
    """
    return measured(complete(job), schemes.find(job["scheme"]), path, timeout=timeout)


def measured(
    job: dict, scheme: schemes.Scheme, path: Path, *, timeout: float = 3600, called: str | None = None
) -> dict:
    """The same for a complete job; `called` is the model's name in a failure where the job names an artefact made from it."""
    path = Path(path)
    path.unlink(missing_ok=True)
    source = files.write_text(path.with_suffix(".job"), json.dumps(job))
    try:
        call = environment.command(scheme.backend, "qwlib.measuring.worker", str(source), str(path))
        done = subprocess.run(**call, capture_output=True, text=True, timeout=timeout)
        reason = processes.last_word(done.returncode, done.stderr)
        if reason is None:
            return record.read(path)
    except subprocess.TimeoutExpired:
        reason = f"stopped after {timeout:.0f} s"
    except QwlibError as error:
        reason = str(error)
    finally:
        source.unlink(missing_ok=True)
    return fail(job | {"model": called or job["model"]}, scheme, reason, path)


def fail(job: dict, scheme: schemes.Scheme, reason: str, path: Path, *, skipped: bool = False) -> dict:
    """The record of a job that gave no figures, written to `path`; `skipped` if it was not even tried."""
    model = "+".join(Path(part).name if Path(part).exists() else part for part in job["model"].split("+"))
    failed = record.new(
        "bench",
        model={"name": model, "weights": job["weights"]},
        scheme=describing.describe_scheme(scheme),
        failure={"reason": reason} | ({"skipped": True} if skipped else {}),
    )
    record.write(failed, path)
    return failed


def main() -> None:
    job, path = sys.argv[1:]
    with processes.whole_process():
        try:
            record.write(run(json.loads(Path(job).read_text())), Path(path))
        except QwlibError as error:
            print(error, file=sys.stderr)
            sys.exit(2)
        except Exception as error:  # the reason of a row is one line; the whole trace comes before it
            traceback.print_exc()
            print(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}", file=sys.stderr)
            sys.exit(1)


if __name__ == "__main__":
    main()
