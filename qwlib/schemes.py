"""The table of schemes: what the linear layers, the embedding and the head are stored as, and who executes it.

A scheme is a row of data. `plan` lays a row over a model, module by module; loading and the memory estimate both read
that plan, so they can't disagree.

Where bits per weight come from: a 4-bit code costs 4 bits, and every block of 64 weights carries one float32 scale
(32 / 64 = 0.5 bits). Double quantization stores that scale in 8 bits and adds one float32 scale for each 256 scales
(8 / 64 + 32 / (64 × 256) = 0.127 bits). Source: QLoRA, arXiv 2305.14314, section 3. int8 keeps one float32 scale a row,
which is under 0.1 bit for rows of 320 or more, and is left out of the figure.

GPTQ's and AWQ's files keep a 16-bit scale and a 4-bit zero point a group (20 / 64 = 0.31 bits), HQQ and ONNX Runtime 32 bits a
group. The formats of llama.cpp are blocks of 32 or 256 weights with everything inside: bytes of a block × 8 / weights in it.
Its mixtures (`_k_m`) store some tensors in larger types, and fall back to others where rows are no multiple of 256, so the
file says what a model takes; so does every other file.

What "4-bit model" leaves out: by default the embedding and the head stay 16-bit. Rows `nf4-all` and `nf4-mixed` store
them too; llama.cpp and ONNX Runtime always do.
"""

from dataclasses import dataclass, replace

from .errors import QwlibError, unknown

BLOCK = 64  # weights a scale; bitsandbytes' default and the only size that its modules take
NESTED_BLOCK = 256  # scales a second-level scale

BITS = {
    "fp32": 32.0,
    "bf16": 16.0,
    "fp16": 16.0,
    "int8": 8.0,
    "fp4": 4 + 32 / BLOCK,
    "fp4-dq": 4 + 8 / BLOCK + 32 / (BLOCK * NESTED_BLOCK),
    "nf4": 4 + 32 / BLOCK,
    "nf4-dq": 4 + 8 / BLOCK + 32 / (BLOCK * NESTED_BLOCK),
    # bytes of a block × 8 / weights in it; source: ggml's block structures, which gguf.GGML_QUANT_SIZES lists
    "q8_0": 34 * 8 / 32,
    "q6_k": 210 * 8 / 256,
    "q5_k": 176 * 8 / 256,
    "q4_k": 144 * 8 / 256,
    "q4_1": 20 * 8 / 32,
    "q4_0": 18 * 8 / 32,
    "q3_k": 110 * 8 / 256,
    "q2_k": 84 * 8 / 256,
    "exl2-4": 4.0,
    "exl3-4": 4.0,
    "exl3-2": 2.0,
}
GROUP_BITS = {
    "gptq": 16 + 4,
    "awq": 16 + 4,
    "hqq": 16 + 16,
    "onnx": 32,
    "tao": 16 + 16,
}  # beside the 4-bit codes, a group


def bits(fmt: str) -> float:
    """Bits a weight of a format: a key of `BITS`, or 4 bits in groups of N, such as `gptq-g64`."""
    if fmt in BITS:
        return BITS[fmt]
    kind, _, group = fmt.partition("-g")
    return 4 + GROUP_BITS[kind] / int(group)


@dataclass(frozen=True)
class Scheme:
    """How a model's weights are stored. `linear`, `embedding` and `head` are formats (see `bits`).

    `backend` executes it and `maker` makes its files: a backend too, None where weights are quantized while they are loaded.
    `calibrated`: it reads a text while it quantizes. `made_on`: the device that its maker needs, None for any.
    """

    name: str
    backend: str
    linear: str
    embedding: str
    head: str
    what: str
    maker: str | None = None
    calibrated: bool = False
    made_on: str | None = None

    @property
    def bits_per_weight(self) -> float:
        """Bits that one weight of a linear layer takes, its share of the scales included."""
        return bits(self.linear)

    @property
    def group(self) -> int | None:
        """Weights of a row that share a scale, None where that can't be chosen."""
        _, _, group = self.linear.partition("-g")
        return int(group) if group else None

    def grouped(self, size: int | None) -> "Scheme":
        """The same with another group size; None changes nothing.

        Raises QwlibError where it can't be chosen.
        """
        if size is None or size == self.group:
            return self
        if self.group is None:
            raise QwlibError(f"{self.name} has no group size to choose: leave it out")
        if type(size) is not int or size < 1:
            raise QwlibError(f"a group is a number of weights, such as 64 or 128, not {size!r}")
        return replace(self, linear=f"{self.linear.partition('-g')[0]}-g{size}")

    @property
    def unsavable(self) -> str | None:
        """Why a model under this scheme can't be written to files, None if it can."""
        if self.backend in (_HQQ, _TAO):
            return f"{self.name} is quantized while it is loaded: {_WHY[self.backend]}"
        if self.maker or self.embedding == self.base:
            return None
        return f"a quantized embedding can't be saved: save {self.linear} instead of {self.name}"

    @property
    def base(self) -> str:
        """The floating-point format of everything that is not quantized: the embedding's, or `bf16`."""
        return self.embedding if self.embedding in ("fp32", "bf16", "fp16") else "bf16"


_HF, _BNB, _HQQ, _TAO = "transformers", "bitsandbytes", "hqq", "torchao"
_GGUF, _GPTQ, _ROUND, _ONNX = "llama.cpp", "gptqmodel", "auto-round", "onnxruntime"
_WHY = {_HQQ: "HQQ writes pickles, which qwlib never opens", _TAO: "its files hold what only the same torchao reads"}
SCHEMES = {
    row.name: row
    for row in (
        Scheme("fp32", _HF, "fp32", "fp32", "fp32", "32-bit floats: twice the 16-bit memory, no gain for inference"),
        Scheme("bf16", _HF, "bf16", "bf16", "bf16", "the 16-bit reference: what most models are published in"),
        Scheme("fp16", _HF, "fp16", "fp16", "fp16", "16-bit with 5 exponent bits, for GPUs without bf16"),
        Scheme("int8", _BNB, "int8", "bf16", "bf16", "LLM.int8(): 8-bit weights and activations, outliers in 16-bit"),
        Scheme("fp4", _BNB, "fp4", "bf16", "bf16", "4-bit floats, one float32 scale for 64 weights"),
        Scheme("fp4-dq", _BNB, "fp4-dq", "bf16", "bf16", "fp4 with its scales in 8-bit (double quantization)"),
        Scheme("nf4", _BNB, "nf4", "bf16", "bf16", "4-bit codes spaced for normally distributed weights"),
        Scheme("nf4-dq", _BNB, "nf4-dq", "bf16", "bf16", "nf4 with its scales in 8-bit: the usual 'QLoRA' setting"),
        Scheme("nf4-mixed", _BNB, "nf4-dq", "int8", "int8", "nf4-dq, and embedding and head in 8-bit"),
        Scheme("nf4-all", _BNB, "nf4-dq", "nf4-dq", "nf4-dq", "nf4-dq, and embedding and head in 4-bit too"),
        Scheme("gguf-bf16", _GGUF, "bf16", "bf16", "bf16", "the 16-bit weights in llama.cpp's file", _GGUF),
        Scheme("gguf-q8_0", _GGUF, "q8_0", "q8_0", "q8_0", "8 bits, blocks of 32", _GGUF),
        Scheme("gguf-q6_k", _GGUF, "q6_k", "q6_k", "q6_k", "6 bits, scales in two levels", _GGUF),
        Scheme("gguf-q5_k_m", _GGUF, "q5_k", "q6_k", "q6_k", "5 bits, some tensors in 6 bits", _GGUF),
        Scheme("gguf-q4_k_m", _GGUF, "q4_k", "q6_k", "q6_k", "4 bits, some tensors in 6: the usual download", _GGUF),
        Scheme("gguf-q4_1", _GGUF, "q4_1", "q6_k", "q6_k", "4 bits, blocks of 32, with a minimum", _GGUF),
        Scheme("gguf-q4_0", _GGUF, "q4_0", "q6_k", "q6_k", "4 bits, blocks of 32, no zero point: the oldest", _GGUF),
        Scheme("gguf-q3_k_m", _GGUF, "q3_k", "q6_k", "q6_k", "3 bits, some tensors in 4 or 5 bits", _GGUF),
        Scheme("gguf-q2_k", _GGUF, "q2_k", "q6_k", "q6_k", "2 bits, some tensors in more bits", _GGUF),
        Scheme("gptq-4bit", _GPTQ, "gptq-g64", "bf16", "bf16", "later columns correct rounding errors", _GPTQ, True),
        Scheme("awq-4bit", _GPTQ, "awq-g64", "bf16", "bf16", "weights scaled by activations", _GPTQ, True, "cuda"),
        Scheme("autoround-4bit", _GPTQ, "gptq-g64", "bf16", "bf16", "learned rounding, GPTQ format", _ROUND, True),
        Scheme("autoround-4bit-awq", _GPTQ, "awq-g64", "bf16", "bf16", "learned rounding, AWQ format", _ROUND, True),
        Scheme("autoround-4bit-gguf", _GGUF, "q4_k", "q6_k", "q6_k", "learned rounding, a Q4_K_M file", _ROUND, True),
        Scheme("onnx-int4", _ONNX, "onnx-g32", "onnx-g32", "onnx-g32", "4-bit integers, rounded to nearest", _ONNX),
        Scheme("hqq-4bit", _HQQ, "hqq-g64", "bf16", "bf16", "zero points fitted without a calibration text"),
        Scheme("torchao-int8", _TAO, "int8", "bf16", "bf16", "8-bit integers, one scale per row; 16-bit activations"),
        Scheme("torchao-int4", _TAO, "tao-g64", "bf16", "bf16", "4-bit integers, on a GPU only", made_on="cuda"),
        Scheme("exl2-4bit", "exllamav2", "exl2-4", "bf16", "bf16", "GPTQ, mixed bit widths", "exllamav2", True, "cuda"),
        Scheme("exl3-4bit", "exllamav3", "exl3-4", "bf16", "bf16", "a trellis code", "exllamav3", True, "cuda"),
        Scheme("exl3-2bit", "exllamav3", "exl3-2", "bf16", "bf16", "exl3-4bit in 2 bits", "exllamav3", True, "cuda"),
    )
}
GGUF_TYPES = {  # enum llama_ftype of llama.h, which general.file_type in a file's metadata repeats
    "gguf-q4_0": 2,
    "gguf-q4_1": 3,
    "gguf-q8_0": 7,
    "gguf-q2_k": 10,
    "gguf-q3_k_m": 12,
    "gguf-q4_k_m": 15,
    "gguf-q5_k_m": 17,
    "gguf-q6_k": 18,
    "gguf-bf16": 32,
}
REFERENCE = "bf16"
BUILT_IN = [row.name for row in SCHEMES.values() if row.backend in (_HF, _BNB)]  # what the base install runs


def find(name: str) -> Scheme:
    """The scheme of that name.

    Raises QwlibError with the nearest names.
    """
    if isinstance(name, Scheme):
        return name
    if name in SCHEMES:
        return SCHEMES[name]
    raise unknown("scheme", name, SCHEMES, " `python -m qwlib schemes` lists all")


def plan(model, scheme: Scheme) -> dict[str, str]:
    """Module name → format, for every linear layer, the input embedding and the output head of `model`.

    `model` is a transformers model on any device, the meta device included. Modules that are not named here (norms,
    positions, biases) stay in `scheme.base`.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    formats = {}
    for name, module in model.named_modules():
        if module is embedding:
            formats[name] = scheme.embedding
        elif module is head:
            formats[name] = scheme.head
        elif isinstance(module, torch.nn.Linear | Conv1D):
            formats[name] = scheme.linear
    return formats
