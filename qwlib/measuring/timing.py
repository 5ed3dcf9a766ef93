"""Speed of a loaded model: repeated requests of one fixed shape, summarised by percentiles.

A figure needs its shape: batch, prompt length, output length, how many runs. The first call at a shape pays for kernels,
caches and (on the CPU) bitsandbytes' repacking of weights, so it is reported apart as `first_call_s`, and warm-up runs
follow before anything counts. Lengths are fixed: exactly `new_tokens` come, whatever the model would like to say.

The roofline: one decoding step has to read every weight once, so steps per second can't exceed bandwidth over bytes.
`copy_bandwidth` measures the bandwidth on this machine, counting bytes read and bytes written. A share above 1 means
that weights stay in a cache.
"""

import time

from ..errors import QwlibError, whole_number
from ..machine import memory
from ..models import embedded
from ..running import streaming


def summary(values: list[float]) -> dict[str, float]:
    """Percentiles p50, p90, p95 and p99 with linear interpolation, and n; p99 is left out below 100 samples."""
    import numpy

    wanted = (50, 90, 95, 99) if len(values) >= 100 else (50, 90, 95)
    return {f"p{q}": float(numpy.percentile(values, q)) for q in wanted} | {"n": len(values)}


def prompt_ids(lm, *, batch: int, tokens: int):
    """`batch` rows of `tokens` ids: consecutive pieces of the embedded text, folded into the model's vocabulary."""
    import torch

    batch, tokens = whole_number(batch, "batch"), whole_number(tokens, "prompt_tokens")
    text = embedded.text()
    ids = lm.tokenizer(text[: 8 * batch * tokens], verbose=False).input_ids
    if not ids:
        raise QwlibError("the tokenizer gives no tokens: are its files beside the model?")
    while len(ids) < batch * tokens:
        ids = ids + ids
    return torch.tensor(ids[: batch * tokens]).remainder(lm.vocabulary).reshape(batch, tokens)


def time_requests(
    lm,
    *,
    batch: int = 1,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    runs: int = 5,
    clock: streaming.Clock = time.perf_counter,
) -> list[streaming.Timeline]:
    """Timelines of `runs` equal requests, the first included."""
    runs, new_tokens = whole_number(runs, "runs"), whole_number(new_tokens, "new_tokens")
    ids = prompt_ids(lm, batch=batch, tokens=prompt_tokens)
    return [streaming.time_stream(lm, ids, new_tokens=new_tokens, clock=clock) for _ in range(runs)]


def summarise(lines: list[streaming.Timeline]) -> dict:
    """Percentiles and rates over equal requests; what needs two tokens is left out where there is one."""
    batch, tokens, count = lines[0].batch, len(lines[0].stamps), len(lines)
    out = {
        "ttft_s": summary([line.ttft_s for line in lines]),
        "e2e_s": summary([line.e2e_s for line in lines]),
        "output_tok_s": batch * tokens * count / sum(line.e2e_s for line in lines),
    }
    if tokens > 1:
        decode_s = sum(line.e2e_s - line.ttft_s for line in lines)
        out["itl_s"] = summary([gap for line in lines for gap in line.itl_s])
        out["tpot_s"] = summary([line.tpot_s for line in lines])
        out["decode_tok_s"] = batch * (tokens - 1) * count / decode_s
    return out


def measure_speed(
    lm,
    *,
    batch: int = 1,
    prompt_tokens: int = 64,
    new_tokens: int = 64,
    runs: int = 5,
    warmup: int = 1,
    clock: streaming.Clock = time.perf_counter,
) -> dict:
    """The `speed` part of a record: a first call and `warmup` requests apart, then `runs` that count."""
    runs, warmup = whole_number(runs, "runs"), whole_number(warmup, "warmup", 0)
    shape = {"batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
    lm.engine.forget()  # a graph of a longer request would serve this one too, more slowly
    lines = time_requests(lm, **shape, runs=1 + warmup + runs, clock=clock)
    return {
        "engine": lm.engine.name,
        **shape,
        "runs": runs,
        "warmup": warmup,
        "import_s": lm.import_s,
        "load_s": lm.load_s,
        "first_call_s": lines[0].e2e_s,
        **({} if lm.engine.ready_s is None else {"engine_ready_s": lm.engine.ready_s}),
        **summarise(lines[1 + warmup :]),
    }


def roofline(lm, bandwidth: float) -> float:
    """Decoding steps a second that `bandwidth` (bytes a second) allows, if each step reads every weight once."""
    return bandwidth / lm.engine.read_bytes()


def request_peak(lm, *, batch: int, prompt_tokens: int, new_tokens: int) -> int | None:
    """Highest use of memory during one request over what the loaded model takes, in bytes; None where no meter exists."""
    lm.engine.forget()  # what a graph holds belongs to the request
    memory.give_back()
    before = memory.used_bytes(lm.device)
    if not memory.reset_peak(lm.device):
        return None
    lm.stream(prompt_ids(lm, batch=batch, tokens=prompt_tokens), new_tokens=new_tokens)
    peak = memory.peak_bytes(lm.device)
    return None if peak is None else max(peak - before, 0)
