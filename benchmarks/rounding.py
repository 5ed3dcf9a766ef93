"""What the 4-bit kernels' different rounding changes in a whole model's scores, played on this machine's processor.

    python benchmarks/rounding.py [--tokens 2048]

Linear layers of the embedded model in nf4-dq are multiplied in four ways, each with sums in float32 and a result in bfloat16:

    bitsandbytes  weights rounded to bfloat16; what the others are compared with
    qwlib         levels rounded to bfloat16 (`linear4bit.rounded_well`), scales in float32
    exact         nothing rounded but the result
    processor     weights rounded to bfloat16, and the product left to the processor's bfloat16 instructions

The last line shows how much two products of the same weights differ. No kernel runs here: only their arithmetic is compared.
"""

import argparse
from types import SimpleNamespace

import bitsandbytes as bnb
import torch
from torch.nn.functional import linear

import qwlib
from qwlib.backends import bnb_ends
from qwlib.kernels import linear4bit
from qwlib.models import catalog, texts

WAYS = ("bitsandbytes", "qwlib", "exact", "processor")


def weight(layer, way: str) -> torch.Tensor:
    """The layer's weights as one of the ways multiplies by them."""
    state = layer.weight.quant_state
    code, rows = state.code, torch.arange(layer.out_features)
    if way == "qwlib":
        gain = linear4bit.rounded_well(code.tolist(), torch.bfloat16)
        code = (code * gain).bfloat16().float() / gain
    state = SimpleNamespace(**vars(state) | {"code": code, "dtype": torch.float32, "nested": state.nested})
    found = bnb_ends.dequantize_rows(layer.weight.data, state, rows)
    return found.bfloat16() if way in ("bitsandbytes", "processor") else found


def scores(way: str, tokens: int):
    """(log-probabilities, token ids), in rows of 512."""
    with qwlib.load(catalog.EMBEDDED, "nf4-dq", device="cpu") as lm:
        text, _ = texts.read()
        ids = lm.encode(text[: 8 * tokens])[:, :tokens].view(-1, 512)
        for layer in lm.model.modules():
            if isinstance(layer, bnb.nn.Linear4bit):
                dense = weight(layer, way) if way == "processor" else weight(layer, way).float()
                layer.forward = lambda x, dense=dense: linear(x.to(dense.dtype), dense).bfloat16()
        with torch.inference_mode():
            return torch.cat([lm.model(row[None]).logits.float().log_softmax(-1) for row in ids]), ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048, help="a multiple of 512")
    tokens = parser.parse_args().tokens
    first, ids = scores(WAYS[0], tokens)
    print(f"{tokens} tokens; KL divergence from the first line in nats per token")
    for way in WAYS:
        logs = first if way == WAYS[0] else scores(way, tokens)[0]
        kld = (first.exp() * (first - logs)).sum(-1).mean()
        loss = -logs[:, :-1].gather(-1, ids[:, 1:, None]).mean()
        same = (first.argmax(-1) == logs.argmax(-1)).float().mean()
        print(f"{way:13} perplexity {loss.exp():.4f}, KL divergence {kld:.6f}, top-1 agreement {same:.2%}", flush=True)


if __name__ == "__main__":
    main()
