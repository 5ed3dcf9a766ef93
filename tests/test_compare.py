import pytest

from qwlib import compare


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
    assert rows[1]["saved %"] == pytest.approx(60)
    assert rows[1]["× 16-bit"] == 1.5


@pytest.mark.parametrize("other", [{"batch": 2}, {"device": "another machine"}, {"weights": "random"}])
def test_no_ratio_between_what_can_not_be_compared(other):
    rows = compare.rows([made("bf16"), made("nf4", **other)])
    assert "× 16-bit" not in rows[1]


def test_a_failure_stays_a_row():
    failed = {"model": {"name": "m"}, "scheme": {"name": "int8"}, "failure": {"reason": "killed by SIGKILL"}}
    headings, body = compare.cells([made("bf16"), failed])
    assert body[1] == ["int8", "failed: killed by SIGKILL"]
    assert "PPL" not in headings


def test_every_batch_size_has_its_own_reference():
    rows = compare.rows([made("bf16", batch=b, tok_s=10.0 * b) for b in (1, 4)] + [made("nf4", batch=4, tok_s=20.0)])
    assert [r.get("× 16-bit") for r in rows] == [1.0, 1.0, 0.5]
