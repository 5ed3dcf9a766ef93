"""ExLlamaV3: weights as paths through a trellis, after a rotation that makes them look normally distributed, on a GPU.

The wheel compiles its CUDA code at the first import, some minutes, apart from every figure. Version 1.6.5 works on tiles of 128
by 128 and pads what is smaller, but not the output of a gated MLP: a llama-like model whose hidden size is no multiple of 128 is
refused by its own code. `widen` adds zero columns, rows and heads instead, which computes the same function and costs the file
what the zeros take; such a model flatters nobody, and larger ones need none of it.
"""

import json
import math
import tempfile
from pathlib import Path

from ..errors import QwlibError
from ..running.stepwise import Stepwise
from . import hf
from .exllama2 import HEAD_BITS, ROOM, copy_weights, stored_bytes, view

TILE = 128
BITS = {"exl3-4bit": 4.0, "exl3-2bit": 2.0}


def fill(lm, source: str) -> None:
    """Open the folder; scores come in float16."""
    import torch
    from exllamav3 import Cache, Config, Model

    lm.dtype, lm.dtype_reason = torch.float16, "ExLlama computes in it"
    with view(source) as folder:
        model = Model.from_config(Config.from_directory(str(folder)))
        cache = Cache(model, max_num_tokens=ROOM)
        model.load(device=str(lm.device))
    lm.tokenizer = hf.tokenizer(lm, source)
    lm.model = Exl3Reader(model, cache, source, lm.row.config().vocab_size)
    lm.engine = Stepwise(lm.model, "exllamav3, greedy", hf.stops(lm, source))


def quantize(source: str, scheme, out: Path, calibration, device) -> dict:
    """Write the converted model into `out`, widened first where it has to be."""
    import torch
    from safetensors.torch import save_file

    bits = BITS[scheme.name]
    rows = torch.tensor(calibration.rows)
    with tempfile.TemporaryDirectory() as work, view(source) as folder:
        wide = widen(folder, Path(work) / "wide")
        save_file({"input_ids": rows.int()}, f"{work}/rows.safetensors")
        (Path(work) / "job").mkdir()
        options = ["-i", str(wide), "-w", f"{work}/job", "-o", f"{work}/made", "-b", str(bits), "-hb", str(HEAD_BITS)]
        options += ["-cd", f"{work}/rows.safetensors", "-cr", str(len(rows)), "-cc", str(rows.shape[1])]
        hf.call("exllamav3.conversion.convert_model", options)
        copy_weights(Path(work) / "made", out)
        widened = wide != folder
    hf.copy_texts(source, out)
    return {"bits": bits, "head_bits": HEAD_BITS, "widened": widened}


def widen(folder: Path, out: Path) -> Path:
    """The folder itself, or `out` with the same function in sizes that are multiples of `TILE`.

    The root mean square of a norm runs over more values, of which the new ones are 0: its weights shrink by the root of the
    ratio of sizes, its epsilon by the ratio.

    Raises QwlibError for an architecture that is not llama's.
    """
    import torch
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    old = config["hidden_size"]
    if old % TILE == 0:
        return folder
    if config["model_type"] != "llama":
        raise QwlibError(
            f"ExLlamaV3 takes hidden sizes that are multiples of {TILE}, and {config['model_type']}'s is {old}"
        )
    size = config.get("head_dim") or old // config["num_attention_heads"]
    per = config["num_attention_heads"] // config["num_key_value_heads"]
    kv = math.ceil(config["num_key_value_heads"] * size / TILE) * TILE // size
    while kv * per * size % TILE:
        kv += 1
    new, heads = math.ceil(old / TILE) * TILE, kv * per
    rows = {"q_proj": heads * size, "k_proj": kv * size, "v_proj": kv * size, "o_proj": new, "down_proj": new}
    out.mkdir()
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            part = name.split(".")[-2]
            if tensor.dim() == 1:
                tensors[name] = _grown(tensor.float() * math.sqrt(old / new), (new,)).to(torch.float16)
                continue
            columns = {"o_proj": heads * size, "down_proj": tensor.shape[1]}.get(part, new)
            tensors[name] = _grown(tensor, (rows.get(part, tensor.shape[0]), columns))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for path in folder.iterdir():
        if path.suffix in (".json", ".jinja", ".model", ".txt") and ".safetensors" not in path.name:
            (out / path.name).write_bytes(path.read_bytes())
    changed = {"hidden_size": new, "num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": size}
    changed["rms_norm_eps"] = config["rms_norm_eps"] * old / new
    (out / "config.json").write_text(json.dumps(config | changed))
    return out


def _grown(tensor, shape):
    import torch

    grown = torch.zeros(shape, dtype=tensor.dtype)
    grown[tuple(slice(size) for size in tensor.shape)] = tensor
    return grown


class Exl3Reader:
    """A `Reader` over ExLlamaV3's model and cache."""

    def __init__(self, model, cache, source: str, vocabulary: int):
        self.model, self.cache, self.at = model, cache, 0
        self.vocabulary, self.longest = vocabulary, ROOM
        self.weights_bytes = self.read_bytes = stored_bytes(source)

    def begin(self, tokens: int) -> None:
        """The cache has its room already."""
        self.at = 0

    def read(self, ids: list[int], last: int):
        """Scores in float32, on the GPU."""
        import torch

        told = {"attn_mode": "flash_attn", "cache": self.cache, "past_len": self.at, "batch_shape": (1, ROOM)}
        scores = self.model.forward(torch.tensor([ids]), told)
        self.at += len(ids)
        return scores[0, -last:, : self.vocabulary].float()

    def close(self) -> None:
        self.model.unload()
        self.model = self.cache = None
