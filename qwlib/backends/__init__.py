"""Who executes a scheme. One row a backend: the packages that it needs, the device, the module here that knows its calls.

Every module has `fill(lm, source)`, which loads the files in the folder `source` into an `Lm`, and, where a backend quantizes
files into files, `quantize(source, scheme, out, calibration, device)`, which reads a 16-bit checkpoint and writes into the
folder `out`; it gives back the settings that shaped the result, for the manifest.

A backend that is not installed here may be in the environment of its own that `make backends` builds (`environment.py`).
"""

import importlib
import importlib.util
import logging
from dataclasses import dataclass

# bitsandbytes 0.50 logs a line at every int8 product, and one at import where the optional `kernels` package is missing
for _name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).setLevel(logging.ERROR)


@dataclass(frozen=True)
class Backend:
    """`packages` maps what is imported to what pip installs; `device` is the only kind it runs on here, None for any."""

    name: str
    module: str
    packages: dict[str, str]
    device: str | None = None

    def missing(self, find=None) -> list[str]:
        """What pip would have to install, seen from where `find` looks (a name → a spec or None); else from here."""
        find = find or importlib.util.find_spec
        return [pip for name, pip in self.packages.items() if find(name) is None]

    def available(self) -> tuple[bool, str]:
        """(can it run in this environment, why not: what to install)."""
        if missing := self.missing():
            return False, f"needs {', '.join(missing)}: pip install {' '.join(missing)}"
        if self.device == "cuda":
            import torch

            if not torch.cuda.is_available():
                return False, "needs a GPU"
        return True, "installed"

    def load_module(self):
        """The module of this package that knows the backend's calls; the backend's own packages are imported too.

        Their first import may compile (ExLlama) or take seconds (GPTQModel): it belongs to no model's load time.
        """
        module = importlib.import_module(f".{self.module}", __name__)
        for name in self.packages:
            importlib.import_module(name)
        return module


_TORCH = {"torch": "torch", "transformers": "transformers", "accelerate": "accelerate"}
BACKENDS = {
    row.name: row
    for row in (
        Backend("transformers", "hf", _TORCH),
        Backend("bitsandbytes", "bnb", _TORCH | {"bitsandbytes": "bitsandbytes"}),
        Backend("llama.cpp", "llamacpp", {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}, "cpu"),
        Backend("gptqmodel", "gptq", _TORCH | {"gptqmodel": "gptqmodel", "optimum": "optimum"}),
        Backend("auto-round", "autoround", _TORCH | {"auto_round": "auto-round"}),
        Backend("onnxruntime", "onnx", {"onnxruntime_genai": "onnxruntime-genai", "onnx_ir": "onnx_ir"}, "cpu"),
        Backend("hqq", "hqq", _TORCH | {"hqq": "hqq"}),
        Backend("torchao", "torchao", _TORCH | {"torchao": "torchao"}),
        Backend("exllamav2", "exllama2", {"torch": "torch", "exllamav2": "exllamav2"}, "cuda"),
        Backend("exllamav3", "exllama3", {"torch": "torch", "exllamav3": "exllamav3"}, "cuda"),
    )
}
