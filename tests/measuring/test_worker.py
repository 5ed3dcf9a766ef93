import json

import pytest

from qwlib.errors import QwlibError
from qwlib.measuring import record, worker

JOB = {"model": "smollm2-135m", "scheme": "nf4-dq", "prompt_tokens": 16, "new_tokens": 4, "runs": 1, "warmup": 0}


def test_a_job_in_a_record_out(tmp_path):
    got = worker.spawn(JOB | {"quality": {"protocol": "gptq-64", "blocks": 2}}, tmp_path / "r.json")
    assert got == record.read(tmp_path / "r.json")
    assert got["scheme"]["name"] == "nf4-dq"
    assert got["memory"]["weights_bytes"] + got["memory"]["state_bytes"] == 109_777_792 + 1_914_360
    assert got["speed"]["new_tokens"] == 4
    assert got["quality"]["tokens"] == 2 * 63
    assert got["env"]["dtype"] == "bfloat16"
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_a_mistake_in_the_job_is_a_row_with_its_reason(tmp_path):
    got = worker.spawn(JOB | {"model": "no-such-model"}, tmp_path / "r.json")
    assert got["failure"]["reason"].startswith("unknown model 'no-such-model'")
    assert record.read(tmp_path / "r.json") == got


def test_a_killed_worker_is_a_row_with_its_reason(tmp_path, monkeypatch):
    """The worker's interpreter is a script here that kills itself, as the kernel would for want of memory."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nkill -9 $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(worker.sys, "executable", str(script))
    got = worker.spawn(JOB, tmp_path / "r.json")
    assert got["failure"]["reason"] == "killed by SIGKILL (out of memory?)"


def test_a_text_that_is_not_there_is_told_before_loading(monkeypatch):
    monkeypatch.setattr(worker, "load", None)  # calling it would raise
    with pytest.raises(QwlibError, match="can't read the text"):
        worker.run(JOB | {"quality": {"text": "/no/such/file"}})
    with pytest.raises(QwlibError, match="unknown protocol"):
        worker.run(JOB | {"quality": {"protocol": "wikitext"}})
    with pytest.raises(QwlibError, match="unknown key 'block'"):
        worker.run(JOB | {"quality": {"block": 3}})
    with pytest.raises(QwlibError, match="no finished reference"):
        worker.run(JOB | {"quality": {"reference": "/no/such/folder"}})


def test_a_worker_that_is_too_slow_is_stopped(tmp_path):
    got = worker.spawn(JOB, tmp_path / "r.json", timeout=0.2)
    assert got["failure"]["reason"] == "stopped after 0 s"


def test_an_old_record_is_not_taken_for_a_new_one(tmp_path):
    worker.spawn(JOB, tmp_path / "r.json", timeout=0.2)
    old = json.loads((tmp_path / "r.json").read_text())
    again = worker.spawn(JOB | {"model": "nope"}, tmp_path / "r.json")
    assert again["failure"] != old["failure"]


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"model": "smollm2-135m"}, "needs scheme"),
        (JOB | {"sizes": 3}, "unknown key 'sizes'"),
        (JOB | {"batches": 3}, "must be"),
        (JOB | {"batch": "3"}, "must be"),
    ],
)
def test_a_job_is_checked_before_anything_runs(job, message, tmp_path):
    with pytest.raises(QwlibError, match=message):
        worker.spawn(job, tmp_path / "r.json")
