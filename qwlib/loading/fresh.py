"""What a saved model says in a fresh process, which knows nothing of the one that saved it.

The only proof that a folder holds the model: state that never reached a file can't help here.

    python -m qwlib.loading.fresh IDS_AND_LOGITS.safetensors MODEL SCHEME DEVICE
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from .. import schemes
from ..backends import environment
from ..errors import QwlibError
from ..machine.processes import importing, last_word, whole_process
from .load import load


def logits(model, scheme: str, ids, *, device: str | None = None, timeout: float = 3600):
    """`Lm.logits` of token `ids` (a tensor, batch × positions) from `model` (a folder or a name), loaded in another process.

    `device`: where, else the one that `load` picks.
    On the host, in the model's type. Raises QwlibError with that process's last word if it fails.
    """
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "exchange.safetensors"
        save_file({"ids": ids.contiguous()}, file)
        row = schemes.find(scheme)
        call = environment.command(row.backend, "qwlib.loading.fresh", str(file), str(model), row.name, device or "")
        try:
            done = subprocess.run(**call, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            raise QwlibError(f"{Path(model).name} was not read in a fresh process within {timeout:.0f} s") from None
        if why := last_word(done.returncode, done.stderr):
            raise QwlibError(f"{Path(model).name} could not be read in a fresh process: {why}")
        return load_file(file)["logits"]


def main() -> None:
    with importing():
        from safetensors.torch import load_file, save_file

    file, model, scheme, device = sys.argv[1:]
    with whole_process():
        try:
            with load(model, scheme, device=device or None) as lm:
                save_file({"logits": lm.logits(load_file(file)["ids"]).cpu().contiguous()}, file)
        except QwlibError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
