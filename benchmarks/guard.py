"""A guard's verdicts per second: generated answers, and one forward pass for P(unsafe), with batches and with a cached prefix.

    python benchmarks/guard.py [--model smollm2-135m] [--scheme bf16] [--weights random] [--prompts 8] [--batch 8]

NeMo Guard's prompt on the project's own messages. The embedded model is not a guard: it always generates the maximum length.
"""

import argparse
import time

import qwlib
from qwlib.guard import labelled
from qwlib.guard.judging import Judge


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--scheme", default="bf16")
    parser.add_argument("--weights", default="trained")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--batch", type=int, default=8)
    asked = parser.parse_args()
    prompts = labelled.load().first(asked.prompts).prompts
    with qwlib.load(asked.model, asked.scheme, weights=asked.weights) as lm:
        judge = Judge(lm)
        lengths = [len(judge.ids(prompt)) for prompt in prompts]
        kept = len(judge.constant)
        ways = {
            "generated answer, one at a time": lambda: judge.generate_verdicts(prompts),
            f"generated answer, batch of {asked.batch}": lambda: judge.generate_verdicts(prompts, batch=asked.batch),
            "P(unsafe), one at a time": lambda: judge.score(prompts, batch=1, reuse=False),
            f"P(unsafe), batch of {asked.batch}": lambda: judge.score(prompts, batch=asked.batch, reuse=False),
            "P(unsafe), one at a time, cached prefix": lambda: judge.score(prompts, batch=1),
            f"P(unsafe), batch of {asked.batch}, cached prefix": lambda: judge.score(prompts, batch=asked.batch),
        }
        print(f"{asked.model} {asked.scheme} ({asked.weights}) on {lm.device}; {len(prompts)} prompts of", end=" ")
        print(f"{min(lengths)} to {max(lengths)} tokens, the first {kept} of them constant; 128 new tokens at most")
        judge.score(prompts[:1])  # the first call of a model pays for what later ones find ready
        first = None
        for name, way in ways.items():
            took = []
            for _ in range(1 if name.startswith("generated") else 3):
                began = time.perf_counter()
                way()
                took.append(time.perf_counter() - began)
            rate = len(prompts) / min(took)
            first = first or rate
            print(f"{name:39} {rate:8.2f} prompts/s   {rate / first:6.1f} ×")


if __name__ == "__main__":
    main()
