"""How processes begin and end: nothing is left switched off, hidden or forgotten."""

import gc
import importlib
import sys

import pytest

from qwlib.machine import processes


def test_nothing_is_collected_meanwhile_and_again_afterwards():
    with processes.importing():
        assert not gc.isenabled()
        with processes.importing():
            pass
        assert not gc.isenabled()  # the inner one leaves it to the outer one
    assert gc.isenabled()
    with pytest.raises(ImportError), processes.importing():
        importlib.import_module("no_such_module")
    assert gc.isenabled()


def test_a_package_is_hidden_only_meanwhile():
    sys.modules.pop("this", None)
    with processes.without("this"), pytest.raises(ImportError):
        importlib.import_module("this")
    assert "this" not in sys.modules
    with processes.without("json"):  # what is imported already stays
        assert importlib.import_module("json") is sys.modules["json"]


def test_why_a_process_ended():
    assert processes.last_word(0, "a warning") is None
    assert processes.last_word(-9, "") == "killed by SIGKILL (out of memory?)"
    assert processes.last_word(-15, "") == "killed by SIGTERM"
    assert processes.last_word(1, "Traceback\n\nValueError: bad\n \n") == "ValueError: bad"
    assert processes.last_word(3, "") == "the process ended with code 3 and no word"
