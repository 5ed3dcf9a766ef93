"""`fourbit` beside bitsandbytes on one weight: times and temporary memory, and on a GPU what the GPU's kernels store differently.

    python benchmarks/fourbit.py [--rows 4096] [--columns 4096] [--rounds 5]

The weight is normal noise in bfloat16, nf4 with double quantization. The two take turns, and the best round of each counts.
"""

import argparse

import bitsandbytes.functional as bnb
import torch

from qwlib.lessons import fourbit, integers
from qwlib.machine import about, clock, devices, memory


def peak(way, device) -> float:
    """GB above what was in use before, at the highest point."""
    memory.give_back()
    before, metered = memory.used_bytes(device), memory.reset_peak(device)
    kept = way()
    found = (memory.peak_bytes(device) - before) / 1e9 if metered else float("nan")
    del kept
    return found


def differences(weight) -> None:
    """What bitsandbytes stores differently on the GPU and on the CPU, and `fourbit` on the GPU differently from that: packed
    bytes, scales, 8-bit scales; how many values come back different; and how many codes right at the midpoints of levels."""
    for quant_type in ("nf4", "fp4"):
        packed, state = bnb.quantize_4bit(weight.cpu(), quant_type=quant_type, compress_statistics=True)
        on_cpu = (packed.flatten(), bnb.quantize_4bit(weight.cpu(), quant_type=quant_type)[1].absmax, state.absmax)
        packed, state = bnb.quantize_4bit(weight, quant_type=quant_type, compress_statistics=True)
        on_gpu = (packed.flatten(), bnb.quantize_4bit(weight, quant_type=quant_type)[1].absmax, state.absmax)
        single, double = (fourbit.quantize_4bit(weight, quant_type, double_quant=d) for d in (False, True))
        ours = (double.packed, single.absmax, double.absmax)
        for who, parts in (("bitsandbytes, GPU", on_gpu), ("fourbit, GPU", ours)):
            counts = [int((a != b.cpu()).sum()) for a, b in zip(on_cpu, parts, strict=True)]
            told = ", ".join(f"{c} of {len(part)}" for c, part in zip(counts, on_cpu, strict=True))
            print(f"{quant_type} {who:18} against bitsandbytes, CPU: bytes, scales, 8-bit scales that differ: {told}")
        theirs = bnb.dequantize_4bit(*bnb.quantize_4bit(weight, quant_type=quant_type))
        other = int((theirs != fourbit.dequantize_4bit(single)).sum())
        levels = fourbit.code_book(quant_type).sort().values
        middles = (levels[1:] + levels[:-1]) / 2
        near = torch.cat([middles.nextafter(levels[:-1]), middles, middles.nextafter(levels[1:]), torch.ones(19)])
        codes = [
            bnb.quantize_4bit(near.to(where), quant_type=quant_type)[0].flatten().cpu() for where in ("cpu", "cuda")
        ]
        apart = int((integers.unpack(codes[0], 64) != integers.unpack(codes[1], 64)).sum())
        print(f"{quant_type} bitsandbytes, GPU  values that come back different: {other} of {weight.numel()};", end=" ")
        print(f"codes at the midpoints and the floats beside them: {apart} of 45")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    device, _ = devices.pick_device()
    weight = torch.randn(asked.rows, asked.columns, generator=torch.Generator().manual_seed(0))
    weight = weight.to(torch.bfloat16).to(device)
    stored = fourbit.quantize_4bit(weight, double_quant=True)
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    steps = {
        "quantize": {
            "fourbit": lambda: fourbit.quantize_4bit(weight, double_quant=True),
            "bitsandbytes": lambda: bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True),
        },
        "dequantize": {
            "fourbit": lambda: fourbit.dequantize_4bit(stored),
            "bitsandbytes": lambda: bnb.dequantize_4bit(packed, state),
        },
    }
    print(f"{asked.rows} × {asked.columns}, bfloat16, nf4-dq, on {about.device_name(device)}")
    for step, ways in steps.items():
        seconds = clock.best(ways, asked.rounds, device)
        for name, way in ways.items():
            print(f"{step:10} {name:12} {1e3 * seconds[name]:9.2f} ms  peak {peak(way, device):6.3f} GB")
        print(f"{step:10} ratio        {seconds['fourbit'] / seconds['bitsandbytes']:9.2f} ×")
    if device.type == "cuda":
        differences(weight)


if __name__ == "__main__":
    main()
