"""How much of what rounding costs comes back, if the model is then trained to give its own 16-bit scores.

    python benchmarks/gpu_distilling.py nf4-dq int4 int2 ternary --text wikitext2 [--steps 1500] [--out FILE] [--keep FOLDER]

The perplexity and the KL divergence of each form of `qwlib.training` are measured before and after training, on Python's
documentation and on `--text`. Neither text is trained on. On one H100 a form takes minutes. A row is written when it is there, so
several runs can share one file. Without a GPU it says so and does nothing, unless `--here` is given.
"""

import argparse
import datetime
import json
import tempfile
import time
from pathlib import Path

import qwlib
from qwlib import files
from qwlib.measuring import quality
from qwlib.measuring.reference import Reference
from qwlib.models import catalog, texts
from qwlib.training import corpus, distill, forms, student

PROTOCOL = "gptq-512"
KEPT = ("ppl", "ppl_stderr")
KEPT_KLD = ("mean", "stderr", "ppl_ratio", "ppl_ratio_stderr", "top1")


class Texts:
    """The texts and the teacher's scores on them, against which students are measured."""

    def __init__(self, model: str, names: list[str | None], blocks: int, folder: Path):
        self.read = [texts.read(name) for name in names]
        self.options = {"protocol": PROTOCOL, "blocks": blocks}
        self.references, self.teacher = [], []
        with qwlib.load(model, "bf16") as lm:
            for number, (text, name) in enumerate(self.read):
                (place := folder / f"reference{number}").mkdir()
                found = quality.measure(lm, text, keep=Reference(place), **self.options)
                self.references.append(place)
                self.teacher.append({"text": name, "tokens": found["tokens"]} | {key: found[key] for key in KEPT})

    def measured(self, lm) -> list[dict]:
        found = []
        for (text, name), place in zip(self.read, self.references, strict=True):
            told = quality.measure(lm, text, reference=Reference.read(place), **self.options)
            row = {"text": name} | {key: told[key] for key in KEPT}
            found.append(row | {f"kld_{key}".replace("kld_ppl", "ppl"): told["kld"][key] for key in KEPT_KLD})
        return found


def row(model: str, form: forms.Form, judge: Texts, folder: Path, **settings) -> dict:
    """One form: what it costs before and after training, and what training took."""
    with qwlib.load(model, "bf16", engine="eager") as lm:
        seen = corpus.rows(lm, "docstrings", distill.CALIBRATION, 512)
        student.shaped(lm.model, form, lm.model, seen)
        before = judge.measured(lm)
    began = time.perf_counter()
    out, told = distill.distill(model, form.name, folder / form.name, **settings)
    seconds = time.perf_counter() - began
    with qwlib.load(str(out), form.scheme) as lm:
        after = judge.measured(lm)
    training = told["training"]
    found = {key: training[key] for key in ("steps", "step_s", "tok_s", "peak_bytes", "kept_step") if key in training}
    found |= {"validation": training["validation_losses"], "settings": training["settings"], "data": training["data"]}
    return {
        "model": model,
        "form": form.name,
        **training.get("packed", {}),
        "seconds": round(seconds, 1),
        **found,
        "bf16": judge.teacher,
        "before": before,
        "after": after,
        "env": told["env"],
    }


def add(file: Path, found: dict) -> None:
    """Put a row into the file, which other runs may write too."""
    env = found.pop("env")
    with files.alone(file):
        held = json.loads(file.read_text())["rows"] if file.is_file() else []
        rows = [each for each in held if (each["model"], each["form"]) != (found["model"], found["form"])] + [found]
        told = {
            "device": env["device"],
            "date": f"{datetime.date.today()}",
            "packages": {name: env["packages"].get(name) for name in ("torch", "transformers", "bitsandbytes")},
            "command": "python benchmarks/gpu_distilling.py",
            "rows": sorted(rows, key=lambda each: list(forms.FORMS).index(each["form"])),
        }
        files.write_text(file, json.dumps(told, indent=1) + "\n")


def table(rows: list[dict]) -> str:
    lines = [
        "| form | bits | text | PPL bf16 | rounded | trained | KLD rounded | trained | steps | minutes |",
        "|---|--:|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for each in rows:
        for own, before, after in zip(each["bf16"], each["before"], each["after"], strict=True):
            up = f"{after['ppl']:.2f} ({100 * (after['ppl_ratio'] - 1):+.1f} ± {100 * after['ppl_ratio_stderr']:.1f} %)"
            cells = [each["form"], f"{each['bits_per_weight']:.2f}", own["text"], f"{own['ppl']:.2f}"]
            cells += [f"{before['ppl']:.4g}", up, f"{before['kld_mean']:.3f}", f"{after['kld_mean']:.4f}"]
            lines.append(f"| {' | '.join([*cells, str(each['steps']), format(each['seconds'] / 60, '.1f')])} |")
    return "\n".join(lines)


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("forms", nargs="*", default=["nf4-dq"])
    parser.add_argument("--model", default=catalog.EMBEDDED)
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--data", action="append", default=[])
    parser.add_argument("--blocks", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("runs/distilled.json"))
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--here", action="store_true")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--table", type=Path)
    for name, kind in (("steps", int), ("rows", int), ("batch", int), ("longest", int), ("every", int)):
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--learning-rate", type=float)
    asked = parser.parse_args()
    if asked.table:
        return print(table(json.loads(asked.table.read_text())["rows"]))
    if not (torch.cuda.is_available() or asked.here):
        return print("benchmarks/gpu_distilling.py: PyTorch sees no GPU, nothing measured")
    names = ("steps", "rows", "batch", "longest", "every", "learning_rate")
    settings = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
    settings |= {"data": asked.data} if asked.data else {}
    settings |= {"compiled": False} if asked.eager else {}
    with tempfile.TemporaryDirectory() as folder:
        judge = Texts(asked.model, [None, *asked.text], asked.blocks, Path(folder))
        for name in asked.forms:
            found = row(asked.model, forms.find(name), judge, asked.keep or Path(folder), **settings)
            add(asked.out, found)
            print(table([found]), flush=True)
    return None


if __name__ == "__main__":
    main()
