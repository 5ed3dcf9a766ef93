"""The 4-bit kernel against float64, beside bitsandbytes' own; and when it is not taken. Most of this needs a GPU."""

import copy
import itertools

import pytest
import torch

from qwlib import QwlibError
from qwlib.kernels import compiling, linear4bit
from qwlib.lessons import fourbit

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TYPES = (torch.bfloat16, torch.float16)
SHAPES = ((4096, 4096), (1024, 4096), (4096, 14336), (1000, 576), (17, 64), (33, 192), (16, 256), (1, 320))
AWKWARD = (
    (48, 96),
    (130, 1056),
    (50, 104),
    (77, 1000),
    (64, 100),
    (128, 51),
)  # columns are no multiple of 64, 32, 8, 4, 2


def stored(shape, *, kind="nf4", nested=True, block_size=64, dtype=torch.bfloat16, seed=0):
    """A `Params4bit` of normal noise, as bitsandbytes stores it on the GPU."""
    import bitsandbytes as bnb

    torch.manual_seed(seed)
    weight = torch.randn(shape, dtype=dtype, device="cuda") / shape[1] ** 0.5
    options = {"quant_type": kind, "compress_statistics": nested, "blocksize": block_size}
    return bnb.nn.Params4bit(weight, requires_grad=False, **options).to("cuda")


def dense(weight):
    """The weights in float64 by the definition: level × scale, with no rounding to 16 bits."""
    import bitsandbytes as bnb

    state = copy.copy(weight.quant_state)
    state.dtype = torch.float32
    return bnb.functional.dequantize_4bit(weight.data, state).double().reshape(state.shape)


def exact(x, weight, bias=None):
    return torch.nn.functional.linear(x.double(), dense(weight), None if bias is None else bias.double())


def error(got, wanted) -> float:
    return ((got.double() - wanted).norm() / wanted.norm()).item()


def ptx(source: str, capability: str, options) -> bytes:
    """PTX of a source for a compute capability such as "75", by NVRTC. torch's own call makes binaries for one GPU alone."""
    import ctypes

    from torch.cuda._utils import _get_gpu_rtc_library

    nvrtc, program, size = _get_gpu_rtc_library(), ctypes.c_void_p(), ctypes.c_size_t()
    given = [f"--gpu-architecture=compute_{capability}", *(f"-D{name}={value}" for name, value in options.items())]
    # the older GPUs have no launches that follow one another (PDL)
    given = (ctypes.c_char_p * len(given))(*(each.replace("PDL=1", "PDL=0").encode() for each in given))
    assert not nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None)
    assert not nvrtc.nvrtcCompileProgram(program, len(given), given)
    assert not nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    assert not nvrtc.nvrtcGetPTX(program, text)
    return text.raw


def product(x, weight, bias=None):
    (out,) = linear4bit.multiply(x, [weight], linear4bit.gain_of(weight, x.dtype), [] if bias is None else [bias])
    return out


@gpu
class TestOnAGpu:
    @pytest.mark.parametrize("shape", SHAPES + AWKWARD, ids=str)
    @pytest.mark.parametrize("dtype", TYPES, ids=str)
    @pytest.mark.parametrize("nested", [True, False])
    def test_it_is_at_least_as_exact_as_bitsandbytes(self, shape, dtype, nested):
        import bitsandbytes as bnb

        for kind, block_size in (("nf4", 64), ("fp4", 64), ("nf4", 32), ("nf4", 128), ("nf4", 4096)):
            weight = stored(shape, kind=kind, nested=nested, block_size=block_size, dtype=dtype)
            assert linear4bit.obstacle(weight, dtype) is None
            for rows in (1, 2, 7, 8, 9, 16, 17, 64):
                x = torch.randn(rows, shape[1], dtype=dtype, device="cuda")
                wanted = exact(x, weight)
                theirs = error(bnb.matmul_4bit(x, weight, quant_state=weight.quant_state), wanted)
                ours = error(product(x, weight), wanted)
                # few numbers that happen to be small decide nothing
                if wanted.numel() >= 256:
                    assert ours <= 1.02 * theirs, (kind, block_size, rows, ours, theirs)
                size = (x.double().square() @ dense(weight).square().T).sqrt().norm()
                assert (product(x, weight).double() - wanted).norm() <= 3 * torch.finfo(dtype).eps * size

    def test_a_scale_of_another_block_would_be_seen(self):
        weight = stored((64, 512))
        x = torch.randn(4, 512, dtype=torch.bfloat16, device="cuda")
        wanted = exact(x, weight)
        assert error(product(x, weight), wanted) < 0.01
        weight.quant_state.absmax[5] ^= 64
        assert error(product(x, weight), wanted) > 0.01

    @pytest.mark.parametrize("nested", [True, False])
    @pytest.mark.parametrize("dtype", TYPES, ids=str)
    def test_weights_of_one_launch_give_what_they_give_alone(self, dtype, nested):
        for columns, block_size in ((4096, 64), (576, 64), (96, 32), (100, 64)):
            rows_out = (1024, 40, 17, 1)
            weights = [
                stored((n, columns), nested=nested, block_size=block_size, dtype=dtype, seed=n) for n in rows_out
            ]
            biases = [torch.randn(n, dtype=dtype, device="cuda") for n in rows_out]
            gain = linear4bit.gain_of(weights[0], dtype)
            for rows in (1, 5, 16):
                x = torch.randn(rows, columns, dtype=dtype, device="cuda")
                together = linear4bit.multiply(x, weights, gain, biases)
                for got, weight, bias in zip(together, weights, biases, strict=True):
                    assert torch.equal(got, product(x, weight, bias))
                    assert not torch.equal(got, product(x, weight))
        with pytest.raises(QwlibError, match="not 1 and 5"):
            linear4bit.multiply(x[:1], [*weights, weight], gain)

    @pytest.mark.parametrize("shape", [*SHAPES[3:], *AWKWARD, (4096, 4096)], ids=str)
    @pytest.mark.parametrize("nested", [True, False])
    def test_dequantized_weights_are_those_of_bitsandbytes_bit_for_bit(self, shape, nested):
        import bitsandbytes as bnb

        for dtype, kind, block_size in itertools.product(TYPES, ("nf4", "fp4"), (32, 64, 1024)):
            weight = stored(shape, kind=kind, nested=nested, block_size=block_size, dtype=dtype)
            theirs = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            ours = linear4bit.dequantize(weight, dtype)
            assert (ours.dtype, ours.shape) == (dtype, theirs.shape)
            assert torch.equal(ours, theirs), (dtype, kind, block_size)

    @pytest.mark.parametrize("capability", ["75", "80"])
    def test_code_for_older_gpus_gives_the_same(self, capability, monkeypatch):
        """A newer GPU runs what was compiled for an older one, through PTX."""
        from torch.cuda._utils import _cuda_load_module

        made = []

        def built(source, name, options, *, threads, shared_bytes, pdl, **_):
            loaded = _cuda_load_module(ptx(source, capability, options), [name])[name]
            loaded.set_shared_memory_config(shared_bytes)
            made.append(name)
            return compiling.Kernel(loaded, threads, shared_bytes, False)

        weight, bias = stored((130, 1056), dtype=torch.float16), torch.randn(130, dtype=torch.float16, device="cuda")
        inputs = [torch.randn(rows, 1056, dtype=torch.float16, device="cuda") for rows in (1, 3, 16)]
        wanted = [product(x, weight, bias) for x in inputs]
        dense_here = linear4bit.dequantize(weight, torch.bfloat16)
        major, minor = divmod(int(capability), 10)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (major, minor))
        monkeypatch.setattr(compiling, "build", built)
        caches = linear4bit._kernel, linear4bit._choice
        try:
            for each in caches:
                each.cache_clear()
            for x, here in zip(inputs, wanted, strict=True):
                got = product(x, weight, bias)
                assert error(got, exact(x, weight, bias)) < 1e-3
                if capability != "75":
                    assert torch.equal(got, here)
            assert torch.equal(linear4bit.dequantize(weight, torch.bfloat16), dense_here)
        finally:
            for each in caches:
                each.cache_clear()
        assert ("linear4bit" in made) == (capability == "80")
        assert ("plain4bit" in made) == (capability == "75")

    @pytest.mark.parametrize("dtype", TYPES, ids=str)
    def test_shapes_and_bias(self, dtype):
        weight, bias = stored((40, 128), dtype=dtype), torch.randn(40, dtype=dtype, device="cuda")
        x = torch.randn(2, 3, 128, dtype=dtype, device="cuda")
        got = product(x, weight, bias)
        assert got.shape == (2, 3, 40)
        assert got.dtype == dtype
        assert error(got, exact(x, weight, bias)) < 0.01
        assert error(product(x, weight), exact(x, weight, bias)) > 0.1
        assert product(x[:0], weight).shape == (0, 3, 40)
        every_second = torch.randn(4, 256, dtype=dtype, device="cuda")[:, ::2]
        assert error(product(every_second, weight), exact(every_second, weight)) < 0.01
        with pytest.raises(QwlibError, match="64 rows and 4 weights at most, not 65 and 1"):
            product(torch.zeros(65, 128, dtype=dtype, device="cuda"), weight)

    def test_a_row_does_not_depend_on_the_others(self):
        weight = stored((4096, 4096))
        x = torch.randn(40, 4096, dtype=torch.bfloat16, device="cuda")
        whole = product(x, weight)
        for rows in (1, 3, 8, 12, 16, 33):
            assert torch.equal(product(x[:rows], weight), whole[:rows])

    @pytest.mark.parametrize("shape", [(96, 576), AWKWARD[2], AWKWARD[-1]], ids=str)
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_what_is_no_number_stays_in_its_row(self, bad, shape):
        weight = stored(shape)
        x = torch.randn(9, shape[1], dtype=torch.bfloat16, device="cuda")
        clean = product(x, weight)
        x[4, 30] = bad
        got = product(x, weight)
        assert not got[4].isfinite().any()
        rest = [row for row in range(9) if row != 4]
        assert torch.equal(got[rest], clean[rest])

    def test_ten_thousand_launches_give_one_result(self):
        weights = [
            stored(shape, nested=nested)
            for shape, nested in itertools.product(((1000, 576), (4096, 4096)), (True, False))
        ]
        inputs = [
            torch.randn(rows, w.quant_state.shape[1], dtype=torch.bfloat16, device="cuda")
            for w in weights
            for rows in (1, 16)
        ]
        pairs = list(zip(inputs, [w for w in weights for _ in range(2)], strict=True))
        wanted = [product(x, w) for x, w in pairs]
        wrong = torch.zeros((), device="cuda", dtype=torch.long)
        for _ in range(10_000 // len(pairs)):
            for (x, w), expected in zip(pairs, wanted, strict=True):
                torch.full_like(expected, float("nan"))  # the memory that the result takes next
                wrong += (product(x, w) != expected).any()
        assert not wrong

    def test_graphs_and_compiling_take_it(self):
        weight = stored((1024, 4096))
        x = torch.randn(2, 4096, dtype=torch.bfloat16, device="cuda")
        wanted = product(x, weight)
        gain = linear4bit.gain_of(weight, x.dtype)
        compiled = torch.compile(lambda x: linear4bit.multiply(x, [weight], gain)[0] + 1, fullgraph=True)
        assert torch.equal(compiled(x), wanted + 1)
        graph, out = torch.cuda.CUDAGraph(), None
        with torch.cuda.graph(graph):
            (out,) = linear4bit.multiply(x, [weight], gain)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(out, product(x, weight))
        assert not torch.equal(out, wanted)
        state = weight.quant_state
        nested = state.state2.code, [state.state2.absmax], [state.offset]
        whole = ("test_schema", "test_faketensor")
        arguments = (x, [weight.data], [state.absmax], state.code, gain, *nested, [], [1024], 64)
        torch.library.opcheck(torch.ops.qwlib.linear4bit.default, arguments, test_utils=whole)
        arguments = (weight.data, state.absmax, state.code, state.state2.code, state.state2.absmax, state.offset)
        arguments += ([1024, 4096], 64, torch.float16)
        torch.library.opcheck(torch.ops.qwlib.dequantize4bit.default, arguments, test_utils=whole)

    def test_a_second_process_finds_it_on_disk(self, tmp_path, monkeypatch):
        monkeypatch.setenv("QWLIB_CACHE", str(tmp_path))
        source = 'extern "C" __global__ void twice(int* x) { *x = 2 * *x + ADD; }'
        settings = {
            "threads": 1,
            "shared_bytes": 0,
            "capability": "".join(map(str, torch.cuda.get_device_capability())),
            "pdl": False,
        }
        x = torch.tensor([20], dtype=torch.int32, device="cuda")
        for add in (2, 2, 3):
            compiling.build(source, "twice", {"ADD": add}, **settings).launch(1, [x])
        assert x.item() == 2 * (2 * (2 * 20 + 2) + 2) + 3
        assert len(list(tmp_path.rglob("*.cubin"))) == 2
        with pytest.raises(QwlibError, match="the kernel twice can't be had"):
            compiling.build(source, "twice", {}, **settings)


@pytest.mark.parametrize(
    ("block_size", "nested", "dtype", "why"),
    [
        (64, 0, torch.bfloat16, None),
        (32, 256, torch.float16, None),
        (4096, 256, torch.float16, None),
        (16, 256, torch.bfloat16, "blocks of 32, 64, 128 and so on, not 16"),
        (96, 0, torch.bfloat16, "blocks of 32, 64, 128 and so on, not 96"),
        (64, 64, torch.bfloat16, "second-level scales for 256 scales each, not 64"),
        (64, 256, torch.float32, "computes in 16 bits, not in float32"),
    ],
)
def test_what_it_can_t_multiply_has_a_reason(block_size, nested, dtype, why):
    found = linear4bit.settings_obstacle(block_size, nested, dtype)
    assert (found or "").endswith(why or "")
    assert (found is None) == (why is None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_reason_is_that():
    assert compiling.obstacle() == "PyTorch sees no CUDA device"


@pytest.mark.parametrize(
    "room", [232_448, 166_912, 101_376]
)  # H100, A100, RTX 4090: CUDA C++ Programming Guide, table 27
@pytest.mark.parametrize("wide", [1, 8, 16])
@pytest.mark.parametrize("nested", [True, False])
def test_the_ring_fits_into_shared_memory(room, wide, nested):
    warps, stages, _, shared_bytes = linear4bit.ring(room, wide, nested)
    assert shared_bytes <= room
    assert stages >= 2
    assert warps in (8, 16)


def test_a_gpu_with_too_little_shared_memory_is_told():
    with pytest.raises(QwlibError, match="bytes of shared memory, and this GPU has 49152"):
        linear4bit.ring(49_152, 1, True)


def test_it_can_be_traced_without_a_gpu():
    x, packed = torch.empty(2, 3, 128, device="meta", dtype=torch.bfloat16), torch.empty(20 * 64, 1, device="meta")
    scales = torch.empty(40, device="meta")
    settings = ([], [], [], [20, 7], 64)
    outs = linear4bit.linear4bit(x, [packed, packed], [scales, scales], scales, 1.0, None, *settings)
    assert [(out.shape, out.dtype) for out in outs] == [((2, 3, 20), torch.bfloat16), ((2, 3, 7), torch.bfloat16)]
    dense = linear4bit.dequantize4bit(packed, scales, scales, None, None, None, [20, 128], 64, torch.float16)
    assert (dense.shape, dense.dtype) == ((20, 128), torch.float16)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_levels_are_rounded_at_a_good_place(dtype):
    """FP4's levels are multiples of 1/24, so there is a number for which nothing is lost; NF4's lose about half."""
    for kind, most in (("nf4", 0.7), ("fp4", 0.0)):
        levels = fourbit.code_book(kind)
        gain = linear4bit.rounded_well(levels.tolist(), dtype)
        plain, well = (((levels * g).to(dtype).double() / g - levels).norm().item() for g in (1.0, gain))
        assert 1 <= gain < 2
        assert well <= most * plain + 1e-7
