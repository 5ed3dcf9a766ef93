"""The linear layers of one token of Llama-3.1-8B on a GPU: 16 bits, and 4 bits by every kernel that is installed.

    python benchmarks/linear4bit.py

All layers of 32 blocks are in one CUDA graph for each kernel, so that neither Python nor a cache helps. Without a GPU it says so
and ends. `benchmarks/gpu.py` writes the same times into its file.

    bf16          PyTorch's product in 16 bits
    bitsandbytes  nf4-dq by bitsandbytes' kernels
    apart         nf4-dq by qwlib's kernels, a launch for each layer
    joined        the same, with query, key and value in one launch, and gate and up
    torch int4    torch's own int4 product, which torchao's int4 weights use; groups of 128, bf16
    Marlin        the int4 kernel that optimum-quanto brings; groups of 128, fp16
    ExLlamaV3     4 bits a weight, fp16

The last two are compiled when they are first used, and are left out where they are not installed.
"""

import torch

from qwlib.kernels import linear4bit
from qwlib.machine import clock

MODEL, LAYERS = "llama-3.1-8b", 32
SHAPES = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (14336, 4096), (14336, 4096), (4096, 14336)]
JOINED = [(0, 1, 2), (3,), (4, 5), (6,)]
ROWS = (1, 4, 8, 16, 32, 64)
GROUP = 128  # weights that share a scale, with the kernels of others


def milliseconds(step, repeats: int = 20) -> float:
    """How long replaying a graph of `step` takes: the median of `repeats`."""
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
    return sorted(times[3:])[repeats // 2]


def inputs(rows: int, dtype) -> dict:
    return {columns: torch.randn(rows, columns, dtype=dtype, device="cuda") for columns in (4096, 14336)}


def sixteen_bits():
    dense = [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(LAYERS) for shape in SHAPES]
    return {"bf16": lambda x: [torch.nn.functional.linear(x[w.shape[1]], w) for w in dense]}, torch.bfloat16


def stored() -> list:
    """The weights of all blocks as bitsandbytes stores them."""
    import bitsandbytes as bnb

    def weight(shape):
        dense = torch.randn(shape, dtype=torch.bfloat16, device="cuda")
        return bnb.nn.Params4bit(dense, False, quant_type="nf4", compress_statistics=True).to("cuda")

    return [[weight(shape) for shape in SHAPES] for _ in range(LAYERS)]


def nf4():
    import bitsandbytes as bnb

    blocks = stored()
    gain = linear4bit.gain_of(blocks[0][0], torch.bfloat16)

    def by_bitsandbytes(x) -> None:
        for weight in (w for block in blocks for w in block):
            bnb.matmul_4bit(x[weight.quant_state.shape[1]], weight, quant_state=weight.quant_state)

    def by_qwlib(groups):
        def step(x) -> None:
            for block in blocks:
                for group in groups:
                    columns = block[group[0]].quant_state.shape[1]
                    linear4bit.multiply(x[columns], [block[place] for place in group], gain)

        return step

    apart = [[place] for place in range(len(SHAPES))]
    return {"bitsandbytes": by_bitsandbytes, "apart": by_qwlib(apart), "joined": by_qwlib(JOINED)}, torch.bfloat16


def torch_int4():
    def weight(rows, columns):
        codes = torch.randint(256, (rows, columns // 2), dtype=torch.uint8, device="cuda")
        scales = torch.rand(columns // GROUP, rows, 2, dtype=torch.bfloat16, device="cuda")
        return columns, torch._convert_weight_to_int4pack(codes, 8), scales

    weights = [weight(*shape) for _ in range(LAYERS) for shape in SHAPES]

    def step(x) -> None:
        for columns, codes, scales in weights:
            torch._weight_int4pack_mm(x[columns], codes, GROUP, scales)

    return {"torch int4": step}, torch.bfloat16


def marlin():
    import optimum.quanto  # noqa: F401 -- registers the product

    def weight(rows, columns):
        codes = torch.randint(2**31 - 1, (columns // 16, rows * 2), dtype=torch.int32, device="cuda")
        scales, shifts = torch.rand(2, columns // GROUP, rows, dtype=torch.float16, device="cuda")
        return columns, codes, scales, shifts, torch.zeros(rows // 128 * 16, dtype=torch.int32, device="cuda")

    weights = [weight(*shape) for _ in range(LAYERS) for shape in SHAPES]

    def step(x) -> None:
        for columns, *weight in weights:
            torch.ops.quanto.gemm_f16i4_marlin(x[columns], *weight)

    return {"Marlin": step}, torch.float16


def exllama3():
    from exllamav3.ext import exllamav3_ext

    aside = {columns: torch.empty(1, columns, dtype=torch.float16, device="cuda") for columns in (4096, 14336)}

    def weight(rows, columns):
        trellis = torch.randint(-(2**15), 2**15, (columns // 16, rows // 16, 64), dtype=torch.int16, device="cuda")
        suh, svh = (torch.ones(n, dtype=torch.float16, device="cuda") for n in (columns, rows))
        return columns, rows, exllamav3_ext.BC_LinearEXL3(trellis, suh, svh, 4, None, True, False, aside[columns])

    weights = [weight(*shape) for _ in range(LAYERS) for shape in SHAPES]

    def step(x) -> None:
        for columns, rows, product in weights:
            product.run_alloc(x[columns], rows, False)

    return {"ExLlamaV3": step}, torch.float16


def measured() -> dict:
    """Milliseconds by kernel for each number of rows, the bytes of the 4-bit weights, and why others were left out."""
    bandwidth = clock.copy_bandwidth(torch.device("cuda"))
    weights = [w for block in stored() for w in block]
    states = [w.quant_state for w in weights]
    size = sum(w.nbytes for w in weights) + sum(s.absmax.nbytes + s.state2.absmax.nbytes for s in states)
    del weights, states
    rows, missing = [{"rows": n} for n in ROWS], {}
    for made in (sixteen_bits, nf4, torch_int4, marlin, exllama3):
        try:
            steps, dtype = made()
            for name, step in steps.items():
                for row in rows:
                    x = inputs(row["rows"], dtype)
                    with torch.inference_mode():
                        row[f"{name} ms"] = milliseconds(lambda step=step, x=x: step(x))
                print(name, ", ".join(f"{row['rows']}: {row[f'{name} ms']:.2f} ms" for row in rows), flush=True)
            del steps, step
        except Exception as error:
            if made in (sixteen_bits, nf4):
                raise
            missing[made.__name__] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            print(made.__name__, missing[made.__name__], flush=True)
        torch.cuda.empty_cache()
    return {"model": MODEL, "copy_bytes_per_s": bandwidth, "bytes": size, "rows": rows, "missing": missing}


def main() -> None:
    if not torch.cuda.is_available():
        return print("skipped: PyTorch sees no CUDA device")
    found = measured()
    least = 1e3 * found["bytes"] / found["copy_bytes_per_s"]
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; 4-bit weights {found['bytes'] / 1e9:.2f} GB")
    print(f"at the copy bandwidth of {found['copy_bytes_per_s'] / 1e12:.2f} TB/s they take {least:.2f} ms to read")


if __name__ == "__main__":
    main()
