import os

import pytest

from qwlib import files
from qwlib.errors import QwlibError
from qwlib.measuring import bench, worker
from qwlib.models import catalog

JOB = {"prompt_tokens": 8, "new_tokens": 3, "runs": 1, "warmup": 0}


def test_rows_of_a_model_with_their_divergence(tmp_path):
    scored = {"protocol": "gptq-64", "blocks": 2}
    rows = list(bench.bench("smollm2-135m", ["nf4"], tmp_path, quality=scored, batches=[2], **JOB))
    assert [r["scheme"]["name"] for r in rows] == ["bf16", "nf4"]
    assert "kld" not in rows[0]["quality"]
    kld = rows[1]["quality"]["kld"]
    assert kld["reference"] == "smollm2-135m bf16"
    assert kld["tokens"] == rows[1]["quality"]["tokens"] == 2 * 63
    assert 0 <= kld["noise_floor"] < 0.1 * kld["mean"]
    ratio = rows[1]["quality"]["ppl"] / rows[0]["quality"]["ppl"]
    assert kld["ppl_ratio"] == pytest.approx(ratio, rel=1e-2)
    assert [s["batch"] for s in rows[1]["sweep"]] == [2]
    assert not list((files.cache_dir() / "references").glob(f"{os.getpid()}-*"))
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_a_row_that_fails_stops_nothing(tmp_path, monkeypatch):
    def measured(job, scheme, path, **_):
        if job["scheme"] == "bf16":
            return {"scheme": {"name": "bf16"}, "failure": {"reason": "out of memory"}}
        return {"scheme": {"name": job["scheme"]}, "quality": job["quality"]}

    monkeypatch.setattr(worker, "measured", measured)
    rows = list(bench.bench("smollm2-135m", ["nf4", "int8"], tmp_path, quality={"protocol": "gptq-64"}))
    assert [r["scheme"]["name"] for r in rows] == ["bf16", "nf4", "int8"]
    assert "failure" in rows[0]
    assert (
        "reference" not in rows[1]["quality"]
    )  # there is none to compare with, and perplexity is measured all the same


@pytest.mark.parametrize(
    ("schemes", "job", "message"),
    [
        (["nf5"], {}, "unknown scheme 'nf5'"),
        (["nf4"], {"quality": {"protocol": "wikitext"}}, "unknown protocol"),
        (["nf4"], {"quality": {"text": "/no/such/file"}}, "can't read the text"),
        (["nf4"], {"rans": 3}, "unknown key 'rans'"),
    ],
)
def test_a_mistake_is_told_before_anything_runs(schemes, job, message, tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "measured", None)  # calling it would raise
    with pytest.raises(QwlibError, match=message):
        list(bench.bench("smollm2-135m", schemes, tmp_path, **job))


def test_the_reference_comes_first_and_once():
    row = catalog.find("smollm2-135m")
    assert [scheme.name for _, scheme in bench.targets(row, ["nf4", "bf16", "nf4"])] == ["bf16", "nf4"]
