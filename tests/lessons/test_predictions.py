import numpy
import pytest
import torch
from IPython.core.formatters import DisplayFormatter

from qwlib import came_true


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
