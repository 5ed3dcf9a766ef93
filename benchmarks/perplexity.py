"""`quality.perplexity` beside the loop of transformers' page on perplexity: same model, same tokens, same windows.

    python benchmarks/perplexity.py [--model smollm2-135m] [--weights trained] [--scheme bf16] [--window 2048] [--windows 6]

The page: https://huggingface.co/docs/transformers/perplexity. Its loop is written anew here from what it describes: one
window at a time, `labels` with the overlap masked, each window's mean weighted by the tokens it scored less one. The two
take turns, and the best round of each counts.
"""

import argparse
import math
import time

import qwlib
from qwlib.machine import about, memory
from qwlib.measuring import quality
from qwlib.models import embedded


def page_loop(lm, ids, length: int) -> tuple[float, int]:
    """(perplexity, tokens) the page's way."""
    import torch

    total, counted, before = 0.0, 0, 0
    for begin in range(0, len(ids), quality.STRIDE):
        end = min(begin + length, len(ids))
        window = torch.tensor([ids[begin:end]], device=lm.device)
        labels = window.clone()
        labels[:, : before - begin] = -100
        with torch.no_grad():
            loss = lm.model(window, labels=labels).loss.item()
        scored = int((labels != -100).sum()) - 1
        total, counted, before = total + loss * scored, counted + scored, end
        if end == len(ids):
            break
    return math.exp(total / counted), counted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--weights", default="trained", help="random: true times, a perplexity without meaning")
    parser.add_argument("--scheme", default="bf16")
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    with qwlib.load(asked.model, asked.scheme, weights=asked.weights) as lm:
        lm.weights = "trained"  # else random ones are refused
        whole = lm.tokenizer(embedded.text(), return_offsets_mapping=True, verbose=False)
        count = asked.window + quality.STRIDE * (asked.windows - 1)
        ids, text = whole.input_ids[:count], embedded.text()[: whole["offset_mapping"][count - 1][1]]
        assert lm.tokenizer(text, verbose=False).input_ids == ids, "the text's end falls into a token: other --windows"
        ways = {
            "page": lambda: page_loop(lm, ids, asked.window),
            "qwlib": lambda: quality.perplexity(lm, text, protocol=f"hf-sliding-{asked.window}"),
        }
        seconds, peaks, found = {name: [] for name in ways}, {}, {}
        for turn in range(asked.rounds + 1):
            for name, way in ways.items():
                memory.give_back()
                before, metered = memory.used_bytes(lm.device), memory.reset_peak(lm.device)
                began = time.perf_counter()
                found[name] = way()
                if turn:  # the first round warms up
                    seconds[name].append(time.perf_counter() - began)
                if metered:
                    peaks[name] = (memory.peak_bytes(lm.device) - before) / 1e9
        where = about.device_name(lm.device)
        page, ours = found["page"][0], found["qwlib"]["ppl"]
        best = {name: min(times) for name, times in seconds.items()}
        print(f"{asked.model} ({asked.weights} weights) {asked.scheme} on {where}")
        print(f"{count} tokens in {asked.windows} windows of {asked.window}, {quality.STRIDE} apart")
        for name, ppl in (("page", page), ("qwlib", ours)):
            print(f"{name:6} {best[name]:7.2f} s  peak {peaks.get(name, float('nan')):6.2f} GB  perplexity {ppl:.5f}")
        print(f"ratio  {best['page'] / best['qwlib']:7.2f}, perplexity differs by {abs(ours / page - 1):.1e}")


if __name__ == "__main__":
    main()
