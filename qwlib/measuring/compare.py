"""Records side by side: the rows of a table, with the 16-bit reference first.

Two records are compared only if the machine and the request shape are the same. A record that failed is a row with its reason.

    bits/weight               bits per weight of a linear layer, as the format defines it
    bits/parameter in memory  memory of the loaded weights, with embedding, output head and scales, divided by the parameters
    memory growth (GB)        how much the memory of the process (on a GPU: of the device) grew
    × 16-bit speed            decoding speed divided by that of bf16 in transformers, whatever engine the row has
    PPL increase (%)          quantized perplexity over the reference's, paired token by token
    top-1 agreement (%)       share of tokens for which both models rank the same token first
    ±                         a standard error
"""

import html
from pathlib import Path

from .. import files, schemes


def order(records: list[dict]) -> list[dict]:
    """The records in the order of the scheme table, the reference first."""
    names = [schemes.REFERENCE, *schemes.SCHEMES]
    place = {name: number for number, name in reversed([*enumerate(names)])}
    return sorted(records, key=lambda r: (r["model"]["name"], place.get(r["scheme"]["name"], len(names))))


def row(record: dict, reference: dict | None) -> dict:
    """One record as a flat row: `scheme`, and either `failure` or numbers with units in their names.

    `reference` is the 16-bit record that it can be compared with. Without it, ratios are left out. A scheme is marked `(saved)`
    if it was read from a saved model, although it can be quantized while loading. It is marked `(not made by qwlib)` if the saved
    model was made by somebody else.
    """
    made, scheme = record["model"].get("artefact"), schemes.SCHEMES.get(record["scheme"]["name"])
    how = " (not made by qwlib)" if made == "foreign" else " (saved)" if made and not (scheme and scheme.maker) else ""
    out = {"model": record["model"]["name"], "scheme": record["scheme"]["name"] + how}
    if "failure" in record:
        how = "skipped" if record["failure"].get("skipped") else "failed"
        return out | {"failure": record["failure"]["reason"], "how": how}
    memory, speed, quality = record["memory"], record["speed"], record.get("quality", {})
    held = memory["weights_bytes"] + memory["state_bytes"]
    out["bits/weight"] = record["scheme"]["bits_per_weight"]
    if parameters := record["model"].get("parameters"):
        out["bits/parameter in memory"] = 8 * held / parameters
    if artefact := record.get("artefact"):
        out["file (GB)"] = artefact["file_bytes"] / 1e9
        if "seconds" in artefact:
            out["quantize (s)"] = artefact["seconds"]
    out |= {
        "weights (GB)": held / 1e9,
        **({"memory growth (GB)": memory["steady_bytes"] / 1e9} if "steady_bytes" in memory else {}),
        "load (s)": speed["load_s"],
        "TTFT (ms)": 1e3 * speed["ttft_s"]["p50"],
    }
    if "itl_s" in speed:
        out |= {
            "ITL p50 (ms)": 1e3 * speed["itl_s"]["p50"],
            "ITL p95 (ms)": 1e3 * speed["itl_s"]["p95"],
            "decode (tokens/s)": speed["decode_tok_s"],
        }
    if "ppl" in quality:
        out |= {"PPL": quality["ppl"], "PPL ±": quality["ppl_stderr"]}
    if kld := quality.get("kld"):
        out |= {"PPL increase (%)": 100 * (kld["ppl_ratio"] - 1), "PPL increase ±": 100 * kld["ppl_ratio_stderr"]}
        out |= {"KLD": kld["mean"], "KLD ±": kld["stderr"], "top-1 agreement (%)": 100 * kld["top1"]}
    if reference:
        theirs = reference["memory"]["weights_bytes"] + reference["memory"]["state_bytes"]
        out["saved (%)"] = 100 * (1 - held / theirs)
        if "decode_tok_s" in speed and "decode_tok_s" in reference["speed"]:
            out["× 16-bit speed"] = speed["decode_tok_s"] / reference["speed"]["decode_tok_s"]
    return out


def _shape(record: dict) -> tuple:
    model, env = record["model"], record["env"]
    keys = ("batch", "prompt_tokens", "new_tokens")
    return model["name"], model["weights"], env["device"], env["cpu"], *(record["speed"][key] for key in keys)


def rows(records: list[dict]) -> list[dict]:
    """Flat rows of all records, ordered, each compared with the reference of its model."""
    ordered = order(records)
    done = [r for r in ordered if "failure" not in r]
    references = {_shape(r): r for r in done if r["scheme"]["name"] == schemes.REFERENCE}
    return [row(r, references.get(_shape(r)) if "failure" not in r else None) for r in ordered]


COLUMNS = {  # heading: format, and whether less (-1) or more (+1) is better; in the order of printing
    "bits/weight": (".2f", 0),
    "bits/parameter in memory": (".2f", -1),
    "file (GB)": (".3f", -1),
    "quantize (s)": (".0f", -1),
    "weights (GB)": (".3f", -1),
    "memory growth (GB)": (".3f", -1),
    "saved (%)": (".1f", 1),
    "load (s)": (".1f", 0),
    "TTFT (ms)": (".0f", -1),
    "ITL p50 (ms)": (".1f", -1),
    "ITL p95 (ms)": (".1f", -1),
    "decode (tokens/s)": (".1f", 1),
    "× 16-bit speed": (".2f", 1),
    "PPL": (".2f", -1),
    "PPL ±": (".2f", 0),
    "PPL increase (%)": (".1f", -1),
    "PPL increase ±": (".1f", 0),
    "KLD": (".4f", -1),
    "KLD ±": (".4f", 0),
    "top-1 agreement (%)": (".1f", 1),
}


_ERRORS = {"PPL": "PPL ±", "PPL increase (%)": "PPL increase ±", "KLD": "KLD ±"}


def cells(records: list[dict]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows of text) for any table. The reason of a failure is in the second column. Empty columns are left out."""
    flat = rows(records)
    used = [name for name in COLUMNS if any(name in r for r in flat) and name not in _ERRORS.values()]

    def cell(r, name):
        return format(r[name], COLUMNS[name][0]) if name in r else ""

    body = []
    for r in flat:
        if "failure" in r:
            body.append([r["scheme"], f"{r['how']}: {r['failure']}"])
        else:
            errors = [f" ± {cell(r, _ERRORS[name])}" if _ERRORS.get(name) in r else "" for name in used]
            body.append([r["scheme"], *(cell(r, name) + error for name, error in zip(used, errors, strict=True))])
    return ["scheme", *used], body


def protocol(record: dict) -> str:
    """The line under a table of perplexities: protocol, text, its hash and the number of tokens."""
    q = record["quality"]
    kld = ""
    if "kld" in q:
        kld = f"; KL divergence from {q['kld']['reference']} over {q['kld']['tokens']:,} of these tokens"
    return f"PPL: {q['protocol']} on {q['text']} (sha256 {q['text_sha256'][:12]}), {q['tokens']:,} tokens{kld}"


def protocols(records: list[dict]) -> list[str]:
    """The lines under a table of these records. A line that another one contains is left out, such as the reference's."""
    lines = list(dict.fromkeys(protocol(r) for r in records if "quality" in r))
    return [line for line in lines if not any(other != line and other.startswith(line) for other in lines)]


def frame(records: list[dict]):
    """A pandas DataFrame with one row per record. The column `failed` gives the reason where a row has no numbers."""
    import pandas

    table = pandas.DataFrame([r | ({"failed": r["failure"]} if "failure" in r else {}) for r in rows(records)])
    return table[[name for name in ("model", "scheme", *COLUMNS, "failed") if name in table]]


def styled(records: list[dict]):
    """`frame` as a pandas Styler. For each model, the best cell of a column is green and the worst is orange-red.

    The colours are bluish green and vermilion of Okabe and Ito's palette, which can be told apart with any colour blindness. They
    are pale, so that dark text is readable on them.
    """
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    scale = LinearSegmentedColormap.from_list("washed", ["#7fcfb5", "#fbf8ef", "#f2a474"])
    table = frame(records)

    def shade(column):
        worse = (-COLUMNS[column.name][1] * column).groupby(table["model"])
        low, high = worse.transform("min"), worse.transform("max")
        place = (-COLUMNS[column.name][1] * column - low) / (
            high - low
        )  # 0 best, 1 worst; no number where all are alike
        return [f"background-color: {to_hex(scale(p))}; color: #222" if p >= 0 else "" for p in place]

    return (
        table.style.hide(axis="index")
        .apply(shade, subset=[name for name in table if COLUMNS.get(name, ("", 0))[1]])
        .format({name: f"{{:{COLUMNS[name][0]}}}" for name in table if name in COLUMNS}, na_rep="", escape="html")
        .set_properties(subset=[name for name in table if name in COLUMNS], **{"text-align": "right"})
    )


def export(records: list[dict], folder: Path) -> list[Path]:
    """Write `table.csv` (full precision), `table.md` and `table.html` into `folder`; the paths come back."""
    headings, body = cells(records)
    models = [r["model"] for r in rows(records)]
    lines = [["model", *headings], ["---"] * (len(headings) + 1)]
    lines += [[model, *row, *[""] * (len(headings) - len(row))] for model, row in zip(models, body, strict=True)]
    markdown = "".join(
        "| " + " | ".join(html.escape(cell, quote=False).replace("|", "\\|") for cell in line) + " |\n"
        for line in lines
    )
    texts = {
        "table.csv": frame(records).to_csv(),
        "table.md": markdown + "".join(f"\n{line}\n" for line in protocols(records)),
        "table.html": styled(records).to_html(doctype_html=True),
    }
    return [files.write_text(Path(folder) / name, text) for name, text in texts.items()]
