import pytest
import torch

import qwlib
from qwlib.machine import memory


def test_reading_skips_an_untied_embedding_only(lm, tiny_folder):
    assert memory.read_bytes(lm.model) == sum(memory.measure(lm.model).values())
    with qwlib.load(tiny_folder("llama"), "bf16") as tiny:
        table = tiny.model.get_input_embeddings().weight.nbytes
        assert memory.read_bytes(tiny.model) == sum(memory.measure(tiny.model).values()) - table


def test_the_peak_meter_sees_a_block_that_came_and_went():
    device = torch.device("cpu")
    before = memory.used_bytes(device)
    if not memory.reset_peak(device):
        pytest.skip("this system has no high-water mark that can be reset")
    block = torch.ones(200_000_000, dtype=torch.uint8)
    del block
    memory.give_back()
    assert memory.peak_bytes(device) - before > 190_000_000
    memory.reset_peak(device)
    assert memory.peak_bytes(device) - before < 100_000_000


@pytest.mark.skipif(torch.cuda.is_available(), reason="repacking happens on a CPU")
def test_repacking_is_reported_apart(repacks):
    """bitsandbytes' CPU kernel keeps bfloat16 scales and no second level: half of NF4's state, more than NF4 + DQ's."""
    from qwlib.measuring import worker

    got = worker.run({"model": "smollm2-135m", "scheme": "nf4-dq", "new_tokens": 2, "runs": 1})["memory"]
    if not repacks:
        assert "repacked_bytes" not in got
        return
    linear = 134_515_008 - 49_152 * 576 - 61 * 576  # all but the embedding and the norms
    scales, codebooks, offsets = 2 * linear // 64, 210 * 16 * 4, 210 * 4
    assert got["repacked_bytes"] == got["weights_bytes"] + scales + codebooks + offsets
