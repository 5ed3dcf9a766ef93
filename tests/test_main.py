import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from qwlib import __main__ as main
from qwlib import schemes
from qwlib.errors import QwlibError
from qwlib.models import catalog


def cli(*arguments, **environment):
    import os

    return subprocess.run(
        [sys.executable, "-m", "qwlib", *arguments], capture_output=True, text=True, env=os.environ | environment
    )


def test_importing_costs_no_heavy_package():
    code = "import sys, qwlib; print([m for m in ('torch', 'transformers', 'numpy', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_lists_hold_every_row():
    models, rows = cli("models"), cli("schemes")
    assert all(name in models.stdout for name in catalog.MODELS)
    assert all(name in rows.stdout for name in schemes.SCHEMES)
    assert models.returncode == rows.returncode == 0


def test_estimate_prints_gigabytes():
    done = cli("estimate", "llama-3.1-8b", "nf4-dq")
    assert "5.592" in done.stdout
    assert "8.030 billion" in done.stdout
    options = ["estimate", "--model", "llama-3.1-8b", "--scheme", "nf4-dq"]
    assert CliRunner().invoke(main.app, options).stdout == done.stdout


def test_a_model_is_named_in_front_or_by_its_option():
    assert main._named(None, None).name == catalog.EMBEDDED
    assert main._named("opt-350m", None).name == main._named(None, "opt-350m").name == "opt-350m"
    assert main._named("opt-350m", "opt-350m").name == "opt-350m"
    with pytest.raises(QwlibError, match="two models are named, opt-350m and phi-3-mini"):
        main._named("opt-350m", "phi-3-mini")
    with pytest.raises(QwlibError, match="nf4-dq is a scheme: name the model before it, such as smollm2-135m nf4-dq"):
        main._named("nf4-dq", None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quantize"], "name a scheme after the model, such as smollm2-135m nf4-dq"),
        (["quantize", "opt-350m"], "such as opt-350m nf4-dq"),
        (["quantize", "opt-350m", "nf4", "--scheme", "fp4"], "two schemes are named, nf4 and fp4"),
        (["quantize", "opt-350m", "nf5"], "unknown scheme 'nf5'"),
        (["merge", "opt-350m"], "opt-350m has no adapter to merge"),
        (["bench", "opt-350m", "nf4", "nf5"], "unknown scheme 'nf5'"),
        (["estimate", "opt-350m", "nf4", "nf5"], "unknown scheme 'nf5'"),
    ],
)
def test_what_is_named_by_position_is_checked(arguments, message):
    with pytest.raises(QwlibError, match=message):
        main.app(arguments, standalone_mode=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("estimate", "--model", "nope"), "unknown model"),
        (("bench", "--scheme", "nf5"), "unknown scheme"),
        (("bench", "--weights", "rnd"), "trained or random"),
        (("bench", "--weights", "random", "--quality"), "no quality"),
    ],
)
def test_mistakes_are_one_line_and_no_traceback(arguments, message):
    done = cli(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.slow
def test_bench_measures_the_reference_first_and_writes_records(tmp_path):
    done = cli(
        "bench",
        "--scheme",
        "nf4",
        "--runs",
        "1",
        "--new-tokens",
        "4",
        "--quality",
        "--blocks",
        "1",
        "--out",
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("│")]
    assert lines[0].split()[1] == "bf16"
    assert lines[1].split()[1] == "nf4"
    stored = sorted(p.name for p in tmp_path.glob("*.json"))
    assert stored == ["smollm2-135m-trained-bf16-1x64+4.json", "smollm2-135m-trained-nf4-1x64+4.json"]
    quality = json.loads((tmp_path / stored[1]).read_text())["quality"]
    assert quality["protocol"] == "gptq-512"
    assert quality["kld"]["tokens"] == 511
    assert "PPL: gptq-512 on pydoc_data.topics" in done.stdout


@pytest.mark.slow
def test_bench_on_random_weights_needs_no_download(tmp_path):
    done = cli(
        "bench",
        "--model",
        "opt-350m",
        "--weights",
        "random",
        "--runs",
        "1",
        "--new-tokens",
        "4",
        "--out",
        str(tmp_path),
    )
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("*.json"))) == 2
    assert "failed" not in done.stdout


def test_run_ends_with_an_error_if_a_notebook_failed(tmp_path, record_cell):
    import nbformat

    for name, body in (("good", record_cell), ("bad", "1 / 0")):
        first = nbformat.v4.new_code_cell('OUT: str = ""  # folder', metadata={"tags": ["parameters"]})
        cells = [first, nbformat.v4.new_code_cell(body)]
        metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=metadata), tmp_path / f"{name}.ipynb")
    both = cli("run", str(tmp_path / "bad.ipynb"), str(tmp_path / "good.ipynb"), "--out", str(tmp_path / "runs"))
    assert both.returncode == 1
    assert "ZeroDivisionError" in both.stdout
    assert "good passed" in both.stdout
    asked = ["run", str(tmp_path / "good.ipynb"), "--out", str(tmp_path / "runs"), "--set", "MODLE=x"]
    assert "does not declare MODLE" in CliRunner().invoke(main.app, asked).stdout


def test_a_setting_is_a_name_and_a_text():
    found = dict(map(main._setting, ["ROWS=176", "MODEL=a/b", "TEXT=", "A=b=c"]))
    assert found == {"ROWS": "176", "MODEL": "a/b", "TEXT": "", "A": "b=c"}
    for bad in ("ROWS", "=3", "A B=3", ""):
        with pytest.raises(QwlibError, match="--set takes NAME=VALUE"):
            main._setting(bad)


def test_run_takes_a_size_and_lets_a_setting_go_over_it(tmp_path, notebook, record_cell):
    parameters = 'OUT: str = ""  # folder\nX: int = 1  # a number\nY: int = 1  # another'
    path = notebook("print('sum', X + Y)", record_cell, parameters=parameters)
    (tmp_path / "sizes.toml").write_text("[n]\nsmoke = {X = 10, Y = 10}\nnightly = {}\n")
    done = cli("run", str(path), "--out", str(tmp_path / "runs"), "--size", "smoke", "--set", "Y=300")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "sum 310" in (tmp_path / "runs" / "latest" / "n.ipynb").read_text()
