"""Every causal architecture of transformers, made tiny: right as plain transformers has it, or refused in one line."""

import gc
import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("architectures", ROOT / "benchmarks" / "architectures.py")
architectures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(architectures)
RECORD = json.loads(architectures.RESULT.read_text())
OUTCOMES = RECORD["outcomes"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", OUTCOMES)
def test_it_agrees_with_transformers_or_is_refused(kind, tmp_path):
    folder = architectures.write(architectures.tiny(kind), tmp_path)
    gc.freeze()
    found = {scheme: architectures.outcome(folder, scheme) for scheme in architectures.SCHEMES}
    assert not [said for said in found.values() if said.startswith("wrong")], found
    assert [said.partition(":")[0] for said in found.values()] == [
        said.partition(":")[0] for said in OUTCOMES[kind].values()
    ]


def test_the_comparison_finds_what_is_wrong(tmp_path, monkeypatch):
    """Positions that are off by one, and an answer that is not the likeliest."""
    folder = architectures.write(architectures.tiny("llama"), tmp_path)
    assert architectures.outcome(folder, "bf16") == "agrees"
    assert architectures.outcome(tmp_path / "gone", "bf16").startswith("refused: no such folder: gone;")
    plain = architectures.qwlib.Lm.logits
    monkeypatch.setattr(architectures.qwlib.Lm, "logits", lambda lm, ids, **more: plain(lm, ids, **more).roll(1, 1))
    assert "scores are off by {'a row':" in architectures.outcome(folder, "bf16")
    monkeypatch.undo()
    stream = architectures.qwlib.Lm.stream
    monkeypatch.setattr(
        architectures.qwlib.Lm, "stream", lambda lm, ids, **more: (stream(lm, ids, **more) + 1) % lm.vocabulary
    )
    assert "the answer to row 0 of 1 is" in architectures.outcome(folder, "bf16")
    monkeypatch.setattr(architectures.qwlib.Lm, "stream", lambda lm, ids, **more: 1 / 0)
    assert architectures.outcome(folder, "bf16") == "wrong: ZeroDivisionError: division by zero"


def test_the_record_has_nothing_wrong_and_measured_md_says_its_counts():
    assert not [each for each in OUTCOMES.values() if any(said.startswith("wrong") for said in each.values())]
    assert "/tmp" not in architectures.RESULT.read_text()
    assert architectures.told(OUTCOMES) in (ROOT / "docs" / "measured.md").read_text().replace("\n", " ")
