"""Decoding step by step at fixed addresses, against transformers' own `generate`. Graphs need a GPU: benchmarks/gpu.py."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import qwlib
from qwlib.errors import QwlibError
from qwlib.measuring import worker
from qwlib.running.decoding import ROUND, Decoder, changing
from qwlib.running.engines import Transformers
from qwlib.running.lm import Lm
from qwlib.running.sampling import Sampling
from qwlib.running.stepwise import Stepwise

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 600,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
    "gpt_neox": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "mistral": {"sliding_window": 8},
    "gemma2": {"sliding_window": 8},
    "gemma3_text": {"sliding_window": 8},
}


def small(family: str, **more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(SIZES | FAMILIES.get(family, {}) | more)))
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, 1
    return model.eval()


def padded(rows: int = 3, width: int = 20):
    """Token ids and mask; every row but the first is padded on the left."""
    ids = torch.randint(2, 300, (rows, width), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : 6 * row] = 0
    return ids, mask


def steps(model) -> Decoder:
    return Decoder(model, "cpu", capture=False)


@pytest.fixture(scope="module")
def llama():
    return small("llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_generate(family):
    model = small(family)
    ids, mask = padded()
    wanted = Transformers(model, torch.device("cpu")).generate(ids, mask, new_tokens=30)
    decoder = steps(model)
    assert torch.equal(decoder.generate(ids, mask, new_tokens=30, ends=[1]), wanted)
    assert torch.equal(decoder.generate(ids, mask, new_tokens=1, ends=[1]), wanted[:, :1])
    # the same test fails where padding is looked at, or a position is off by one
    unmasked = decoder.generate(ids, torch.ones_like(mask), new_tokens=30, ends=[1])
    assert torch.equal(unmasked[0], wanted[0])
    assert not torch.equal(unmasked[2], wanted[2])


def test_the_embedded_model_answers_alike_and_stops_alike():
    with qwlib.load("smollm2-135m", "fp32", device="cpu") as lm:
        ids, mask = lm._prepare(lm.chat("Name a colour.", "What is the capital of Kenya? One word."))
        decoder, plain = steps(lm.model), lm.engine
        for ends in (True, False):
            wanted = plain.generate(ids, mask, new_tokens=40, stop_at_eos=ends)
            found = decoder.generate(ids, mask, new_tokens=40, ends=plain.ends, pad=plain.stops[0], stop_at_eos=ends)
            assert torch.equal(found, wanted)
            assert (found.shape[1] < 40) is ends
        assert not set(plain.ends) & set(found.flatten().tolist())
        del plain, decoder


def test_rows_of_a_batch_and_requests_one_after_another_do_not_touch_each_other(llama):
    ids, mask = padded()
    decoder = steps(llama)
    together = decoder.generate(ids, mask, new_tokens=24)
    held = decoder.cache
    for row in range(3):
        real = mask[row].bool()
        alone = decoder.generate(ids[row, real][None], mask[row, real][None], new_tokens=24)
        assert torch.equal(alone[0], together[row])
    assert decoder.cache is not held  # another batch size
    held = decoder.cache
    again = decoder.generate(ids[:1], mask[:1], new_tokens=24)
    assert decoder.cache is held  # used as it is
    assert torch.equal(again[0], together[0])
    long = decoder.generate(ids[:1], mask[:1], new_tokens=ROUND)
    assert decoder.cache is not held  # longer
    assert torch.equal(long[0, :24], together[0])
    assert torch.equal(long, steps(llama).generate(ids[:1], mask[:1], new_tokens=ROUND))


def test_a_request_that_fills_the_cache_to_its_last_place(llama):
    decoder = steps(llama)
    ids, mask = padded(1, 20)
    for new in range(ROUND - 22, ROUND - 17):
        wanted = Transformers(llama, torch.device("cpu")).generate(ids, mask, new_tokens=new)
        assert torch.equal(decoder.generate(ids, mask, new_tokens=new, ends=[1]), wanted)


class Listener:
    """What a streamer of transformers is asked to do."""

    def __init__(self, fail_at: int | None = None):
        self.got, self.ended, self.fail_at = [], False, fail_at

    def put(self, value):
        if self.fail_at == len(self.got):
            raise RuntimeError("the reader is gone")
        self.got.append(value)

    def end(self):
        self.ended = True


def test_every_token_is_handed_over_once_in_order(llama):
    ids, mask = padded()
    for new in (1, 2, 9):
        heard = Listener()
        out = steps(llama).generate(ids, mask, new_tokens=new, streamer=heard)
        assert torch.equal(heard.got[0], ids)
        assert torch.equal(torch.stack(heard.got[1:], 1), out)
        assert out.shape == (3, new)
        assert heard.ended


def test_rows_that_ended_are_padded_and_the_last_one_ends_all(llama):
    ids, mask = padded()
    free = steps(llama).generate(ids, mask, new_tokens=30)
    ends = [int(free[0, 4]), int(free[1, 9]), int(free[2, 2])]
    firsts = [next(i for i, token in enumerate(row.tolist()) if token in ends) for row in free]
    heard = Listener()
    out = steps(llama).generate(ids, mask, new_tokens=30, ends=ends, pad=299, stop_at_eos=True, streamer=heard)
    assert out.shape[1] == max(firsts) + 1 == len(heard.got) - 1
    for row, first in enumerate(firsts):
        assert torch.equal(out[row, : first + 1], free[row, : first + 1])
        assert (out[row, first + 1 :] == 299).all()


def test_drawing_follows_the_probabilities_and_the_seed(llama):
    ids, mask = padded(1, 12)
    many = ids.repeat(400, 1), mask.repeat(400, 1)
    decoder = steps(llama)
    with torch.inference_mode():
        scores = llama(ids).logits[0, -1]
    heat = 0.03  # the scores of so small a model lie near each other
    settings = Sampling(temperature=heat, top_k=4, seed=3)
    best = scores.topk(4)
    p = (best.values / heat).softmax(-1)
    first = decoder.generate(*many, new_tokens=2, sampling=settings)
    assert torch.isin(first[:, 0], best.indices).all()
    share = (first[:, :1] == best.indices).float().mean(0)
    noise = (p * (1 - p) / 400).sqrt()
    assert ((share - p).abs() < 4.5 * noise).all()
    assert not ((share - best.values.softmax(-1)).abs() < 4.5 * noise).all()  # not at temperature 1
    assert torch.equal(first, decoder.generate(*many, new_tokens=2, sampling=settings))
    assert not torch.equal(first, decoder.generate(*many, new_tokens=2, sampling=Sampling(heat, 4, 1.0, seed=4)))
    assert len(first[:, 1].unique()) > 1  # later steps draw too
    nucleus = decoder.generate(*many, new_tokens=1, sampling=Sampling(heat, top_p=0.5 * float(p[0])))
    assert (nucleus == best.indices[0]).all()
    greedy = decoder.generate(ids, mask, new_tokens=20)
    assert torch.equal(decoder.generate(ids, mask, new_tokens=20, sampling=Sampling(top_k=1)), greedy)
    decoder.generate(*many, new_tokens=2, sampling=settings)
    assert (decoder.generate(*many, new_tokens=2) == greedy[0, :2]).all()  # another kind of choice for the same batch


def test_generate_draws_too_by_the_same_words(lm):
    ids = lm.encode("The colour of the sky is")
    settings = Sampling(temperature=0.8, top_k=20, top_p=0.9, seed=5)
    state = torch.random.get_rng_state()
    one, other = (lm.stream(ids, new_tokens=8, sampling=settings) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(one, other)
    assert not torch.equal(one, lm.stream(ids, new_tokens=8, sampling=Sampling(0.8, 20, 0.9, seed=6)))


@pytest.mark.parametrize("wrong", [{"temperature": 0}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.5}])
def test_settings_out_of_range(wrong):
    with pytest.raises(QwlibError, match="are needed, not"):
        Sampling(**wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what is said without a GPU")
def test_what_decodes_here_and_why(lm):
    assert lm.engine.name == "transformers generate, dynamic cache"
    assert lm.engine.why == "a graph needs a CUDA device"
    assert lm.use("eager").engine.why == "asked for"
    assert lm.use().engine.decoder is None
    for name in ("graph", "compiled"):
        with pytest.raises(QwlibError, match=f"can't decode by {name}: a graph needs a CUDA device"):
            lm.use(name)
    with pytest.raises(QwlibError, match="it is eager, graph or compiled"):
        lm.use("fast")
    with pytest.raises(QwlibError, match="can't decode by graph"):
        worker.run({"model": "smollm2-135m", "scheme": "bf16", "engine": "graph"})


def test_a_model_of_another_library_decodes_in_its_own_way(lm):
    made = Lm(lm.row, lm.scheme, "trained", lm.device, "", lm.dtype, "", engine=Stepwise(None, "a reader"))
    assert made.use() is made
    with pytest.raises(QwlibError, match="in a way of its own"):
        made.use("graph")
    with pytest.raises(QwlibError, match="answers greedily here"):
        made.engine.generate(torch.ones(1, 2), torch.ones(1, 2), new_tokens=1, sampling=Sampling())


def test_where_steps_can_not_be_had_generate_takes_over_and_says_why():
    model = small("llama")
    ids, mask = padded()
    plain = Transformers(model, torch.device("cpu"))
    wanted = plain.generate(ids, mask, new_tokens=5)

    class Broken(Decoder):
        def _captured(self):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    heard = Listener()
    picked = Transformers(model, torch.device("cpu"), decoder=Broken(model, "cpu"))
    assert torch.equal(picked.generate(ids, mask, new_tokens=5, streamer=heard), wanted)
    assert len(heard.got) == 6  # nothing was handed over twice
    assert picked.decoder is None
    assert picked.why == "no graph: operation not permitted when stream is capturing"
    asked = Transformers(model, torch.device("cpu"), decoder=Broken(model, "cpu"), must=True)
    with pytest.raises(QwlibError, match=r"no graph: operation not permitted.*engine='eager'"):
        asked.generate(ids, mask, new_tokens=5)


def test_an_error_of_who_listens_is_theirs(llama):
    ids, mask = padded()
    engine = Transformers(llama, torch.device("cpu"), decoder=steps(llama))
    with pytest.raises(RuntimeError, match="the reader is gone"):
        engine.generate(ids, mask, new_tokens=5, streamer=Listener(fail_at=3))
    assert engine.decoder is not None
    assert engine.generate(ids, mask, new_tokens=5).shape == (3, 5)


def test_a_request_while_another_is_answered_goes_to_generate(llama):
    ids, mask = padded()
    engine = Transformers(llama, torch.device("cpu"), decoder=steps(llama))
    wanted = engine.generate(ids, mask, new_tokens=9)

    class Asks(Listener):
        def put(self, value):
            super().put(value)
            if len(self.got) == 4:
                self.other = engine.generate(ids[:1], mask[:1], new_tokens=9)

    heard = Asks()
    assert torch.equal(engine.generate(ids, mask, new_tokens=9, streamer=heard), wanted)
    assert torch.equal(heard.other, wanted[:1])
    assert engine.decoder is not None


def test_nothing_of_a_request_is_left_for_the_next_one(llama):
    ids, mask = padded(1)
    decoder = steps(llama)
    wanted = decoder.generate(ids, mask, new_tokens=10)
    with torch.inference_mode():
        for slot in decoder.cache.layers:
            slot.keys.fill_(torch.nan)
            slot.values.fill_(torch.nan)
    held = decoder.cache
    assert torch.equal(decoder.generate(ids, mask, new_tokens=10), wanted)
    assert decoder.cache is held


def test_steps_that_do_not_look_alike_are_known_beforehand(llama):
    assert changing(llama) is None
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [9.0] * 8}
    rope["original_max_position_embeddings"] = 32
    long = small("phi3", rope_parameters=rope, original_max_position_embeddings=32, initializer_range=0.3)
    assert "longrope" in changing(long)
    ids, mask = padded(1)  # from 20 tokens over the border at 32: generate reads all again there, steps do not
    wanted = Transformers(long, torch.device("cpu")).generate(ids, mask, new_tokens=30)
    assert not torch.equal(steps(long).generate(ids, mask, new_tokens=30, ends=[1]), wanted)
    assert "can't be compiled" in changing(small("gpt_neo", attention_types=[[["local"], 3]]))
    peculiar = small("llama")
    peculiar.config.rope_parameters = {"full_attention": {"rope_type": "dynamic"}}
    assert "dynamic" in changing(peculiar)


def test_memory_that_is_short_once_costs_one_request_only(llama):
    class Short(Decoder):
        def _captured(self):
            raise torch.OutOfMemoryError("CUDA out of memory")

    ids, mask = padded(1)
    engine = Transformers(llama, torch.device("cpu"), decoder=Short(llama, "cpu"))
    assert engine.generate(ids, mask, new_tokens=3).shape == (1, 3)
    assert engine.decoder is not None
    assert engine.why == "no graph: CUDA out of memory"


def test_a_cache_that_holds_more_than_keys_and_values():
    torch.manual_seed(0)
    hybrid = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2}
    sizes = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    }
    few = {
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    }
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("qwen3_next", **(SIZES | hybrid | sizes | few))
    ).eval()
    ids, mask = padded(1)
    with pytest.raises(QwlibError, match=r"no graph: its cache is made of .*, not of keys and values alone"):
        steps(model).generate(ids, mask, new_tokens=3)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_gives_the_tokens_of_generate(family):
    model = small(family).cuda()
    ids, mask = padded()
    plain = Transformers(model, torch.device("cuda"))
    decoder = Decoder(model, "cuda")
    for new in (30, 30, ROUND + 5, 7):  # captured, used again, captured longer, used shorter
        wanted = plain.generate(ids, mask, new_tokens=new)
        assert torch.equal(decoder.generate(ids, mask, new_tokens=new, ends=[1]), wanted)
    alone = decoder.generate(ids[:1], mask[:1], new_tokens=30, ends=[1])
    assert torch.equal(alone, plain.generate(ids[:1], mask[:1], new_tokens=30))


@needs_gpu
def test_a_graph_draws_by_its_seed():
    model = small("llama").cuda()
    ids, mask = padded()
    decoder = Decoder(model, "cuda")
    drawn = [decoder.generate(ids, mask, new_tokens=30, sampling=Sampling(seed=seed)) for seed in (1, 1, 2, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[3])
    assert not torch.equal(drawn[0], drawn[2])


@needs_gpu
def test_what_decodes_on_a_gpu():
    with qwlib.load("smollm2-135m", "nf4-dq") as lm:
        assert lm.engine.name == "CUDA graph, static cache"
        lm.stream(lm.encode("A"), new_tokens=3)
        assert lm.engine.decoder.ready_s < 5
    with qwlib.load("smollm2-135m", "int8") as lm:
        assert lm.engine.decoder is None
        assert "outliers" in lm.engine.why
