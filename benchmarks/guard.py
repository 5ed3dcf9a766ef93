"""A guard's verdicts a second: its own words beside one forward pass for P(unsafe), and what each step of the latter brings.

    python benchmarks/guard.py [--model smollm2-135m] [--scheme bf16] [--weights random] [--prompts 8] [--batch 8]

NeMo Guard's prompt on the project's own messages. An embedded model is no guard: it writes until it may write no more.
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
            "its own words, one by one": lambda: judge.generate_verdicts(prompts),
            f"its own words, {asked.batch} at once": lambda: judge.generate_verdicts(prompts, batch=asked.batch),
            "P(unsafe), one by one": lambda: judge.score(prompts, batch=1, reuse=False),
            f"P(unsafe), {asked.batch} at once": lambda: judge.score(prompts, batch=asked.batch, reuse=False),
            "P(unsafe), one by one, prefix kept": lambda: judge.score(prompts, batch=1),
            f"P(unsafe), {asked.batch} at once, prefix kept": lambda: judge.score(prompts, batch=asked.batch),
        }
        print(f"{asked.model} {asked.scheme} ({asked.weights}) on {lm.device}; {len(prompts)} prompts of", end=" ")
        print(f"{min(lengths)} to {max(lengths)} tokens, the first {kept} of them constant; 128 new tokens at most")
        judge.score(prompts[:1])  # the first call of a model pays for what later ones find ready
        first = None
        for name, way in ways.items():
            took = []
            for _ in range(1 if name.startswith("its") else 3):
                began = time.perf_counter()
                way()
                took.append(time.perf_counter() - began)
            rate = len(prompts) / min(took)
            first = first or rate
            print(f"{name:38} {rate:8.2f} prompts/s   {rate / first:6.1f} ×")


if __name__ == "__main__":
    main()
