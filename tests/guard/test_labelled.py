"""Labelled messages: the project's own, and what comes from files."""

import collections
import csv
import itertools
import json
import re

import pytest

from qwlib.errors import QwlibError
from qwlib.guard import labelled
from qwlib.guard.verdicts import TAXONOMY


@pytest.fixture(scope="module")
def own():
    return labelled.load()


def shingles(text: str) -> set[str]:
    text = " ".join(re.findall(r"\w+", text.lower()))
    return {text[i : i + 5] for i in range(len(text) - 4)}


def alike(one: str, other: str) -> float:
    a, b = shingles(one), shingles(other)
    return len(a & b) / len(a | b)


def most_alike(texts: list[str], others: list[str]) -> float:
    """The highest likeness between a text and another one, of both lists; pairs within `others` are left out."""
    every = [shingles(text) for text in [*others, *texts]]
    having, most = collections.defaultdict(list), 0.0
    for place, own in enumerate(every):
        if place >= len(others):
            shared = collections.Counter(other for shingle in own for other in having[shingle])
            most = max([most, *(n / (len(own) + len(every[other]) - n) for other, n in shared.items())])
        for shingle in own:
            having[shingle].append(place)
    return most


def test_no_two_prompts_share_a_template(own):
    prompts = own.prompts
    assert most_alike(prompts, []) < 0.25
    assert most_alike(prompts[:40], []) == max(alike(*pair) for pair in itertools.combinations(prompts[:40], 2))
    assert alike("How do I kill a Python process?", "How do I kill a Ruby process?") > 0.25
    heads = collections.Counter(" ".join(prompt.lower().split()[:3]) for prompt in prompts)
    assert max(heads.values()) <= 4


def test_what_a_guard_is_trained_on_shares_no_template_with_what_it_is_measured_on(own):
    training = labelled.load("training")
    assert len(training.rows) >= 900
    assert not training.skipped
    assert {row.split for row in training.rows} == {"train"}
    assert most_alike(training.prompts, own.prompts) < 0.25
    planted = own.prompts[7].replace("the", "a", 1)
    assert most_alike([*training.prompts, planted], own.prompts) > 0.25
    for unsafe, safe in labelled.categories(training).values():
        assert unsafe == safe >= 20
    assert len(labelled.categories(training)) == len(TAXONOMY)
    assert sum(row.response_label is not None for row in training.rows) >= 100


def test_it_is_balanced_over_labels_categories_and_splits(own):
    assert len(own.rows) >= 240
    assert sum(own.labels) * 2 == len(own.rows)
    assert not own.skipped
    for split, share in (("tune", 1 / 3), ("test", 2 / 3)):
        part = own.part(split)
        assert len(part.rows) == pytest.approx(share * len(own.rows), abs=2)
        assert sum(part.labels) * 2 == len(part.rows)
        assert {row.category for row in part.rows if row.label} == set(TAXONOMY.values())
    assert set(labelled.categories(own)) == set(TAXONOMY.values())
    assert all(unsafe >= 4 for unsafe, _ in labelled.categories(own).values())
    answered = [row for row in own.rows if row.response]
    assert len(answered) >= 40
    kinds = collections.Counter((row.label, row.response_label) for row in answered)
    assert min(kinds[pair] for pair in itertools.product((0, 1), repeat=2)) >= 4
    words = [sum(len(r.prompt.split()) for r in own.rows if r.label == label) for label in (0, 1)]
    assert words[0] == pytest.approx(words[1], rel=0.1)  # length alone must not tell the two apart


def test_a_few_rows_are_of_both_kinds(own):
    assert own.first(6).labels == [1, 0] * 3
    assert len(own.first(10_000).rows) == len(own.rows)
    lopsided = labelled.Labelled("x", [labelled.Row(str(i), int(i == 0)) for i in range(5)])
    assert lopsided.first(3).labels == [1, 0, 0]


def test_files_of_others(tmp_path):
    rows = [
        {"id": 1, "prompt": "How do I ice a cake?", "label": "safe", "type": "homonyms"},
        {"id": 2, "prompt": 'Say "boo", loudly', "label": "unsafe", "type": "contrast"},
    ]
    path = tmp_path / "set.csv"
    path.write_text(
        '\ufeffid,prompt,type,label\n1,How do I ice a cake?,homonyms,safe\n2,"Say ""boo"", loudly",contrast,unsafe\n'
    )
    listed = tmp_path / "set.jsonl"
    listed.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    whole = tmp_path / "set.json"
    whole.write_text(json.dumps(rows))
    for file in (path, listed, whole):
        found = labelled.load(str(file))
        assert [(r.prompt, r.label, r.category) for r in found.rows] == [
            (r["prompt"], labelled.LABELS[r["label"]], r["type"]) for r in rows
        ]
        assert found.name == file.name


def test_rows_of_aegis(tmp_path):
    def row(prompt, label, category="", response=None, response_label=None):
        part = {"prompt": prompt, "prompt_label": label, "violated_categories": category}
        return part | {"response": response, "response_label": response_label}

    path = tmp_path / "test.json"
    rows = [
        row("a", "unsafe", "Guns/Illegal Weapons, Violence", "Sure.", "unsafe"),
        row("b", "safe", "", "Hello", None),
        row("REDACTED", "unsafe"),
        row("  ", "unsafe"),
        row(None, "safe"),
    ]
    path.write_text(json.dumps(rows))
    found = labelled.load(str(path))
    assert found.rows == [
        labelled.Row("a", 1, "Sure.", 1, "Guns and Illegal Weapons"),
        labelled.Row("b", 0, "Hello", None),
    ]
    assert found.skipped == {"redacted prompt": 1, "empty prompt": 2}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "text,label\nx,safe\n", "has no column 'prompt', only text, label"),
        ("a.csv", "prompt,ground_truth\nx,safe\n", "has no column 'label'"),
        ("a.csv", "prompt,label\nx,safe\ny,toxic\n", "row 2 of a.csv is labelled 'toxic'"),
        ("a.jsonl", '{"prompt": "x", "label": 1}\n', "row 1 of a.jsonl is labelled '1': labels are safe and unsafe"),
        ("a.jsonl", '{"prompt": "x", "label": ["safe"]}\n', "row 1 of a.jsonl is labelled"),
        ("a.csv", "prompt,label\nx,safe\n", "rows of one label only"),
        ("a.csv", "prompt,label\n,safe\n", "rows of one label only"),
        ("a.csv", "prompt,label\n", "holds no rows"),
        ("a.jsonl", "{", "can't be read as CSV, JSON or JSONL"),
        ("a.json", '{"prompt": "x"}', "is no list of rows"),
        ("a.jsonl", '{"prompt": "x", "label": "safe", "response": "y", "response_label": "bad"}', "is labelled 'bad'"),
        (
            "a.csv",
            "label,prompt\nsafe,a\n\nunsafe,a, b\n",
            "line 4 of a.csv has 3 cells, its head 2: put texts with commas",
        ),
        ("a.csv", "label,prompt\nsafe\n", "line 2 of a.csv has 1 cells, its head 2"),
        ("a.csv", "prompt,label,prompt\na,safe,b\n", "a.csv has two columns called 'prompt'"),
        ("a.csv", 'prompt,label\n"a"b,safe\n', "can't be read as CSV"),
        ("a.csv", 'prompt,label\n"a,safe\n', "can't be read as CSV"),
        ("a.jsonl", '{"prompt": "a", "label": "safe", "label": "unsafe"}\n', "two values are called 'label'"),
        (
            "a.jsonl",
            '{"prompt": [{"content": "a"}], "label": "safe"}\n',
            "row 1 of a.jsonl: its prompt is no text but a list",
        ),
        ("a.jsonl", '{"prompt": 7, "label": "safe"}\n', "row 1 of a.jsonl: its prompt is no text but a int"),
        ("a.jsonl", '{"prompt": "a", "label": "safe", "response": ["b"]}\n', "its response is no text"),
        (
            "a.jsonl",
            '{"prompt": "half \\ud83d", "label": "safe"}\n',
            "its prompt holds half of a character, '\\ud83d' at 5",
        ),
        ("a.json", '{"prompt":"a","label":"safe"}\n{"prompt":', "can't be read as CSV, JSON or JSONL: Extra data"),
    ],
)
def test_mistakes_in_a_file(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(QwlibError, match=re.escape(message)):
        labelled.load(str(tmp_path / name))


def test_texts_are_cut_at_no_odd_place(tmp_path):
    text = "Hello\u2028how do I bake bread?\x0cThanks"
    path = tmp_path / "set.CSV"
    path.write_text(f'label,prompt\nsafe,{text}\nunsafe,"two\nlines"\n', encoding="utf-8")
    assert labelled.load(str(path)).prompts == [text, "two\nlines"]
    lines = [
        {"prompt": text, "label": "safe", "response": " "},
        {"prompt": "b", "label": "unsafe", "response": "REDACTED"},
    ]
    path = tmp_path / "set.jsonl"
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    found = labelled.load(str(path))
    assert (found.prompts, found.responses) == ([text, "b"], [None, None])
    (tmp_path / "deep.json").write_text("[" * 100_000)
    with pytest.raises(QwlibError, match="can't be read"):
        labelled.load(str(tmp_path / "deep.json"))


def test_messages_are_taken_byte_for_byte(tmp_path):
    long = "a" * 200_000
    path = tmp_path / "set.csv"
    path.write_bytes(f'prompt,label\r\n"one\r\ntwo\n three",safe\r\n\r\n" {long}",unsafe\r\n'.encode())
    assert labelled.load(str(path)).prompts == ["one\r\ntwo\n three", f" {long}"]
    assert csv.field_size_limit() == 131_072  # other readers' limit is as it was
    path = tmp_path / "lines.json"  # as `datasets` writes them
    path.write_bytes(b'{"prompt":"a\\r\\nb","label":"safe"}\r\n{"prompt":"c","label":"unsafe"}\n')
    assert labelled.load(str(path)).prompts == ["a\r\nb", "c"]


@pytest.mark.parametrize("source", ["word " * 2000, "~nobody-of-this-name/x.csv", "a\0b", "", None, 7])
def test_what_is_no_name_of_a_set(source):
    with pytest.raises(QwlibError, match="no such set of messages") as caught:
        labelled.load(source)
    assert len(str(caught.value)) < 300


def test_sets_that_are_not_there(own):
    with pytest.raises(QwlibError, match="no such set of messages: xtest; name own, xstest"):
        labelled.load("xtest")
    with pytest.raises(QwlibError, match="own has no split 'dev', only test, tune"):
        own.part("dev")
