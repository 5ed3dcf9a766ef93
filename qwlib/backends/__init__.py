"""Who executes a scheme. One row a backend: the packages that it needs; the code is in the file of the same name."""

import importlib.util
import logging
from dataclasses import dataclass

# bitsandbytes 0.50 logs a line at every int8 product, and one at import where the optional `kernels` package is missing
for _name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
    logging.getLogger(_name).setLevel(logging.ERROR)


@dataclass(frozen=True)
class Backend:
    """`packages` maps what is imported to what pip installs."""

    name: str
    packages: dict[str, str]

    def available(self) -> tuple[bool, str]:
        """(can it run here, why not: what to install)."""
        missing = [pip for name, pip in self.packages.items() if importlib.util.find_spec(name) is None]
        return (
            (False, f"needs {', '.join(missing)}: pip install {' '.join(missing)}") if missing else (True, "installed")
        )


_TORCH = {"torch": "torch", "transformers": "transformers", "accelerate": "accelerate"}
BACKENDS = {
    row.name: row
    for row in (
        Backend("transformers", _TORCH),
        Backend("bitsandbytes", _TORCH | {"bitsandbytes": "bitsandbytes"}),
    )
}
