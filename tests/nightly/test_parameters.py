"""What is set is of the kind that a notebook declares, or is refused: `PUBLIC=false` is false."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwlib.errors import QwlibError
from qwlib.nightly import executing, parameters

CELL = """
MODEL: str = "x"  # a name
ROWS: int = 64  # rows
SHARE: float = 0.5
PUBLIC: bool = False
SEED: int | None = None
LATE: "float | None" = 1.5
TEXT = "plain"
COUNT = 3
EMPTY = None
LIST = [1, 2]
ONE = TWO = True
"""


def notebook(folder, *sources: str):
    cells = [{"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": source} for source in sources]
    path = folder / "n.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "metadata": {}, "source": ["# n"]}, *cells]}))
    return path


@pytest.fixture
def path(tmp_path):
    return notebook(tmp_path, CELL)


def test_every_name_has_the_kind_that_it_is_declared_with(path):
    found = {p.name: (p.kind, p.optional) for p in parameters.declared(path).values()}
    assert found == {
        "MODEL": ("str", False),
        "ROWS": ("int", False),
        "SHARE": ("float", False),
        "PUBLIC": ("bool", False),
        "SEED": ("int", True),
        "LATE": ("float", True),
        "TEXT": ("str", False),
        "COUNT": ("int", False),
        "EMPTY": (None, False),
        "LIST": (None, False),
        "ONE": ("bool", False),
        "TWO": ("bool", False),
    }


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("PUBLIC", "false", False),
        ("PUBLIC", "False", False),
        ("PUBLIC", " TRUE ", True),
        ("PUBLIC", True, True),
        ("ROWS", "176", 176),
        ("ROWS", "-3", -3),
        ("SHARE", "1e-3", 0.001),
        ("SHARE", 2, 2.0),
        ("SEED", "none", None),
        ("SEED", "7", 7),
        ("LATE", "None", None),
        ("MODEL", "false", "false"),
        ("MODEL", "123", "123"),
        ("MODEL", " a ", " a "),
        ("TEXT", "", ""),
        ("COUNT", "4", 4),
        ("EMPTY", "3", "3"),
        ("LIST", [3], [3]),
    ],
)
def test_a_value_becomes_of_that_kind(path, name, value, wanted):
    got = parameters.checked(path, {name: value})[name]
    assert (got, type(got)) == (wanted, type(wanted))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PUBLIC", "no", "PUBLIC is true or false, not 'no'"),
        ("PUBLIC", "0", "PUBLIC is true or false"),
        ("PUBLIC", "", "PUBLIC is true or false"),
        ("PUBLIC", 0, "PUBLIC is true or false, not 0"),
        ("PUBLIC", None, "PUBLIC is true or false, not None"),
        ("ROWS", "1e3", "ROWS is a whole number, not '1e3'"),
        ("ROWS", "none", "ROWS is a whole number"),
        ("ROWS", 2.0, "ROWS is a whole number, not 2.0"),
        ("ROWS", True, "ROWS is a whole number, not True"),
        ("SHARE", "nan", "SHARE is a number, not nan"),
        ("SHARE", "inf", "SHARE is a number"),
        ("SHARE", True, "SHARE is a number, not True"),
        ("SEED", "x", "SEED is a whole number or none, not 'x'"),
        ("MODEL", 5, "MODEL is a text, not 5"),
        ("NAME", "x", "does not declare NAME"),
    ],
)
def test_another_value_is_refused(path, name, value, message):
    with pytest.raises(QwlibError, match=message):
        parameters.checked(path, {name: value})


@given(st.text(max_size=6), st.sampled_from(["ROWS", "SHARE", "PUBLIC"]))
def test_no_text_stays_a_text_where_something_else_is_declared(text, name):
    kind = {"ROWS": "int", "SHARE": "float", "PUBLIC": "bool"}[name]
    try:
        value = parameters.Parameter(name, kind).read(text)
    except QwlibError:
        return
    assert type(value).__name__ == kind


def test_a_second_cell_a_broken_one_and_no_notebook_are_told(tmp_path):
    with pytest.raises(QwlibError, match="2 cells are tagged parameters: keep one"):
        parameters.declared(notebook(tmp_path, "X = 1", "X = 5"))
    with pytest.raises(QwlibError, match="no plain Python"):
        parameters.declared(notebook(tmp_path, "%matplotlib inline"))
    for content in ("", "[]", '{"cells": 5}', '{"cells": [3]}'):
        (tmp_path / "n.ipynb").write_text(content)
        with pytest.raises(QwlibError, match=r"n\.ipynb can't be read as a notebook"):
            parameters.declared(tmp_path / "n.ipynb")
    assert parameters.declared(notebook(tmp_path)) == {}


def test_a_notebook_that_is_refused_has_a_copy_of_which_no_cell_ran(tmp_path):
    path, executed = notebook(tmp_path, "X = 1", "X = 5"), tmp_path / "executed.ipynb"
    held = json.loads(path.read_text())
    held["cells"][1] |= {"execution_count": 7, "outputs": [{"output_type": "stream", "text": "of an earlier run"}]}
    path.write_text(json.dumps(held))
    assert executing.execute(path, executed, {"X": 2})["category"] == "parameters"
    cells = json.loads(executed.read_text())["cells"]
    assert [cell["source"] for cell in cells] == [cell["source"] for cell in held["cells"]]
    assert {(cell["execution_count"], *cell["outputs"]) for cell in cells[1:]} == {(None,)}
    executed.unlink()
    path.write_text("{")
    assert executing.execute(path, executed, {})["category"] == "parameters"
    assert not executed.exists()
