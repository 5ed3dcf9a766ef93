"""A saved model in a fresh process."""

import pytest
import torch

import qwlib
from qwlib.loading import fresh

pytestmark = pytest.mark.slow  # each starts a process and loads a model in it


@pytest.mark.parametrize("scheme", ["bf16", "nf4-dq", "int8"])
def test_a_saved_model_says_the_same(tmp_path, scheme):
    with qwlib.load("smollm2-135m", scheme) as lm:
        lm.save(tmp_path / "saved")
        ids = lm.encode(["Rivers meander because", "The"])
        here = lm.logits(ids).cpu()
    again = fresh.logits(tmp_path / "saved", scheme, ids)
    assert again.dtype == here.dtype
    assert torch.equal(again, here)
    assert not torch.equal(fresh.logits("smollm2-135m", "fp4" if scheme != "fp4" else "bf16", ids), here)


def test_what_went_wrong_there_is_told_here(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(qwlib.QwlibError, match="could not be read in a fresh process: "):
        fresh.logits(tmp_path, "bf16", torch.zeros(1, 3, dtype=torch.long))
