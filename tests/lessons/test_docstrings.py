"""Examples made from docstrings are what training reads, and the same ones each time."""

import json

from qwlib.lessons import docstrings
from qwlib.training import examples


def test_lines_are_questions_and_first_sentences(tmp_path):
    count = docstrings.write(tmp_path / "all.jsonl")
    found = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert count == len(found) == len(examples.read(tmp_path / "all.jsonl")) > 500
    assert {"prompt": "What does math.sqrt in Python do?", "answer": "Return the square root of x."} in found
    assert len({row["answer"] for row in found}) == count


def test_some_of_them_are_the_same_each_time(tmp_path):
    for name in ("one", "two"):
        assert docstrings.write(tmp_path / name, 20) == 20
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert docstrings.write(tmp_path / "many", 10**6) == docstrings.write(tmp_path / "all")
