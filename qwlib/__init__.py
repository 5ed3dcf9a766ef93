"""qwlib: load a language model under a 4-bit scheme, measure it honestly, write down what was found.

What a person types in a notebook stands here, each name imported when it is used first:

    with qwlib.load("smollm2-135m", "nf4-dq") as lm: …
    qwlib.estimate("llama-3.1-8b", "nf4-dq").total_bytes
    folder = qwlib.quantize("smollm2-135m", "gguf-q4_k_m")
    folder, record = qwlib.finetune("smollm2-135m", "nf4-dq", "examples.jsonl", "runs/mine")
    records = list(qwlib.bench("smollm2-135m", ["nf4", folder], "runs/mine"))

So do the modules that the notebooks use: `from qwlib import fourbit, plots`. docs/architecture.md tells where each of them lies.
"""

from importlib import import_module

from .errors import QwlibError

__version__ = "0.1.0"
FACE = {
    "banner": "machine.about",
    "load": "loading.load",
    "Lm": "running.lm",
    "estimate": "models.estimates",
    "quantize": "loading.quantizing",
    "finetune": "training.finetune",
    "bench": "measuring.bench",
    "came_true": "lessons.predictions",
    "MODELS": "models.catalog",
    "SCHEMES": "schemes",
    "BACKENDS": "backends",
}
MODULES = {
    name: room
    for room, names in {
        "machine": "clock devices memory processor",
        "lessons": "docstrings exercises fourbit integers kernel_pictures lowrank pictures predictions tiles "
        "training_pictures",
        "models": "artefacts catalog checkpoints embedded estimates hub texts",
        "running": "streaming",
        "kernels": "linear4bit profiles",
        "backends": "environment",
        "guard": "classify guards judging labelled verdicts",
        "loading": "calibration fresh merging",
        "measuring": "compare describing plots quality record tasks timing",
        "training": "anatomy examples loop on_gpu",
        "publishing": "card publish",
    }.items()
    for name in names.split()
}
__all__ = ["QwlibError", *FACE, *MODULES]


def __getattr__(name: str):
    if name in FACE:
        return getattr(import_module(f".{FACE[name]}", __name__), name)
    if name in MODULES:
        return import_module(f".{MODULES[name]}.{name}", __name__)
    raise AttributeError(f"module 'qwlib' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *FACE, *MODULES])
