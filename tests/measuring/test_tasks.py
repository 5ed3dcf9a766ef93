import json

import pytest
import torch

import qwlib
from qwlib.errors import QwlibError
from qwlib.measuring import record, tasks


def changed(path, **changes):
    task = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in task.items() if value is not None}))
    return path


@pytest.fixture
def topics(tmp_path):
    return tasks.write_topics(tmp_path, documents=12)


@pytest.fixture(scope="module")
def good(lm, tmp_path_factory):
    """What the model scores, one row at a time."""
    return tasks.evaluate(lm, tasks.write_topics(tmp_path_factory.mktemp("good"), documents=12), batch=1)


def test_a_task_gives_the_accuracy_of_the_likeliest_choice(lm, topics, good):
    """Summed by hand: the log-probability of every choice's tokens after the beginning."""
    got = good
    right = []
    for line in topics.with_suffix(".jsonl").read_text().splitlines():
        document = json.loads(line)
        begin = lm.tokenizer(document["beginning"]).input_ids
        sums = []
        for choice in document["choices"]:
            ids = lm.tokenizer(document["beginning"] + choice).input_ids
            logs = lm.logits([ids])[0].float().log_softmax(-1).cpu()
            sums.append(sum(logs[i - 1, ids[i]].item() for i in range(len(begin), len(ids))))
        right.append(float(sums.index(max(sums)) == document["right"]))
    assert got["value"] == pytest.approx(sum(right) / 12, abs=1 / 12 + 1e-9)  # bfloat16 can flip one close choice
    assert 0.5 < got["value"] <= 1
    assert got["stderr"] == pytest.approx((got["value"] * (1 - got["value"]) / 11) ** 0.5)
    assert (got["n"], got["task"], got["metric"], got["batch"]) == (12, "python_topics", "acc", 1)
    assert got["harness"].startswith("lm-eval 0.")
    record.validate(record.new("notebook", tasks=[got]))
    with pytest.raises(QwlibError, match=r"tasks\.0\.value"):
        record.validate(record.new("notebook", tasks=[got | {"value": "high"}]))


def test_a_task_that_turns_the_answers_around_scores_lower(lm, topics, good):
    """The data decides: with a wrong choice called right, the same model fails."""
    file = topics.with_suffix(".jsonl")
    documents = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps(d | {"right": (d["right"] + 1) % 4}) + "\n" for d in documents))
    bad = tasks.evaluate(lm, topics)
    assert bad["value"] < good["value"] - 0.3
    assert bad["sha256"] != good["sha256"]


@pytest.mark.parametrize("scheme", ["nf4-dq", "nf4-all"])
def test_the_model_is_left_as_it_was(scheme, topics, shallow, capfd):
    """The harness ties weights when it takes a model, which would break a quantized head for good."""
    with qwlib.load(str(shallow), scheme) as one:
        ids = one.encode("The river")
        before, state = one.stream(ids, new_tokens=5), torch.get_rng_state()
        settings = one.tokenizer.padding_side, one.tokenizer.pad_token
        tasks.evaluate(one, topics, limit=2)
        assert torch.equal(one.stream(ids, new_tokens=5), before)
        assert torch.equal(torch.get_rng_state(), state)
        assert (one.tokenizer.padding_side, one.tokenizer.pad_token) == settings
    assert capfd.readouterr() == ("", "")


def test_the_limit_is_kept(lm, topics):
    assert tasks.evaluate(lm, topics, limit=3)["n"] == 3


def test_the_topics_task_is_fair(topics):
    documents = [json.loads(line) for line in topics.with_suffix(".jsonl").read_text().splitlines()]
    assert {d["right"] for d in documents} == {0, 1, 2, 3}
    for d in documents:
        assert len(set(d["choices"])) == 4
        assert all(choice.startswith(" ") for choice in d["choices"])
    again = tasks.write_topics(topics.parent / "again", documents=12)
    assert again.with_suffix(".jsonl").read_text() == topics.with_suffix(".jsonl").read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"include": "other.yaml"}, "the key 'include', which is not taken"),
        ({"unsafe_code": True}, "the key 'unsafe_code'"),
        ({"dataset_path": "allenai/ai2_arc"}, "must have dataset_path: json"),
        ({"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}}, "wants gone.jsonl beside it"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "a metric with more than"),
        ({"task": None}, "names no task"),
    ],
)
def test_what_could_run_code_or_fetch_is_refused(topics, changes, message):
    with pytest.raises(QwlibError, match=message):
        tasks.read(changed(topics, **changes))


def test_a_function_in_the_file_is_not_run(topics, tmp_path):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\ndef go(*_): return 'x'\n")
    topics.write_text(topics.read_text().rstrip().rstrip("}") + ', "doc_to_text": !function evil.go }')
    with pytest.raises(QwlibError, match="is no plain YAML"):
        tasks.read(topics)
    assert not (tmp_path / "ran").exists()


def test_a_template_reaches_no_python_objects(lm, topics, tmp_path):
    door = "{{ cycler.__init__.__globals__.os.popen('touch " + str(tmp_path / "ran") + "').read() }}"
    with pytest.raises(QwlibError, match="can't be run: SecurityError"):
        tasks.evaluate(lm, changed(topics, doc_to_text=door))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changes", [{"test_split": "validation"}, {"doc_to_text": "{{nothing}}"}, {"metric_list": [{"metric": "no-such"}]}]
)
def test_a_mistake_in_a_task_is_one_line(lm, topics, changes):
    with pytest.raises(QwlibError, match="the task python_topics can't be run"):
        tasks.evaluate(lm, changed(topics, **changes))


def test_missing_files_harness_or_training_are_told(lm, tmp_path, topics, monkeypatch):
    import dataclasses

    with pytest.raises(QwlibError, match="there is no task at"):
        tasks.evaluate(lm, tmp_path / "gone.yaml")
    with pytest.raises(QwlibError, match="random weights have no accuracy"):
        tasks.evaluate(dataclasses.replace(lm, weights="random"), topics)
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(QwlibError, match=r'pip install "qwlib\[eval\]"'):
        tasks.evaluate(lm, topics)
