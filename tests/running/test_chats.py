"""What is asked is what the model reads, or there is an error; what a tokenizer puts behind a text is no part of it."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from qwlib.errors import QwlibError
from qwlib.measuring import quality
from qwlib.running import streaming
from qwlib.running.lm import text_ids

PARTS = (
    "{% for m in messages %}{{ m['role'] }}: {% for c in m['content'] %}"
    "{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}\n{% endfor %}assistant:"
)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}<{{ m['content'] }}>{% endfor %}",
        "{% for m in messages %}<{{ m['content'] | trim }}>{% endfor %}",
        PARTS,
        {"default": PARTS, "tool_use": "tools"},
    ],
)
def test_the_question_is_in_what_is_read(shallow16, monkeypatch, template):
    monkeypatch.setattr(shallow16.tokenizer, "chat_template", template)
    rows = shallow16.chat(" What is a fox? ", "And a hen?\n\nTell me.")
    read = [shallow16.tokenizer.decode([i for i in row.tolist() if i >= 0]) for row in rows]
    assert "What is a fox?" in read[0]
    assert "And a hen?" in read[1]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "its chat template leaves out what is asked"),
        ("You are helpful.", "leaves out what is asked"),
        ("{{ raise_exception('a system message is needed') }}", "refuses it .a system message is needed"),
        ("{% for m in messages %}{{ m['content']", "refuses it"),
        ({"rag": "x", "tool_use": "y"}, "refuses it"),
        ("{{ messages[1]['content'] }}", "refuses it"),
    ],
)
def test_a_template_that_drops_refuses_or_breaks_is_one_line(shallow16, monkeypatch, template, message):
    monkeypatch.setattr(shallow16.tokenizer, "chat_template", template)
    with pytest.raises(QwlibError, match=message) as caught:
        shallow16.chat("What is a fox?")
    assert "\n" not in str(caught.value)
    assert "mend `tokenizer.chat_template`" in str(caught.value)


@pytest.fixture
def ended(shallow):
    """The tokenizer, putting an end-of-text token behind every text and none in front."""
    tokenizer = AutoTokenizer.from_pretrained(shallow)
    end = tokenizer.eos_token
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    assert tokenizer("a fox").input_ids[-1] == tokenizer.eos_token_id
    return tokenizer


def test_what_stands_behind_a_text_is_no_part_of_it(shallow16, ended, monkeypatch):
    plain, text = shallow16.tokenizer, "A quick brown fox. " * 40
    ids, places = text_ids(ended, text, places=True)
    assert ids == plain(text).input_ids
    assert [text[a:b] for a, b in places][:3] == ["A", " quick", " brown"]
    written = f"a{ended.eos_token}"  # one that was written stays
    assert text_ids(ended, written)[0] == plain(written).input_ids
    assert text_ids(ended, "")[0] == [ended.eos_token_id]  # all there is
    want = quality.perplexity(shallow16, text, protocol="hf-sliding-64")
    monkeypatch.setattr(shallow16, "tokenizer", ended)
    assert torch.equal(shallow16.encode(text)[0], torch.tensor(ids))
    assert quality.perplexity(shallow16, text, protocol="hf-sliding-64") == want
    with pytest.raises(QwlibError, match="the text has"):
        quality.perplexity(shallow16, "a", protocol="hf-sliding-64")


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda lm: lm.logits([[], [5, 6]]), "row 0 .from 0. has no token"),
        (lambda lm: lm.stream([[5], []], new_tokens=2), "row 1 .from 0. has no token"),
        (lambda lm: lm.logits([]), "at least one token"),
        (lambda lm: lm.logits([[5, -2]]), "token id -2 is no word"),
        (lambda lm: lm.logits(torch.tensor([[1.0, 2.0]])), "whole numbers, not torch.float32"),
        (lambda lm: lm.logits([[1.5]]), "whole numbers, not torch.float32"),
        (lambda lm: lm.logits([[True, False]]), "whole numbers, not torch.bool"),
        (lambda lm: lm.stream("hello", new_tokens=2), "`encode` makes them of a text"),
        (lambda lm: lm.logits(None), "`encode` makes them of a text"),
        (lambda lm: lm.logits([[10**30]]), "`encode` makes them of a text"),
        (lambda lm: lm.stream([[5]], new_tokens=0), "new_tokens is a whole number of at least 1, not 0"),
        (lambda lm: lm.stream([[5]], new_tokens=-1), "new_tokens is a whole number"),
        (lambda lm: lm.stream([[5]], new_tokens=2.0), "new_tokens is a whole number of at least 1, not 2.0"),
        (lambda lm: lm.stream([[5]], new_tokens=True), "new_tokens is a whole number"),
        (lambda lm: list(streaming.text_chunks(lm, [[5], [6]], new_tokens=2)), "follows one row, not 2"),
        (lambda lm: lm.chat(), "no text to encode"),
        (lambda lm: lm.encode([]), "no text to encode"),
        (lambda lm: lm.encode("fox \ud83d"), r"half of a character, '\\ud83d' at 4"),
        (lambda lm: lm.encode(["a", None]), "is no text but a NoneType"),
        (lambda lm: lm.chat("\ud83d"), "a question holds half of a character"),
        (lambda lm: quality.perplexity(lm, "a b c \ud83d", protocol="gptq-2"), "half of a character"),
        (lambda lm: quality.perplexity(lm, "a b c", protocol="gptq-2", blocks=-1), "blocks is a whole number"),
        (lambda lm: quality.perplexity(lm, "a b c", protocol="gptq-2", blocks=0), "blocks is a whole number"),
        (lambda lm: quality.perplexity(lm, "a b c", protocol="gptq-2", batch=-1), "batch is a whole number"),
    ],
)
def test_what_a_person_can_give_wrong_is_one_line(shallow16, ask, message):
    with pytest.raises(QwlibError, match=message) as caught:
        ask(shallow16)
    assert "\n" not in str(caught.value)
