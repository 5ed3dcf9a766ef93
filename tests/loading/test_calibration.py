import hashlib

import pytest

from qwlib.errors import QwlibError
from qwlib.guard import judging, labelled
from qwlib.loading import calibration
from qwlib.models import embedded


@pytest.fixture(scope="module")
def made(lm):
    text, name = calibration.read(None)
    return calibration.make(lm.tokenizer, text, calibration.facts(name, "cpu", text))


def test_samples_are_spread_over_the_text(lm, made):
    samples, length = calibration.SIZES["cpu"]
    assert len(made.rows) == samples
    assert {len(row) for row in made.rows} == {length}
    assert made.facts["tokens"] == samples * length
    text = calibration.docstrings()
    places = [text.find(lm.tokenizer.decode(row[10:30])) for row in made.rows]
    found = [place for place in places if place >= 0]
    assert len(found) > samples / 2
    assert found == sorted(found)
    assert found[-1] > 0.8 * len(text)


def test_on_a_gpu_as_many_as_the_paper_took():
    told = calibration.facts(None, "cuda")
    assert calibration.facts("called so", "cuda", calibration.docstrings()) == told | {"text": "called so"}
    assert told["samples"] >= 128
    assert told["length"] >= 512
    assert told["text_sha256"] == hashlib.sha256(calibration.docstrings().encode()).hexdigest()


def test_the_default_text_is_not_the_evaluation_text(made):
    calibration.check(made.facts, embedded.text())
    shared = set(made.facts["sequences"]) & calibration.sequences(embedded.text())
    assert len(shared) < calibration.SHARED * len(made.facts["sequences"])


def test_the_text_itself_and_one_that_holds_some_of_it_are_refused(made):
    text = calibration.docstrings()
    with pytest.raises(QwlibError, match=r"(99|100)% of what this model was calibrated on"):
        calibration.check(made.facts, text)
    with pytest.raises(QwlibError, match="name another text"):
        calibration.check(made.facts, embedded.text() + text[: len(text) // 8])


def test_a_sequence_is_thirteen_words_whatever_lies_between():
    words = [f"w{i}" for i in range(2000)]
    kept = calibration.sequences(" ".join(words))
    assert kept == calibration.sequences("\n\n".join(words))
    assert 1988 / 16 / 2 < len(kept) < 1988 / 16 * 2
    assert not kept & calibration.sequences(" ".join(word for i, word in enumerate(words) if i % 12))


def test_a_text_that_is_too_short_or_not_there_is_told(lm, tmp_path):
    (tmp_path / "short.txt").write_text("a few words only")
    told = calibration.facts(str(tmp_path / "short.txt"), "cpu")
    with pytest.raises(QwlibError, match=r"short.txt has 0 pieces of 256 tokens, calibration needs 32"):
        calibration.make(lm.tokenizer, "a few words only", told)
    with pytest.raises(QwlibError, match="can't read the text"):
        calibration.facts(str(tmp_path / "none.txt"), "cpu")


def test_a_guard_is_calibrated_on_its_prompts_and_right_verdicts_and_on_no_message_that_it_is_measured_on(lm):
    text, judge, own = judging.calibration_text("nemoguard-8b", lm.tokenizer), judging.Judge(lm), labelled.load()
    assert not [row.prompt for row in own.part("test").rows if f"user: {row.prompt}\n" in text]
    words, asked = ("safe", "unsafe"), []
    for row in own.part("tune").rows:
        asked.append((row.prompt, None, '{"User Safety": "' + words[row.label]))
        if row.response is not None:
            behind = f'", "Response Safety": "{words[row.response_label]}'
            asked.append((row.prompt, row.response, asked[-1][-1] + behind))
    assert len(asked) == text.count("<|im_start|>assistant") > 100
    for prompt, response, answer in asked:
        whole = judge.render(prompt, response) + answer
        assert text.count(whole + "\n") + text.endswith(whole) == 1
    told = calibration.facts("a guard's prompts", "cuda", text, lm.tokenizer)
    made = calibration.make(lm.tokenizer, text, told)
    assert 80 < len(made.rows) == told["samples"] < 128  # as many as there are
    assert calibration.facts("a guard's prompts", "cpu", text, lm.tokenizer)["samples"] == 32
