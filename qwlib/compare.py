"""Records side by side: the rows of a table, with the 16-bit reference first.

A ratio stands only between records of one machine and one request shape. A record that failed is a row with its reason.
"""

from . import schemes


def order(records: list[dict]) -> list[dict]:
    """The records in the order of the scheme table, the reference first."""
    names = [schemes.REFERENCE, *schemes.SCHEMES]
    place = {name: number for number, name in reversed([*enumerate(names)])}
    return sorted(records, key=lambda r: (r["model"]["name"], place.get(r["scheme"]["name"], len(names))))


def row(record: dict, reference: dict | None) -> dict:
    """One record as a flat row: `scheme`, `failure` or figures with units in their names.

    `reference` is the 16-bit record that it can be compared with; without it ratios are left out.
    """
    out = {"model": record["model"]["name"], "scheme": record["scheme"]["name"]}
    if "failure" in record:
        return out | {"failure": record["failure"]["reason"]}
    memory, speed, quality = record["memory"], record["speed"], record.get("quality", {})
    held = memory["weights_bytes"] + memory["state_bytes"]
    out |= {
        "bits/weight": record["scheme"]["bits_per_weight"],
        "weights GB": held / 1e9,
        "load s": speed["load_s"],
        "TTFT ms": 1e3 * speed["ttft_s"]["p50"],
    }
    if "itl_s" in speed:
        out |= {
            "ITL p50 ms": 1e3 * speed["itl_s"]["p50"],
            "ITL p95 ms": 1e3 * speed["itl_s"]["p95"],
            "decode tok/s": speed["decode_tok_s"],
        }
    if "ppl" in quality:
        out |= {"PPL": quality["ppl"], "PPL ±": quality["ppl_stderr"]}
    if reference:
        theirs = reference["memory"]["weights_bytes"] + reference["memory"]["state_bytes"]
        out["saved %"] = 100 * (1 - held / theirs)
        if "decode_tok_s" in speed and "decode_tok_s" in reference["speed"]:
            out["× 16-bit"] = speed["decode_tok_s"] / reference["speed"]["decode_tok_s"]
    return out


def _shape(record: dict) -> tuple:
    model, env = record["model"], record["env"]
    keys = ("engine", "batch", "prompt_tokens", "new_tokens")
    return model["name"], model["weights"], env["device"], env["cpu"], *(record["speed"][key] for key in keys)


def rows(records: list[dict]) -> list[dict]:
    """Flat rows of all records, ordered, each compared with the reference of its model."""
    ordered = order(records)
    done = [r for r in ordered if "failure" not in r]
    references = {_shape(r): r for r in done if r["scheme"]["name"] == schemes.REFERENCE}
    return [row(r, references.get(_shape(r)) if "failure" not in r else None) for r in ordered]


COLUMNS = {  # heading: format, in the order of printing
    "bits/weight": ".2f",
    "weights GB": ".3f",
    "saved %": ".1f",
    "load s": ".1f",
    "TTFT ms": ".0f",
    "ITL p50 ms": ".1f",
    "ITL p95 ms": ".1f",
    "decode tok/s": ".1f",
    "× 16-bit": ".2f",
    "PPL": ".2f",
    "PPL ±": ".2f",
}


def cells(records: list[dict]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows of text) for any table: a failure fills the second column, columns that nobody has are left out."""
    flat = rows(records)
    used = [name for name in COLUMNS if any(name in r for r in flat)]
    body = []
    for r in flat:
        if "failure" in r:
            body.append([r["scheme"], f"failed: {r['failure']}"])
        else:
            body.append([r["scheme"], *(format(r[name], COLUMNS[name]) if name in r else "" for name in used)])
    return ["scheme", *used], body
