"""What 4 bits are worth on a GPU: memory, time to load, and decoding by three engines beside what transformers offers.

    python benchmarks/gpu.py [--model llama-3.1-8b] [--weights random] [--scheme nf4-dq ...] [--out results/h100.json]

One process, one GPU, one file; a scheme's rows are written when it is done, and a second run with `--resume` goes on. Shares
are of the copy bandwidth measured in the same run. Without a GPU it says so and does nothing. `--table FILE` prints a file.
"""

import argparse
import json
from pathlib import Path

from qwlib import files, loading, memory, record, timing
from qwlib.errors import QwlibError

SCHEMES = ["fp32", "bf16", "fp16", "int8", "fp4", "fp4-dq", "nf4", "nf4-dq", "nf4-mixed", "nf4-all"]
COMPILED = ["bf16", "nf4", "nf4-dq", "nf4-all"]  # compiling takes half a minute each
BATCHES = [4, 16, 64]
LARGE = ("gpt-neox-20b", ["nf4", "nf4-dq"])


def energy_j() -> float | None:
    """What the GPU has taken since its driver started, in joules; None where NVML can't be had.

    Source: nvmlDeviceGetTotalEnergyConsumption, millijoules, since Volta (NVIDIA's NVML API reference).
    """
    import ctypes

    import torch

    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        device, used = ctypes.c_void_p(), ctypes.c_ulonglong()
        uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}".encode()
        failed = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(device))
        failed = failed or nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(used))
    except (OSError, AttributeError):
        return None
    return None if failed else used.value / 1000


def measured(lm, bandwidth: float, **shape) -> dict:
    """One row: speed, share of the roofline, joules a token (of requests after the counted ones, prompts included)."""
    speed = timing.measure_speed(lm, runs=3, warmup=1, **shape)
    speed["roofline_share"] = speed["decode_tok_s"] / shape["batch"] / timing.roofline(lm, bandwidth)
    began = energy_j()
    timing.time_requests(lm, **shape, runs=4)
    if began is not None:
        speed["joules_per_token"] = (energy_j() - began) / (4 * shape["batch"] * shape["new_tokens"])
    return speed


def of_scheme(model: str, weights: str, scheme: str, asked) -> dict:
    """Everything about one scheme."""
    row = {"model": model, "weights": weights, "scheme": scheme, "speed": []}
    with loading.load(model, scheme, weights=weights) as lm:
        bandwidth = timing.copy_bandwidth(lm.device)
        row |= {"memory": dict(lm.memory), "load_s": lm.load_s, "copy_bytes_per_s": bandwidth}
        row["read_bytes"] = lm.engine.read_bytes()
        shape = {"prompt_tokens": asked.prompt_tokens, "new_tokens": asked.new_tokens}
        usual = ["eager", "graph", *(["compiled"] if scheme in COMPILED and not asked.fast else [])]
        for name in asked.engine or usual:
            try:
                lm.use(name)
                row["speed"].append({"name": name} | measured(lm, bandwidth, batch=1, **shape))
                print(scheme, name, summary(row["speed"][-1]), flush=True)
                for batch in BATCHES if name == "graph" and scheme in COMPILED and not asked.fast else []:
                    row["speed"].append({"name": name} | measured(lm, bandwidth, batch=batch, **shape))
                    print(scheme, name, summary(row["speed"][-1]), flush=True)
            except QwlibError as error:
                row["speed"].append({"name": name, "failure": str(error)})
                print(scheme, name, error, flush=True)
        lm.use()
        if model == asked.model:
            long = timing.time_requests(lm, prompt_tokens=asked.long, new_tokens=2, runs=5)
            row["long_prompt"] = {"tokens": asked.long} | timing.summary([line.ttft_s for line in long[2:]])
    memory.give_back()
    return row


def summary(speed: dict) -> str:
    gaps = speed["itl_s"]
    return (
        f"batch {speed['batch']:2}: {speed['decode_tok_s']:7.1f} tok/s, {speed['roofline_share']:6.1%} of the roofline, gaps "
        f"{gaps['p50'] * 1e3:.2f} ms, p99/p50 {gaps.get('p99', gaps['p95']) / gaps['p50']:.2f}, ready in "
        f"{speed.get('engine_ready_s', 0):.2f} s, {speed.get('joules_per_token', 0):.2f} J/token"
    )


def table(found: dict) -> str:
    """Markdown: a row a scheme, batch 1."""
    lines = [
        "| scheme | GB | load s | TTFT (2048) ms | eager tok/s | graph | compiled | of the roofline | p99 / p50 | J/token |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in found["rows"]:
        first = {s["name"]: s for s in row["speed"] if s.get("batch") == 1}
        best = first.get("compiled") or first.get("graph") or first.get("eager")
        if best is None:
            continue
        held = (row["memory"]["weights_bytes"] + row["memory"]["state_bytes"]) / 1e9
        speeds = [
            f"{first[name]['decode_tok_s']:.0f}" if name in first else "" for name in ("eager", "graph", "compiled")
        ]
        long = f"{row['long_prompt']['p50'] * 1e3:.0f}" if "long_prompt" in row else ""
        gaps = best["itl_s"].get("p99", best["itl_s"]["p95"]) / best["itl_s"]["p50"]
        called = row["scheme"] if row["model"] == found["rows"][0]["model"] else f"{row['model']} {row['scheme']}"
        share, joules = f"{best['roofline_share']:.1%}", f"{best.get('joules_per_token', 0):.2f}"
        cells = [called, f"{held:.2f}", f"{row['load_s']:.1f}", long, *speeds, share, f"{gaps:.2f}", joules]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--weights", default="random")
    parser.add_argument("--scheme", action="append")
    parser.add_argument("--engine", action="append", choices=["eager", "graph", "compiled"])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--long", type=int, default=2048)
    parser.add_argument("--fast", action="store_true", help="eager and graph at batch 1 only")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("results/h100.json"))
    parser.add_argument("--table", type=Path)
    asked = parser.parse_args()
    if asked.table:
        return print(table(json.loads(asked.table.read_text())))
    if not torch.cuda.is_available():
        return print("benchmarks/gpu.py: PyTorch sees no GPU, nothing to measure")
    found = {"env": record.environment(), "rows": []}
    if asked.resume and asked.out.is_file():
        found = json.loads(asked.out.read_text())
    done = {(row["model"], row["scheme"]) for row in found["rows"]}
    jobs = [(asked.model, scheme) for scheme in asked.scheme or SCHEMES]
    jobs += [] if asked.scheme or asked.fast else [(LARGE[0], scheme) for scheme in LARGE[1]]
    for model, scheme in jobs:
        if (model, scheme) not in done:
            found["rows"].append(of_scheme(model, asked.weights, scheme, asked))
            files.write_text(asked.out, json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
