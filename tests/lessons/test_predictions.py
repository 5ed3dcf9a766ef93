import numpy
import pytest
import torch
from IPython.core.formatters import DisplayFormatter

from qwlib import came_true
from qwlib.lessons import predictions


@pytest.mark.parametrize("yes", [True, numpy.bool_(True), torch.tensor(True)])
def test_a_prediction_is_told_with_its_numbers(yes, capsys):
    assert came_true("it shrinks", yes, "3 instead of 4 bytes")
    assert capsys.readouterr().out == "✓ came true: it shrinks (3 instead of 4 bytes)\n"


@pytest.mark.parametrize("no", [False, numpy.bool_(False), torch.tensor(False)])
def test_and_one_that_failed_too(no, capsys):
    assert not came_true("it shrinks", no, "4 bytes")
    assert capsys.readouterr().out == "✗ did not come true: it shrinks (4 bytes)\n"


def test_a_notebook_shows_the_line_once():
    assert DisplayFormatter().format(came_true("it shrinks", True, "4 bytes")) == ({}, {})
    assert DisplayFormatter().format(True)[0] == {"text/plain": "True"}


def test_and_one_that_the_measurement_does_not_decide(capsys):
    assert not came_true("it shrinks", None, "3 to 5 bytes")
    assert capsys.readouterr().out == "? undecided: it shrinks (3 to 5 bytes)\n"


@pytest.mark.parametrize(
    ("one", "other", "is_smaller"),
    [([1, 2], [3, 4], True), ([3, 4], [1, 2], False), ([1, 3], [2, 4], None), ([1, 2], [2, 3], None), ([2], [2], None)],
)
def test_ranges_that_overlap_decide_nothing(one, other, is_smaller):
    assert predictions.smaller(one, other) is is_smaller
