import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import qwlib
from qwlib.errors import QwlibError
from qwlib.machine import memory
from qwlib.measuring import quality
from qwlib.measuring.reference import Reference
from qwlib.models import embedded, texts

TEXT = embedded.text()[:3_000]  # some 700 tokens


@pytest.fixture(scope="module")
def with_bos(shallow32):
    """The same model with a tokenizer that sets a BOS token, as Llama's does."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(embedded.checkpoint())
    start = tokenizer.bos_token
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.bos_token_id)]
    )
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    return dataclasses.replace(shallow32, tokenizer=tokenizer)


# every protocol a second time, straight from its definition: token by token, float64, plain Python


def gptq(ids, length):
    for begin in range(0, len(ids) - length + 1, length):
        yield ids[begin : begin + length], range(1, length)


def llamacpp(ids, length, bos=None):
    for chunk in range(len(ids) // length):
        row = ids[chunk * length : (chunk + 1) * length]
        yield (row if bos is None else [bos, *row[1:]]), range(length // 2 + 1, length)


def sliding(ids, length, stride=512):
    """Each token in the first window that holds it with something before it."""
    homes = {}
    for token in range(1, len(ids)):
        home = next((k for k in range(len(ids)) if k * stride < token < k * stride + length), None)
        if home is None:  # the first token of a window that nothing overlaps
            continue
        homes.setdefault(home, []).append(token - home * stride)
    for home, places in homes.items():
        yield ids[home * stride : home * stride + length], places


def by_hand(lm, rows):
    """(ppl, standard error, losses) of (row, scored places)."""
    losses = []
    for row, places in rows:
        with torch.inference_mode():
            scores = lm.model(torch.tensor([row], device=lm.device)).logits[0].double().cpu()
        logs = scores - scores.exp().sum(-1, keepdim=True).log()
        losses += [-logs[place - 1, row[place]].item() for place in places]
    mean = sum(losses) / len(losses)
    deviation = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / (len(losses) - 1))
    return math.exp(mean), math.exp(mean) * deviation / math.sqrt(len(losses)), losses


@pytest.mark.parametrize(
    ("protocol", "rule"),
    [
        ("gptq-64", lambda ids: gptq(ids, 64)),
        ("gptq-512", lambda ids: gptq(ids, 512)),
        ("hf-sliding-600", lambda ids: sliding(ids, 600)),
        ("hf-sliding-512", lambda ids: sliding(ids, 512)),
        ("hf-sliding", lambda ids: sliding(ids, 8192)),  # one short window
        ("llamacpp-128", lambda ids: llamacpp(ids, 128)),
    ],
)
def test_perplexity_equals_its_definition(shallow32, protocol, rule):
    ids = shallow32.tokenizer(TEXT).input_ids
    assert len(ids) % 64  # there is a remainder, so that what becomes of it is tested
    ppl, stderr, losses = by_hand(shallow32, rule(ids))
    got = quality.perplexity(shallow32, TEXT, protocol=protocol)
    assert got["ppl"] == pytest.approx(ppl, rel=1e-4)
    assert got["ppl_stderr"] == pytest.approx(stderr, rel=1e-4)
    assert got["tokens"] == len(losses)
    assert got["protocol"] == protocol
    fewer = math.exp(sum(losses[:-2]) / (len(losses) - 2))
    assert got["ppl"] != pytest.approx(fewer, rel=1e-4)  # a rule that forgot two tokens would be told apart


def test_bits_per_byte_counts_the_bytes_of_what_is_scored(shallow32):
    """In one block everything but the first token is scored, so its bytes are those of the text without that token."""
    text = "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 4
    ids = shallow32.tokenizer(text).input_ids
    _, _, losses = by_hand(shallow32, gptq(ids, len(ids)))
    wanted = sum(losses) / math.log(2) / len(shallow32.tokenizer.decode(ids[1:]).encode())
    got = quality.perplexity(shallow32, text, protocol=f"gptq-{len(ids)}")["bits_per_byte"]
    assert got == pytest.approx(wanted, rel=1e-4)
    assert got != pytest.approx(sum(losses) / math.log(2) / len(text), rel=1e-3)  # letters are not bytes


def test_a_bos_token_stands_where_the_protocol_wants_it(shallow32, with_bos):
    bos, ids = with_bos.tokenizer.bos_token_id, with_bos.tokenizer(TEXT).input_ids
    assert ids[0] == bos
    assert bos not in ids[1:]
    for protocol, rows in (("gptq-128", gptq(ids, 128)), ("llamacpp-128", llamacpp(ids, 128, bos))):
        ppl, _, losses = by_hand(with_bos, rows)
        got = quality.perplexity(with_bos, TEXT, protocol=protocol)
        assert got["ppl"] == pytest.approx(ppl, rel=1e-4)
        assert got["tokens"] == len(losses)
    forgotten, _, _ = by_hand(with_bos, llamacpp(ids, 128))
    assert forgotten != pytest.approx(ppl, rel=1e-4)  # the last one above, had no chunk begun with BOS


@given(st.sampled_from(["gptq", "llamacpp", "hf-sliding"]), st.integers(4, 1500), st.integers(0, 5000))
def test_windows_score_every_token_at_most_once_and_never_without_context(kind, length, tokens):
    spans = quality.windows(f"{kind}-{length}", tokens)
    scored = [t for _, first, end in spans for t in range(first, end)]
    assert scored == sorted(set(scored))
    for begin, first, end in spans:
        assert 0 <= begin < first < end <= tokens
        assert end - begin <= length
        if kind != "hf-sliding":
            assert end - begin == length
    if kind == "hf-sliding" and length > quality.STRIDE:
        assert scored == list(range(1, tokens))
    elif kind == "gptq":
        assert len(scored) == tokens // length * (length - 1)


def test_batching_changes_nothing_but_rounding(shallow32):
    one = quality.perplexity(shallow32, TEXT, protocol="gptq-64", batch=1, blocks=5)
    many = quality.perplexity(shallow32, TEXT, protocol="gptq-64", batch=3, blocks=5)
    assert many["ppl"] == pytest.approx(one["ppl"], rel=1e-5)
    assert many["tokens"] == one["tokens"]


def test_blocks_limit_what_is_read(shallow32):
    got = quality.perplexity(shallow32, TEXT, protocol="gptq-64", blocks=3)
    assert got["tokens"] == 3 * 63
    assert quality.perplexity(shallow32, TEXT, protocol="gptq-64", blocks=9)["ppl_stderr"] < 0.8 * got["ppl_stderr"]


@pytest.mark.parametrize(
    ("text", "protocol", "message"),
    [
        ("too short", "gptq-512", "the text has 2 tokens, gptq-512 needs at least 512"),
        ("too short", "llamacpp-512", "the text has 2 tokens, llamacpp-512 needs at least 512"),
        ("", "gptq-64", "has 0 tokens"),
        ("", "hf-sliding", "has 0 tokens"),
        ("word", "hf-sliding", "has 1 tokens, hf-sliding needs at least 3"),
        (TEXT, "wikitext", "unknown protocol 'wikitext': use gptq-2048"),
        (TEXT, "gptq", "unknown protocol"),
        (TEXT, "gptq-1", "unknown protocol"),
        (TEXT, "gptq-0512", "unknown protocol"),
        (TEXT, "llamacpp-2", "unknown protocol"),
        (TEXT, None, "unknown protocol"),
    ],
)
def test_what_can_not_be_measured_is_refused(shallow32, text, protocol, message):
    with pytest.raises(QwlibError, match=message):
        quality.perplexity(shallow32, text, protocol=protocol)


def test_a_window_of_2048_takes_little_more_memory_than_its_forward_pass(shallow16):
    """The rejected way holds float32 scores of the whole window, as `model(ids, labels=ids)` does."""
    text = embedded.text()[:20_000]
    ids = torch.tensor([shallow16.tokenizer(text).input_ids[:2048]])

    def peak(work):
        memory.give_back()
        before = memory.used_bytes(shallow16.device)
        if not memory.reset_peak(shallow16.device):
            pytest.skip("no meter for memory here")
        work()
        return memory.peak_bytes(shallow16.device) - before

    def upcast():
        with torch.inference_mode():
            return shallow16.model(ids.to(shallow16.device), labels=ids.to(shallow16.device), use_cache=False).loss

    quality.perplexity(shallow16, text, protocol="gptq-2048", blocks=1)  # warm
    plain = peak(lambda: shallow16.logits(ids))
    assert peak(lambda: quality.perplexity(shallow16, text, protocol="gptq-2048", blocks=1)) < 1.5 * plain
    assert peak(upcast) > 1.5 * plain


def test_scores_of_the_last_positions_are_those_of_all(shallow32):
    ids = torch.tensor([shallow32.tokenizer(TEXT).input_ids[:40]] * 2)
    last = shallow32.logits(ids, last=7)
    assert last.shape == (2, 7, shallow32.vocabulary)
    assert torch.allclose(last, shallow32.logits(ids)[:, -7:], atol=1e-3)


# divergence


@pytest.fixture(scope="module")
def quantized(shallow):
    with qwlib.load(str(shallow), "nf4") as loaded:
        yield loaded


def test_divergence_equals_its_definition(shallow16, quantized):
    got = quality.divergence(quantized, shallow16, TEXT, protocol="gptq-128", blocks=4, batch=2)
    ids = torch.tensor(shallow16.tokenizer(TEXT).input_ids[: 4 * 128]).view(4, 128)
    klds, same, shifts = [], [], []
    for rows in ids.split(2):
        logs = [one.logits(rows)[:, :-1].double().log_softmax(-1).cpu() for one in (shallow16, quantized)]
        for p, q, row in zip(*logs, rows, strict=True):
            klds += (p.exp() * (p - q)).sum(-1).tolist()
            same += (p.argmax(-1) == q.argmax(-1)).tolist()
            shifts += [(p[i, t] - q[i, t]).item() for i, t in enumerate(row[1:].tolist())]
    klds.sort()
    assert got["tokens"] == len(klds) == 4 * 127
    mean = sum(klds) / len(klds)
    # two forward passes of one bf16 model can differ in the last bit, so not to all digits
    assert got["mean"] == pytest.approx(mean, rel=2e-3)
    assert got["median"] == pytest.approx((klds[253] + klds[254]) / 2, rel=1e-2)
    assert got["p99"] == pytest.approx(klds[502], rel=5e-2)
    assert got["stderr"] == pytest.approx(torch.tensor(klds).std().item() / math.sqrt(len(klds)), rel=1e-2)
    assert got["top1"] == pytest.approx(sum(same) / len(same), abs=0.005)
    assert got["ppl_ratio"] == pytest.approx(math.exp(sum(shifts) / len(shifts)), rel=2e-3)
    assert got["reference"] == f"{shallow16.row.name} bf16"
    backwards = quality.divergence(shallow16, quantized, TEXT, protocol="gptq-128", blocks=4)
    assert backwards["mean"] != pytest.approx(mean, rel=2e-3)  # KL divergence has a direction


def test_the_paired_ratio_is_that_of_the_perplexities_and_surer(shallow16, quantized):
    options = {"protocol": "gptq-128", "blocks": 8}
    base = quality.perplexity(shallow16, TEXT, **options)
    with Reference.temporary() as kept:
        quality.measure(shallow16, TEXT, keep=kept, **options)
        got = quality.measure(quantized, TEXT, reference=kept, **options)
    ratio, kld = got["ppl"] / base["ppl"], got["kld"]
    assert kld["ppl_ratio"] == pytest.approx(ratio, rel=2e-3)
    unpaired = ratio * math.hypot(got["ppl_stderr"] / got["ppl"], base["ppl_stderr"] / base["ppl"])
    assert kld["ppl_ratio_stderr"] < 0.5 * unpaired
    assert kld["noise_floor"] < 0.1 * kld["mean"]


def test_a_model_does_not_diverge_from_itself_but_for_noise(lm):
    got = quality.divergence(lm, lm, TEXT, protocol="gptq-128", blocks=2)
    assert abs(got["mean"]) < 1e-3
    assert got["top1"] > 0.98
    assert 0 <= got["noise_floor"] < 0.02
    if lm.arithmetic is torch.bfloat16:
        assert got["noise_floor"] > 0  # such kernels round otherwise for another shape; float32's need not


def test_another_text_protocol_or_vocabulary_is_not_compared(shallow32, tiny_folder):
    with Reference.temporary() as kept:
        quality.measure(shallow32, TEXT, protocol="gptq-64", blocks=2, keep=kept)
        for text, protocol, message in (
            (TEXT, "gptq-32", "protocol is gptq-64"),
            (TEXT + "!", "gptq-64", "text_sha256"),
        ):
            with pytest.raises(QwlibError, match=f"can't be the reference: its {message}"):
                quality.divergence(shallow32, kept, text, protocol=protocol)


def test_a_full_disk_is_told(shallow32, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 0}))
    with pytest.raises(QwlibError, match="no room for the reference's scores"):
        quality.divergence(shallow32, shallow32, TEXT, protocol="gptq-64", blocks=1)


def test_scores_that_overflow_are_told(shallow32, monkeypatch):
    plain = type(shallow32).logits
    monkeypatch.setattr(type(shallow32), "logits", lambda *args, **more: plain(*args, **more) * float("inf"))
    with pytest.raises(QwlibError, match=r"shallow[0-9]* in fp32 gives scores that are no numbers: torch\.float32"):
        quality.perplexity(shallow32, TEXT, protocol="gptq-64", blocks=1)


@pytest.mark.hub
def test_the_published_perplexity_of_llama(capsys):
    """Llama-3.1-8B has 6.24 under `gptq-2048`; needs a GPU with 20 GB, HF_TOKEN and the licence."""
    text, _ = texts.read("wikitext2")
    with qwlib.load("llama-3.1-8b") as llama:
        assert quality.perplexity(llama, text, protocol="gptq-2048")["ppl"] == pytest.approx(6.24, abs=0.01)
