import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwlib.nightly import executing


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("No such file: '/scratch/tmpab12/x.json'", "No such file: '/home/me/runs/20261123-010203/x.json'"),
        ("Tried to allocate 2.00 GiB (GPU 0)", "Tried to allocate 14.50 GiB (GPU 1)"),
        ("<Tensor at 0x7f3a2b1c>", "<Tensor at 0x55aa01>"),
        ("sha 4f2a99bc01de differs", "sha 0011223344ff differs"),
        ("took 1.5e-3 s, not 0.2", "took 7e+10 s, not 12,345.6"),
        ("\x1b[31mValueError\x1b[0m: bad", "ValueError: bad"),
        ("~/a/b.txt is missing", "C:\\Users\\me\\b.txt is missing"),
    ],
)
def test_the_same_failure_has_the_same_name_every_night(one, other):
    assert executing.signature("cell error", one) == executing.signature("cell error", other)


def test_another_failure_has_another_name():
    names = {
        executing.signature(category, text)
        for category in ("cell error", "timeout")
        for text in ("ValueError: bad", "KeyError: bad", "ValueError: worse", "ValueError: feedface")
    }
    assert len(names) == 8
    assert all(re.fullmatch(r"[0-9a-f]{12}", name) for name in names)


@given(st.text(alphabet="abcdefxyz ", max_size=30), st.integers(0, 10**9), st.integers(0, 10**9))
def test_numbers_never_matter_and_words_always_do(words, one, other):
    first, second = (executing.signature("harness", f"{words}: {number} bytes") for number in (one, other))
    assert first == second
    assert first != executing.signature("harness", f"{words} not: {one} bytes")


@pytest.fixture(scope="module")
def shell():
    """IPython as a kernel of a run has it."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    made = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("IPython.get_ipython", lambda: made)
        executing.strict()
    return made


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("!false", "the command `false` ended with exit code 1"),
        ("x = !exit 3", "the command `exit 3` ended with exit code 3"),
        ("for code in (0, 4):\n    x = !exit {code}", "the command `exit {code}` ended with exit code 4"),
        ("exit", "exit.. and quit.. do not end a notebook"),
        ("quit()", "do not end a notebook"),
        ("exit(1)", "do not end a notebook"),
    ],
)
def test_what_a_kernel_passes_over_raises(shell, cell, message, capsys):
    with pytest.raises(RuntimeError, match=message):
        shell.run_cell(cell).raise_error()


def test_commands_that_work_work_as_before(shell, capfd):
    shell.run_cell(
        "name = 'two words'\nx = !printf 'a\\nb\\n' && echo {name}\ny = %sx echo c\n!echo {name}"
    ).raise_error()
    assert list(shell.user_ns["x"]) == ["a", "b", "two words"]
    assert list(shell.user_ns["y"]) == ["c"]
    assert "two words" in capfd.readouterr().out
    assert shell.user_ns["x"].n == "a\nb\ntwo words"  # IPython's list of lines


def test_an_unknown_magic_says_its_name(shell, monkeypatch):
    shown = []
    monkeypatch.setattr(shell, "_showtraceback", lambda kind, value, lines: shown.append((kind.__name__, str(value))))
    for cell in ("%nosuchmagic", "%%othermagic\n1"):
        assert not shell.run_cell(cell).success
    assert [kind for kind, _ in shown] == ["UsageError"] * 2
    assert "nosuchmagic" in shown[0][1]
    assert "othermagic" in shown[1][1]
