import hashlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from qwlib import files


def test_text_is_written_whole(tmp_path):
    path = files.write_text(tmp_path / "deep" / "a.txt", "eins")
    assert files.write_text(path, "zwei ✓").read_text(encoding="utf-8") == "zwei ✓"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_what_does_not_follow_a_schema_is_named():
    schema = {"properties": {"a": {"type": "object", "properties": {"b": {"type": "integer"}}, "required": ["b"]}}}
    assert files.misfit({"a": {"b": 1}}, schema) is None
    assert files.misfit({"a": {"b": 1.5}}, schema) == "a.b: must be integer"
    assert files.misfit({"a": {"b": True}}, schema) == "a.b: must be integer"
    assert files.misfit({"a": {"b": 1}, "c": [0.5, float("inf")]}, schema) == "c.1: inf is no number"
    assert "a: must contain ['b']" in files.misfit({"a": {}}, schema)


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = files.write_text(tmp_path / "a.txt", "old")

    def full(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "model"

    def break_off():
        with files.new_folder(target) as out:
            (out / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        break_off()
    assert list(tmp_path.iterdir()) == []
    with files.new_folder(target) as out:
        (out / "whole").write_text("x")
        assert not target.exists()
    assert (target / "whole").read_text() == "x"


def test_the_faster_of_two_writers_wins(tmp_path):
    target = tmp_path / "model"
    with files.new_folder(target) as slow:
        (slow / "who").write_text("slow")
        with files.new_folder(target) as fast:
            (fast / "who").write_text("fast")
    assert (target / "who").read_text() == "fast"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_one_at_a_time_makes_what_belongs_at_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("QWLIB_CACHE", str(tmp_path / "cache"))
    made, inside, most = [], [], []

    def make(path):
        with files.alone(path):
            inside.append(path)
            most.append(len(inside))
            time.sleep(0.02)
            if path not in made:
                made.append(path)
            inside.remove(path)

    def at_once(*paths):
        most.clear()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(make, paths))
        return max(most)

    assert at_once(*[tmp_path / "model"] * 4) == 1
    assert at_once(*[tmp_path / name for name in "abcd"]) > 1  # other paths do not wait
    assert made.count(tmp_path / "model") == 1
    with pytest.raises(ValueError, match="broke"), files.alone(tmp_path / "model"):
        raise ValueError("broke")
    assert at_once(tmp_path / "model") == 1  # an error gives the lock back


def test_sha256_is_the_bytes_hash(tmp_path):
    (tmp_path / "f").write_bytes(b"qwlib")
    assert files.sha256(tmp_path / "f") == hashlib.sha256(b"qwlib").hexdigest()


def test_the_cache_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("QWLIB_CACHE", str(tmp_path))
    assert files.cache_dir() == tmp_path
    monkeypatch.delenv("QWLIB_CACHE")
    assert "qwlib" in str(files.cache_dir())
