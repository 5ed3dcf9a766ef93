"""Exercises ship unanswered and run clean; a right answer is told from a wrong one."""

import ast
import contextlib
import io
import json
from pathlib import Path

import pytest

from qwlib.lessons import exercises

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "01_fundamentals.ipynb"

# for each exercise of notebook 01: a right answer, and wrong ones that somebody might give
ANSWERS = [
    (
        "4 + 8 / 128 + 32 / (128 * 256)",
        ["4 + 8 / 64 + 32 / (64 * 256)", "4 + 32 / 128", "4 + 8 / 128", "4.063", "4.0", "'four'"],
    ),
    (
        "tuple(0.5 * fourbit.normal_float()[[0b0011, 0b1110]])",
        ["tuple(0.5 * fourbit.normal_float()[[0b1110, 0b0011]])", "(-0.3949, 0.723)", "0.5", "(-0.1975,)"],
    ),
    ("[12, 8, 6, 4, 3, 2, 0, -12] * 8", ["torch.randn(64).tolist()", "[1.0] * 63", "[1.0] * 64"]),
]


def run(cells: list[dict], answer: str) -> str:
    """What the exercise prints, after the cells that it builds on."""
    *before, exercise = ["".join(cell["source"]) for cell in cells]
    assert exercise.startswith("answer = None")
    names = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for source in before:
            exec(source, names)
        names["torch"].manual_seed(0)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(exercise.replace("answer = None", f"answer = {answer}", 1), names)
    return out.getvalue().strip()


@pytest.mark.parametrize("number", range(3))
def test_a_right_answer_a_wrong_one_and_none(number):
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    asked = [cell for cell in code if "exercise" in cell["metadata"].get("tags", [])]
    assert len(asked) == len(ANSWERS)
    imports = next(cell for cell in code if "import qwlib\n" in cell["source"])
    helper = next(cell for cell in code if "def off(tensor):\n" in cell["source"])
    (function,) = [node for node in ast.parse("".join(helper["source"])).body if isinstance(node, ast.FunctionDef)]
    helper = helper | {"source": ast.unparse(function)}
    story = [imports, helper, asked[number]]
    right, wrong = ANSWERS[number]
    assert run(story, right) == "right"
    for answer in wrong:
        assert run(story, answer).startswith("not yet: "), answer
    assert run(story, "None") == "not answered yet"


def test_an_answer_that_breaks_is_wrong_and_says_how():
    assert exercises.check("x", lambda answer: answer + 1 > 0, "a number") == (
        'not yet: TypeError: can only concatenate str (not "int") to str. a number'
    )
    assert exercises.check(0, lambda answer: answer == 0, "zero is an answer too") == "right"
