"""The table of models: where each comes from, what its licence asks, and the configuration that gives its shape.

The stored configurations (`configs/*.json`) are why memory can be estimated, and a random-weight model of the exact
shape be built, without a download. A Hub id or a local folder works wherever a name does.

Revisions are commit hashes of the Hub repository where one could be known; `None` says "unpinned: the Hub's main branch".
"""

import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

from ..errors import QwlibError, unknown
from . import hub


def once(question: Callable) -> Callable:
    """`question(row, …)`, answered once for a row: what costs a look at the disk or the Hub stays with the row."""

    @functools.wraps(question)
    def asked(row, *more):
        key = (question.__qualname__, *more)
        if key not in row.found:
            row.found[key] = question(row, *more)
        return row.found[key]

    return asked


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on the Hub or in a folder, to be put over a model's weights unmerged.

    `rank`: that of an adapter over all linear layers, so that its bytes are known before a download.
    """

    source: str
    revision: str | None
    folder: str = ""
    rank: int | None = None


@dataclass(frozen=True)
class Model:
    """A row of the catalog, or a Hub id or folder that a user named.

    `source` is what `from_pretrained` takes (`None` for a model in PyPI packages, which is unpacked first); `licence_page` is
    set where the Hub asks a user to accept a licence; `adapter` goes over `source`, which has a row of its own if `over` names
    one; `config_name` names the stored configuration. `found` holds what was found out about it (`once`): `find` makes a row
    where a name enters, and the row travels from there.
    """

    name: str
    source: str | None
    revision: str | None = None
    licence: str = "unknown"
    licence_page: str | None = None
    adapter: Adapter | None = None
    over: str | None = None
    config_name: str | None = None
    what: str = ""
    found: dict = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def address(self) -> str:
        """What `find` takes to find the same row in another process."""
        if self.name in MODELS or not self.adapter:
            return self.name
        return f"{base(self).address}+{self.adapter.source}"

    @once
    def config(self):
        """The transformers configuration: the stored one, else read from the folder or the Hub."""
        from transformers import AutoConfig

        if self.config_name is None:
            inside = {"gguf_file": file} if (file := bare_gguf(self.source)) else {}
            with hub.explained(self):
                return AutoConfig.from_pretrained(
                    self.source, revision=self.revision, trust_remote_code=False, **inside
                )
        stored = resources.files(__package__) / "configs" / f"{self.config_name}.json"
        return AutoConfig.for_model(**json.loads(stored.read_text()))


_LLAMA = "https://huggingface.co/meta-llama/Llama-3.1-8B"
MODELS = {
    row.name: row
    for row in (
        Model(
            "smollm2-135m",
            None,
            licence="Apache-2.0",
            config_name="smollm2-135m",
            what="SmolLM2-135M-Instruct, embedded: no network needed",
        ),
        Model(
            "smollm2-guard",
            None,
            licence="Apache-2.0",
            config_name="smollm2-135m",
            adapter=Adapter(str(Path(__file__).with_name("smollm2-guard")), None, rank=6),
            over="smollm2-135m",
            what="content-safety adapter over smollm2-135m, trained by qwlib: no network needed",
        ),
        Model(
            "gemma-3-270m",
            None,
            licence="Gemma terms of use",
            config_name="gemma-3-270m",
            what="Gemma-3-270m, base model, if its PyPI packages are installed: no network needed",
        ),
        Model(
            "opt-350m",
            "facebook/opt-350m",
            "061d15c4d9cc3e25b93c0393d0bcca4934eaa033",  # refs/pr/33, which has safetensors; main had none
            licence="OPT licence, research only",
            config_name="opt-350m",
            what="OPT, 2022: post-norm, learned positions",
        ),
        Model(
            "qwen2.5-3b",
            "Qwen/Qwen2.5-3B-Instruct",
            "aa8e72537993ba99e69dfaafa59ed015b17504d1",
            licence="Qwen research licence",
            config_name="qwen2.5-3b",
            what="Qwen2.5-3B-Instruct",
        ),
        Model(
            "gemma-2-2b",
            "google/gemma-2-2b-it",
            "299a8560bedf22ed1c72a8a11e7dce4a7f9f51f8",
            licence="Gemma terms of use",
            licence_page="https://huggingface.co/google/gemma-2-2b-it",
            config_name="gemma-2-2b",
            what="Gemma-2-2b-it: a 256,000-word embedding",
        ),
        Model(
            "phi-3-mini",
            "microsoft/Phi-3-mini-4k-instruct",
            "f39ac1d28e925b323eae81227eaba4464caced4e",
            licence="MIT",
            config_name="phi-3-mini",
            what="Phi-3-mini-4k-instruct",
        ),
        Model(
            "llama-3.1-8b",
            "meta-llama/Llama-3.1-8B",
            "d04e592bb4f6aa9cfee91e2e20afa771667e1d4b",
            licence="Llama 3.1 community",
            licence_page=_LLAMA,
            config_name="llama-3.1-8b",
            what="the base model, for published perplexities",
        ),
        Model(
            "llama-3.1-8b-instruct",
            "meta-llama/Llama-3.1-8B-Instruct",
            "0e9e39f249a16976918f6564b8830bc894c89659",
            licence="Llama 3.1 community",
            licence_page=f"{_LLAMA}-Instruct",
            config_name="llama-3.1-8b",
            what="the chat model",
        ),
        Model(
            "nemoguard-8b",
            "meta-llama/Llama-3.1-8B-Instruct",
            "0e9e39f249a16976918f6564b8830bc894c89659",
            licence="NVIDIA Open Model + Llama 3.1 community",
            licence_page=f"{_LLAMA}-Instruct",
            config_name="llama-3.1-8b",
            adapter=Adapter(
                "nvidia/llama-3.1-nemoguard-8b-content-safety",
                "0ef9fa805d78e7a30958f0324d733dd5d4098d97",
                "llama-3.1-nemoguard-8b-content-safety-lora-adapter",
                rank=16,  # its adapter_config.json
            ),
            what="content-safety adapter over llama-3.1-8b-instruct",
        ),
        Model(
            "gpt-neox-20b",
            "EleutherAI/gpt-neox-20b",
            "c292233c833e336628618a88a648727eb3dff0a7",
            licence="Apache-2.0",
            config_name="gpt-neox-20b",
            what="GPT-NeoX-20B: 20 billion weights on one GPU",
        ),
    )
}
EMBEDDED = "smollm2-135m"


def find(model: "str | Path | Model") -> Model:
    """The row of that name in the catalog, else one for a local folder, a Hub id or a GGUF file; a row is given back as it is.

    `model+adapter` is either with a LoRA adapter over it, a folder or Hub id.
    The file is a path, or `owner/name/file.gguf` for one on the Hub, which is downloaded here: only it says what it holds.

    Raises QwlibError with the nearest names, where a folder holds no model, or a file can't be had.
    """
    if isinstance(model, Model):
        return model
    name = str(model)
    if name in MODELS:
        return replace(MODELS[name])
    if is_gguf(name):
        return Model(name, *hub.gguf_folder(name), what="a GGUF file")
    folder = Path(name).expanduser()
    if "+" in name and not folder.exists():
        under, _, over = name.rpartition("+")
        under, local = find(under), Path(over).expanduser()
        if not over or under.adapter:
            raise QwlibError(f"{name} names {'two adapters' if over else 'no adapter'}: it takes one, as model+adapter")
        if local.is_dir():
            return replace(under, name=f"{under.name}+{local.name}", adapter=Adapter(str(local.resolve()), None))
        return replace(under, name=f"{under.name}+{over}", adapter=Adapter(over, None))
    if folder.exists():
        if not (folder / "config.json").is_file() and not gguf_file(folder):
            raise QwlibError(f"{name} is not a model: it has no config.json; name a folder that save_pretrained wrote")
        return Model(name, str(folder.resolve()), what="a local folder")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return Model(name, name, what="a Hub repository")
    if "/" in name:
        raise QwlibError(f"no such folder: {name}; name a folder with a config.json, a Hub id, or a catalog model")
    raise unknown("model", name, MODELS, " `python -m qwlib models` lists all")


def base(row: Model) -> Model:
    """The row without its adapter: `model` of `model+adapter`."""
    if not row.adapter:
        return row
    return replace(row, name=row.over or row.name.rpartition("+")[0] or row.name, adapter=None, over=None)


def is_gguf(name: str) -> bool:
    """Whether a name is that of a GGUF file, here or on the Hub, and of no folder."""
    return name.lower().endswith(".gguf") and not Path(name).expanduser().is_dir()


def gguf_file(folder: str | Path) -> str | None:
    """The name of the one GGUF file in a folder, None where there is none.

    Raises QwlibError where there are several: a folder is one model.
    """
    inside = Path(folder).iterdir() if Path(folder).is_dir() else ()
    found = sorted(path.name for path in inside if path.suffix.lower() == ".gguf")
    if split := next((match for name in found if (match := re.search(r"-0*\d+-of-0*(\d+)\.gguf$", name, re.I))), None):
        raise QwlibError(
            f"{folder} holds one GGUF model in {int(split[1])} parts: join them with llama.cpp's `llama-gguf-split --merge`"
        )
    if len(found) > 1:
        raise QwlibError(f"{folder} holds {len(found)} GGUF files: put the one that is meant into a folder of its own")
    return found[0] if found else None


def bare_gguf(folder: str | Path) -> str | None:
    """The same where no config.json lies beside it, so that the file has to say what it holds."""
    return None if (Path(folder) / "config.json").is_file() else gguf_file(folder)
