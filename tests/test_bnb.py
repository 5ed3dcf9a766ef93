"""bitsandbytes' faults, each shown and each worked around; a test that fails here may mean that one was mended upstream."""

import bitsandbytes
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qwlib
from qwlib.backends import bnb

AVX512_BF16 = bitsandbytes.functional.has_avx512bf16()


def store(rows: int, columns: int, *, double: bool, quant_type: str = "nf4"):
    """(original, Params4bit) of a random bfloat16 weight whose rows differ in size, as those of an embedding do."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=draw) * torch.rand(rows, 1, generator=draw)
    weight = weight.to(torch.bfloat16)
    stored = bitsandbytes.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type=quant_type, compress_statistics=double
    )
    return weight, stored.to("cpu")


def by_definition(stored) -> torch.Tensor:
    """The whole weight, flat and in Python's own arithmetic: a code book entry times its block's scale."""
    state = stored.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = torch.stack(
            [
                state.state2.code[int(code)] * state.state2.absmax[i // state.state2.blocksize] + state.offset
                for i, code in enumerate(state.absmax)
            ]
        )
    flat = []
    for byte in stored.data.flatten().tolist():
        flat += [byte >> 4, byte & 15]
    n = state.shape.numel()
    values = [state.code[code] * absmax[i // state.blocksize] for i, code in enumerate(flat[:n])]
    return torch.stack(values).to(state.dtype).reshape(state.shape)


def _storage(module) -> int:
    return module.weight.untyped_storage().data_ptr()


def relative(a, b) -> float:
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 150),
    double=st.booleans(),
    quant_type=st.sampled_from(["nf4", "fp4"]),
)
def test_rows_follow_the_definition_for_any_shape(rows, columns, double, quant_type):
    _, stored = store(rows, columns, double=double, quant_type=quant_type)
    ids = torch.randint(0, rows, (3, 5))
    assert torch.equal(bnb.dequantize_rows(stored.data, stored.quant_state, ids), by_definition(stored)[ids])


def test_bitsandbytes_own_embedding_is_wrong_with_double_quantization():
    weight, stored = store(2048, 128, double=True)
    theirs = bitsandbytes.nn.Embedding4bit(2048, 128, dtype=torch.bfloat16)
    theirs.weight = stored
    ids = torch.randint(0, 2048, (64,), generator=torch.Generator().manual_seed(1))
    ours = bnb.StoredEmbedding(stored, torch.bfloat16)(ids)
    table = bitsandbytes.functional.dequantize_4bit(stored.data, stored.quant_state)
    assert torch.equal(ours, table[ids])
    assert relative(ours, weight[ids]) < 0.12
    assert relative(theirs(ids), table[ids]) > 0.05, "bitsandbytes mended Embedding4bit: its own may serve now"


@pytest.mark.parametrize(("rows", "columns"), [(64, 96), (32, 72), (31, 64), (31, 33), (1001, 144)])
@pytest.mark.parametrize("double", [False, True])
def test_awkward_linear_layers_are_right(rows, columns, double):
    weight, stored = store(rows, columns, double=double)
    layer = bitsandbytes.nn.Linear4bit(columns, rows, bias=True, compute_dtype=torch.bfloat16)
    layer.weight, layer.bias = stored, torch.nn.Parameter(torch.ones(rows, dtype=torch.bfloat16))
    model = torch.nn.Sequential(layer).eval()
    assert bnb.mend(model) == 1
    x = torch.randn(5, columns, dtype=torch.bfloat16)
    with torch.inference_mode():
        out = model(x)
    assert relative(out, x.float() @ by_definition(stored).float().T + 1) < 0.01
    assert relative(out, x.float() @ weight.float().T + 1) > 0.01  # quantization itself costs more than the tolerance


def test_usual_shapes_are_left_to_bitsandbytes():
    model = torch.nn.Sequential(bitsandbytes.nn.Linear4bit(64, 32, bias=False, compute_dtype=torch.bfloat16)).to("cpu")
    assert bnb.mend(model) == 0
    assert type(model[0]) is bitsandbytes.nn.Linear4bit


@pytest.mark.skipif(not AVX512_BF16, reason="repacking happens on CPUs with AVX512-BF16")
@pytest.mark.parametrize("scheme", ["nf4-all", "nf4-mixed"])
def test_a_tied_embedding_survives_the_heads_first_forward(scheme):
    with qwlib.load("smollm2-135m", scheme) as lm:
        embedding, head = lm.model.get_input_embeddings(), lm.model.get_output_embeddings()
        ids = torch.randint(0, lm.vocabulary, (2, 40))
        one_storage = _storage(embedding) == _storage(head)
        before = embedding(ids)
        first, second = lm.logits(ids), lm.logits(ids)
        assert one_storage
        assert torch.equal(embedding(ids), before)
        assert relative(first, second) < 0.02  # the kernels' own noise: a few last bits of bfloat16
        assert relative(lm.logits(ids.flip(0)), second) > 0.1
        if scheme == "nf4-all":
            still_one = _storage(embedding) == _storage(head)
            assert not still_one  # repacked


def test_an_8bit_embedding_is_within_its_step(lm):
    table = lm.model.get_input_embeddings().weight.detach()
    ids = torch.randint(0, len(table), (3, 50))
    with qwlib.load("smollm2-135m", "nf4-mixed") as mixed:
        rows = mixed.model.get_input_embeddings()(ids)
    step = table[ids].abs().amax(-1, keepdim=True).float() / 127
    error = (rows.float() - table[ids].float()).abs() / step
    assert error.max() < 1.1  # half a step, and bfloat16's rounding of the product
    assert (error.max() > 0.3).item()


def test_saving_a_quantized_embedding_is_refused(tmp_path):
    for scheme in ("nf4-all", "nf4-mixed"):
        with qwlib.load("smollm2-135m", scheme) as lm:
            with pytest.raises(qwlib.QwlibError, match="save nf4-dq instead"):
                lm.save(tmp_path)
            with pytest.raises(NotImplementedError):
                lm.model.save_pretrained(tmp_path)
