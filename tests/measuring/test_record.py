import copy
import json

import pytest

from qwlib.errors import QwlibError
from qwlib.machine import about
from qwlib.measuring import record

SUMMARY = {"p50": 0.1, "p90": 0.2, "p95": 0.3, "n": 4}


@pytest.fixture(scope="module")
def whole():
    return record.new(
        "bench",
        model={"name": "smollm2-135m", "weights": "trained", "parameters": 134515008},
        scheme={"name": "nf4", "backend": "bitsandbytes", "bits_per_weight": 4.5},
        memory={"weights_bytes": 1, "state_bytes": 0},
        speed={
            "engine": "x",
            "batch": 1,
            "prompt_tokens": 64,
            "new_tokens": 8,
            "runs": 2,
            "warmup": 1,
            "load_s": 1.0,
            "ttft_s": SUMMARY,
            "e2e_s": SUMMARY,
            "output_tok_s": 10.0,
        },
        notes=["a note"],
    )


def test_what_was_written_is_read(whole, tmp_path):
    path = record.write(whole, tmp_path / "deep" / "r.json")
    assert record.read(path) == whole


def test_parts_that_were_not_measured_are_absent(whole):
    assert "quality" not in record.new("bench", quality=None)
    assert "quality" not in whole


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("memory", "weights_bytes"), None, "memory.weights_bytes"),
        (("memory", "weights_bytes"), 1.5, "memory.weights_bytes"),
        (("memory", "weights_bytes"), -1, "memory.weights_bytes"),
        (("memory", "new_key"), None, "memory.new_key is null"),
        (("speed", "output_tok_s"), float("nan"), "speed.output_tok_s: nan is no number"),
        (("speed", "output_tok_s"), float("inf"), "speed.output_tok_s: inf is no number"),
        (("speed", "ttft_s"), 0.1, "speed.ttft_s"),
        (("speed", "ttft_s"), {"p50": 1}, "speed.ttft_s"),
        (("schema",), 2, "schema"),
        (("created",), "yesterday", "created"),
        (("kind",), "", "kind"),
    ],
)
def test_a_wrong_value_is_named(whole, place, value, message):
    broken = copy.deepcopy(whole)
    inner = broken
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(QwlibError, match=message):
        record.validate(broken)


@pytest.mark.parametrize("missing", ["schema", "kind", "created", "env"])
def test_required_parts_are_required(whole, missing):
    with pytest.raises(QwlibError, match=missing):
        record.validate({k: v for k, v in whole.items() if k != missing})


def test_new_keys_may_come(whole):
    record.validate(whole | {"guard": {"f1": 0.9}, "memory": whole["memory"] | {"later": 3}})


def test_every_cut_of_a_file_is_an_error(whole, tmp_path):
    text = json.dumps(whole)
    for length in range(0, len(text) - 1, 37):
        (tmp_path / "r.json").write_text(text[:length])
        with pytest.raises(QwlibError, match="damaged or half-written"):
            record.read(tmp_path / "r.json")
    with pytest.raises(QwlibError, match="no record"):
        record.read(tmp_path / "none.json")
    (tmp_path / "r.json").write_text("[1]")
    with pytest.raises(QwlibError, match="not a valid record"):
        record.read(tmp_path / "r.json")


def test_an_invalid_record_never_reaches_the_disk(whole, tmp_path):
    path = record.write(whole, tmp_path / "r.json")
    with pytest.raises(QwlibError):
        record.write(whole | {"schema": 7}, path)
    assert record.read(path) == whole


def test_the_environment_names_no_person_and_no_path():
    import getpass
    import os

    text = json.dumps(about.environment())
    assert os.path.expanduser("~") not in text
    assert getpass.getuser() == "root" or getpass.getuser() not in text
    assert about.environment()["packages"]["torch"]


def test_a_bench_record_has_figures_or_a_failure(whole):
    bare = {key: value for key, value in whole.items() if key not in ("memory", "speed")}
    with pytest.raises(QwlibError):
        record.validate(bare)
    record.validate(bare | {"failure": {"reason": "killed by SIGKILL"}})
    with pytest.raises(QwlibError, match="scheme"):
        record.validate({key: value for key, value in whole.items() if key != "scheme"})
