import statistics
import time

import pytest
import torch

from qwlib.errors import QwlibError
from qwlib.running import streaming
from qwlib.running.streaming import Timeline


def scripted(*times):
    """A clock that reads out the given times."""
    return iter(times).__next__


def test_figures_follow_their_definitions_exactly():
    line = Timeline(batch=4, clock=scripted(10.0, 10.5, 10.75, 11.5)).start()
    for _ in range(3):
        line(torch.zeros(4))
    assert line.ttft_s == 0.5
    assert line.itl_s == [0.25, 0.75]
    assert line.tpot_s == 0.5
    assert line.e2e_s == 1.5
    assert line.output_tok_s == 4 * 3 / 1.5
    assert line.decode_tok_s == 4 * 2 / 1.0


def test_a_single_token_has_no_gap():
    line = Timeline(clock=scripted(0.0, 2.0)).start()
    line(torch.zeros(1))
    assert (line.itl_s, line.tpot_s, line.decode_tok_s) == ([], None, None)
    assert line.output_tok_s == 0.5


def test_starting_again_forgets_the_first_request():
    line = Timeline(clock=scripted(0.0, 1.0, 5.0, 5.5)).start()
    line(None)
    line.start()
    line(None)
    assert (line.ttft_s, len(line.stamps)) == (0.5, 1)


@pytest.mark.parametrize("batch", [1, 3])
def test_every_token_is_stamped_and_the_prompt_is_not(lm, batch):
    ids = torch.arange(20 * batch).reshape(batch, 20) + 100
    line = streaming.time_stream(lm, ids, new_tokens=7)
    assert len(line.stamps) == 7
    assert line.batch == batch
    assert line.began < line.stamps[0]
    assert line.stamps == sorted(line.stamps)
    assert line.e2e_s == pytest.approx(line.ttft_s + sum(line.itl_s))


def spread(line) -> float:
    """Share of the request that lies between the first and the last token."""
    return (line.stamps[-1] - line.stamps[0]) / line.e2e_s


def test_tokens_reach_the_callback_as_they_are_generated(lm):
    ids = lm.encode("The capital of France is")
    lm.stream(ids, new_tokens=32)  # on a GPU the first request captures its graph
    line = streaming.time_stream(lm, ids, new_tokens=32)
    assert spread(line) > 0.5
    heap = Timeline().start()
    for token in lm.stream(ids, new_tokens=32)[0]:
        heap(token)
    assert spread(heap) < 0.5


def test_stamping_costs_nothing_beside_a_token(lm):
    line = streaming.time_stream(lm, lm.encode("Once upon a time"), new_tokens=24)
    gap = statistics.median(line.itl_s)
    recorder = Timeline().start()
    streamer, token = streaming.token_streamer(recorder), torch.zeros(1, dtype=torch.long)
    streamer.put(torch.zeros(1, 64, dtype=torch.long))  # the prompt
    began = time.perf_counter()
    for _ in range(100_000):
        streamer.put(token)
    cost = (time.perf_counter() - began) / 100_000
    assert len(recorder.stamps) == 100_000
    assert cost < 0.02 * gap


def test_chunks_are_the_same_text_in_fewer_pieces(lm):
    ids = lm.chat("Write a sentence about rivers.")
    chunks = list(streaming.text_chunks(lm, ids, new_tokens=24))
    tokens = lm.stream(ids, new_tokens=24)[0]
    assert "".join(chunks) == lm.tokenizer.decode(tokens, skip_special_tokens=True)
    assert 1 < len([chunk for chunk in chunks if chunk]) < 24


def test_an_error_in_the_thread_is_carried_over(lm, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(lm.engine, "generate", broken)
    with pytest.raises(QwlibError, match="RuntimeError: out of luck"):
        list(streaming.text_chunks(lm, [[5, 6]], new_tokens=4))


def test_an_abandoned_iterator_stops_its_thread(lm):
    import threading

    before = threading.active_count()
    chunks = streaming.text_chunks(lm, lm.chat("Tell a long story."), new_tokens=2000)
    next(chunks)
    chunks.close()
    assert threading.active_count() == before
