"""A folder whose files are damaged or of another model loads, or is refused in one line: no traceback, no half of a model."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import qwlib
from qwlib.errors import QwlibError
from qwlib.models import catalog, checkpoints, intact, limits

FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 1234567\n"


@pytest.fixture(scope="module")
def whole(tiny_folder, tmp_path_factory):
    """A function: kind → a folder as `save_pretrained` writes it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def make(kind: str) -> Path:
        source, folder = tiny_folder(kind), tmp_path_factory.mktemp(f"{kind}-whole")
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        return folder

    return functools.cache(make)


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole("llama"), tmp_path / "m"))


def edit(path: Path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder) -> str | None:
    """The one line that loading is refused with, None where the model loads and scores."""
    said = None
    try:
        with qwlib.load(str(folder), "bf16", device="cpu") as lm:
            assert lm.logits([[5, 6, 7]]).isfinite().all()
    except QwlibError as error:
        said = str(error)
    assert said is None or ("\n" not in said and 20 < len(said) < 700)
    return said


def cut(path, other):
    path.write_bytes(path.read_bytes()[:-3])


def halved(path, other):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def emptied(path, other):
    path.write_bytes(b"")


def pointed(path, other):
    path.write_text(POINTER)


def scrambled(path, other):
    path.write_bytes(bytes(range(256)) * 20)


def swapped(path, other):
    shutil.copy(other / path.name, path)


def listed(path, other):
    path.write_text("[1, 2]")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", [cut, halved, emptied, pointed, scrambled, swapped, listed])
def test_every_damage_is_one_line_or_none(copy, whole, name, harm):
    harm(copy / name, whole("gemma2"))
    said = refusal(copy)
    if harm in (cut, halved, emptied, pointed, scrambled):
        assert said, "a damaged file was taken"
        assert name in said
    if harm is pointed:
        assert "git lfs pull" in said


def test_whole_folders_are_taken(copy, shallow):
    intact.check(copy)
    intact.check(shallow)
    assert refusal(copy) is None


def test_the_parts_of_an_index_have_to_be_there(copy):
    index = copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(QwlibError, match=r"model-00002-of-00002\.safetensors is missing in m"):
        intact.check(copy)
    for bad in ("[]", "{}", '{"weight_map": 3}'):
        index.write_text(bad)
        with pytest.raises(QwlibError, match="names no files"):
            intact.check(copy)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_parameters": {"rope_type": "su", "rope_theta": 1e4}}, "su"),
        ({"hidden_act": "swiglu"}, "swiglu"),
        ({"num_key_value_heads": 3}, ""),
        ({"dtype": "bf16"}, "bf16"),
        ({"pad_token_id": 1001}, "adding"),
        ({"num_hidden_layers": 1}, "weights that the model does not use, model.layers.1"),
        ({"num_hidden_layers": 3}, "lacks"),
        ({"hidden_size": 80}, ""),
    ],
)
def test_a_configuration_of_another_model_is_one_line(copy, changes, said):
    edit(copy / "config.json", **changes)
    assert said in refusal(copy)


def test_weights_that_are_known_to_be_harmless_are_passed_over(copy):
    weights = load_file(copy / "model.safetensors")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights | extra, copy / "model.safetensors", metadata={"format": "pt"})
    assert refusal(copy) is None
    save_file(weights | {"model.layers.0.other": torch.ones(4)}, copy / "model.safetensors", metadata={"format": "pt"})
    assert "holds 1 weights that the model does not use, model.layers.0.other first" in refusal(copy)


@pytest.mark.parametrize("pad", [-1, 1001])
def test_a_padding_token_outside_the_vocabulary_pads_nothing(copy, pad):
    with qwlib.load(str(copy), "fp32", device="cpu") as lm:
        wanted = lm.logits([[5, 6, 7, 8], [9]])[1, -1]
    (copy / "generation_config.json").write_text(json.dumps({"pad_token_id": pad, "eos_token_id": [2, 5000]}))
    with qwlib.load(str(copy), "fp32", device="cpu") as lm:
        assert torch.equal(lm.logits([[5, 6, 7, 8], [9]])[1, -1], wanted)
        assert lm.engine.stops == [2]
        assert lm.stream([[5, 6], [7]], new_tokens=3).shape == (2, 3)


def test_an_adapter_beside_a_model_or_in_its_place_is_told(copy):
    (copy / "adapter_config.json").write_text("{}")
    assert "holds a whole model and an adapter" in refusal(copy)
    (copy / "model.safetensors").rename(copy / "adapter_model.safetensors")
    assert "m is an adapter: name the model that it is for before it, as model+m" in refusal(copy)


def test_a_tokenizer_without_words_is_told(copy):
    (copy / "tokenizer.json").unlink()
    assert "has no tokenizer files (tokenizer.json, or a vocabulary)" in refusal(copy)
    edit(copy / "tokenizer_config.json", tokenizer_class="BertTokenizer")
    assert "has no tokenizer files" in refusal(copy)


def test_an_artefact_keeps_the_publishers_settings(copy, tmp_path):
    published = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "eos_token_id": 2}
    (copy / "generation_config.json").write_text(json.dumps(published))
    with qwlib.load(str(copy), "nf4-dq", device="cpu") as lm:
        assert lm.model.generation_config.temperature is None  # measuring is greedy
        lm.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "generation_config.json").read_text()) == published


@pytest.mark.parametrize(
    ("kind", "sizes", "positions", "window"),
    [
        ("llama", {"max_position_embeddings": 77}, 77, None),
        ("gpt2", {"n_positions": 77}, 77, None),
        ("mpt", {"max_seq_len": 77}, 77, None),
        ("gpt_neo", {"max_position_embeddings": 77, "window_size": 8}, 77, 8),
        ("mistral", {"max_position_embeddings": 77, "sliding_window": 9}, 77, 9),
        ("gemma3", {"text_config": {"max_position_embeddings": 77, "sliding_window": 9}}, 77, 9),
        ("llama4", {"text_config": {"max_position_embeddings": 77, "attention_chunk_size": 6}}, 77, 6),
        ("mamba", {}, None, None),
        ("bloom", {}, None, None),
    ],
)
def test_positions_and_windows_under_every_name(kind, sizes, positions, window):
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, **sizes)
    assert (limits.positions(config), limits.window(config)) == (positions, window)


def test_an_estimate_keeps_to_the_positions(tiny_folder):
    folder = tiny_folder("llama")  # of 256 positions
    assert qwlib.estimate(folder).context == 256
    assert qwlib.estimate(folder, context=256).kv_bytes == qwlib.estimate(folder).kv_bytes
    assert qwlib.estimate("smollm2-135m").context == 2048
    with pytest.raises(QwlibError, match="a context of 257 tokens is more than the 256 positions"):
        qwlib.estimate(folder, context=257)
    with pytest.raises(QwlibError, match="context is a whole number of at least 1, not 0"):
        qwlib.estimate(folder, context=0)


def gguf_file(path: Path, kind: int | None = 15) -> Path:
    """A GGUF file of one tensor that says it is of llama.cpp's file type `kind` (15: Q4_K_M)."""
    import gguf
    import numpy

    path.parent.mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(str(path), "llama")
    if kind is not None:
        writer.add_file_type(kind)
    writer.add_tensor("token_embd.weight", numpy.zeros((8, 32), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_is_told_of_gguf_files(tmp_path, whole):
    unnamed = catalog.find(str(gguf_file(tmp_path / "unnamed.gguf", None)))
    with pytest.raises(QwlibError, match="does not say how it is quantized"):
        checkpoints.saved_scheme(unnamed)
    assert checkpoints.saved_scheme(catalog.find(str(gguf_file(tmp_path / "Loud.GGUF")))) == "gguf-q4_k_m"
    for part in (1, 2, 3):
        gguf_file(tmp_path / "split" / f"m-0000{part}-of-00003.gguf")
    with pytest.raises(QwlibError, match="holds one GGUF model in 3 parts: join them"):
        catalog.find(str(tmp_path / "split"))
    for name in ("a", "b"):
        gguf_file(tmp_path / "two" / f"{name}.gguf")
    with pytest.raises(QwlibError, match="holds 2 GGUF files: put the one that is meant into a folder of its own"):
        catalog.find(str(tmp_path / "two"))
    folder = shutil.copytree(whole("llama"), tmp_path / "folder.gguf")
    assert refusal(folder) is None
