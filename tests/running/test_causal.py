"""What a model does with tokens that come later, with padding, and with positions: seen from its scores."""

import inspect

import pytest
import torch
import transformers

import qwlib
from qwlib.errors import QwlibError
from qwlib.running import causal

CPU = torch.device("cpu")
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
HEADS = {"intermediate_size": 128, "num_attention_heads": 4, "max_position_embeddings": 64}
PADDED = "reads padding as text: rows of other lengths one by one"


def made(config, **shape):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config(**SHAPE | shape)).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.15)
    return model


def manner(model):
    return causal.look(model, CPU, 320)


@pytest.mark.parametrize("config", [transformers.LlamaConfig, transformers.BloomConfig, transformers.MambaConfig])
def test_a_causal_decoder_is_read_as_it_is(config):
    """Positions, positions in the attention alone, and none."""
    assert manner(made(config, **(HEADS if config is transformers.LlamaConfig else {}))) == causal.Manner()


@pytest.mark.parametrize("config", [transformers.BertConfig, transformers.RobertaConfig, transformers.ElectraConfig])
def test_an_encoder_is_refused_and_the_same_one_as_a_decoder_is_not(config):
    with pytest.raises(QwlibError, match="is no causal decoder: tokens that come later change"):
        manner(made(config, **HEADS))
    manner(made(config, **HEADS, is_decoder=True))


def test_padding_that_is_read_as_text_is_noticed():
    model = made(transformers.RwkvConfig, attention_hidden_size=64)
    assert manner(model) == causal.Manner(True, f"RwkvForCausalLM {PADDED}")


def test_positions_that_begin_elsewhere_are_left_to_the_model():
    model = made(transformers.RobertaConfig, **HEADS, is_decoder=True)
    assert manner(model).positions is False
    model.roberta.embeddings.position_embeddings.weight.data.zero_()  # where they mean nothing, they may be given
    assert manner(model) == causal.Manner()


def test_a_leak_from_the_last_token_alone_is_noticed():
    """As a mask that is one position too wide makes it."""
    model = made(transformers.LlamaConfig, **HEADS)
    attention = model.model.layers[0].self_attn
    plain = attention.forward

    def ahead(hidden_states, *args, **named):
        return plain(hidden_states + 0.3 * hidden_states.roll(-1, 1), *args, **named)

    attention.forward = ahead
    with pytest.raises(QwlibError, match="no causal decoder"):
        manner(model)


def test_scores_that_are_no_numbers_are_not_judged_here():
    model = made(transformers.LlamaConfig, **HEADS)
    model.lm_head.weight.data.fill_(float("nan"))
    assert manner(model) == causal.Manner()


def test_answers_for_which_padding_counts_as_positions_are_given_one_by_one():
    """`generate` gives no positions to what does not ask for them by name; scores take them all the same."""
    shape = {"d_model": 64, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 128}
    model = made(transformers.WhisperConfig, **shape)
    assert manner(model) == causal.Manner(
        True, "WhisperForCausalLM's generate counts padding as positions" + causal.ALONE
    )
    assert manner(made(transformers.BartConfig, **shape)).why == f"BartForCausalLM {PADDED}"  # its scores take none
    assert (
        "position_ids" not in inspect.signature(transformers.BloomForCausalLM.forward).parameters
    )  # it has none at all


def test_rounding_that_moves_some_ids_is_no_verdict(monkeypatch):
    """As of a mixture whose router stands between two experts."""
    verdicts = iter([None, causal.Manner(True, "padding"), causal.Manner()])
    monkeypatch.setattr(causal, "_seen", lambda *_: next(verdicts))
    assert manner(made(transformers.LlamaConfig, **HEADS)) == causal.Manner()
    verdicts = iter([None, None, None])
    with pytest.raises(QwlibError, match="no causal decoder"):
        manner(made(transformers.LlamaConfig, **HEADS))


@pytest.fixture(scope="module")
def rwkv(tmp_path_factory, shallow):
    """A folder with a recurrent model that knows no mask."""
    folder = tmp_path_factory.mktemp("rwkv")
    made(transformers.RwkvConfig, attention_hidden_size=64, vocab_size=49_152).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(shallow).save_pretrained(folder)
    return str(folder)


def test_rows_of_other_lengths_are_read_one_by_one(rwkv):
    rows = [[9, 8, 7, 6, 5, 4], [30, 20, 10], [3]]
    with qwlib.load(rwkv, "fp32", device="cpu") as lm:
        alone = [lm.logits([row])[0] for row in rows]
        assert PADDED in lm.engine.why
        together = lm.logits(rows)
        for scores, wanted in zip(together, alone, strict=True):
            assert torch.allclose(scores[-len(wanted) :], wanted, atol=1e-5)
            assert not scores[: -len(wanted)].any()
        assert torch.allclose(lm.logits(rows, last=2)[:, -1], torch.stack([each[-1] for each in alone]), atol=1e-5)
        assert lm.logits([rows[0]], after=lm.prefix([40, 50])).shape[1] == len(rows[0])  # read again, and not shown
        behind = lm.logits(rows, last=1, after=lm.prefix([40, 50]))[:, 0]
        assert torch.allclose(behind, torch.stack([lm.logits([[40, 50, *row]])[0, -1] for row in rows]), atol=1e-4)
        assert not torch.allclose(behind, together[:, -1], atol=1e-2)
        answers = torch.cat([lm.stream([row], new_tokens=4) for row in rows])
        assert torch.equal(lm.stream(rows, new_tokens=4), answers)
        with pytest.raises(QwlibError, match="ask for one row, or for rows of one length"):
            lm.stream(rows, new_tokens=4, on_token=print)
        assert lm.stream([row[:1] for row in rows], new_tokens=2, on_token=lambda _: None).shape == (3, 2)


def test_an_encoder_is_told_before_anything_is_measured(tmp_path, shallow):
    made(transformers.BertConfig, **HEADS, vocab_size=49_152).save_pretrained(tmp_path)
    transformers.AutoTokenizer.from_pretrained(shallow).save_pretrained(tmp_path)
    with qwlib.load(str(tmp_path), "nf4-dq") as lm:
        for ask in (lambda: lm.logits([[5, 6]]), lambda: lm.stream([[5, 6]], new_tokens=1), lambda: lm.prefix([5, 6])):
            with pytest.raises(QwlibError, match="BertLMHeadModel is no causal decoder"):
                ask()
