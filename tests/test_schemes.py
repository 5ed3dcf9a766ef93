import pytest

from qwlib import schemes
from qwlib.models import catalog, estimates

TYPES_NAMED = [name.removeprefix("gguf-") for name in schemes.SCHEMES if name.startswith("gguf-")]


@pytest.mark.parametrize("fmt", [*schemes.BITS, "gptq-g128", "awq-g64", "hqq-g64", "onnx-g32"])
def test_bits_per_weight_agree_with_bytes(fmt):
    weights, state = estimates.stored_bytes((16384, 16384), fmt)
    assert 8 * (weights + state) / 16384**2 == pytest.approx(schemes.bits(fmt), rel=1e-3)
    assert 8 * weights / 16384**2 != pytest.approx(schemes.bits(fmt) * 1.01, rel=1e-3)


def test_the_blocks_of_llama_cpp_are_what_its_own_table_says():
    import gguf

    for name in ("q8_0", "q6_k", "q5_k", "q4_k", "q4_0", "q3_k", "q2_k"):
        weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]]
        assert schemes.bits(name) == 8 * size / weights
    assert {f"gguf-{name}": gguf.LlamaFileType[f"MOSTLY_{name.upper()}"] for name in TYPES_NAMED} == schemes.GGUF_TYPES


def test_a_group_size_can_be_chosen_where_there_is_one():
    scheme = schemes.find("gptq-4bit")
    assert (scheme.group, scheme.grouped(128).group, scheme.grouped(None)) == (64, 128, scheme)
    assert scheme.grouped(128).bits_per_weight == 4 + 20 / 128
    with pytest.raises(ValueError, match="nf4-dq has no group size to choose"):
        schemes.find("nf4-dq").grouped(128)


def test_double_quantization_costs_what_the_paper_says():
    """QLoRA, arXiv 2305.14314, section 3: from 0.5 to 0.127 bits a parameter."""
    assert schemes.BITS["nf4"] - 4 == 0.5
    assert schemes.BITS["nf4-dq"] - 4 == pytest.approx(0.127, abs=5e-4)


def test_an_unknown_scheme_gets_the_nearest_ones():
    with pytest.raises(ValueError, match="did you mean nf4"):
        schemes.find("nf4dq")


def test_embedding_and_head_are_stored_alike_everywhere():
    """Most models tie the two: a row that stores them differently could not be loaded there."""
    for scheme in schemes.SCHEMES.values():
        assert scheme.embedding == scheme.head
        assert scheme.base in ("fp32", "bf16", "fp16")


def test_the_plan_names_every_linear_layer_once():
    shapes = estimates.meta_model(catalog.find("opt-350m"))
    plan = schemes.plan(shapes, schemes.find("nf4-mixed"))
    assert plan["lm_head"] == plan["model.decoder.embed_tokens"] == "int8"
    assert plan["model.decoder.project_in"] == plan["model.decoder.layers.23.fc2"] == "nf4-dq"
    assert len(plan) == 24 * 6 + 2 + 2
    assert "model.decoder.embed_positions" not in plan
