"""`bnb_4bit_compute_dtype`: float32, which is the default, beside bfloat16, on a bfloat16 model in nf4 with double quantization.

    python benchmarks/compute_dtype.py [--model smollm2-135m] [--weights trained] [--rounds 3]

For a few shapes: the forward pass over the prompt, and a whole answer of 32 tokens. The best round of each counts. What is
stored is equal; the type is changed in the layers of one loaded model.
"""

import argparse
from functools import partial

import torch
from bitsandbytes.nn import Linear4bit
from transformers import GenerationConfig

import qwlib
from qwlib.machine import about, clock

SHAPES = ((1, 64), (1, 512), (16, 64))  # batch, prompt tokens
NEW_TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--weights", default="trained")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    settings = GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, pad_token_id=0)
    with qwlib.load(asked.model, "nf4-dq", weights=asked.weights) as lm, torch.inference_mode():
        layers = [module for module in lm.model.modules() if isinstance(module, Linear4bit)]
        print(f"{asked.model} ({asked.weights} weights) nf4-dq on {about.device_name(lm.device)}")
        for batch, length in SHAPES:
            ids = torch.randint(5, 1000, (batch, length), device=lm.device)
            mask = torch.ones_like(ids)
            for dtype in (torch.float32, torch.bfloat16):
                for layer in layers:
                    layer.compute_dtype = dtype
                options = {"attention_mask": mask, "generation_config": settings}
                ways = {
                    "prefill": partial(lm.model, ids, logits_to_keep=1),
                    "answer": partial(lm.model.generate, ids, **options),
                }
                seconds = clock.best(ways, asked.rounds, lm.device)
                name, prefill = str(dtype).removeprefix("torch."), 1e3 * seconds["prefill"]
                rate = batch * NEW_TOKENS / seconds["answer"]
                print(f"batch {batch:2}, prompt {length:3}, {name:8}  prefill {prefill:7.1f} ms  {rate:7.1f} tokens/s")


if __name__ == "__main__":
    main()
