"""Tiny notebooks that go wrong in every way that papermill keeps silent about."""

import json

import nbformat
import pytest

from qwlib import runner
from qwlib.errors import QwlibError

PARAMETERS = 'OUT: str = ""  # folder for the record'
RECORD = """
from qwlib import record
from pathlib import Path
record.write(record.new("notebook"), Path(OUT) / "record.json")
"""


@pytest.fixture
def notebook(tmp_path):
    def make(*cells: str, name: str = "n", parameters: str = PARAMETERS):
        made = nbformat.v4.new_notebook()
        first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
        made.cells = [first, *(nbformat.v4.new_code_cell(cell) for cell in cells)]
        made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        path = tmp_path / f"{name}.ipynb"
        nbformat.write(made, path)
        return path

    return make


@pytest.mark.parametrize(
    ("cells", "status", "reason"),
    [
        (["print('fine')", RECORD], "passed", ""),
        (["1 / 0", RECORD], "failed", "ZeroDivisionError: division by zero"),
        (["import sys; sys.exit(0)", RECORD], "failed", ""),
        (["print('no record')"], "failed", "did not write a valid record: there is no record"),
        (["import os; os.kill(os.getpid(), 9)", RECORD], "failed", "kernel died"),
        (
            ["from pathlib import Path; Path(OUT).mkdir(); (Path(OUT) / 'record.json').write_text('{')"],
            "failed",
            "damaged",
        ),
    ],
)
def test_a_run_is_proved_by_its_record(notebook, tmp_path, cells, status, reason):
    (outcome,), _ = runner.run([notebook(*cells)], tmp_path / "runs")
    assert outcome.status == status
    assert reason in outcome.reason


def test_an_old_record_proves_nothing(notebook, tmp_path):
    cells = "from qwlib import record\nfrom pathlib import Path\nold = record.new('notebook')\n"
    cells += "old['created'] = '2020-01-01T00:00:00+00:00'\nrecord.write(old, Path(OUT) / 'record.json')"
    (outcome,), _ = runner.run([notebook(cells)], tmp_path / "runs")
    assert (outcome.status, outcome.reason) == ("failed", "the record is not of this run")


def test_unknown_parameters_are_refused(notebook, tmp_path):
    path = notebook(RECORD)
    (outcome,), _ = runner.run([path], tmp_path / "runs", parameters={"MODLE": "x"})
    assert "does not declare MODLE" in outcome.reason
    (bare,), _ = runner.run([notebook(RECORD, parameters="X: int = 1  # x")], tmp_path / "runs")
    assert "does not declare OUT" in bare.reason


def test_a_hanging_cell_is_stopped(notebook, tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "CELL_TIMEOUT_S", 1)
    (outcome,), _ = runner.run([notebook("import time; time.sleep(600)", RECORD)], tmp_path / "runs")
    assert outcome.status == "timeout"


def test_one_failure_stops_nothing_and_the_page_shows_all(notebook, tmp_path):
    draw = "from qwlib import plots\nplots.arrivals({'tokens': [0.1, 0.2]})"
    bad = notebook("raise ValueError('<script>alert(1)</script>')", name="bad")
    good = notebook(draw, RECORD, name="good")
    outcomes, folder = runner.run([bad, good], tmp_path / "runs")
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
    _, folder = runner.run([path], tmp_path / "runs")
    page = (folder / "n.html").read_text()
    body = page[page.index("<body") :]
    for part in ("<h2", "<td>1</td>", "<details>", "<b>bold</b>"):
        assert part in body, part
    assert "<script>alert" not in page
    assert body.count("color: red") == 1  # in the code that is shown, not as a style sheet's leavings
    assert 'src="http' not in page


def test_nothing_to_run_is_told(tmp_path):
    with pytest.raises(QwlibError, match="no notebooks"):
        runner.run([], tmp_path)
    with pytest.raises(QwlibError, match="no such notebook"):
        runner.run([tmp_path / "none.ipynb"], tmp_path)
