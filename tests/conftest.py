"""Fixtures: the embedded model loaded once, and tiny random models of every architecture in the catalog."""

import gc
import io
import os
import sys

import pytest

import qwlib
from qwlib.backends import environment
from qwlib.loading import quantizing
from qwlib.machine import processes, processor
from qwlib.models import catalog

with processes.without("rfc3987_syntax"):
    import nbformat

os.environ.update(processes.environment())  # before torch is imported, whose threads read it once
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // int(workers))))

TINY = {  # shapes small enough to load in a moment; several are no multiple of a 64-block, or have odd vocabularies
    "llama": {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen2": {"hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4, "num_key_value_heads": 2},
    "gemma2": {
        "hidden_size": 144,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "sliding_window": 16,
        "tie_word_embeddings": True,
    },
    "phi3": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4},
    "opt": {
        "hidden_size": 128,
        "ffn_dim": 256,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 72,
        "do_layer_norm_before": False,
        "tie_word_embeddings": True,
    },
    "gpt_neox": {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4},
}


def tiny_config(kind: str) -> dict:
    shape = {"num_hidden_layers": 2, "vocab_size": 1001, "max_position_embeddings": 256}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return {"model_type": kind} | shape | ids | TINY[kind]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A function: kind → folder with a random checkpoint of that architecture and the embedded tokenizer."""
    import json

    from qwlib.models import estimates, random_weights

    made = {}

    def make(kind: str):
        if kind not in made:
            shapes = tmp_path_factory.mktemp(kind)
            (shapes / "config.json").write_text(json.dumps(tiny_config(kind)))
            made[kind] = tmp_path_factory.mktemp(f"{kind}-weights")
            random_weights.write(estimates.meta_model(catalog.find(str(shapes))), made[kind])
        return str(made[kind])

    return make


@pytest.fixture(scope="session")
def lm():
    """The embedded model in bf16."""
    with qwlib.load("smollm2-135m", "bf16") as loaded:
        yield loaded


@pytest.fixture(scope="session")
def lm32():
    """The embedded model in float32, where two ways to one figure agree to many digits."""
    with qwlib.load("smollm2-135m", "fp32") as loaded:
        yield loaded


@pytest.fixture(scope="session")
def shallow(tmp_path_factory):
    """A folder with the first 3 of the embedded model's 30 layers: its words, for tests that don't mind what it says."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    from qwlib.models import embedded

    source, folder = embedded.checkpoint(), tmp_path_factory.mktemp("shallow")
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, folder)
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 3}
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(source / "model.safetensors")
    kept = {name: w for name, w in weights.items() if "layers" not in name or int(name.split(".")[2]) < 3}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def shallow32(shallow):
    """The shallow model in float32."""
    with qwlib.load(str(shallow), "fp32") as loaded:
        yield loaded


@pytest.fixture(scope="session")
def shallow16(shallow):
    """The shallow model in bf16."""
    with qwlib.load(str(shallow), "bf16") as loaded:
        yield loaded


@pytest.fixture(scope="session")
def repacks() -> bool:
    """Whether the first forward of a 4-bit layer, on the CPU that `load` would pick, repacks its weight for a kernel."""
    import torch

    return not torch.cuda.is_available() and processor.capability() in processor.BF16


@pytest.fixture(autouse=True, scope="session")
def makers_take_every_core():
    """Whoever wants the same artefact waits for it, so that the cores are free meanwhile."""
    plain = environment.command

    def command(name: str, module: str, *arguments: str) -> dict:
        call = plain(name, module, *arguments)
        if module == quantizing.__name__:
            call["env"].pop("OMP_NUM_THREADS", None)
        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(environment, "command", command)
        yield


@pytest.fixture(autouse=True)
def modules_are_not_gone_through(frozen=[0]):  # noqa: B006 the number of modules at the last freeze
    """Every load collects three times, and modules that are imported by now stay to the end: 0.3 s each time without this."""
    if len(sys.modules) > frozen[0] + 200:
        frozen[0] = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(autouse=True)
def no_step_summary(monkeypatch):
    """Nights of the tests are not those of the workflow that runs the tests."""
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


@pytest.fixture(scope="session")
def record_cell():
    """The source of a cell that writes a true record into OUT without importing torch first, so that it takes no seconds."""
    import json

    from qwlib.measuring import record

    return f"""
import json, datetime, pathlib
written = json.loads({json.dumps(json.dumps(record.new("notebook")))})
written["created"] = datetime.datetime.now(datetime.UTC).isoformat()
written |= globals().get("MORE", {{}})
pathlib.Path(OUT, "record.json").write_text(json.dumps(written))
"""


def made(*cells: str, name: str = "n", parameters: str = 'OUT: str = ""  # folder for the record', folder):
    """The path of a new notebook of these cells that begins with a parameters cell."""
    whole = nbformat.v4.new_notebook()
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    whole.cells = [first, *(nbformat.v4.new_code_cell(cell) for cell in cells)]
    whole.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for number, cell in enumerate(whole.cells):
        cell.id = f"cell-{number}"  # nbformat draws them: the same cells are to be the same file
    folder.mkdir(exist_ok=True)
    nbformat.write(whole, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def drawn(figure):
    """The axes of a figure that can be written as a PNG."""
    png = io.BytesIO()
    figure.savefig(png, format="png")
    assert png.getvalue().startswith(b"\x89PNG")
    return figure.axes


@pytest.fixture
def notebook(tmp_path):
    """`made`, in this test's folder."""
    return lambda *cells, **named: made(*cells, **{"folder": tmp_path} | named)
