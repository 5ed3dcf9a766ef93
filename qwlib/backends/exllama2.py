"""ExLlamaV2: GPTQ's way with the bits of each layer chosen by measured error, on a GPU. Archived; ExLlamaV3 is its heir.

The wheel compiles its CUDA code at the first import, a minute or more, apart from every figure. Two faults of version 0.3.2
are worked around: it knows `rope_theta` only at the top of a configuration, where transformers 5 no longer writes it, and takes
10000 silently; and without flash-attn its attention is not causal unless `EXLLAMA_NO_SDPA` is set.
"""

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import QwlibError
from ..running.stepwise import Stepwise
from . import hf

BITS = 4.0
HEAD_BITS = 6
os.environ.setdefault("EXLLAMA_NO_SDPA", "1")  # read when exllamav2 is imported, here and in its converter
ROOM = 2048  # tokens in the cache, and the longest row that is read


def fill(lm, source: str) -> None:
    """Open the folder; scores come in float16."""
    import torch
    from exllamav2 import ExLlamaV2, ExLlamaV2Cache, ExLlamaV2Config

    lm.dtype, lm.dtype_reason = torch.float16, "ExLlama computes in it"
    with view(source) as folder:
        config = ExLlamaV2Config(str(folder))
        config.max_seq_len = ROOM
        model = ExLlamaV2(config)
        model.load()
    lm.model = Exl2Reader(model, ExLlamaV2Cache(model, max_seq_len=ROOM), source)
    lm.tokenizer = hf.tokenizer(lm, source)
    lm.engine = Stepwise(lm.model, "exllamav2, greedy", hf.stops(lm, source))


def quantize(source: str, scheme, out: Path, calibration, device) -> dict:
    """Measure every layer at several widths, then write the one that meets `BITS` on average into `out`."""
    import pandas
    from transformers import AutoTokenizer

    samples, length = len(calibration.rows), len(calibration.rows[0])
    with tempfile.TemporaryDirectory() as work, view(source) as folder:
        text = AutoTokenizer.from_pretrained(source).batch_decode(calibration.rows)
        pandas.DataFrame({"text": text}).to_parquet(f"{work}/text.parquet")
        (Path(work) / "job").mkdir()
        options = ["-i", str(folder), "-o", f"{work}/job", "-nr", "-cf", f"{work}/made", "-b", str(BITS)]
        options += ["-hb", str(HEAD_BITS), "-c", f"{work}/text.parquet", "-r", str(samples - 1), "-l", str(length)]
        options += ["-mr", "16", "-ml", str(length)]
        hf.call("exllamav2.conversion.convert_exl2", options)
        copy_weights(Path(work) / "made", out)
    hf.copy_texts(source, out)
    return {"bits": BITS, "head_bits": HEAD_BITS}


def copy_weights(made: Path, out: Path) -> None:
    """A converter's weights, and the configuration that it wrote under a name of its own: ours stays the model's."""
    for path in sorted(made.glob("*.safetensors*")):
        shutil.move(path, out / path.name)
    shutil.move(made / "config.json", out / "exllama.json")
    if not list(out.glob("*.safetensors")):
        raise QwlibError("ExLlama's converter wrote no weights")


@contextlib.contextmanager
def view(source: str) -> Iterator[Path]:
    """A folder of links in which ExLlama finds the configuration that it wants: its own, or the model's with `rope_theta`."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for path in Path(source).iterdir():
            if path.name not in ("config.json", "exllama.json"):
                (folder / path.name).symlink_to(path.resolve())
        own = Path(source) / "exllama.json"
        config = json.loads((own if own.is_file() else Path(source) / "config.json").read_text())
        if "rope_theta" not in config and "rope_theta" in config.get("rope_parameters", {}):
            config["rope_theta"] = config["rope_parameters"]["rope_theta"]
        (folder / "config.json").write_text(json.dumps(config))
        yield folder


def stored_bytes(folder: str) -> int:
    """Bytes of all tensors in a folder's safetensors files."""
    from safetensors import safe_open

    total = 0
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for key in file.keys():  # noqa: SIM118  it is no dictionary
                total += file.get_tensor(key).nbytes
    return total


class Exl2Reader:
    """A `Reader` over ExLlamaV2's model and cache."""

    def __init__(self, model, cache, source: str):
        self.model, self.cache = model, cache
        self.vocabulary, self.longest = model.config.vocab_size, ROOM
        self.weights_bytes = self.read_bytes = stored_bytes(source)

    def begin(self, tokens: int) -> None:
        """The cache has its room already."""
        self.cache.current_seq_len = 0

    def read(self, ids: list[int], last: int):
        """Scores in float32, on the GPU."""
        import torch

        with torch.inference_mode():
            scores = self.model.forward(torch.tensor([ids]), self.cache)
        return scores[0, -last:, : self.vocabulary].float()

    def close(self) -> None:
        self.model.unload()
        self.model = self.cache = None
