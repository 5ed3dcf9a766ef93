"""The table of schemes: what the linear layers, the embedding and the head are stored as, and who executes it.

A scheme is a row of data. `plan` lays a row over a model, module by module; loading and the memory estimate both read
that plan, so they can't disagree.

Where bits per weight come from: a 4-bit code costs 4 bits, and every block of 64 weights carries one float32 scale
(32 / 64 = 0.5 bits). Double quantization stores that scale in 8 bits and adds one float32 scale for each 256 scales
(8 / 64 + 32 / (64 × 256) = 0.127 bits). Source: QLoRA, arXiv 2305.14314, section 3. int8 keeps one float32 scale a row,
which is under 0.1 bit for rows of 320 or more, and is left out of the figure.

What "4-bit model" leaves out: by default the embedding and the head stay 16-bit. Rows `nf4-all` and `nf4-mixed` store
them too.
"""

import difflib
from dataclasses import dataclass

from .errors import QwlibError

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
}


@dataclass(frozen=True)
class Scheme:
    """How a model's weights are stored. `linear`, `embedding` and `head` are keys of `BITS`."""

    name: str
    backend: str
    linear: str
    embedding: str
    head: str
    what: str

    @property
    def bits_per_weight(self) -> float:
        """Bits that one weight of a linear layer takes, its share of the scales included."""
        return BITS[self.linear]

    @property
    def unsavable(self) -> str | None:
        """Why a model under this scheme can't be written to files, None if it can."""
        if self.embedding == self.base:
            return None
        return f"a quantized embedding can't be saved: save {self.linear} instead of {self.name}"

    @property
    def base(self) -> str:
        """The floating-point format of everything that is not quantized: the embedding's, or `bf16`."""
        return self.embedding if self.embedding in ("fp32", "bf16", "fp16") else "bf16"


_HF, _BNB = "transformers", "bitsandbytes"
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
    )
}
REFERENCE = "bf16"


def find(name: str) -> Scheme:
    """The scheme of that name.

    Raises QwlibError with the nearest names.
    """
    if isinstance(name, Scheme):
        return name
    if name in SCHEMES:
        return SCHEMES[name]
    near = difflib.get_close_matches(str(name), SCHEMES, n=3) or list(SCHEMES)
    raise QwlibError(f"unknown scheme {name!r}: did you mean {', '.join(near)}? `python -m qwlib schemes` lists all")


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
