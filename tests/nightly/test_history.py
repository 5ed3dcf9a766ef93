import errno
import json
import os

import pytest

from qwlib.nightly import gates, history
from qwlib.nightly.runner import Outcome

LINE = {"size": "smoke", "device": "cpu", "figures": {"a": 1.5}, "regressions": [], "suspects": [], "packages": {}}


def read(path):
    return history.read(path, size="smoke")


def test_nights_come_back_in_the_order_of_the_file_and_by_size(tmp_path):
    path = tmp_path / "runs" / "history.jsonl"
    for night, size in (("2099", "smoke"), ("1", "smoke"), ("3", "nightly"), ("2", "smoke")):
        history.append(path, LINE | {"night": night, "size": size})
    nights, damaged = read(path)
    assert [night["night"] for night in nights] == ["2099", "1", "2"]
    assert damaged == []
    assert read(tmp_path / "none") == ([], [])


@pytest.mark.parametrize(
    "bad",
    [
        "{",
        '{"schema": 1}',
        '{"schema": 9}',
        "[]",
        "1",
        "\x00\xff",
        *(
            json.dumps({"schema": 1, "night": "x"} | LINE | {"figures": {"a": value}})
            for value in ("b", float("nan"), None)
        ),
        json.dumps({"schema": 1, "night": 3} | LINE),
    ],
)
def test_a_damaged_line_is_told_and_stays(tmp_path, bad):
    path = tmp_path / "history.jsonl"
    history.append(path, LINE | {"night": "1"})
    with open(path, "ab") as file:
        file.write(bad.encode("latin-1") + b"\n")
    history.append(path, LINE | {"night": "2"})
    nights, damaged = read(path)
    assert [night["night"] for night in nights] == ["1", "2"]
    assert len(damaged) == 1
    assert "line 2" in damaged[0]
    assert bad.encode("latin-1") in path.read_bytes()


def test_every_cut_of_the_file_keeps_every_whole_night(tmp_path):
    """A night that is appended after a crash at any byte begins a line of its own."""
    path = tmp_path / "history.jsonl"
    history.append(path, LINE | {"night": "1"})
    first = path.stat().st_size
    history.append(path, LINE | {"night": "2"})
    whole = path.read_bytes()
    for cut in range(first, len(whole) + 1):
        path.write_bytes(whole[:cut])
        history.append(path, LINE | {"night": "3"})
        nights, damaged = read(path)
        complete = cut >= len(whole) - 1
        assert [night["night"] for night in nights] == (["1", "2", "3"] if complete else ["1", "3"])
        assert bool(damaged) == (first < cut < len(whole) - 1)


def test_of_two_lines_of_one_night_the_later_counts(tmp_path):
    path = tmp_path / "history.jsonl"
    history.append(path, LINE | {"night": "1"})
    history.append(path, LINE | {"night": "1", "figures": {"a": 2.0}})
    (night,), _ = read(path)
    assert night["figures"] == {"a": 2.0}


def test_nights_of_two_devices_may_have_one_name(tmp_path):
    path = tmp_path / "history.jsonl"
    for device, value in (("cpu", 1.0), ("gpu", 2.0), ("cpu", 3.0)):
        history.append(path, LINE | {"night": "1", "device": device, "figures": {"a": value}})
    assert [(night["device"], night["figures"]["a"]) for night in read(path)[0]] == [("gpu", 2.0), ("cpu", 3.0)]


def test_one_night_from_the_future_changes_no_verdict(tmp_path):
    """A second slow night running is a regression, wherever in time another line of the history claims to be."""
    name = "03/m/bf16/decode_tok_s"
    row = {"scheme": {"name": "bf16"}, "model": {"name": "m"}, "speed": {"decode_tok_s": 60.0, "ttft_s": {}}}
    tonight = [Outcome("03", "passed", 100.0, record={"rows": [row], "env": {"python": "3", "packages": {}}})]

    def line(night, value, **more):
        return LINE | {"night": night, "figures": {name: value}} | more

    good = [line(f"2026110{day}-013000", 100.0) for day in range(1, 5)]
    slow = line("20261105-013000", 60.0, suspects=[name])
    future = line("20991231-013000", 100.0)
    for number, lines in enumerate(([*good, slow], [*good[:2], future, *good[2:], slow])):
        for each in lines:
            history.append(tmp_path / str(number), each)
        past = history.past(read(tmp_path / str(number))[0])
        (found,) = [finding for finding in gates.judge(tonight, None, past) if finding.name == name]
        assert found.state == "regression"
    single = history.past([*good])
    (found,) = [finding for finding in gates.judge(tonight, None, single) if finding.name == name]
    assert found.state == "suspect"


def test_a_full_disk_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "history.jsonl"
    history.append(path, LINE | {"night": "1"})
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        history.append(path, LINE | {"night": "2"})
    assert path.read_bytes() == before


def test_values_that_a_gate_rejected_are_no_passes():
    nights = [
        {"figures": {"a": 1.0, "b": 1.0, "c": 1.0}, "regressions": [], "suspects": [], "packages": {}},
        {
            "figures": {"a": 9.0, "b": 2.0, "c": 9.0},
            "regressions": ["a"],
            "suspects": ["c"],
            "packages": {"torch": "1"},
        },
    ]
    past = history.past(nights)
    assert past.passes == {"a": [1.0], "b": [1.0, 2.0], "c": [1.0]}
    assert past.suspects == {"a", "c"}
    assert past.packages == {"torch": "1"}
    assert history.past([]).passes == {}


def test_what_was_accepted_stays_accepted_when_the_night_is_judged_again(tmp_path):
    path = tmp_path / "history.jsonl"
    history.append(path, LINE | {"night": "1"})
    history.append(path, LINE | {"night": "2", "accepted": True, "figures": {"a": 9.0}})
    history.append(path, LINE | {"night": "2", "figures": {"a": 9.0}})
    nights, _ = read(path)
    assert history.past(nights).passes == {"a": [9.0]}
