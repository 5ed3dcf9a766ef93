"""`load`: a model under a scheme, with the reasons for what was chosen, and its memory given back at the end.

    with qwlib.load("smollm2-135m", "nf4") as lm:
        lm.model, lm.tokenizer        # the plain transformers objects
        lm.stream(ids, new_tokens=64, on_token=print)
        lm.logits(ids)

Decisions come with a reason: one GPU if there is one, never spread over CPU and disk (`device_map="auto"` does that
silently); bfloat16 only where the GPU has it in hardware, which is compute capability 8.0 (NVIDIA, Ampere);
`torch.cuda.is_bf16_supported()` says yes to a T4, which emulates it.
"""

import contextlib
import gc
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

from . import artefacts, catalog, embedded, estimates, hub, memory, random_weights, schemes
from .backends import BACKENDS
from .errors import QwlibError
from .lm import Lm


def pick_device(device: str | None = None):
    """(torch device, why)."""
    import torch

    if device is not None:
        if str(device).partition(":")[0] not in ("cpu", "cuda"):
            raise QwlibError(f"device {device!r}: qwlib runs on cpu, cuda or cuda:N")
        if torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise QwlibError("a GPU was asked for and PyTorch sees none: leave device out to use the CPU")
        return torch.device(device), "asked for"
    if torch.cuda.is_available():
        return torch.device("cuda", 0), f"the first of {torch.cuda.device_count()} CUDA device(s)"
    return torch.device("cpu"), "PyTorch sees no CUDA device"


def pick_dtype(scheme: schemes.Scheme, device, capability: tuple[int, int] | None = None):
    """(compute type, why). `capability` is the GPU's compute capability; it is asked of the device where not given."""
    import torch

    if scheme.base in ("fp32", "fp16"):
        return {"fp32": torch.float32, "fp16": torch.float16}[scheme.base], f"scheme {scheme.name} says so"
    if device.type != "cuda":
        return torch.bfloat16, "the 16-bit reference type"
    major, minor = capability or torch.cuda.get_device_capability(device)
    if major >= 8:
        return torch.bfloat16, f"compute capability {major}.{minor} has bfloat16"
    return torch.float16, f"compute capability {major}.{minor} only emulates bfloat16 (hardware has it from 8.0)"


def banner() -> str:
    """One line for the top of a notebook: versions, device and compute type, each choice with its reason."""
    from . import arithmetic, record

    device, device_why = pick_device()
    dtype, dtype_why = pick_dtype(schemes.find(schemes.REFERENCE), device)
    products, products_why = arithmetic.choose(dtype, device)
    versions = " · ".join(f"{name} {version}" for name, version in record.environment()["packages"].items())
    names = [str(each).removeprefix("torch.") for each in (dtype, products)]
    lines = [versions, f"{record.device_name()} ({device_why}) · {names[0]} ({dtype_why})"]
    return "\n".join([*lines, f"products of several rows in {names[1]} ({products_why})"])


@contextlib.contextmanager
def load(
    model: str,
    scheme: str | None = None,
    *,
    weights: str = "trained",
    device: str | None = None,
    engine: str | None = None,
) -> Iterator[Lm]:
    """Load `model` (catalog name, Hub id or folder) under `scheme` and yield an `Lm`; leaving gives the memory back.

    Without `scheme` that is bf16, or what a quantized folder holds. The files of an artefact are checked first. Schemes of
    backends that read files of their own (GGUF, GPTQ, AWQ, ONNX, ExLlama) open folders only: `quantize` writes them.

    `weights="random"` builds the model's exact shape with random values and no download: true bytes and times, no quality.
    What has to be downloaded or unpacked first is not part of `load_s`. `engine` is what decodes, see `Lm.use`.

    Raises QwlibError in one line: unknown model or scheme, package missing, gated without a token, not enough memory.
    """
    if weights not in ("trained", "random"):
        raise QwlibError(f"weights must be 'trained' or 'random', not {weights!r}")
    row = catalog.find(model)
    here = weights == "trained" and row.source is not None and Path(row.source).is_dir()
    manifest = artefacts.verify(row.source) if here else None
    if here:
        _refuse_pickles(Path(row.source))
    saved = saved_scheme(row) if weights == "trained" else None
    scheme = schemes.find(scheme or saved or schemes.REFERENCE)
    if saved and saved != scheme.name:
        raise QwlibError(f"{row.name} was saved as {saved}: load it with that scheme, or load the 16-bit original")
    if row.adapter and (scheme.maker or scheme.backend not in ("transformers", "bitsandbytes", "hqq", "torchao")):
        raise QwlibError(f"{row.name}: {scheme.backend} takes no adapter; `python -m qwlib merge` first, then quantize")
    if scheme.maker and not saved:
        raise QwlibError(
            f"{scheme.name} is read from files: `python -m qwlib quantize --scheme {scheme.name}` writes them, load that folder"
        )
    backend = BACKENDS[scheme.backend]
    ready, why = backend.available()
    if not ready:
        raise QwlibError(f"scheme {scheme.name} {why}")
    where, where_reason = pick_device(device or backend.device)
    if backend.device and not device:
        where_reason = f"{backend.name} runs on {'a GPU' if backend.device == 'cuda' else 'the CPU'} here"
    if scheme.made_on == "cuda" and not scheme.maker and where.type != "cuda":
        raise QwlibError(f"{scheme.name} needs a GPU: choose another scheme (`python -m qwlib schemes`)")
    dtype, dtype_reason = pick_dtype(scheme, where)
    _check_room(row, scheme, where)
    source = folder(row, weights)
    if weights == "trained" and not here:
        manifest = artefacts.verify(source)
    if random_weights.is_random(row):
        weights = "random"
    lm = Lm(row, scheme, weights, where, where_reason, dtype, dtype_reason, saved=saved, manifest=manifest)
    failed = True
    try:
        _fill_metered(lm, source)
        lm.use(engine)
        yield lm
        failed = False
    finally:
        _release(lm, tell=not failed)


def folder(model: str, weights: str = "trained") -> str:
    """Folder of a model's 16-bit checkpoint, unpacked, written or downloaded where it has to be: what `from_pretrained` takes.

    Raises QwlibError for an unknown model, a gated one without a token, or no connection.
    """
    row = catalog.find(model)
    if weights == "random":
        return str(random_weights.checkpoint(row))
    if row.source is None:
        return str(embedded.checkpoint(catalog.base(row).name))
    return row.source if Path(row.source).is_dir() else hub.fetch(row)


def _refuse_pickles(folder: Path) -> None:
    names = [path.name for path in folder.iterdir()]
    pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")))
    if pickles and not any(name.endswith((".safetensors", ".gguf", ".onnx")) for name in names):
        raise QwlibError(
            f"{folder.name} holds its weights in {pickles[0]}, a pickle, which can run code when it is opened: "
            "convert them to safetensors where you trust them"
        )


def _check_room(row: catalog.Model, scheme: schemes.Scheme, device) -> None:
    need = estimates.estimate(row, scheme, context=1)
    free = memory.free_bytes(device)
    total = need.weights_bytes + need.state_bytes
    if total > free:
        raise QwlibError(
            f"{row.name} in {scheme.name} takes {total / 1e9:.1f} GB and {device} has {free / 1e9:.1f} GB free: "
            "choose a scheme with fewer bits or a smaller model (`python -m qwlib estimate`)"
        )


def _fill_metered(lm: Lm, source: str) -> None:
    began = time.perf_counter()
    backend = BACKENDS[lm.scheme.backend].load_module()  # imported now, so that its memory is not the model's
    lm.import_s = time.perf_counter() - began
    memory.give_back()
    before = memory.used_bytes(lm.device)
    metered = memory.reset_peak(lm.device)
    began = time.perf_counter()
    with hub.explained(lm.row):
        backend.fill(lm, source)
    lm.load_s = time.perf_counter() - began
    lm.memory |= lm.engine.held()
    peak = memory.peak_bytes(lm.device) if metered else None
    if peak is not None:
        lm.memory["load_peak_bytes"] = max(peak - before, 0)
    memory.give_back()
    lm.memory["steady_bytes"] = max(memory.used_bytes(lm.device) - before, 0)


def saved_scheme(row: catalog.Model) -> str | None:
    """The scheme that a folder or Hub repository was saved in: None for floating point, else what it says of itself.

    A manifest says it, else the configuration, else a GGUF file. Raises QwlibError for a format that nothing here runs.
    """
    folder = Path(row.source) if row.source else None
    if folder and folder.is_dir():
        if manifest := artefacts.read(folder):
            return manifest["scheme"]
        if file := catalog.gguf_file(folder):
            return _gguf_scheme(folder / file)
    saved = getattr(row.config(), "quantization_config", None)
    if saved is None:
        return None
    saved = saved if isinstance(saved, dict) else saved.to_dict()
    if saved.get("load_in_8bit"):
        return "int8"
    if saved.get("load_in_4bit"):
        return saved.get("bnb_4bit_quant_type", "fp4") + "-dq" * bool(saved.get("bnb_4bit_use_double_quant"))
    fmt, bits = saved.get("quant_method", "an unknown format"), saved.get("bits")
    if fmt in ("gptq", "awq") and bits == 4:
        return f"{fmt}-4bit"
    told = f"{bits}-bit {fmt}" if bits else fmt
    raise QwlibError(f"{row.name} was saved as {told}, which nothing here runs: load the 16-bit original")


def _gguf_scheme(file: Path) -> str:
    import gguf

    from .backends.llamacpp import TYPES

    try:
        told = gguf.GGUFReader(file).fields
        kind = int(told["general.file_type"].contents())
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise QwlibError(f"{file.name} is no whole GGUF file ({error}): download it again") from None
    known = {number: name for name, number in TYPES.items()}
    if kind not in known:
        raise QwlibError(
            f"{file.name} is of llama.cpp's file type {kind}, which is no scheme here: {', '.join(TYPES)} are"
        )
    return known[kind]


def _release(lm: Lm, *, tell: bool) -> None:
    """Drop what this object holds, collect, and `tell` if somebody else still holds the model.

    An error on its way out holds it through its traceback, and nothing is told then: the memory comes back with the error.
    """
    watch = weakref.ref(lm.model) if lm.model is not None else None
    memory.forget(lm.model)
    if lm.engine is not None:
        lm.engine.close()
    lm.model = lm.tokenizer = lm.engine = None
    memory.give_back()
    if tell and watch is not None and watch() is not None:
        gc.collect()
        warnings.warn(
            "the model is still referenced outside its `with` block, so its memory stays: delete that variable",
            stacklevel=4,
        )
