"""Rows of a GPU: those that come with the package, what is refused, and new ones."""

import json

import pytest

from qwlib import QwlibError
from qwlib.models import estimates
from qwlib.training import examples, on_gpu

ROW = {
    "model": "small",
    "scheme": "nf4-dq",
    "method": "lora",
    "batch": 2,
    "length": 512,
    "recompute": False,
    "gpus": 1,
    "weights_bytes": 1000,
    "peak_bytes": 5000,
    "step_s": 0.5,
    "tok_s": 2048.0,
    "trained_parameters": 100,
}
RECORD = {
    "device": "a device",
    "date": "2026-01-01",
    "packages": {"torch": "2"},
    "command": "python script.py",
    "rows": [ROW, ROW | {"batch": 1, "recompute": True}, ROW | {"batch": 1}],
}


@pytest.fixture
def file(tmp_path):
    def write(record):
        path = tmp_path / "h100.json"
        path.write_text(record if isinstance(record, str) else json.dumps(record), encoding="utf-8")
        return path

    return write


def test_the_package_s_rows_agree_with_the_estimates():
    rows = [row for row in on_gpu.h100()["rows"] if "failure" not in row]
    assert {"llama-3.1-8b", "gpt-neox-20b"} <= {row["model"] for row in rows}
    for row in rows:
        wanted = estimates.held_bytes(row["model"], row["scheme"])
        assert row["weights_bytes"] == pytest.approx(wanted, rel=0.005), row
        assert on_gpu.parts(row)["activations"] > 0, row


def test_adapters_have_the_numbers_that_follow_from_shapes():
    for row in on_gpu.h100()["rows"]:
        shapes = estimates.linear_shapes(row["model"])
        assert row["trained_parameters"] == sum(16 * (outputs + inputs) for outputs, inputs in shapes)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: record.pop("date"),
        lambda record: record["rows"].clear(),
        lambda record: record["rows"][0].pop("peak_bytes"),
        lambda record: record["rows"][0].pop("batch"),
        lambda record: record["rows"][0].update(step_s=0),
        lambda record: record["rows"][0].update(recompute=1),
        lambda record: record.update(more=1),
    ],
)
def test_a_record_with_a_hole_is_refused(spoil, file):
    record = json.loads(json.dumps(RECORD))
    assert on_gpu.h100(file(record)) == RECORD
    spoil(record)
    with pytest.raises(QwlibError, match="not a valid record"):
        on_gpu.h100(file(record))


def test_a_file_that_is_missing_or_no_json_is_told_in_one_line(file, tmp_path):
    for path in (tmp_path / "none.json", file("{")):
        with pytest.raises(QwlibError, match="can't be read"):
            on_gpu.h100(path)


def test_a_row_that_failed_needs_no_figures_and_is_not_picked(file):
    failed = {key: ROW[key] for key in on_gpu.JOB} | {"failure": "a batch does not fit into the GPU"}
    rows = on_gpu.h100(file(RECORD | {"rows": [failed, *RECORD["rows"]]}))["rows"]
    assert on_gpu.pick(rows, scheme="nf4-dq", recompute=False) == [RECORD["rows"][2], ROW]
    assert on_gpu.pick(rows, scheme="bf16") == []


def test_parts_add_up_to_the_peak():
    assert on_gpu.parts(ROW) == {
        "weights": 1000,
        "adapter": 400,
        "gradients": 400,
        "optimizer": 800,
        "activations": 2400,
    }


def test_examples_have_just_the_length(tmp_path):
    import transformers

    on_gpu.write(tmp_path / "words.jsonl", 5)
    from qwlib.models import embedded

    tokenizer = transformers.AutoTokenizer.from_pretrained(embedded.checkpoint())
    found = examples.read(tmp_path / "words.jsonl")
    texts = [tokenizer.apply_chat_template(each.messages, tokenize=False).rstrip() for each in found]
    assert [len(tokenizer(text)["input_ids"]) for text in texts] == 5 * [on_gpu.LENGTH]


def test_jobs_become_rows_and_a_failure_becomes_one_too(monkeypatch):
    asked = []

    def finetune(model, scheme, data, out, **settings):
        asked.append((model, scheme, settings))
        if scheme == "bf16":
            raise QwlibError("a batch does not fit into the GPU")
        found = {key: ROW[key] for key in on_gpu.FOUND if key != "weights_bytes"}
        return out, {"memory": {"weights_bytes": 900, "state_bytes": 100}, "training": found}

    monkeypatch.setattr(on_gpu, "finetune", finetune)
    jobs = [{"model": "small", "scheme": s, "batch": 2, "recompute": False} for s in ("nf4-dq", "bf16")]
    done, failed = on_gpu.measured(jobs, steps=3)
    assert done == ROW
    assert failed == {key: ROW[key] for key in on_gpu.JOB} | {
        "scheme": "bf16",
        "failure": "a batch does not fit into the GPU",
    }
    assert asked[0][2] | {"weights": "random", "longest": 512, "validation": 0, "steps": 3, "batch": 2} == asked[0][2]
