"""Training data: what is refused with its line, and which tokens are learnt."""

import json
from types import SimpleNamespace

import pytest
import torch

from qwlib import QwlibError
from qwlib.guard import guards, labelled, verdicts
from qwlib.training import examples

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Name a colour."},
    {"role": "assistant", "content": "Blue."},
    {"role": "user", "content": "Another one?"},
    {"role": "assistant", "content": "Dark red."},
]


def file(tmp_path, *rows, name="data.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def one(prompt="Is it raining?", answer="Yes."):
    return examples.Example([{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}], 1)


def test_both_forms_and_both_kinds_of_file_hold_the_same(tmp_path):
    pair = {"prompt": "Hi", "answer": "Hello, you"}
    messages = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, you"}]}
    first, second = examples.read(file(tmp_path, pair, "", messages))
    assert first.messages == second.messages
    assert (first.line, second.line) == (1, 3)
    (third,) = examples.read(file(tmp_path, 'prompt,answer\nHi,"Hello, you"', name="data.csv"))
    assert third.messages == first.messages
    assert third.line == 2
    assert examples.sha256([first]) == examples.sha256([third])
    assert examples.sha256([first]) != examples.sha256([first, second])


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ("{", "line 2 of data.jsonl is no JSON"),
        ("[1]", "line 2 of data.jsonl is no object"),
        ({"prompt": "a"}, "line 2 of data.jsonl has a prompt and no answer"),
        ({"question": "a", "answer": "b"}, "line 2 of data.jsonl needs either messages, or prompt and answer"),
        ({"prompt": "a", "answer": " "}, "line 2 of data.jsonl: what the assistant says is empty"),
        ({"prompt": 1, "answer": "b"}, "line 2 of data.jsonl: what the user says is no text but a int"),
        ({"prompt": "a", "answer": "\ud800"}, "half of a character"),
        ({"messages": []}, "messages are a list of objects"),
        ({"messages": [{"role": "bot", "content": "a"}]}, "one of system, user, assistant"),
        ({"messages": TURNS[:4]}, "ends with the user: the last message is the answer to learn"),
    ],
)
def test_the_first_line_that_is_something_else_is_named(row, why, tmp_path):
    good = {"prompt": "a", "answer": "b"}
    with pytest.raises(QwlibError, match=why):
        examples.read(file(tmp_path, good, row, good))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a,b\n1,2", "needs a head with the columns prompt and answer"),
        ("prompt,answer\n1,2,3", "line 2 of data.csv has 3 cells, its head 2"),
        ('prompt,answer\n1,"2', "can't be read as CSV"),
        ("prompt,answer", "holds no examples"),
        ("prompt,answer,answer\n1,2,3", "has two columns called 'answer'"),
    ],
)
def test_a_csv_file_that_is_none_is_refused(text, why, tmp_path):
    with pytest.raises(QwlibError, match=why):
        examples.read(file(tmp_path, text, name="data.csv"))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(QwlibError, match=r"none\.jsonl can't be read"):
        examples.read(tmp_path / "none.jsonl")


def learnt(lm, tokens) -> list[str]:
    """The runs of learnt tokens as text."""
    runs, before = [], False
    for label in tokens.labels:
        if label != examples.IGNORED:
            runs = [*(runs if before else [*runs, []])]
            runs[-1].append(label)
        before = label != examples.IGNORED
    return [lm.tokenizer.decode(run) for run in runs]


def test_only_answers_are_learnt_with_what_ends_them(shallow16):
    (tokens,) = examples.tokenized(shallow16, [examples.Example(TURNS, 1)], 512)
    assert learnt(shallow16, tokens) == ["Blue.<|im_end|>", "Dark red.<|im_end|>"]
    whole = shallow16.tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert shallow16.tokenizer.decode(tokens.ids) == whole.rstrip()
    assert [label for label in tokens.labels if label >= 0] == [
        i for i, label in zip(tokens.ids, tokens.labels, strict=True) if label >= 0
    ]


def test_the_prompt_is_what_a_model_is_asked(shallow16):
    """Token for token: else it would learn to answer after tokens that it never sees."""
    (tokens,) = examples.tokenized(shallow16, [one()], 512)
    asked = shallow16.chat("Is it raining?")[0].tolist()
    assert tokens.ids[: len(asked)] == asked
    assert tokens.labels[: len(asked)] == [examples.IGNORED] * len(asked)


def test_without_a_template_the_text_is_prompt_answer_and_end(shallow16):
    import copy

    tokenizer = copy.deepcopy(shallow16.tokenizer)
    tokenizer.chat_template = None
    plain = SimpleNamespace(tokenizer=tokenizer, row=shallow16.row, longest=None)
    (tokens,) = examples.tokenized(plain, [one()], 512)
    assert learnt(plain, tokens) == ["Yes." + tokenizer.eos_token]
    assert tokenizer.decode(tokens.ids).endswith("Is it raining?\nYes." + tokenizer.eos_token)


def test_a_template_that_rewrites_earlier_messages_is_refused(shallow16):
    import copy

    tokenizer = copy.deepcopy(shallow16.tokenizer)
    tokenizer.chat_template = "{{ messages|length }}: {% for m in messages %}{{ m.content }} {% endfor %}"
    with pytest.raises(QwlibError, match="its chat template changes earlier messages"):
        examples.tokenized(SimpleNamespace(tokenizer=tokenizer, row=shallow16.row, longest=None), [one()], 512)


def test_what_is_too_long_is_named_and_not_cut(shallow16):
    rows = [one(), examples.Example(one(answer="No, " * 30).messages, 2), examples.Example(TURNS, 3)]
    whole = examples.tokenized(shallow16, rows, 512)
    most = max(len(row.ids) for row in whole)
    assert examples.tokenized(shallow16, rows, most) == whole
    with pytest.raises(
        QwlibError, match=rf"1 of 3 examples have more than {most - 1} tokens, line 2 first and up to {most}"
    ):
        examples.tokenized(shallow16, rows, most - 1)
    with pytest.raises(QwlibError, match=rf"has {shallow16.longest} positions: longest can't be"):
        examples.tokenized(shallow16, rows, shallow16.longest + 1)


def test_a_split_is_drawn_by_its_seed_and_loses_nothing():
    rows = [one(str(n)) for n in range(40)]
    kept, held = examples.split(rows, 0.25, seed=3)
    assert len(held) == 10
    assert sorted(map(str, kept + held)) == sorted(map(str, rows))
    assert examples.split(rows, 0.25, seed=3) == (kept, held)
    assert examples.split(rows, 0.25, seed=4) != (kept, held)
    assert examples.split(rows, 0.0, seed=3) == (rows, [])


def test_a_batch_is_padded_on_the_right():
    rows = [examples.Tokens([5, 6, 7], [-100, 6, 7], 4), examples.Tokens([8], [8], 9)]
    batch = examples.batch(rows, 0)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["lines"].tolist() == [4, 9]
    assert batch["input_ids"].dtype == torch.int64


def test_a_guard_s_set_is_its_official_prompt_with_the_right_answer():
    rows = labelled.load("own").rows
    found = examples.read("guard:own")
    assert len(found) == len(rows)
    for row, example in zip(rows, found, strict=True):
        asked, answer = example.messages
        rated = row.response if row.response_label is not None else None
        assert asked == {"role": "user", "content": guards.nemoguard_prompt(row.prompt, rated)}
        verdict = verdicts.nemoguard(answer["content"], response=rated is not None)
        assert verdict.error is None
        assert verdict.user == ("safe", "unsafe")[row.label]
        assert verdict.response == (None if rated is None else ("safe", "unsafe")[row.response_label])
        assert bool(verdict.categories) == bool(row.category and (row.label or row.response_label))
    with pytest.raises(QwlibError, match="no such set of messages: none"):
        examples.read("guard:none")


def test_words_that_matter_more_are_found_in_their_order(shallow16, tmp_path):
    path = tmp_path / "verdicts.jsonl"
    row = {"prompt": "Is it safe?", "answer": '{"User": "safe", "Agent": "unsafe"}', "emphasis": ["safe", "unsafe"]}
    path.write_text(json.dumps(row) + "\n" + json.dumps(row | {"emphasis": "Agent"}) + "\n", encoding="utf-8")
    read = examples.read(path)
    assert [each.emphasis for each in read] == [("safe", "unsafe"), ("Agent",)]
    assert examples.sha256(read[:1]) != examples.sha256([examples.Example(read[0].messages, 1)])
    both, one = examples.tokenized(shallow16, read, 512)
    tokenizer = shallow16.tokenizer
    assert tokenizer.decode([both.ids[place] for place in both.emphasis]) == "safeunsafe"
    assert tokenizer.decode([one.ids[place] for place in one.emphasis]).strip() == "Agent"
    weights = examples.batch([both, one], 0, 8)["weights"]
    assert weights[0].sum() == both.learnt + 7 * len(both.emphasis)
    assert set(weights.unique().tolist()) == {0, 1, 8}
    assert (weights[:, [label == -100 for label in both.labels]] == 0).all()
    assert examples.batch([both, one], 0)["weights"].sum() == both.learnt + one.learnt


@pytest.mark.parametrize(
    ("emphasis", "why"),
    [
        ("maybe", "line 1 of x.jsonl: its emphasis 'maybe' is not a part of the answer there"),
        (["unsafe", "safe"], "its emphasis 'safe' is not a part of the answer there"),
        (3, "its emphasis is a word of the answer, or a list of them"),
        ([""], "its emphasis is a word of the answer, or a list of them"),
    ],
)
def test_an_emphasis_that_is_not_in_the_answer_is_named(emphasis, why, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"prompt": "?", "answer": '"unsafe"', "emphasis": emphasis}), encoding="utf-8")
    with pytest.raises(QwlibError, match=why):
        examples.read(path)


def test_a_guard_s_verdicts_are_emphasised():
    rows = labelled.load("training").rows
    read = examples.read("guard:training")
    assert all(each.emphasis[0] == ("safe", "unsafe")[row.label] for each, row in zip(read, rows, strict=True))
    assert [len(each.emphasis) for each in read] == [1 + (row.response_label is not None) for row in rows]
