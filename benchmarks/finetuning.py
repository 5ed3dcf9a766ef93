"""LoRA, QLoRA and full fine-tuning of the embedded model: loss, seconds a step, and memory, on the same examples.

    python benchmarks/finetuning.py [--steps 40]

The examples are made from Python itself: a function of the standard library is named, and the answer is the first sentence of its
docstring. The validation loss is over a tenth of them, which no run has learnt from.
"""

import argparse
import importlib
import inspect
import json
import tempfile
from pathlib import Path

import qwlib
from qwlib.machine import about
from qwlib.models import catalog

MODULES = (
    "argparse array ast asyncio base64 bisect calendar cmath codecs collections contextlib copy csv datetime decimal "
    "difflib dis email.utils enum fileinput fnmatch fractions functools getpass glob gzip hashlib heapq html inspect io "
    "ipaddress itertools json linecache locale logging math mimetypes operator os pathlib pickle platform pprint random re "
    "secrets shlex shutil signal socket statistics string struct subprocess sys tempfile textwrap threading time tokenize "
    "traceback types urllib.parse uuid warnings weakref zipfile zlib"
)
ROWS = (("bf16", "lora"), ("nf4-dq", "lora"), ("nf4-all", "lora"), ("int8", "lora"), ("bf16", "dora"), ("fp32", "full"))


def write(path: Path) -> int:
    """A line for every public function with a docstring whose first sentence is short; how many there are."""
    pairs = {}
    for name in MODULES.split():
        module = importlib.import_module(name)
        for called, found in vars(module).items():
            text = inspect.getdoc(found) if callable(found) and not called.startswith("_") else None
            first = " ".join((text or "").partition("\n\n")[0].split()).partition(". ")[0].rstrip(".")
            if 20 < len(first) < 120 and "(" not in first and not inspect.isclass(found):
                pairs.setdefault(first, {"prompt": f"What does {name}.{called} in Python do?", "answer": f"{first}."})
    path.write_text("\n".join(map(json.dumps, pairs.values())), encoding="utf-8")
    return len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=40)
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "python.jsonl"
        env, count = about.environment(), write(data)
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
