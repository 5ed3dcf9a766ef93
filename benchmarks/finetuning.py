"""LoRA, QLoRA and full fine-tuning of the embedded model: loss, seconds a step, and memory, on the same examples.

    python benchmarks/finetuning.py [--steps 40]

The examples are made from Python itself: a function of the standard library is named, and the answer is the first sentence of its
docstring. The validation loss is over a tenth of them, which no run has learnt from.
"""

import argparse
import tempfile
from pathlib import Path

import qwlib
from qwlib.lessons import docstrings
from qwlib.machine import about
from qwlib.models import catalog

ROWS = (("bf16", "lora"), ("nf4-dq", "lora"), ("nf4-all", "lora"), ("int8", "lora"), ("bf16", "dora"), ("fp32", "full"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "python.jsonl"
        env, count = about.environment(), docstrings.write(data)
        print(f"{env['cpu']}, {count} examples, {steps} steps of 8")
        print(
            "| scheme | method | trained | weights (GB) | peak (GB) | s a step | tokens/s | loss before | validation loss |"
        )
        print("|---|---|--:|--:|--:|--:|--:|--:|--:|")
        for scheme, method in ROWS:
            rate = 2e-5 if method == "full" else 5e-4
            _, told = qwlib.finetune(
                catalog.EMBEDDED,
                scheme,
                data,
                Path(folder) / f"{scheme}-{method}",
                method=method,
                steps=steps,
                every=max(1, steps // 2),
                learning_rate=rate,
            )
            found, held = told["training"], told["memory"]
            cells = [
                scheme,
                method,
                f"{found['trained_parameters'] / 1e6:.1f} M",
                f"{(held['weights_bytes'] + held['state_bytes']) / 1e9:.3f}",
                f"{found['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in found else "",
                f"{found['step_s']:.2f}",
                f"{found['tok_s']:.0f}",
                f"{found['losses'][0]['loss']:.2f}",
                f"{min(check['loss'] for check in found['validation_losses']):.3f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
