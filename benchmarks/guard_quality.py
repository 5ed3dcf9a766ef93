"""How good a guard is, in 16 bits and quantized: F1, average precision, false positives, calibration, and verdicts that flip.

    python benchmarks/guard_quality.py --guard smollm2-guard [--data own xstest] [--out results/guard.json]
    python benchmarks/guard_quality.py --model smollm2-135m+my-adapter
    python benchmarks/guard_quality.py --again

The guard is one of `guards.GUARDS` whose model has an adapter, or a model with an adapter that is asked NemoGuard's prompt.
`--again` trains smollm2-guard anew with the settings that its record has: minutes on an H100, hours on a CPU. It fails if the
new guard's AUROC on the `test` messages is below the interval that was measured for the one that comes with the package.

The threshold is fixed on the `tune` messages by the 16-bit guard, and all rows use it. `nf4-dq` and `int8` have the adapter
beside quantized weights. `merged` has it in the 16-bit weights, which are quantized then. XSTest comes from the Hub or a file.
"""

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path

import qwlib
from qwlib import files
from qwlib.guard import classify, guards, judging, labelled
from qwlib.loading import merging
from qwlib.machine import about
from qwlib.models import catalog
from qwlib.training import finetune, runs

PACKAGED = Path(catalog.find("smollm2-guard").adapter.source)
SHOWN = ("f1", "average_precision", "auroc", "recall_at_5pct_fpr", "false_positive_rate", "brier")


def scores(model: str, scheme: str, guard: str, sets: dict, batch: int) -> dict[str, list[float]]:
    """P(unsafe) of each message, by set."""
    with qwlib.load(model, scheme) as lm:
        judge = judging.Judge(lm, guard)
        return {name: [s.unsafe for s in judge.score(rows.prompts, batch=batch)] for name, rows in sets.items()}


def measured(model: str, guard: str, sets: dict, batch: int) -> list[dict]:
    """A row for each way to hold the guard, and each set but `tune`."""
    with tempfile.TemporaryDirectory() as folder:
        merged = str(merging.merge(model, Path(folder) / "merged"))
        ways = {"bf16": (model, "bf16"), "nf4-dq": (model, "nf4-dq"), "int8": (model, "int8")}
        ways |= {"merged, bf16": (merged, "bf16"), "merged, nf4-dq": (merged, "nf4-dq")}
        found, rows = {}, []
        for way, (held, scheme) in ways.items():
            found[way] = scores(held, scheme, guard, sets, batch)
            threshold = classify.fit_threshold(found["bf16"]["tune"], sets["tune"].labels)
            for name in (name for name in sets if name != "tune"):
                given, labels = found[way][name], sets[name].labels
                row = {"way": way, "data": name} | classify.evaluate(given, labels, threshold=threshold)
                row["intervals"] = {
                    key: classify.interval(given, labels, key, threshold=threshold) for key in SHOWN if key in row
                }
                if way != "bf16":
                    row["compared"] = classify.compare(found["bf16"][name], given, labels, threshold=threshold)
                rows.append(row)
                print(table([row]).splitlines()[-1], flush=True)
    return rows


def again(folder: Path) -> str:
    """A guard that is trained as smollm2-guard was: the name under which it can be loaded."""
    settings = json.loads((PACKAGED / runs.RECORD).read_text(encoding="utf-8"))["training"]["settings"]
    out, _ = finetune.finetune(catalog.EMBEDDED, "bf16", "guard:training", folder / "guard", **settings)
    return f"{catalog.EMBEDDED}+{out}"


def worse(rows: list[dict]) -> str | None:
    """What is below the interval of the packaged guard, None if nothing is."""
    packaged = json.loads((PACKAGED / "quality.json").read_text(encoding="utf-8"))["rows"]
    found, held = (next(r for r in each if (r["data"], r["way"]) == ("own, test", "bf16")) for each in (rows, packaged))
    low, high = held["intervals"]["auroc"]
    if found["auroc"] < low:
        return f"AUROC {found['auroc']:.3f} is below {low:.3f} to {high:.3f} of the guard that comes with the package"
    return None


def table(rows: list[dict]) -> str:
    lines = [
        "| messages | guard | F1 | average precision | AUROC | recall at 5 % false positives | false positives | ECE | flips |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = [f"{row['data']} ({row['n']})", row["way"]]
        for key in SHOWN[:5]:
            low, high = row["intervals"][key]
            cells.append(f"{row[key]:.3f} ({low:.2f} to {high:.2f})")
        cells.append(f"{row['ece']:.3f}")
        cells.append(f"{1 - row['compared']['agreement']:.1%}".replace("%", " %") if "compared" in row else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--guard")
    parser.add_argument("--model")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--data", nargs="+", default=["own"])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--out", type=Path, default=Path("results/guard.json"))
    parser.add_argument("--table", type=Path)
    asked = parser.parse_args()
    if asked.table:
        return print(table(json.loads(asked.table.read_text())["rows"]))
    if not (asked.guard or asked.model or asked.again):
        return print("benchmarks/guard_quality.py: no --guard, no --model and no --again, nothing to measure")
    with tempfile.TemporaryDirectory() as folder:
        guard = asked.guard or "nemoguard-8b"
        model = again(Path(folder)) if asked.again else asked.model or guards.find(guard).model
        sets = {"tune": labelled.load("own").part("tune")}
        for name in asked.data:
            loaded = labelled.load(name)
            sets["own, test" if name == "own" else "XSTest"] = loaded.part("test") if name == "own" else loaded
        env = about.environment()
        called = catalog.find(model).name
        print(f"{called}, {env['device']}, {len(sets['tune'].rows)} messages for the threshold")
        rows = measured(model, guard, sets, asked.batch)
    found = {"date": f"{datetime.date.today()}", "env": env, "guard": guard, "model": called, "rows": rows}
    files.write_text(asked.out, json.dumps(found, indent=1) + "\n")
    print(table(rows))
    return sys.exit(worse(rows)) if asked.again else None


if __name__ == "__main__":
    main()
