"""What 4 bits are worth on a GPU: memory, time to load, and decoding by three engines beside what transformers offers.

    python benchmarks/gpu.py [--model llama-3.1-8b] [--weights random] [--scheme nf4-dq ...] [--out results/h100.json]

One process, one GPU, one file; a scheme's rows are written when it is done, and a second run with `--resume` goes on. Shares
are of the copy bandwidth measured in the same run. Without a GPU it says so and does nothing. `--tables FILE` prints what a file
holds, and draws the README's picture of it.
"""

import argparse
import datetime
import json
import time
from pathlib import Path

import qwlib
from qwlib import files
from qwlib.errors import QwlibError
from qwlib.machine import about, clock, memory
from qwlib.measuring import timing
from qwlib.running import streaming

SCHEMES = ["bf16", "nf4-dq", "nf4", "nf4-mixed", "nf4-all", "fp4", "fp4-dq", "int8", "fp16", "fp32"]
COMPILED = ["bf16", "nf4-dq", "nf4-mixed", "nf4-all"]  # compiling takes half a minute each
PAIR = ["bf16", "nf4-dq"]  # in batches, too, and by what transformers has itself
BATCHES = [1, 4, 8, 16, 64]
KERNEL = "bitsandbytes"  # whose kernels multiply in one more row, of the second of the pair
LARGE = ("gpt-neox-20b", ["nf4", "nf4-dq"])
FRONT = ["bf16", "int8", "nf4", "nf4-dq", "nf4-all"]  # of the first model, in the README
PICTURE = Path(__file__).parents[1] / "docs" / "front.svg"


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


def measured(lm, bandwidth: float, runs: int, **shape) -> dict:
    """Speed of `runs` requests after two, their share of the roofline, and joules a token (the prompts' included)."""
    speed = timing.measure_speed(lm, runs=1, warmup=0, **shape)
    began = energy_j()
    speed |= timing.summarise(timing.time_requests(lm, runs=runs, **shape)) | {"runs": runs, "warmup": 1}
    if began is not None:
        speed["joules_per_token"] = (energy_j() - began) / (runs * shape["batch"] * shape["new_tokens"])
    return speed | {"roofline_share": share(lm, bandwidth, speed)}


def share(lm, bandwidth: float, speed: dict) -> float:
    """Steps a second over those that reading the weights allows."""
    return speed["decode_tok_s"] / speed["batch"] / timing.roofline(lm, bandwidth)


def static(lm, bandwidth: float, **shape) -> dict:
    """transformers' `generate` with a static cache, which it compiles where it says that it can."""
    lm.use("eager")
    lm.model.generation_config.cache_implementation = "static"
    try:
        return measured(lm, bandwidth, 1, **shape) | {"engine": "transformers generate, static cache"}
    finally:
        lm.model.generation_config.cache_implementation = None


def continuous(lm, bandwidth: float, *, batch: int, prompt_tokens: int, new_tokens: int) -> dict:
    """transformers' `generate_batch`: continuous batching with CUDA graphs, timed by its own stamps; the second call counts."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    rows = timing.prompt_ids(lm, batch=batch, tokens=prompt_tokens).tolist()
    settings = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    how = ContinuousBatchingConfig(use_cuda_graph=True, allow_block_sharing=False, max_memory_percent=0.5)
    attention = lm.model.config._attn_implementation
    for _ in range(2):
        sent = time.perf_counter()
        done = lm.model.generate_batch(rows, settings, continuous_batching_config=how, record_timestamps=True)
    lm.model.set_attn_implementation(attention)
    stamps = [answer.timestamps for answer in done.values()]
    if len(stamps) < batch or any(len(row) != new_tokens for row in stamps):
        raise QwlibError("generate_batch gave fewer tokens than asked for: see its own messages above")
    steps = [max(at) for at in zip(*stamps, strict=True)]  # rows move on together but for the first tokens
    speed = {"batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "runs": 1, "warmup": 1}
    speed |= timing.summarise([streaming.Timeline(batch, began=sent, stamps=steps)])
    return speed | {
        "engine": "transformers generate_batch, CUDA graphs",
        "roofline_share": share(lm, bandwidth, speed),
    }


def products(lm) -> list[dict]:
    """Microseconds of one multiplication by the model's largest kind of linear layer, with 1 to 64 rows and nothing in between.

    One graph multiplies by that layer of every block, so that no weight is still in a cache from an earlier multiplication.
    """
    import torch

    kinds = {}
    for module in lm.model.modules():
        if isinstance(module, torch.nn.Linear):
            kinds.setdefault((module.out_features, module.in_features), []).append(module)
    (rows_out, columns), layers = max(kinds.items(), key=lambda kind: kind[0][0] * kind[0][1] * len(kind[1]))
    found = []
    for rows in BATCHES:
        x = torch.randn(rows, columns, device=lm.device, dtype=lm.dtype)
        graph, aside = torch.cuda.CUDAGraph(), torch.cuda.Stream()
        with torch.inference_mode(), torch.cuda.stream(aside):
            for layer in layers[:2]:
                layer(x)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph, stream=aside):
                for layer in layers:
                    layer(x)
        seconds = clock.best({"all": graph.replay}, 20, lm.device)["all"]
        found.append({"shape": [rows_out, columns], "rows": rows, "us": seconds / len(layers) * 1e6})
    return found


def of_scheme(model: str, weights: str, scheme: str, kernel: str | None, asked) -> dict:
    """Everything about one scheme."""
    row = (
        {"model": model, "weights": weights, "scheme": scheme} | ({"kernel": kernel} if kernel else {}) | {"speed": []}
    )
    with qwlib.load(model, scheme, weights=weights, kernel=kernel) as lm:
        bandwidth = clock.copy_bandwidth(lm.device)
        row |= {"memory": dict(lm.memory), "load_s": lm.load_s, "copy_bytes_per_s": bandwidth}
        row["read_bytes"] = lm.engine.read_bytes()
        both = scheme in PAIR and not asked.fast and model == asked.model
        jobs = [("eager", 1), *(("graph", batch) for batch in (BATCHES if both else BATCHES[:1]))]
        jobs += [("compiled", 1)] * (scheme in COMPILED and not asked.fast and model == asked.model)
        jobs += [("static", 1), ("continuous", 1), ("continuous", 16)] * (both and not kernel)
        for name, batch in jobs:
            if not asked.engine or name in asked.engine:
                shape = {"batch": batch, "prompt_tokens": asked.prompt_tokens, "new_tokens": asked.new_tokens}
                row["speed"].append({"name": name, "batch": batch} | by_engine(lm, name, bandwidth, shape))
                print(scheme, name, summary(row["speed"][-1]), flush=True)
        row["why"] = lm.use().engine.why
        if model == asked.model:
            long = timing.time_requests(lm, prompt_tokens=asked.long, new_tokens=2, runs=7)
            row["long_prompt"] = {"tokens": asked.long} | timing.summary([line.ttft_s for line in long[2:]])
        if both:
            row["products"] = products(lm)
    memory.give_back()
    return row


def by_engine(lm, name: str, bandwidth: float, shape: dict) -> dict:
    """A row, or why there is none."""
    try:
        if name == "continuous":
            return continuous(lm.use("eager"), bandwidth, **shape)
        if name == "static":
            return static(lm, bandwidth, **shape)
        return measured(lm.use(name), bandwidth, 1 if name == "eager" else 3, **shape)
    except QwlibError as error:
        return {"failure": str(error)}
    except Exception as error:
        if name not in ("static", "continuous"):
            raise
        return {"failure": f"transformers: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"}


def summary(speed: dict) -> str:
    if "failure" in speed:
        return f"batch {speed['batch']:2}: {speed['failure']}"
    gaps = speed["itl_s"]
    return (
        f"batch {speed['batch']:2}: {speed['decode_tok_s']:7.1f} tok/s, {speed['roofline_share']:6.1%} of the roofline, gaps "
        f"{gaps['p50'] * 1e3:.2f} ms, p99/p50 {gaps.get('p99', gaps['p95']) / gaps['p50']:.2f}, ready in "
        f"{speed.get('engine_ready_s', 0):.2f} s, {speed.get('joules_per_token', 0):.2f} J/token"
    )


def tables(found: dict) -> str:
    """Markdown: one row per scheme at batch size 1, then batch sizes, then what transformers offers itself."""
    each = (front_table, schemes_table, batches_table, own_table, kernel_table)
    return "\n\n".join(table(found) for table in each)


def held_bytes(row: dict) -> int:
    return row["memory"]["weights_bytes"] + row["memory"]["state_bytes"]


def alone(row: dict) -> dict[str, dict]:
    """The speeds at batch 1 by engine."""
    return {s["name"]: s for s in row["speed"] if s["batch"] == 1 and "failure" not in s}


def front_rows(found: dict) -> list[dict]:
    first = found["rows"][0]["model"]
    return sorted(
        (row for row in found["rows"] if row["model"] == first and row["scheme"] in FRONT and "kernel" not in row),
        key=lambda row: FRONT.index(row["scheme"]),
    )


def front_table(found: dict) -> str:
    """The README's: bytes and speed of the first model."""
    lines = [
        "| scheme | memory (GB) | saved | first token (ms) | tokens/s: `eager` | `graph` | `compiled` |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    rows = front_rows(found)
    for row in rows:
        speeds = alone(row)
        saved = 1 - held_bytes(row) / held_bytes(rows[0])
        cells = [row["scheme"], f"{held_bytes(row) / 1e9:.2f}", f"{saved:.1%}".replace("%", " %") if saved else ""]
        cells.append(f"{row['long_prompt']['p50'] * 1e3:.0f}")
        cells += [f"{speeds[n]['decode_tok_s']:.0f}" if n in speeds else "" for n in ("eager", "graph", "compiled")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(found: dict, path: Path) -> Path:
    """The README's picture as SVG: what each scheme holds, and how fast it decodes by the engine that `load` takes by itself.

    The path comes back.
    """
    import matplotlib

    from qwlib import figures

    rows = front_rows(found)
    names = [row["scheme"] for row in rows]
    panels = {
        "memory (GB)": [held_bytes(row) / 1e9 for row in rows],
        "tokens per second, default engine": [
            (alone(row).get("graph") or alone(row)["eager"])["decode_tok_s"] for row in rows
        ],
    }
    figure, axes = figures.axes(width=9.0, height=2.5, columns=2)
    for ax, (unit, values), form in zip(axes, panels.items(), ("%.1f", "%.0f"), strict=True):
        drawn = ax.barh(names, values, color=[figures.looks(names)[name]["color"] for name in names])
        ax.bar_label(drawn, fmt=form, padding=4, color=figures.INK)
        ax.invert_yaxis()
        ax.margins(x=0.12)
        ax.grid(visible=False)
        ax.set_xlabel(unit)
    device = found["env"]["device"]
    figure.suptitle(f"{rows[0]['model']} on one {device}, batch size 1", color=figures.INK)
    same = {"svg.fonttype": "none", "svg.hashsalt": "qwlib"}  # the same bytes every time, and text that stays text
    with matplotlib.rc_context(same):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", metadata={"Date": None})
    return path


def schemes_table(found: dict) -> str:
    lines = [
        "| scheme | memory (GB) | load peak | load s | TTFT ms | eager tok/s | graph | compiled | roofline | p99/p50 | J/token |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in found["rows"]:
        first = alone(row)
        best = first.get("compiled") or first.get("graph") or first["eager"]
        called = row["scheme"] if row["model"] == found["rows"][0]["model"] else f"{row['model']}, {row['scheme']}"
        called += f", {row['kernel']}'s kernel" if "kernel" in row else ""
        cells = [
            called,
            f"{held_bytes(row) / 1e9:.2f}",
            f"{row['memory']['load_peak_bytes'] / 1e9:.2f}",
            f"{row['load_s']:.1f}",
        ]
        cells.append(f"{row['long_prompt']['p50'] * 1e3:.0f}" if "long_prompt" in row else "")
        cells += [f"{first[n]['decode_tok_s']:.0f}" if n in first else "" for n in ("eager", "graph", "compiled")]
        cells.append(f"{best['roofline_share'] * 100:.1f} %")
        cells.append(f"{best['itl_s']['p99'] / best['itl_s']['p50']:.2f}")
        cells.append(f"{best['joules_per_token']:.2f}" if "joules_per_token" in best else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def pair(found: dict) -> list[dict]:
    """The rows of `PAIR`, where both are there."""
    first = [row for row in found["rows"] if row["model"] == found["rows"][0]["model"] and "kernel" not in row]
    rows = {row["scheme"]: row for row in first}
    return [rows[scheme] for scheme in PAIR] if set(PAIR) <= set(rows) else []


def batches_table(found: dict) -> str:
    """Where 4 bits stop being faster, and why: the time of one matrix multiplication."""
    lines = [
        f"| batch size | {PAIR[0]} tok/s | {PAIR[1]} tok/s | ratio | {PAIR[0]} µs | {PAIR[1]} µs | ratio |",
        "|--:|--:|--:|--:|--:|--:|--:|",
    ]
    ratios, rows = {}, pair(found)
    for batch in BATCHES if rows else []:
        speeds = [
            s["decode_tok_s"] for row in rows for s in row["speed"] if (s["name"], s["batch"]) == ("graph", batch)
        ]
        taken = [p["us"] for row in rows for p in row.get("products", []) if p["rows"] == batch]
        if len(speeds) == len(taken) == 2:
            ratios[batch] = speeds[1] / speeds[0], taken[1] / taken[0]
            cells = [batch, *(f"{s:.0f}" for s in speeds), f"{ratios[batch][0]:.2f} ×", *(f"{us:.1f}" for us in taken)]
            lines.append(f"| {' | '.join(map(str, cells))} | {ratios[batch][1]:.2f} × |")
    slower = [batch for batch, (ratio, _) in ratios.items() if ratio < 1]
    if not slower:
        return "\n".join(lines)
    shape, at = " × ".join(map(str, rows[0]["products"][0]["shape"])), slower[0]
    why = (
        f"From batch size {at} on, {PAIR[1]} is slower than {PAIR[0]}. At batch size {at}, a matrix multiplication with a\n"
        f"{shape} weight takes {ratios[at][1]:.2f} times as long in 4 bits as in 16. At batch size 1 it takes {ratios[1][1]:.2f} "
        f"times as\nlong. With more rows, reading 16-bit weights takes the same time, and unpacking 4-bit weights takes longer."
    )
    return "\n".join([*lines, "", why])


def by_kernel(found: dict) -> list[dict]:
    """The rows of 16 bits, of 4 bits by bitsandbytes' kernels, and by qwlib's, which older files name."""
    named = [row for row in found["rows"] if "kernel" in row]
    if not pair(found) or not named:
        return []
    full, plain = pair(found)
    return [full, plain, named[0]] if named[0]["kernel"] == "qwlib" else [full, named[0], plain]


def kernel_table(found: dict) -> str:
    """By batch size: 16 bits, 4 bits by bitsandbytes' kernels and by qwlib's, and what one layer takes."""
    lines = [
        "| batch size | bf16 (tokens/s) | nf4-dq by bitsandbytes | by qwlib's kernel | over bf16 | one layer (µs): bf16 | "
        "bitsandbytes | qwlib |",
        "|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    rows = by_kernel(found)
    for batch in BATCHES if rows else []:
        speeds = [s["decode_tok_s"] for r in rows for s in r["speed"] if (s["name"], s["batch"]) == ("graph", batch)]
        taken = [p["us"] for row in rows for p in row["products"] if p["rows"] == batch]
        cells = [
            str(batch),
            *(f"{s:.0f}" for s in speeds),
            f"{speeds[2] / speeds[0]:.2f} ×",
            *(f"{us:.1f}" for us in taken),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def own_table(found: dict) -> str:
    """What transformers has itself, beside the graphs."""
    lines = [
        "| decoding | batch size | " + " | ".join(f"{scheme} tok/s" for scheme in PAIR) + " |",
        "|---|--:|--:|--:|",
    ]
    names = {"eager": "`generate`", "static": "`generate`, static cache", "continuous": "`generate_batch`, CUDA graphs"}
    names |= {"graph": 'engine="graph"', "compiled": 'engine="compiled"'}
    for name, called in names.items():
        for batch in BATCHES:
            cells = [
                f"{s['decode_tok_s']:.0f}" if "failure" not in s else s["failure"]
                for row in pair(found)
                for s in row["speed"]
                if (s["name"], s["batch"]) == (name, batch)
            ]
            if cells and batch in (1, 16):
                lines.append(f"| {called} | {batch} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--weights", default="random")
    parser.add_argument("--scheme", action="append")
    parser.add_argument("--engine", action="append", choices=["eager", "graph", "compiled", "static", "continuous"])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--long", type=int, default=2048)
    parser.add_argument("--fast", action="store_true", help="eager and graph at batch 1 only")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("results/h100.json"))
    parser.add_argument("--tables", type=Path)
    asked = parser.parse_args()
    if asked.tables:
        found = json.loads(asked.tables.read_text())
        return print(tables(found), picture(found, PICTURE), sep="\n\n")
    if not torch.cuda.is_available():
        return print("benchmarks/gpu.py: PyTorch sees no GPU, nothing to measure")
    found = {"date": f"{datetime.date.today()}", "env": about.environment(), "rows": []}
    if asked.resume and asked.out.is_file():
        found = json.loads(asked.out.read_text())
    done = {(row["model"], row["scheme"], row.get("kernel")) for row in found["rows"]}
    jobs = [(asked.model, scheme, None) for scheme in asked.scheme or SCHEMES]
    if not asked.scheme and not asked.fast:
        jobs.insert(2, (asked.model, PAIR[1], KERNEL))
        jobs += [(LARGE[0], scheme, None) for scheme in LARGE[1]]
    for job in jobs:
        if job not in done:
            model, scheme, kernel = job
            found["rows"].append(of_scheme(model, asked.weights, scheme, kernel, asked))
            files.write_text(asked.out, json.dumps(found, indent=1) + "\n")
    print(tables(found))


if __name__ == "__main__":
    main()
