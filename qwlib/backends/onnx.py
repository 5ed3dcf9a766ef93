"""ONNX Runtime: 4-bit integers rounded to nearest, in a graph that onnxruntime-genai's builder writes and runs.

Embedding and head are quantized too. The generator keeps its own key-value cache; what it computes for every position it was
given can be read after each call, so one generator gives both token streams and scores.
"""

import tempfile
from pathlib import Path

from ..running.stepwise import Stepwise
from . import hf


def fill(lm, source: str) -> None:
    """Open the graph in `source`."""
    import torch

    lm.dtype, lm.dtype_reason = torch.float32, "the graph that is built for a CPU computes in it"
    lm.tokenizer = hf.tokenizer(lm, source)
    lm.model = GraphReader(source, torch.get_num_threads())
    lm.engine = Stepwise(lm.model, "onnxruntime-genai, greedy", hf.stops(lm, source))


def quantize(source: str, scheme, out: Path, calibration, device) -> dict:
    """Write graph, weights, configuration and tokenizer into `out`.

    Raises QwlibError where the builder does not know the architecture.
    """
    with tempfile.TemporaryDirectory() as cache:
        options = ["-i", source, "-o", str(out), "-p", "int4", "-e", "cpu", "-c", cache]
        options += ["--extra_options", f"int4_block_size={scheme.group}"]
        hf.call("onnxruntime_genai.models.builder", options)
    hf.copy_texts(source, out)
    return {}


class GraphReader:
    """A `Reader` over onnxruntime-genai's generator."""

    def __init__(self, folder: str, threads: int):
        import json

        import onnxruntime_genai

        self.lib = onnxruntime_genai
        config = onnxruntime_genai.Config(folder)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.model = onnxruntime_genai.Model(config)
        told = json.loads((Path(folder) / "genai_config.json").read_text())["model"]
        self.vocabulary, self.longest = told["vocab_size"], told["context_length"]
        self.weights_bytes = self.read_bytes = _graph_bytes(Path(folder) / told["decoder"]["filename"])
        self.generator, self.room = None, 0

    def begin(self, tokens: int) -> None:
        """The generator is made again where its cache is too short: room for the next power of two, from 512."""
        if tokens > self.room:
            self.generator = None
            self.room = max(512, 1 << (tokens - 1).bit_length())
            wanted = self.lib.GeneratorParams(self.model)
            wanted.set_search_options(max_length=min(self.room + 1, self.longest), do_sample=False)
            self.generator = self.lib.Generator(self.model, wanted)
        elif self.generator.token_count():
            self.generator.rewind_to(0)

    def read(self, ids: list[int], last: int):
        """Scores in float32, on the host."""
        import numpy
        import torch

        self.generator.append_tokens(numpy.array([ids], dtype=numpy.int32))
        return torch.from_numpy(self.generator.get_output("logits")[0, -last:].astype(numpy.float32))

    def close(self) -> None:
        self.generator = self.model = None


def _graph_bytes(file: Path) -> int:
    import onnx_ir

    tensors = onnx_ir.load(file).graph.initializers.values()
    return sum(value.const_value.nbytes for value in tensors if value.const_value is not None)
