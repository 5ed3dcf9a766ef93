"""The metrics of a night that are compared, each with a tolerance from its own measurement. `gates` explains the comparison.

They are read from the rows of the notebooks' records. The rows have no schema. A value that is not in a row gives no metric.
"""

import contextlib
import math
import re
from dataclasses import dataclass

from .. import schemes

# not repacked_bytes: it depends on what a processor can do
EXACT = ("weights_bytes", "state_bytes", "kv_bytes_per_token")
PPL_FLOOR = 0.005  # of the perplexity
KLD_FLOOR = 0.002  # nats a token
TOP1_FLOOR = 0.01
GUARD_FLOOR = 0.02
LOSS_FLOOR = (
    0.02  # nats a token: the same run on another processor rounds in another order, and every step adds to that
)
GUARD = ("f1", "recall", "false_positive_rate", "average_precision", "auroc", "brier")


@dataclass(frozen=True)
class Figure:
    """One metric. `kind` is exact, paired, ratio or time. `tolerance` is absolute. `less` says whether less is better."""

    value: float
    kind: str
    tolerance: float = 0.0
    less: bool = False


# what reading a row can raise that does not hold what its keys promise
ODD = (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError)


def figures(outcomes: list, odd: list[str] | None = None) -> dict[str, Figure]:
    """The metrics of the notebooks that passed, by name: `notebook/model/row/metric`.

    A row that can't be read has no metrics. Its name is added to `odd`.
    """
    found = {}
    for outcome in outcomes:
        if outcome.status != "passed":
            continue
        found[f"{outcome.name}/seconds"] = Figure(outcome.seconds, "time", less=True)
        own = rows(outcome)
        for name, row in own.items():
            if "failure" not in row:
                try:
                    beside = own.get(_reference(name))
                    each = _bytes(row) | _quality(row) | _guard(row) | _speed(row, beside) | _training(row, beside)
                    found |= {f"{name}/{key}": each[key] for key in each if math.isfinite(each[key].value)}
                except ODD:
                    if odd is not None:
                        odd.append(name)
    return found


def given(outcomes: list) -> dict[str, dict]:
    """What each row was measured with: hashes of weights and text, protocol, sizes. A difference is a probable cause."""
    found = {}
    for outcome in outcomes:
        for name, row in rows(outcome).items() if outcome.status == "passed" else ():
            with contextlib.suppress(*ODD):
                found[name] = _facts(row, outcome.record)
    return found


def _facts(row: dict, record: dict) -> dict:
    model, known = row.get("model") or record.get("model", {}), record["env"]["packages"]  # named once for all rows
    scored, timed, file = row.get("quality", {}), row.get("speed", {}), row.get("artefact", {})
    facts = {"weights": model.get("sha256"), "revision": model.get("revision"), "text": scored.get("text_sha256")}
    facts |= {key: scored.get(key) for key in ("protocol", "tokens")}
    facts |= {key: timed.get(key) for key in ("engine", "batch", "prompt_tokens", "new_tokens")}
    facts |= {"messages": row.get("guard", {}).get("n"), "file": file.get("sha256")}
    facts |= {"data": row.get("training", {}).get("data", {}).get("sha256")}
    facts |= {key: version for key, version in file.get("tools", {}).items() if key not in known}
    return {key: _short(value) for key, value in facts.items() if value is not None}


def _short(value):
    return value[:12] if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{40,}", value) else value


def rows(outcome) -> dict[str, dict]:
    """The rows of a notebook's record by name: `notebook/model/scheme`. A second row with the same name ends in #2."""
    record, found = outcome.record, {}
    for row in record.get("rows", []):
        model = row.get("model") or record.get("model", {})
        model = model if isinstance(model, dict) else {"name": model}
        label = row.get("scheme") or row.get("options") or "row"
        label = label.get("name", "row") if isinstance(label, dict) else label
        weights = "-random" if model.get("weights") == "random" else ""
        parts = (outcome.name, f"{model.get('name', 'model')}{weights}", str(label))
        name = "/".join(part.replace("/", "--").replace(" ", "_") for part in parts)
        number = 1
        while (numbered := name if number == 1 else f"{name}#{number}") in found:
            number += 1
        found[numbered] = row
    return found


def _reference(name: str) -> str:
    return f"{name.rpartition('/')[0]}/{schemes.REFERENCE}"


def _bytes(row: dict) -> dict[str, Figure]:
    held = row.get("memory", {})
    return {key: Figure(held[key], "exact") for key in EXACT if key in held}


def _quality(row: dict) -> dict[str, Figure]:
    scored = row.get("quality")
    if not scored:
        return {}
    ppl, kld = scored["ppl"], scored.get("kld")
    floor = PPL_FLOOR * ppl
    if not kld:
        return {"ppl": Figure(ppl, "paired", floor)}
    paired = ppl * kld.get("ppl_ratio_stderr", 0.0)
    top1_stderr = math.sqrt(kld["top1"] * (1 - kld["top1"]) / kld["tokens"])
    return {
        "ppl": Figure(ppl, "paired", max(floor, paired)),
        "kld": Figure(kld["mean"], "paired", max(KLD_FLOOR, kld["stderr"])),
        "top1": Figure(kld["top1"], "paired", max(TOP1_FLOOR, top1_stderr)),
    }


def _guard(row: dict) -> dict[str, Figure]:
    """A guard's metrics. The tolerance is at least one message, so a single other answer is never a regression."""
    judged = row.get("guard", {})
    unsafe, n = judged.get("positives", 0), judged.get("n", 0)
    of = dict.fromkeys(GUARD, unsafe) | {"f1": unsafe / 2, "false_positive_rate": n - unsafe, "brier": n}
    found = {}
    for key in (key for key in GUARD if key in judged):
        share, rows = min(max(judged[key], 0.0), 1.0), max(1, of[key])
        stderr = math.sqrt(share * (1 - share) / rows)
        found[key] = Figure(judged[key], "paired", max(GUARD_FLOOR, 1 / rows, stderr))
    return found


def _speed(row: dict, reference: dict | None) -> dict[str, Figure]:
    timed, base = row.get("speed", {}), (reference or {}).get("speed", {})
    found = {}
    if "roofline_share" in timed:
        found["roofline_share"] = Figure(timed["roofline_share"], "ratio")
    for name, value, other, less in (
        ("decode", timed.get("decode_tok_s"), base.get("decode_tok_s"), False),
        ("ttft", timed.get("ttft_s", {}).get("p50"), base.get("ttft_s", {}).get("p50"), True),
    ):
        if value and timed is base:
            found[{"decode": "decode_tok_s", "ttft": "ttft_s"}[name]] = Figure(value, "time", less=less)
        elif value and other:
            found[f"{name}_over_16_bit"] = Figure(value / other, "ratio", less=less)
    return found


def _training(row: dict, reference: dict | None) -> dict[str, Figure]:
    """What was trained: the lowest validation loss, and peak and time, over those of 16 bits where there is such a run."""
    trained, base = row.get("training", {}), (reference or {}).get("training", {})
    found = {}
    if checks := trained.get("validation_losses"):
        found["validation_loss"] = Figure(min(check["loss"] for check in checks), "paired", LOSS_FLOOR)
    for name, key in (("step", "step_s"), ("train_peak", "peak_bytes")):
        value, other = trained.get(key), base.get(key)
        if value and trained is base and key == "step_s":
            found["train_step_s"] = Figure(value, "time", less=True)
        elif value and other and trained is not base:
            found[f"{name}_over_16_bit"] = Figure(value / other, "ratio", less=True)
    return found


def packages_of(outcomes: list) -> dict[str, str]:
    """The versions of Python and of the packages, from the first record that has them."""
    env = next((o.record["env"] for o in outcomes if o.record), None)
    return {"python": env["python"]} | env["packages"] if env else {}
