"""What notebook 08 says of a run is what the run does."""

import json

import pytest
import torch

import qwlib
from qwlib.training import anatomy, examples, finetune
from qwlib.training.settings import Settings

HOW = Settings(steps=3, batch=4, rank=4, every=3, learning_rate=3e-3, validation=0.25)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "numbers.jsonl"
    rows = [{"prompt": f"Count {n}.", "answer": " ".join(["One"] * (1 + n % 5)) + "."} for n in range(24)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def parts(data, shallow):
    """(for training, held back), as tokens."""
    with qwlib.load(str(shallow), "bf16", device="cpu") as lm:
        split = examples.split(examples.read(data), HOW.validation, HOW.seed)
        return [examples.tokenized(lm, part, HOW.longest) for part in split]


def test_batches_are_those_that_the_library_trains_on(data, parts, shallow, tmp_path, monkeypatch):
    seen = []
    plain = examples.batch
    monkeypatch.setattr(
        examples, "batch", lambda rows, pad, *_: seen.append([r.line for r in rows]) or plain(rows, pad)
    )
    finetune.finetune(str(shallow), "bf16", data, tmp_path / "out", device="cpu", **HOW.told())
    wanted = [[row.line for row in rows] for rows in anatomy.batches(parts[0], HOW)]
    assert seen[:3] == wanted
    assert wanted != [[row.line for row in rows] for rows in anatomy.batches(parts[0], Settings(seed=1, **OTHERS))]


OTHERS = {key: value for key, value in HOW.told().items() if key != "seed"}


def test_ways_are_compared_on_the_answers(parts, shallow):
    rows, model = parts[1], str(shallow)
    found = anatomy.compare({"one": (model, "bf16"), "same": (model, "bf16"), "other": (model, "nf4")}, rows)
    total = count = 0
    with qwlib.load(model, "bf16", device="cpu") as lm:
        for row in rows:
            scores = lm.model(torch.tensor([row.ids])).logits[0, :-1].float()
            labels = torch.tensor(row.labels[1:])
            total += torch.nn.functional.cross_entropy(scores, labels, ignore_index=-100, reduction="sum").item()
            count += row.learnt
    assert found["one"]["loss"] == pytest.approx(total / count, rel=1e-2)
    assert found["one"]["kl"] == found["same"]["kl"] == 0
    assert found["other"]["kl"] > 0.01
    assert abs(found["other"]["loss"] - found["one"]["loss"]) > 1e-3
    assert all(each["seconds"] > 0 for each in found.values())
