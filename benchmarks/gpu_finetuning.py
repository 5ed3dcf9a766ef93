"""LoRA and QLoRA of Llama-3.1-8B's shape on a GPU: peak memory, seconds a step, and tokens a second by batch size.

    python benchmarks/gpu_finetuning.py [--gpus 1 2] [--out qwlib/training/h100.json] [--resume]

Weights are random, which changes neither bytes nor times. Every example has 512 tokens, nearly all of them learnt. Each row is a
run of `qwlib finetune` in a process of its own, or in one for each GPU. Without a GPU it says so and does nothing.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from qwlib import files
from qwlib.machine import about
from qwlib.training import on_gpu
from qwlib.training.on_gpu import LENGTH

BATCHES = (1, 2, 4, 8)
HEAD = ("model", "scheme", "method", "batch", "length", "recompute", "gpus")


def jobs(gpus: list[int]) -> list[dict]:
    """What is measured: everything on one GPU, and a part of it on more."""
    found = []
    for scheme in ("nf4-dq", "bf16"):
        each = {"model": "llama-3.1-8b", "scheme": scheme, "method": "lora", "length": LENGTH}
        if 1 in gpus:
            found += [each | {"batch": batch, "recompute": False, "gpus": 1} for batch in BATCHES]
            found += [each | {"batch": batch, "recompute": True, "gpus": 1} for batch in (1, 8)]
        found += [each | {"batch": 8, "recompute": False, "gpus": count} for count in gpus if count > 1]
    if 1 in gpus:
        large = {"model": "gpt-neox-20b", "scheme": "nf4-dq", "method": "lora", "length": LENGTH, "gpus": 1}
        found += [large | {"batch": batch, "recompute": True} for batch in (1, 4)]
    return found


def measured(job: dict, data: Path, steps: int, folder: Path) -> dict:
    """One row: the job, and what its record says."""
    out = folder / f"row{len(list(folder.iterdir()))}"
    start = [sys.executable, "-m", "qwlib"]
    if job["gpus"] > 1:
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(job["gpus"]), "-m", "qwlib"]
    command = [*start, "finetune", job["model"], job["scheme"], "--weights", "random", "--data", str(data)]
    command += ["--out", str(out), "--batch", str(job["batch"]), "--longest", str(LENGTH), "--steps", str(steps)]
    command += ["--every", str(steps), "--validation", "0", *(["--recompute"] if job["recompute"] else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return job | {"failure": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    told = json.loads((out / "training.json").read_text(encoding="utf-8"))
    found, held = told["training"], told["memory"]
    row = job | {"weights_bytes": held["weights_bytes"] + held["state_bytes"], "env": told["env"]}
    kept = ("peak_bytes", "predicted_bytes", "step_s", "trained_parameters")
    row["tok_s"] = job["batch"] * LENGTH / found["step_s"]
    return row | {key: found[key] for key in kept if key in found} | {"loss": found["losses"][-1]["loss"]}


def table(rows: list[dict]) -> str:
    lines = [
        "| model | scheme | GPUs | batch | activations | weights (GB) | peak (GB) | s a step | tokens/s |",
        "|---|---|--:|--:|---|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [row["model"], row["scheme"], row["gpus"], row["batch"], "again" if row["recompute"] else "kept"]
        if "failure" in row:
            cells += [row["failure"], "", "", ""]
        else:
            cells += [f"{row['weights_bytes'] / 1e9:.2f}", f"{row['peak_bytes'] / 1e9:.2f}"]
            cells += [f"{row['step_s']:.3f}", f"{row['tok_s']:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("qwlib/training/h100.json"))
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--table", type=Path)
    asked = parser.parse_args()
    if asked.table:
        return print(table(json.loads(asked.table.read_text())["rows"]))
    if torch.cuda.device_count() < max(asked.gpus):
        return print(f"benchmarks/gpu_finetuning.py: PyTorch sees {torch.cuda.device_count()} GPUs, nothing measured")
    found = {"rows": []}
    if asked.resume and asked.out.is_file():
        found = json.loads(asked.out.read_text())
    done = [{key: row[key] for key in HEAD} for row in found["rows"]]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "words.jsonl"
        on_gpu.write(data)
        for job in jobs(asked.gpus):
            if job in done:
                continue
            row = measured(job, data, asked.steps, Path(folder))
            env = row.pop("env", None) or about.environment()
            found = {
                "device": env["device"],
                "date": f"{datetime.date.today()}",
                "packages": {
                    name: env["packages"].get(name) for name in ("torch", "transformers", "bitsandbytes", "peft")
                },
                "command": "python benchmarks/gpu_finetuning.py",
                "rows": [*found["rows"], row],
            }
            files.write_text(asked.out, json.dumps(found, indent=1) + "\n")
            print(table([row]).splitlines()[-1], flush=True)
    return print(table(found["rows"]))


if __name__ == "__main__":
    main()
