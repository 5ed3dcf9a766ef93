import math

import pytest
import torch

from qwlib import embedded, quality
from qwlib.errors import QwlibError

TEXT = embedded.text()[:20_000]


def by_hand(lm, text: str, length: int):
    """`gptq-N` straight from its definition: one token at a time, probabilities in float64, plain Python sums."""
    ids = lm.tokenizer(text).input_ids
    total, squares, count, scored = 0.0, 0.0, 0, b""
    for begin in range(0, len(ids) - length + 1, length):
        block = ids[begin : begin + length]
        with torch.inference_mode():
            scores = lm.model(torch.tensor([block], device=lm.device)).logits[0].double().cpu()
        logs = scores - scores.exp().sum(-1, keepdim=True).log()
        for position in range(length - 1):
            loss = -logs[position, block[position + 1]].item()
            total, squares, count = total + loss, squares + loss * loss, count + 1
        scored += lm.tokenizer.decode(block[1:]).encode()
    mean = total / count
    deviation = math.sqrt((squares / count - mean * mean) * count / (count - 1))
    ppl = math.exp(mean)
    return ppl, ppl * deviation / math.sqrt(count), total / math.log(2) / len(scored), count


@pytest.mark.parametrize("length", [64, 512])
def test_perplexity_equals_its_definition(lm, length):
    ppl, stderr, bits, count = by_hand(lm, TEXT, length)
    got = quality.perplexity(lm, TEXT, protocol=f"gptq-{length}", batch=1)
    assert got["ppl"] == pytest.approx(ppl, rel=1e-4)
    assert got["ppl_stderr"] == pytest.approx(stderr, rel=1e-3)
    assert got["bits_per_byte"] == pytest.approx(bits, rel=1e-3)
    assert got["tokens"] == count
    other = quality.perplexity(lm, TEXT, protocol=f"gptq-{length // 2}", batch=1)
    assert other["ppl"] != pytest.approx(ppl, rel=1e-2)


def test_batching_changes_nothing_but_rounding(lm):
    one = quality.perplexity(lm, TEXT, protocol="gptq-128", batch=1)
    many = quality.perplexity(lm, TEXT, protocol="gptq-128", batch=8)
    assert many["ppl"] == pytest.approx(one["ppl"], rel=2e-3)
    assert many["tokens"] == one["tokens"]


def test_blocks_limit_what_is_read(lm):
    got = quality.perplexity(lm, TEXT, protocol="gptq-128", blocks=3)
    assert got["tokens"] == 3 * 127
    assert got["text_sha256"] == quality.perplexity(lm, TEXT, protocol="gptq-128", blocks=2)["text_sha256"]


def test_more_text_means_a_smaller_error(lm):
    few, many = (quality.perplexity(lm, TEXT, protocol="gptq-128", blocks=n) for n in (4, 32))
    assert many["ppl_stderr"] < 0.6 * few["ppl_stderr"]


@pytest.mark.parametrize(
    ("text", "protocol", "message"),
    [
        ("too short", "gptq-512", "the text has 2 tokens, gptq-512 needs at least 512"),
        ("", "gptq-64", "has 0 tokens"),
        (TEXT, "wikitext", "unknown protocol"),
        (TEXT, "gptq-1", "unknown protocol"),
    ],
)
def test_what_can_not_be_measured_is_refused(lm, text, protocol, message):
    with pytest.raises(QwlibError, match=message):
        quality.perplexity(lm, text, protocol=protocol)


def test_texts_come_from_files_too(tmp_path):
    (tmp_path / "a.txt").write_text("Grüße", encoding="utf-8")
    assert quality.read_text(str(tmp_path / "a.txt")) == ("Grüße", "a.txt")
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "c.txt").write_text("  \n")
    for name, message in (("b.txt", "can't read"), ("c.txt", "is empty"), ("d.txt", "can't read")):
        with pytest.raises(QwlibError, match=message):
            quality.read_text(str(tmp_path / name))
