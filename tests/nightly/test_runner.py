"""Tiny notebooks that go wrong in every way that papermill keeps silent about."""

import errno
import json
import os
import time

import nbformat
import psutil
import pytest

from qwlib import files
from qwlib.errors import QwlibError
from qwlib.nightly import executing, runner

RECORD = "(the cell that writes the record)"


@pytest.fixture
def notebook(notebook, record_cell):
    return lambda *cells, **named: notebook(*(record_cell if c == RECORD else c for c in cells), **named)


def run(*paths, out, timeout_s: float = 60, **parameters):
    return runner.run([runner.Plan(path, parameters, timeout_s) for path in paths], out)


@pytest.mark.parametrize(
    ("cells", "status", "category", "reason"),
    [
        (["print('fine')", RECORD], "passed", "", ""),
        (["1 / 0", RECORD], "failed", "cell error", "ZeroDivisionError: division by zero"),
        (["x = 1\nassert x == 2", RECORD], "failed", "cell error", "AssertionError: assert x == 2"),
        (["!false", RECORD], "failed", "cell error", "the command `false` ended with exit code 1"),
        (
            ["%pip install --no-index no-such-package-anywhere", RECORD],
            "failed",
            "cell error",
            "ended with exit code 1",
        ),
        (["!true", RECORD], "passed", "", ""),
        (["import sys; sys.exit(0)", RECORD], "failed", "missing record", "as sys.exit(0) does"),
        (["print('no record')"], "failed", "missing record", "did not write a valid record: there is no record"),
        (["import os; os.kill(os.getpid(), 9)", RECORD], "failed", "kernel died", "the kernel died in cell 3 of 4"),
        (
            ["from pathlib import Path; (Path(OUT) / 'record.json').write_text('{')"],
            "failed",
            "missing record",
            "damaged",
        ),
    ],
)
def test_a_run_is_proved_by_its_record(notebook, tmp_path, cells, status, category, reason):
    (outcome,), folder = run(notebook(*cells), out=tmp_path / "runs")
    assert (outcome.status, outcome.category) == (status, category)
    assert reason in outcome.reason
    assert bool(outcome.signature) == (status != "passed")
    assert outcome.peak_bytes > 30e6  # an interpreter and a kernel
    written = json.loads((folder / "n" / "outcome.json").read_text())
    assert (written["status"], written["signature"]) == (status, outcome.signature)
    assert "Fatal" not in (folder / "n" / "log.txt").read_text()  # the process itself ended in order


def test_a_reason_is_one_line_without_commands(notebook, tmp_path, capsys):
    """GitHub's log takes `::stop-commands::` at the start of a line for a command, terminals what follows an escape."""
    (outcome,), _ = run(notebook(r"raise ValueError('a\n::stop-commands::x\x1b]0;p\x07')"), out=tmp_path / "runs")
    assert outcome.reason == "cell 3: ValueError: a ::stop-commands::x ]0;p"
    shown = capsys.readouterr().out
    assert "\n::" not in shown
    assert "\x1b" not in shown


def test_a_file_that_can_not_be_cleaned_is_removed(tmp_path, monkeypatch):
    token = "hf_" + "Qw3r" * 9
    monkeypatch.setenv("HF_TOKEN", token)
    for name, text in (("with", f"x {token}"), ("without", "x"), ("empty", "")):
        (tmp_path / name).write_text(text)

    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        runner.scrub(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"without", "empty"}


def test_an_old_record_proves_nothing(notebook, tmp_path):
    cells = "from qwlib import record\nfrom pathlib import Path\nold = record.new('notebook')\n"
    cells += "old['created'] = '2020-01-01T00:00:00+00:00'\nrecord.write(old, Path(OUT) / 'record.json')"
    (outcome,), _ = run(notebook(cells), out=tmp_path / "runs")
    assert (outcome.status, outcome.category) == ("failed", "missing record")
    assert outcome.reason == "the record was not written during this run"


def test_unknown_parameters_are_refused(notebook, tmp_path):
    (outcome,), _ = run(notebook(RECORD), out=tmp_path / "runs", MODLE="x")
    assert (outcome.status, outcome.category) == ("error", "parameters")
    assert "does not declare MODLE" in outcome.reason
    typed = "X: int = 1  # x\nOUT: str = ''"
    (wrong,), _ = run(notebook(RECORD, parameters=typed), out=tmp_path / "runs", X="many")
    assert (wrong.category, wrong.reason) == ("parameters", "X is a whole number, not 'many'")
    (bare,), _ = run(notebook(RECORD, parameters="X: int = 1  # x"), out=tmp_path / "runs")
    assert "does not declare OUT" in bare.reason


def test_a_notebook_that_names_no_kernel_runs_and_its_unknown_magic_is_named(notebook, tmp_path):
    path = notebook("%nosuchmagic", RECORD)
    whole = nbformat.read(path, 4)
    whole.metadata = {}
    nbformat.write(whole, path)
    (outcome,), _ = run(path, out=tmp_path / "runs")
    assert (outcome.status, outcome.category) == ("failed", "cell error")
    assert "UsageError" in outcome.reason
    assert "%nosuchmagic" in outcome.reason


def test_the_same_failure_has_the_same_signature_in_another_run(notebook, tmp_path):
    path = notebook("open(OUT + '/none/' + str(id(OUT)))", RECORD)
    (first,), _ = run(path, out=tmp_path / "runs")
    (second,), _ = run(path, out=tmp_path / "elsewhere" / "runs")
    (other,), _ = run(notebook("open(5, 6, 7)"), out=tmp_path / "runs")
    assert first.reason != second.reason
    assert first.signature == second.signature != other.signature


def test_a_hanging_notebook_is_ended_with_all_that_it_started(notebook, tmp_path):
    """Its kernel, and a worker that the kernel started in a session of its own."""
    start = "import subprocess\nworker = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
    start += "open(OUT + '/pid', 'w').write(str(worker.pid))\nimport time; time.sleep(600)"
    began = time.monotonic()
    (outcome,), folder = run(notebook(start, RECORD), out=tmp_path / "runs", timeout_s=12)
    assert (outcome.status, outcome.category) == ("timeout", "timeout")
    assert outcome.reason == "stopped in cell 3 of 4, at the time limit of 12 s"
    assert time.monotonic() - began < 90
    assert not psutil.pid_exists(int((folder / "n" / "pid").read_text()))
    assert not executing.processes(str(folder / "n"))


def test_what_a_notebook_leaves_behind_is_ended_too(notebook, tmp_path):
    leave = "import subprocess\nworker = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
    leave += "open(OUT + '/pid', 'w').write(str(worker.pid))"
    (outcome,), folder = run(notebook(leave, RECORD), out=tmp_path / "runs")
    assert outcome.status == "passed"
    assert not psutil.pid_exists(int((folder / "n" / "pid").read_text()))


def test_a_skip_carries_its_reason(notebook, tmp_path):
    plan = runner.Plan(notebook("1 / 0"), skip="takes an hour")
    (outcome,), folder = runner.run([plan], tmp_path / "runs")
    assert (outcome.status, outcome.reason, outcome.signature) == ("skipped", "takes an hour", "")
    assert "takes an hour" in (folder / "index.html").read_text()


def test_a_token_is_in_no_file_of_a_run(notebook, tmp_path, monkeypatch, record_cell):
    """Printed, raised, in the record: every file of the run is looked through."""
    token = "hf_" + "Qw3r" * 9
    monkeypatch.setenv("HF_TOKEN", token)
    said = "import os\nprint(os.environ['HF_TOKEN'])\nMORE = {'notes': [os.environ['HF_TOKEN']]}" + record_cell
    raised = notebook(said, "raise ValueError(os.environ['HF_TOKEN'])", name="raised")
    outcomes, folder = run(notebook(said), raised, out=tmp_path / "runs")
    assert [outcome.status for outcome in outcomes] == ["passed", "failed"]
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert not [path for path in files if token.encode() in path.read_bytes()]
    assert "***" in (folder / "index.html").read_text()
    assert "***" in (folder / "n" / "record.json").read_text()
    assert os.environ["HF_TOKEN"] == token


def test_one_failure_stops_nothing_and_the_page_shows_all(notebook, tmp_path):
    draw = "from qwlib import plots\nplots.arrivals({'tokens': [0.1, 0.2]})"
    bad = notebook("raise ValueError('<script>alert(1)</script>')", name="bad")
    good = notebook(draw, RECORD, name="good")
    outcomes, folder = run(bad, good, out=tmp_path / "runs")
    assert [o.status for o in outcomes] == ["failed", "passed"]
    latest = tmp_path / "runs" / "latest"
    assert latest.resolve() == folder
    page = (latest / "index.html").read_text()
    assert "1 of 2 notebooks passed" in page
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert page.count("data:image/png") == 1
    assert "<script>alert" not in (latest / "bad.html").read_text()
    assert "https://" not in page
    assert json.loads((folder / "good" / "record.json").read_text())["kind"] == "notebook"


def test_the_executed_copy_reads_like_the_notebook(notebook, tmp_path):
    """Headings, tables and folded parts stay, scripts of an output do not, and nothing is fetched from elsewhere."""
    code = (
        "from IPython.display import HTML\nHTML('<style>td { color: red }</style><b>bold</b><script>alert(2)</script>')"
    )
    path = notebook(code, RECORD)
    whole = nbformat.read(path, 4)
    text = "## Title\n\n![badge](https://example.org/x.svg)\n\n|a|b|\n|-|-|\n|1|2|\n\n<details><summary>s</summary>more</details>"
    whole.cells.insert(0, nbformat.v4.new_markdown_cell(text))
    nbformat.write(whole, path)
    _, folder = run(path, out=tmp_path / "runs")
    page = (folder / "n.html").read_text()
    body = page[page.index("<body") :]
    for part in ("<h2", "<td>1</td>", "<details>", "<b>bold</b>"):
        assert part in body, part
    assert "<script>alert" not in page
    assert body.count("color: red") == 1  # in the code that is shown, not as a style sheet's leavings
    assert 'src="http' not in page


def test_two_of_one_name_are_told_apart(tmp_path):
    plans = [
        runner.Plan(tmp_path / folder / f"{name}.ipynb") for folder, name in (("x", "a"), ("y", "A"), ("z", "a-2"))
    ]
    assert [plan.name for plan in runner._told_apart([*plans, plans[0]])] == ["a", "A-2", "a-2-2", "a-3"]
    for plan in plans:
        plan.path.parent.mkdir()
        plan.path.touch()
    outcomes, folder = runner.run(plans, tmp_path / "runs")
    assert [outcome.category for outcome in outcomes] == ["parameters"] * 3
    assert sorted(path.parent.name for path in folder.glob("*/outcome.json")) == ["A-2", "a", "a-2-2"]


def test_nothing_to_run_is_told(tmp_path):
    with pytest.raises(QwlibError, match="no notebooks"):
        runner.run([], tmp_path)
    with pytest.raises(QwlibError, match="no such notebook"):
        run(tmp_path / "none.ipynb", out=tmp_path)
