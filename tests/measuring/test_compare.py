import pytest

from qwlib.measuring import compare


def made(scheme, *, held=100, tok_s=10.0, batch=1, device="cpu", weights="trained", **more):
    summary = {"p50": 0.1, "p90": 0.1, "p95": 0.1, "n": 1}
    speed = {
        "engine": "e",
        "batch": batch,
        "prompt_tokens": 8,
        "new_tokens": 8,
        "load_s": 1.0,
        "ttft_s": summary,
        "itl_s": summary,
    }
    return {
        "model": {"name": "m", "weights": weights},
        "scheme": {"name": scheme, "bits_per_weight": 4.0},
        "env": {"device": device, "cpu": "c"},
        "memory": {"weights_bytes": held, "state_bytes": 0},
        "speed": speed | {"decode_tok_s": tok_s},
    } | more


def test_the_reference_comes_first_and_ratios_are_against_it():
    rows = compare.rows([made("nf4", held=40, tok_s=15.0), made("bf16")])
    assert [r["scheme"] for r in rows] == ["bf16", "nf4"]
    assert rows[1]["saved (%)"] == pytest.approx(60)
    assert rows[1]["× 16-bit speed"] == 1.5


@pytest.mark.parametrize("other", [{"batch": 2}, {"device": "another machine"}, {"weights": "random"}])
def test_no_ratio_between_what_can_not_be_compared(other):
    rows = compare.rows([made("bf16"), made("nf4", **other)])
    assert "× 16-bit speed" not in rows[1]


def test_what_was_read_from_an_artefact_is_marked():
    origins = {None: "nf4", "qwlib": "nf4 (saved)", "foreign": "nf4 (not made by qwlib)"}
    for artefact, label in origins.items():
        record = made("nf4")
        record["model"] |= {"artefact": artefact} if artefact else {}
        found = compare.rows([made("bf16"), record])[1]
        assert found["scheme"] == label
        assert found["× 16-bit speed"] == 1  # compared with the reference all the same


def test_a_failure_stays_a_row():
    failed = {"model": {"name": "m"}, "scheme": {"name": "int8"}, "failure": {"reason": "killed by SIGKILL"}}
    headings, body = compare.cells([made("bf16"), failed])
    assert body[1] == ["int8", "failed: killed by SIGKILL"]
    assert "PPL" not in headings


def test_every_batch_size_has_its_own_reference():
    rows = compare.rows([made("bf16", batch=b, tok_s=10.0 * b) for b in (1, 4)] + [made("nf4", batch=4, tok_s=20.0)])
    assert [r.get("× 16-bit speed") for r in rows] == [1.0, 1.0, 0.5]


KLD = {
    "reference": "m bf16",
    "tokens": 9,
    "mean": 0.25,
    "stderr": 0.01,
    "top1": 0.75,
    "ppl_ratio": 1.5,
    "ppl_ratio_stderr": 0.02,
}
QUALITY = {
    "protocol": "gptq-8",
    "text": "t",
    "text_sha256": "0" * 64,
    "tokens": 9,
    "ppl": 15.0,
    "ppl_stderr": 1.0,
    "kld": KLD,
}
FAILED = {"model": {"name": "m"}, "scheme": {"name": "int8"}, "failure": {"reason": "no <b>room</b> | none"}}


def test_divergence_has_its_columns():
    row = compare.rows([made("nf4", quality=QUALITY)])[0]
    assert (row["KLD"], row["KLD ±"], row["top-1 agreement (%)"]) == (0.25, 0.01, 75.0)
    assert (row["PPL increase (%)"], row["PPL increase ±"]) == (50.0, 2.0)
    assert compare.protocol({"quality": QUALITY}).startswith(
        "PPL: gptq-8 on t (sha256 000000000000), 9 tokens; KL diverg"
    )


def test_a_protocol_stands_once_under_a_table():
    plain = {key: value for key, value in QUALITY.items() if key != "kld"}
    lines = compare.protocols([made("bf16", quality=plain), made("nf4", quality=QUALITY), made("fp4", quality=QUALITY)])
    assert lines == [compare.protocol({"quality": QUALITY})]
    other = compare.protocols([made("bf16", quality=plain), made("nf4", quality=QUALITY | {"protocol": "gptq-9"})])
    assert len(other) == 2


def test_a_value_stands_with_its_error():
    headings, body = compare.cells([made("bf16"), made("nf4", quality=QUALITY)])
    assert headings[-4:] == ["PPL", "PPL increase (%)", "KLD", "top-1 agreement (%)"]
    assert body[1][-4:] == ["15.00 ± 1.00", "50.0 ± 2.0", "0.2500 ± 0.0100", "75.0"]
    assert body[0][-4:] == [""] * 4


def test_the_frame_keeps_numbers_and_reasons():
    table = compare.frame([made("bf16"), made("nf4", held=40, quality=QUALITY), FAILED])
    assert list(table["scheme"]) == ["bf16", "int8", "nf4"]
    assert table.loc[table["scheme"] == "int8", "failed"].item() == "no <b>room</b> | none"
    assert table.loc[table["scheme"] == "nf4", "saved (%)"].item() == pytest.approx(60)
    assert table["PPL"].count() == 1


def colours(html: str) -> dict[str, str]:
    """Cell text → background, read from the page's style sheet."""
    import re

    styles = {}
    for selectors, body in re.findall(r"([#\w, ]+) \{([^}]*)\}", html):
        if found := re.search(r"background-color: (#\w+)", body):
            styles |= {one.strip().lstrip("#"): found[1] for one in selectors.split(",")}
    cells = re.findall(r'<td id="(\w+)"[^>]*>([^<]*)</td>', html)
    return {text: styles[name] for name, text in cells if name in styles}


def test_the_best_is_green_the_worst_is_not_and_text_is_escaped():
    """Slow and small against fast and large: each measure has its own direction."""
    html = compare.styled(
        [made("bf16", held=10**9, tok_s=10.0), made("nf4", held=4 * 10**8, tok_s=20.0), FAILED]
    ).to_html()
    found = colours(html)
    good, bad = found["0.400"], found["1.000"]
    assert good != bad
    assert (found["20.0"], found["10.0"]) == (good, bad)
    assert "<b>" not in html
    red, green = int(good[1:3], 16), int(good[3:5], 16)
    assert green > red


def test_the_table_is_exported_three_ways(tmp_path):
    import csv

    records = [made("bf16"), made("nf4", held=40, quality=QUALITY), FAILED]
    paths = compare.export(records, tmp_path)
    assert [p.name for p in paths] == ["table.csv", "table.md", "table.html"]
    with open(tmp_path / "table.csv", newline="") as file:
        rows = {row["scheme"]: row for row in csv.DictReader(file)}
    assert float(rows["nf4"]["weights (GB)"]) == 4e-8
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert len({line.replace("\\|", "").count("|") for line in lines if line.startswith("|")}) == 1
    assert "PPL: gptq-8 on t" in lines[-1]
    for name in ("table.md", "table.html"):
        assert "<b>" not in (tmp_path / name).read_text()
