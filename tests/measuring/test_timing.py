from types import SimpleNamespace

import numpy
import pytest
import torch

from qwlib.errors import QwlibError
from qwlib.machine import clock
from qwlib.measuring import timing


class Clock:
    """Time that only moves when told."""

    now = 0.0

    def __call__(self):
        return self.now


def scripted_lm(clock, *, first: float, ttft: float, gap: float):
    """A model whose first request takes `first` seconds longer, and whose tokens come at known times."""
    calls = []

    def stream(ids, *, new_tokens, on_token=None):
        clock.now += ttft + (first if not calls else 0.0)
        calls.append(ids)
        for number in range(new_tokens):
            clock.now += gap if number else 0.0
            if on_token:
                on_token(None)

    tokenizer = lambda text, **_: SimpleNamespace(input_ids=[ord(c) for c in text])  # noqa: E731
    engine = SimpleNamespace(name="a script", ready_s=None, forget=lambda: None)
    facts = {"vocabulary": 64, "import_s": 2.0, "load_s": 3.0, "engine": engine}
    return SimpleNamespace(stream=stream, tokenizer=tokenizer, calls=calls, **facts)


def test_speed_is_exact_on_a_scripted_clock():
    clock = Clock()
    lm = scripted_lm(clock, first=8.0, ttft=0.5, gap=0.25)
    speed = timing.measure_speed(lm, batch=2, prompt_tokens=10, new_tokens=5, runs=4, warmup=2, clock=clock)
    assert len(lm.calls) == 1 + 2 + 4
    assert all(ids.shape == (2, 10) for ids in lm.calls)
    assert speed["first_call_s"] == 8.0 + 0.5 + 4 * 0.25
    assert speed["ttft_s"] == {"p50": 0.5, "p90": 0.5, "p95": 0.5, "n": 4}
    assert speed["itl_s"] == {"p50": 0.25, "p90": 0.25, "p95": 0.25, "n": 16}
    assert speed["tpot_s"]["p50"] == 0.25
    assert speed["e2e_s"]["p50"] == 1.5
    assert speed["output_tok_s"] == 2 * 5 / 1.5
    assert speed["decode_tok_s"] == 2 / 0.25
    assert speed["load_s"] == 3.0


def test_one_token_has_no_gaps_to_report():
    clock = Clock()
    speed = timing.measure_speed(scripted_lm(clock, first=0, ttft=1, gap=0), new_tokens=1, runs=1, clock=clock)
    assert not {"itl_s", "tpot_s", "decode_tok_s"} & set(speed)


def test_percentiles_are_numpys_and_p99_needs_a_hundred():
    values = list(numpy.random.default_rng(0).exponential(size=99))
    assert "p99" not in timing.summary(values)
    values.append(9.0)
    got = timing.summary(values)
    ordered = sorted(values)
    for q in (50, 90, 95, 99):  # re-derived: linear between the neighbours of rank (n − 1) q
        rank = (len(ordered) - 1) * q / 100
        low = int(rank)
        wanted = ordered[low] + (rank - low) * (ordered[min(low + 1, 99)] - ordered[low])
        assert got[f"p{q}"] == pytest.approx(wanted)
    assert got["n"] == 100


def test_prompts_have_the_shape_and_stay_in_the_vocabulary(lm):
    ids = timing.prompt_ids(lm, batch=3, tokens=50)
    assert ids.shape == (3, 50)
    assert not torch.equal(ids[0], ids[1])
    small = SimpleNamespace(tokenizer=lm.tokenizer, vocabulary=1000)
    assert timing.prompt_ids(small, batch=2, tokens=700).max() < 1000


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"prompt_tokens": 0}, {"runs": 0}, {"new_tokens": 0}])
def test_impossible_shapes_are_refused(lm, wrong):
    with pytest.raises(QwlibError, match="at least 1"):
        timing.measure_speed(lm, **wrong)


def test_bandwidth_counts_bytes_read_and_written():
    ticks = iter([0.0, 2.0] * 3)
    got = clock.copy_bandwidth(torch.device("cpu"), size=1000, repeats=3, clock=ticks.__next__)
    assert got == 2 * 1000 / 2.0


def test_the_roofline_is_bandwidth_over_bytes_read(lm):
    held = lm.memory["weights_bytes"]  # embedding and head are one tensor here: all of it is read
    assert timing.roofline(lm, 10e9) == pytest.approx(10e9 / held, rel=1e-6)


def test_a_request_needs_memory_of_its_own(lm):
    peak = timing.request_peak(lm, batch=8, prompt_tokens=256, new_tokens=2)
    if peak is None:
        pytest.skip("this system has no high-water mark that can be reset")
    cache = 8 * 257 * 23_040  # tokens × bytes a token of the key-value cache
    assert peak > cache
    assert timing.request_peak(lm, batch=1, prompt_tokens=16, new_tokens=2) < cache


def test_the_best_round_counts_and_the_first_does_not():
    spent = {"quick": iter([9.0, 2.0, 1.0]), "slow": iter([5.0, 6.0, 4.0])}
    now, order = [0.0], []

    def way(name):
        now[0] += next(spent[name])
        order.append(name)

    ways = {name: (lambda name=name: way(name)) for name in spent}
    assert clock.best(ways, 2, "cpu", clock=lambda: now[0]) == {"quick": 1.0, "slow": 4.0}
    assert order == ["quick", "slow"] * 3
