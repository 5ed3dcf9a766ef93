"""How processes begin and end: nothing is left switched off, hidden or forgotten."""

import contextlib
import gc
import importlib
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor

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


def test_later_collections_pass_over_what_came_with_transformers(monkeypatch):
    frozen = []
    monkeypatch.setattr(gc, "freeze", lambda: frozen.append(gc.isenabled()))
    monkeypatch.setattr(processes, "HEAVY", "a_heavy_module")
    with processes.importing():
        pass
    assert frozen == []
    with processes.importing():
        monkeypatch.setitem(sys.modules, "a_heavy_module", sys)
    assert frozen == [False]
    with processes.importing():  # it is there already, and models may be
        pass
    assert frozen == [False]


def test_a_package_is_hidden_only_meanwhile():
    sys.modules.pop("this", None)
    with processes.without("this"), pytest.raises(ImportError):
        importlib.import_module("this")
    assert "this" not in sys.modules
    with processes.without("json"):  # what is imported already stays
        assert importlib.import_module("json") is sys.modules["json"]


def test_what_takes_too_long_is_ended():
    def loop():
        while True:
            time.sleep(0.01)

    def stubborn():  # catches everything three times
        for _ in range(3):
            with contextlib.suppress(Exception):
                loop()
        loop()

    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(TimeoutError, match=r"more than 0\.05 s"), processes.within(0.05):
        loop()
    with pytest.raises(TimeoutError), processes.within(0.05):
        stubborn()
    with pytest.raises(TimeoutError), processes.within(0.05):
        re.match(r"(a|aa)+$", "a" * 60 + "b")
    with processes.within(0.05):
        pass
    time.sleep(0.1)  # nothing comes afterwards
    assert signal.getsignal(signal.SIGALRM) is before
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: _entered(processes.within(0.01))).result()


def _entered(manager) -> bool:
    with manager:
        time.sleep(0.03)
    return True


def test_why_a_process_ended():
    assert processes.last_word(0, "a warning") is None
    assert processes.last_word(-9, "") == "killed by SIGKILL (out of memory?)"
    assert processes.last_word(-15, "") == "killed by SIGTERM"
    assert processes.last_word(1, "Traceback\n\nValueError: bad\n \n") == "ValueError: bad"
    assert processes.last_word(3, "") == "the process ended with code 3 and no word"
