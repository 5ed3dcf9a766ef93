"""What 4 bits are worth on a GPU: memory, time to load, and decoding by three engines beside what transformers offers.

    python benchmarks/gpu.py [--model llama-3.1-8b] [--weights random] [--scheme nf4-dq ...] [--out results/h100.json]

One process, one GPU, one file; a scheme's rows are written when it is done, and a second run with `--resume` goes on. Shares
are of the copy bandwidth measured in the same run. Without a GPU it says so and does nothing. `--tables FILE` prints what a file
holds, draws the README's picture of it, and writes the part that notebook 07 shows to those who have no GPU.
"""

import argparse
import datetime
import json
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import linear4bit

import qwlib
from qwlib import files
from qwlib.errors import QwlibError
from qwlib.kernels import profiles
from qwlib.machine import about, clock, memory
from qwlib.measuring import timing
from qwlib.running import streaming

SCHEMES = ["bf16", "nf4-dq", "nf4", "nf4-mixed", "nf4-all", "fp4", "fp4-dq", "int8", "fp16", "fp32"]
COMPILED = ["bf16", "nf4-dq", "nf4-mixed", "nf4-all"]  # compiling takes half a minute each
PAIR = ["bf16", "nf4-dq"]  # in batches, too, and by what transformers has itself
BATCHES = [1, 4, 8, 16, 64]
KERNEL = "bitsandbytes"  # whose kernels multiply in one more row, of the second of the pair
APART = "graph, a launch for each layer"  # with no layers joined
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


def not_joined(lm, bandwidth: float, **shape) -> dict:
    """A graph in which qwlib's kernels are launched once for each layer."""
    joined = [(layer, layer.joined) for layer in lm.model.modules() if getattr(layer, "joined", None)]
    for layer, _ in joined:
        layer.joined = None
    try:
        return measured(lm.use("graph"), bandwidth, 3, **shape)
    finally:
        for layer, place in joined:
            layer.joined = place
        lm.use("eager")


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
        jobs += [(APART, 1)] * (both and not kernel and scheme == PAIR[1])
        for name, batch in jobs:
            if not asked.engine or name in asked.engine:
                shape = {"batch": batch, "prompt_tokens": asked.prompt_tokens, "new_tokens": asked.new_tokens}
                row["speed"].append({"name": name, "batch": batch} | by_engine(lm, name, bandwidth, shape))
                print(scheme, name, summary(row["speed"][-1]), flush=True)
        row["why"] = lm.use().engine.why
        if both:
            step = next(speed for speed in row["speed"] if speed["name"] == "graph")
            ids = timing.prompt_ids(lm, batch=1, tokens=asked.prompt_tokens)
            row["profile"] = profiles.measured(lm, ids, new_tokens=32, step_ms=1e3 * step["itl_s"]["p50"])
        if model == asked.model:
            long = timing.time_requests(lm, prompt_tokens=asked.long, new_tokens=2, runs=7)
            row["long_prompt"] = {"tokens": asked.long} | timing.summary([line.ttft_s for line in long[2:]])
    memory.give_back()
    return row


def by_engine(lm, name: str, bandwidth: float, shape: dict) -> dict:
    """A row, or why there is none."""
    try:
        if name == "continuous":
            return continuous(lm.use("eager"), bandwidth, **shape)
        if name == "static":
            return static(lm, bandwidth, **shape)
        if name == APART:
            return not_joined(lm, bandwidth, **shape)
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
    """Markdown: one row per scheme at batch size 1, then both kernels by rows and batch sizes, and what transformers offers."""
    each = [front_table, schemes_table]
    if "linear_layers" in found:
        each += [layers_table, batches_table, profile_table, own_table]
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
        called += f", by {row['kernel']}" if "kernel" in row else ""
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


def compared(found: dict) -> dict[str, dict]:
    """The rows of 16 bits, and of 4 bits by bitsandbytes' kernels and by qwlib's: `profiles.WAYS`."""
    full, own = pair(found)
    other = next(row for row in found["rows"] if row.get("kernel") == KERNEL)
    return dict(zip(profiles.WAYS, (full, other, own), strict=True))


def by_batch(row: dict) -> dict[int, float]:
    """Tokens a second of a CUDA graph."""
    return {s["batch"]: s["decode_tok_s"] for s in row["speed"] if s["name"] == "graph"}


def layers_table(found: dict) -> str:
    """All linear layers of a token by kernel, in milliseconds."""
    layers = found["linear_layers"]
    names = [key for key in layers["rows"][0] if key != "rows"]
    heads = ["rows", *(name.replace(" ms", " (ms)") for name in names), "joined over bf16"]
    lines = [f"| {' | '.join(heads)} |", f"|{'--:|' * len(heads)}"]
    for row in layers["rows"]:
        ratio = row["bf16 ms"] / row["joined ms"]
        lines.append(f"| {' | '.join([str(row['rows']), *(f'{row[name]:.2f}' for name in names)])} | {ratio:.2f} × |")
    return "\n".join(lines)


def batches_table(found: dict) -> str:
    """Tokens a second of a graph by batch size: 16 bits, and 4 bits by both kernels."""
    rows = compared(found)
    heads = [
        "batch size",
        PAIR[0],
        PAIR[1],
        f"over {PAIR[0]}",
        f"{PAIR[1]} by bitsandbytes' kernels",
        f"over {PAIR[0]}",
    ]
    lines = [f"| {' | '.join(heads)} |", f"|{'--:|' * len(heads)}"]
    for batch, full in by_batch(rows[PAIR[0]]).items():
        cells = [str(batch), f"{full:.0f}"]
        for way in reversed(profiles.WAYS[1:]):
            speed = by_batch(rows[way])[batch]
            cells += [f"{speed:.0f}", f"{speed / full:.2f} ×"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def profile_table(found: dict) -> str:
    """The kernels of a step of a graph, in milliseconds and how many."""
    rows = compared(found)
    lines = ["| kernels | " + " | ".join(f"{name} (ms)" for name in rows) + " |", "|---|" + "--:|" * len(rows)]
    for kinds in zip(*(row["profile"] for row in rows.values()), strict=True):
        cells = [f"{k['ms']:.2f}" + (f" ({k['count']})" if k["count"] else "") for k in kinds]
        lines.append(f"| {kinds[0]['kind']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def lesson(found: dict) -> dict:
    """What notebook 07 shows where there is no GPU: `profiles.SCHEMA`."""
    rows, layers = compared(found), found["linear_layers"]
    names = {"eager": "eager", APART: "graph, not joined", "graph": "graph", "compiled": "compiled"}
    speeds = [
        {"way": way, "engine": names[s["name"]], "batch": s["batch"], "tok_s": s["decode_tok_s"]}
        for way, row in rows.items()
        for name in names
        for s in row["speed"]
        if s["name"] == name and "failure" not in s
    ]
    keys = ("rows", *(f"{name} ms" for name in ("bf16", "bitsandbytes", "apart", "joined")))
    products = [{key.replace(" ", "_"): row[key] for key in keys} for row in layers["rows"]]
    return {
        "device": found["env"]["device"],
        "date": found["date"],
        "packages": {name: found["env"]["packages"][name] for name in ("torch", "transformers", "bitsandbytes")},
        "command": "python benchmarks/gpu.py",
        "model": layers["model"],
        "copy_bytes_per_s": layers["copy_bytes_per_s"],
        "bytes": layers["bytes"],
        "products": products,
        "profiles": {way: row["profile"] for way, row in rows.items()},
        "speeds": speeds,
    }


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
        print(tables(found))
        if len(front_rows(found)) == len(FRONT):
            print(picture(found, PICTURE))
        if "linear_layers" in found:
            files.write_text(profiles.FILE, json.dumps(lesson(found), indent=1) + "\n")
            print(profiles.FILE)
        return None
    if not torch.cuda.is_available():
        return print("benchmarks/gpu.py: PyTorch sees no GPU, nothing to measure")
    found = {"date": f"{datetime.date.today()}", "env": about.environment(), "rows": []}
    if asked.resume and asked.out.is_file():
        found = json.loads(asked.out.read_text())
    whole = not asked.scheme and not asked.fast
    if whole and "linear_layers" not in found:
        # a process of its own: ExLlamaV3 changes how PyTorch allocates memory, and transformers' static cache hung after that
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as apart:
            found["linear_layers"] = apart.submit(linear4bit.measured).result()
        files.write_text(asked.out, json.dumps(found, indent=1) + "\n")
    done = {(row["model"], row["scheme"], row.get("kernel")) for row in found["rows"]}
    jobs = [(asked.model, scheme, None) for scheme in asked.scheme or SCHEMES]
    if whole:
        jobs.insert(2, (asked.model, PAIR[1], KERNEL))
        jobs += [(LARGE[0], scheme, None) for scheme in LARGE[1]]
    for job in jobs:
        if job not in done:
            model, scheme, kernel = job
            found["rows"].append(of_scheme(model, asked.weights, scheme, kernel, asked))
            files.write_text(asked.out, json.dumps(found, indent=1) + "\n")
    if whole:
        print(tables(found))


if __name__ == "__main__":
    main()
