import os

import pytest
import torch

from qwlib import files
from qwlib.errors import QwlibError
from qwlib.measuring.reference import Reference


class Fake:
    """What `start` and `check` ask of a model."""

    class row:
        name = "m"

    class scheme:
        name = "bf16"

    vocabulary = 10
    dtype = torch.bfloat16


def filled(kept, slices):
    kept.start(Fake, protocol="p")
    for scores in slices:
        kept.add(scores)
    kept.finish(0.25)


def test_what_is_kept_comes_back_bit_for_bit_and_in_order():
    scores = torch.randn(7, 10).bfloat16().float()
    with Reference.temporary() as kept:
        filled(kept, scores.split(3))
        again = Reference.read(kept.folder)
        assert (again.name, again.tokens, again.noise_floor) == ("m bf16", 7, 0.25)
        for _ in range(2):
            assert torch.equal(torch.cat([again.take(3, "cpu"), again.take(3, "cpu"), again.take(1, "cpu")]), scores)
            assert again.take(1, "cpu") is None
            again.rewind()


def test_a_limit_cuts_between_slices_and_stays_cut():
    with Reference.temporary(limit=5 * 10 * 2) as kept:  # five positions of ten words in two bytes
        filled(kept, [torch.ones(3, 10), torch.ones(3, 10), torch.ones(1, 10)])
        assert kept.tokens == 3
        assert (kept.folder / "scores.bin").stat().st_size == 3 * 10 * 2


def test_a_full_disk_keeps_nothing_and_breaks_nothing(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0}))
    with Reference.temporary() as kept:
        filled(kept, [torch.ones(3, 10)])
        assert kept.tokens == 0
        assert kept.take(3, "cpu") is None


def test_it_is_removed_at_the_end_whatever_happens():
    seen = []

    def broken():
        with Reference.temporary() as kept:
            seen.append(kept.folder)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        broken()
    assert not seen[0].exists()


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not():
    home = files.cache_dir() / "references"
    dead, living = home / "999999999-x", home / f"{os.getpid()}-x"
    for folder in (dead, living):
        folder.mkdir(parents=True)
    with Reference.temporary():
        assert not dead.exists()
        assert living.exists()
    living.rmdir()


def test_an_unfinished_one_is_refused(tmp_path):
    with pytest.raises(QwlibError, match="no finished reference"):
        Reference.read(tmp_path)


def test_another_vocabulary_or_protocol_is_refused():
    class Wider(Fake):
        vocabulary = 11

    with Reference.temporary() as kept:
        filled(kept, [])
        kept.check(Fake, protocol="p")
        with pytest.raises(QwlibError, match="its vocabulary is 10, not 11"):
            kept.check(Wider, protocol="p")
        with pytest.raises(QwlibError, match="its protocol is p, not q"):
            kept.check(Fake, protocol="q")
