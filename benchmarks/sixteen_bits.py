"""How much do computations with the same 16-bit weights differ? transformers in bf16 and float32, and llama.cpp's bf16 file.

On four rows of 512 tokens: top-1 agreement, the share of positions where both rank the same next token first, and how much the
perplexities differ. Needs the environment of `make backends`.
"""

import torch

import qwlib
from qwlib.loading import fresh, quantizing
from qwlib.models import embedded

MODEL = "smollm2-135m"


def perplexity(scores, ids) -> float:
    return torch.nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).exp().item()


def main() -> None:
    with qwlib.load(MODEL, "bf16", device="cpu") as lm:
        ids = lm.encode(embedded.text()[:12_000])[:, :2048].reshape(4, 512)
        padded = torch.nn.functional.pad(ids, (8, 0), value=-1)
        rounded, again = lm.logits(ids).float(), lm.logits(padded)[:, 8:].float()
    with qwlib.load(MODEL, "fp32", device="cpu") as lm:
        exact = lm.logits(ids)
    theirs = fresh.logits(quantizing.quantize(MODEL, "gguf-bf16"), "gguf-bf16", ids)
    for name, one, other in (
        ("transformers in bf16, with and without 8 tokens of padding", rounded, again),
        ("transformers in bf16 against float32", rounded, exact),
        ("llama.cpp's bf16 file against transformers in bf16", theirs, rounded),
        ("llama.cpp's bf16 file against transformers in float32", theirs, exact),
    ):
        same = (one.argmax(-1) == other.argmax(-1)).float().mean().item()
        print(f"{name:60} {same:6.1%} {abs(perplexity(one, ids) / perplexity(other, ids) - 1):7.2%}")


if __name__ == "__main__":
    main()
