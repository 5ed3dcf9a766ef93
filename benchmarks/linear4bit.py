"""The products of one token of Llama-3.1-8B on a GPU: 16 bits, bitsandbytes' 4-bit kernel, and qwlib's, in one CUDA graph each.

    python benchmarks/linear4bit.py

32 layers, so that no cache helps. Without a GPU it says so and ends.
"""

import torch

from qwlib.kernels import linear4bit
from qwlib.machine import clock

LAYERS = 32
SHAPES = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
JOINED = [(0, 1, 2), (3,), (4, 5), (6,)]
ROWS = (1, 4, 8, 16)


def milliseconds(step, repeats: int = 20) -> list[float]:
    """How long replaying a graph of `step` takes, `repeats` times, sorted."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
        with torch.cuda.graph(graph, stream=stream):
            step()
        times = []
        for _ in range(repeats + 3):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
    return sorted(times[3:])


def main() -> None:
    if not torch.cuda.is_available():
        return print("skipped: PyTorch sees no CUDA device")
    import bitsandbytes as bnb

    bandwidth = clock.copy_bandwidth(torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy bandwidth {bandwidth / 1e12:.2f} TB/s")
    dense = [[torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in SHAPES] for _ in range(LAYERS)]
    stored = [
        [bnb.nn.Params4bit(w, False, quant_type="nf4", compress_statistics=True).to("cuda") for w in layer]
        for layer in dense
    ]
    size = sum(
        w.nbytes + w.quant_state.absmax.nbytes + w.quant_state.state2.absmax.nbytes for each in stored for w in each
    )
    print(f"4-bit weights {size / 1e9:.2f} GB: {1e3 * size / bandwidth:.2f} ms at that bandwidth")
    gain = linear4bit.gain_of(stored[0][0], torch.bfloat16)
    print("rows   bf16 ms   bitsandbytes ms   qwlib ms   joined ms (slowest)   over bf16   over bitsandbytes")
    for rows in ROWS:
        inputs = {k: torch.randn(rows, k, dtype=torch.bfloat16, device="cuda") for k in (4096, 14336)}
        with torch.inference_mode():
            times = {name: milliseconds(step) for name, step in each_way(dense, stored, inputs, gain).items()}
        middle = {name: found[len(found) // 2] for name, found in times.items()}
        print(
            f"{rows:4} {middle['bf16']:9.2f} {middle['bitsandbytes']:17.2f} {middle['qwlib']:10.2f} {middle['joined']:11.2f} "
            f"({times['joined'][-1]:.2f}) {middle['bf16'] / middle['joined']:15.2f} × "
            f"{middle['bitsandbytes'] / middle['joined']:17.2f} ×",
            flush=True,
        )


def each_way(dense, stored, inputs, gain) -> dict:
    """Calls that multiply by all weights. `joined`: those of `JOINED` in one launch each."""

    def size(weight) -> int:
        return weight.quant_state.shape[1]

    def by_bitsandbytes() -> None:
        for weight in (w for layer in stored for w in layer):
            bnb.matmul_4bit(inputs[size(weight)], weight, quant_state=weight.quant_state)

    def by_qwlib(groups) -> None:
        for layer in stored:
            for group in groups:
                linear4bit.multiply(inputs[size(layer[group[0]])], [layer[place] for place in group], gain)

    import bitsandbytes as bnb

    return {
        "bf16": lambda: [torch.nn.functional.linear(inputs[w.shape[1]], w) for layer in dense for w in layer],
        "bitsandbytes": by_bitsandbytes,
        "qwlib": lambda: by_qwlib([[place] for place in range(len(SHAPES))]),
        "joined": lambda: by_qwlib(JOINED),
    }


if __name__ == "__main__":
    main()
