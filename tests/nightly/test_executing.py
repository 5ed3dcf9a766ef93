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
