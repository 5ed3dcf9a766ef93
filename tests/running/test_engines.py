"""Scores and streams out of a reader that only reads a few more tokens, against transformers' own."""

import pytest
import torch

import qwlib
from qwlib.errors import QwlibError
from qwlib.running import padding, streaming
from qwlib.running.engines import Transformers
from qwlib.running.lm import Lm
from qwlib.running.stepwise import Stepwise


class CachedReader:
    """The embedded model behind a reader's three calls, with transformers' cache."""

    def __init__(self, lm):
        self.model, self.begun = lm.model, []
        self.vocabulary, self.longest = lm.vocabulary, 128
        self.weights_bytes = self.read_bytes = 1000

    def begin(self, tokens):
        self.cache = None
        self.begun.append(tokens)

    def read(self, ids, last):
        with torch.inference_mode():
            out = self.model(torch.tensor([ids], device=self.model.device), past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        return out.logits[0, -last:].float().clone()

    def close(self):
        self.model = self.cache = None


@pytest.fixture
def twin(lm32):
    """The embedded model as another library's would be opened."""
    engine = Stepwise(CachedReader(lm32), "a reader", [lm32.tokenizer.eos_token_id])
    made = Lm(
        lm32.row, lm32.scheme, lm32.weights, lm32.device, "", lm32.dtype, "", tokenizer=lm32.tokenizer, engine=engine
    )
    return made


def test_scores_are_those_of_the_same_model(lm32, twin):
    ids = torch.tensor([[1, 504, 2, 300, 17, 40], [-1, -1, 9, 8, 7, 6]])
    ours, theirs = twin.logits(ids), lm32.logits(ids).float()
    assert ours.shape == theirs.shape
    real = ids >= 0
    assert torch.allclose(ours[real], theirs[real], atol=1e-3)
    assert not torch.allclose(ours[real].roll(1, 0), theirs[real], atol=1e-3)
    assert (ours[~real] == 0).all()
    assert torch.equal(twin.logits(ids, last=2)[0], ours[0, -2:])
    assert torch.equal(twin.logits(ids, last=5)[1, 1:], ours[1, 2:])


def test_a_prefix_stands_before_every_row(lm32, twin):
    kept, rows = [1, 504, 2, 300], torch.tensor([[17, 40, 5], [-1, 9, 8]])
    whole = torch.tensor([[*kept, 17, 40, 5], [-1, *kept, 9, 8]])
    wanted = lm32.logits(whole, last=2).float()
    for each in (lm32, twin):
        prefix = each.prefix(kept)
        for _ in range(2):  # what is kept is not used up
            found = each.logits(rows, last=2, after=prefix).float()
            assert torch.allclose(found, wanted, atol=1e-3)
        assert not torch.allclose(each.logits(rows, last=2).float(), wanted, atol=1e-3)
    assert twin.engine.reader.begun[:4] == [7, 6, 7, 6]
    with pytest.raises(QwlibError, match="2 \\+ 127 tokens"):
        twin.logits([[5, 6]], after=twin.prefix([7] * 127))


@pytest.mark.parametrize("kind", ["gemma2", "qwen2", "opt", "gpt_neox", "phi3"])
def test_a_prefix_before_rows_of_other_lengths(tiny_folder, kind):
    """gemma2 looks back 16 positions only: padding between prefix and row would push some of them out of sight."""
    kept, rows = list(range(20, 32)), [[5, 6, 7, 8, 9, 10, 11, 12], [13], [14, 15, 16]]
    with qwlib.load(tiny_folder(kind), "fp32") as tiny:
        found = tiny.logits(padding.pad_left(rows), last=1, after=tiny.prefix(kept))[:, -1]
        alone = torch.cat([tiny.logits([kept + row], last=1)[:, -1] for row in rows])
        assert torch.allclose(found, alone, atol=1e-4)
        assert not torch.allclose(found.roll(1, 0), alone, atol=1e-4)


def test_precise_scores_are_not_rounded_to_sixteen_bits(lm):
    ids = lm.encode("The capital of France is")
    rounded, precise = lm.logits(ids, last=2), lm.logits(ids, last=2, precise=True)
    assert (rounded.dtype, precise.dtype) == (torch.bfloat16, torch.float32)
    assert (precise - rounded.float()).abs().max() <= rounded.float().abs().max() / 256  # bf16 keeps 8 bits
    assert not torch.equal(precise, precise.bfloat16().float())
    assert torch.equal(lm.logits(ids, last=2), rounded)  # the hook is gone


def test_an_error_of_the_models_code_is_one_line_and_that_of_a_callback_its_own(shallow32, monkeypatch):
    with pytest.raises(ZeroDivisionError):
        shallow32.stream([[5, 6]], new_tokens=2, on_token=lambda _: 1 / 0)
    broken = shallow32.model.model.layers[0].register_forward_pre_hook(lambda *_: torch.ones(2) @ torch.ones(3))
    try:
        for ask in (
            lambda: shallow32.stream([[5, 6]], new_tokens=1, on_token=print),
            lambda: shallow32.logits([[5, 6]]),
        ):
            with pytest.raises(
                QwlibError, match="in fp32 can't read these ids: RuntimeError: inconsistent tensor size"
            ):
                ask()
    finally:
        broken.remove()


def test_a_stream_is_the_same_one(lm32, twin):
    ids = lm32.encode("The capital of France is")
    seen = []
    out = twin.stream(ids, new_tokens=12, on_token=lambda token: seen.append(token.tolist()))
    assert torch.equal(out, lm32.stream(ids, new_tokens=12))
    assert [token for (token,) in seen] == out[0].tolist()
    assert twin.engine.reader.begun == [ids.shape[1] + 12]
    assert len(streaming.time_stream(twin, ids, new_tokens=5).stamps) == 5
    assert "".join(streaming.text_chunks(twin, ids, new_tokens=12)).strip()


def test_it_stops_where_it_is_told(lm32, twin):
    ids = lm32.chat("Say only: yes")
    stopped = twin.stream(ids, new_tokens=40, stop_at_eos=True)[0].tolist()
    assert stopped[-1] == lm32.tokenizer.eos_token_id
    assert len(stopped) < 40
    held = twin.stream(ids, new_tokens=len(stopped) + 3)[0].tolist()
    assert held[: len(stopped) - 1] == stopped[:-1]
    assert len(held) == len(stopped) + 3
    assert lm32.tokenizer.eos_token_id not in held


def test_what_it_can_not_do_is_told(lm, twin):
    two = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(QwlibError, match="a reader answers one request at a time here: ask for a batch of 1, not 2"):
        twin.stream(two, new_tokens=2)
    with pytest.raises(QwlibError, match=r"120 \+ 9 tokens are more than the model's 128 positions"):
        twin.stream(torch.ones(1, 120, dtype=torch.long), new_tokens=9)
    with pytest.raises(QwlibError, match="outside the model's"):
        twin.logits(torch.tensor([[lm.vocabulary]]))
    assert twin.engine.held() == {"weights_bytes": 1000, "state_bytes": 0}


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        (
            "qwen3_next",
            {"layer_types": ["linear_attention", "full_attention"], "num_experts": 2, "num_experts_per_tok": 1},
        ),
        ("llama", {}),
    ],
)
def test_a_prefix_is_kept_as_keys_and_values_or_read_again(family, sizes):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    plain = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
    plain |= {"num_key_value_heads": 2, "vocab_size": 300, "max_position_embeddings": 128, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(plain | sizes))).eval()
    engine = Transformers(model, torch.device("cpu"))
    ids, rows = [7, 8, 9, 10, 11, 12], torch.tensor([[20, 21, 22], [0, 30, 31]])
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    prefix = engine.prefix(ids)
    assert (prefix.kept is None) is (family != "llama")
    assert ("its cache holds" in prefix.why) is (family != "llama")
    got = engine.logits(rows, mask, 1, prefix)[:, -1]
    for row, found in zip(([20, 21, 22], [30, 31]), got, strict=True):
        whole = torch.tensor([ids + row])
        wanted = engine.logits(whole, torch.ones_like(whole), 1)[0, -1]
        assert torch.allclose(found, wanted, atol=1e-4)
        assert not torch.allclose(
            found, engine.logits(whole[:, 1:], torch.ones_like(whole[:, 1:]), 1)[0, -1], atol=1e-4
        )
