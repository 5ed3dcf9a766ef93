"""Matrix multiplications in 16 bits and in float32: a layer with several numbers of rows, whole models, a step of training.

    python benchmarks/arithmetic.py [--scheme bf16 --scheme nf4-dq --scheme int8] [--rounds 3]

First on this processor, then (if it has more) as if it had AVX2 alone. `default` multiplies in the type of the weights, and uses
the 16-bit compute type for 4-bit layers. `qwlib` is what `qwlib.load` chooses. The two take turns, and the best round of each
counts. The environment variables do not change bitsandbytes' own loops: they use all instructions that the processor has, so a
4-bit layer is dequantized faster than on a processor with AVX2 alone.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import time
from functools import partial
from unittest import mock

import torch
from torch.nn import functional

import qwlib
from qwlib.machine import arithmetic, clock, processes, processor
from qwlib.measuring import quality, timing
from qwlib.models import embedded
from qwlib.training import adapting
from qwlib.training.settings import Settings

AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"}
LAYERS = {"576 → 1,536": (1536, 576), "head, 576 → 49,152": (49_152, 576), "4,096 → 4,096": (4096, 4096)}
ROWS = (1, 2, 4, 8, 16, 64, 512)


def layers(rounds: int) -> None:
    print(f"{'layer':20} {'rows':>5} {'bfloat16':>10} {'float32':>10}   ms, best of {3 * rounds}")
    for name, shape in LAYERS.items():
        weight = torch.randn(shape).bfloat16()
        for rows in ROWS:
            x = torch.randn(rows, shape[1]).bfloat16()
            ways = {"own": partial(functional.linear, x, weight), "single": partial(arithmetic.linear, x, weight)}
            took = clock.best(ways, 3 * rounds, "cpu")
            print(f"{name:20} {rows:5} {1e3 * took['own']:10.3f} {1e3 * took['single']:10.3f}", flush=True)


def models(names: list[str], rounds: int) -> None:
    print(f"\n{'scheme':8} {'':12} {'PPL':>8} {'PPL, s':>8} {'TTFT, ms':>9} {'tokens/s':>9} {'batch of 8':>10}")
    for scheme in names:
        as_it_comes = mock.patch.object(arithmetic, "choose", lambda dtype, device: (dtype, "asked for"))
        with contextlib.ExitStack() as stack:
            with as_it_comes:
                plain = stack.enter_context(qwlib.load("smollm2-135m", scheme, device="cpu"))
            for module in plain.model.modules():
                if hasattr(module, "support_avx512bf16_for_cpu") and processor.capability() == "AVX2":
                    module.support_avx512bf16_for_cpu = False  # bitsandbytes asks the processor, which may have more
            chosen = stack.enter_context(qwlib.load("smollm2-135m", scheme, device="cpu"))
            found = {"default": [], "qwlib": []}
            for _ in range(rounds):
                for name, lm in zip(found, (plain, chosen), strict=True):
                    found[name].append(figures(lm))
            del plain, chosen, lm
        for name, rows in found.items():
            ppl, seconds, ttft = rows[0][0], min(r[1] for r in rows), min(r[2] for r in rows)
            one, eight = (max(r[n] for r in rows) for n in (3, 4))
            print(
                f"{scheme:8} {name:12} {ppl:8.3f} {seconds:8.2f} {1e3 * ttft:9.0f} {one:9.1f} {eight:10.1f}", flush=True
            )


def figures(lm) -> tuple:
    """(perplexity of 2 × 512 tokens, its seconds, TTFT of a prompt of 64, tokens/s of one request and of a batch of 8)."""
    began = time.perf_counter()
    ppl = quality.perplexity(lm, embedded.text(), protocol="gptq-512", blocks=2)["ppl"]
    took = time.perf_counter() - began
    one = timing.measure_speed(lm, prompt_tokens=64, new_tokens=16, runs=2, warmup=0)
    eight = timing.measure_speed(lm, batch=8, prompt_tokens=16, new_tokens=16, runs=2, warmup=0)
    return ppl, took, one["ttft_s"]["p50"], one["decode_tok_s"], eight["decode_tok_s"]


def training(rows: int = 4, tokens: int = 64) -> None:
    """The forward and the backward pass of a LoRA step in bfloat16, without the optimizer's."""
    print(f"\n{'LoRA, bf16':12} {'forward, s':>10} {'backward, s':>11}   {rows} × {tokens} tokens, better of two")
    own = mock.patch.object(arithmetic, "choose", lambda dtype, device: (dtype, "asked for"))
    for name, way in (("default", own), ("qwlib", contextlib.nullcontext())):
        with way, qwlib.load("smollm2-135m", "bf16", device="cpu", engine="eager") as lm:
            model, ids = adapting.adapted(lm, Settings()).train(), torch.arange(rows * tokens).view(rows, tokens)
            times = []
            for _ in range(2):
                began = time.perf_counter()
                loss = model(input_ids=ids, labels=ids).loss
                read = time.perf_counter()
                loss.backward()
                times.append((read - began, time.perf_counter() - read))
            del model, loss
        print(f"{name:12} {min(t[0] for t in times):10.2f} {min(t[1] for t in times):11.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scheme", action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--here", action="store_true", help="on this processor only")
    parser.add_argument("--models", action="store_true", help="without the table of layers")
    parser.add_argument("--training", action="store_true", help="a step of training alone")
    asked = parser.parse_args()
    print(f"{processor.name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    dtype, why = arithmetic.choose(torch.bfloat16, torch.device("cpu"))
    print(f"matrix multiplications with several rows in {str(dtype).removeprefix('torch.')} ({why})\n")
    if not (asked.models or asked.training):
        layers(asked.rounds)
    if not asked.training:
        models(asked.scheme or ["bf16", "nf4-dq", "int8"], asked.rounds)
    training()
    if not asked.here and processor.capability() != "AVX2":
        print(flush=True)
        subprocess.run(
            [sys.executable, *sys.argv, "--here"], env=processes.environment() | AVX2, check=True, cwd=os.getcwd()
        )


if __name__ == "__main__":
    main()
