import pytest

from qwlib.errors import QwlibError
from qwlib.models import catalog, estimates

PARAMETERS = {  # safetensors totals that the models' Hub pages print
    "smollm2-135m": 134_515_008,
    "smollm2-guard": 134_515_008,
    "gemma-3-270m": 268_098_176,
    "opt-350m": 331_196_416,
    "qwen2.5-3b": 3_085_938_688,
    "gemma-2-2b": 2_614_341_888,
    "phi-3-mini": 3_821_079_552,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-8b-instruct": 8_030_261_248,
    "nemoguard-8b": 8_030_261_248,
    "gpt-neox-20b": 20_554_567_680,
}


@pytest.mark.parametrize("name", catalog.MODELS)
def test_stored_configurations_have_the_published_size(name):
    assert sum(p.numel() for p in estimates.meta_model(catalog.find(name)).parameters()) == PARAMETERS[name]


def test_the_embedded_configuration_is_the_unpacked_one(lm):
    stored, loaded = catalog.find("smollm2-135m").config().to_dict(), lm.model.config.to_dict()
    differ = {k for k in stored | loaded if stored.get(k) != loaded.get(k)}
    assert differ <= {"dtype", "_model_name_or_path", "_name_or_path", "transformers_version", "architectures"}


def test_revisions_are_whole_hashes():
    for row in catalog.MODELS.values():
        assert row.source is None or len(row.revision) == 40


def test_an_unknown_name_gets_the_nearest_ones():
    with pytest.raises(QwlibError, match=r"did you mean .*qwen2\.5-3b"):
        catalog.find("qwen25-3b")


def test_folders_and_hub_ids_are_models_too(tmp_path):
    assert catalog.find("some-one/some-model").source == "some-one/some-model"
    with pytest.raises(QwlibError, match=r"no config\.json"):
        catalog.find(str(tmp_path))
    with pytest.raises(QwlibError, match="no such folder"):
        catalog.find("./missing/folder")
    (tmp_path / "config.json").write_text("{}")
    assert catalog.find(str(tmp_path)).source == str(tmp_path)
