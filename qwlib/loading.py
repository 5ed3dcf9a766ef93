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
from .lm import Lm, quiet


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
        return torch.bfloat16, "the 16-bit reference type; a CPU without bf16 units emulates it"
    major, minor = capability or torch.cuda.get_device_capability(device)
    if major >= 8:
        return torch.bfloat16, f"compute capability {major}.{minor} has bfloat16"
    return torch.float16, f"compute capability {major}.{minor} only emulates bfloat16 (hardware has it from 8.0)"


def banner() -> str:
    """One line for the top of a notebook: versions, device and compute type, each choice with its reason."""
    from . import record

    device, device_why = pick_device()
    dtype, dtype_why = pick_dtype(schemes.find(schemes.REFERENCE), device)
    versions = " · ".join(f"{name} {version}" for name, version in record.environment()["packages"].items())
    return f"{versions}\n{record.device_name()} ({device_why}) · {str(dtype).removeprefix('torch.')} ({dtype_why})"


@contextlib.contextmanager
def load(model: str, scheme: str | None = None, *, weights: str = "trained", device: str | None = None) -> Iterator[Lm]:
    """Load `model` (catalog name, Hub id or folder) under `scheme` and yield an `Lm`; leaving gives the memory back.

    Without `scheme` that is bf16, or what a quantized folder holds. The files of an artefact are checked first.

    `weights="random"` builds the model's exact shape with random values and no download: true bytes and times, no quality.
    What has to be downloaded or unpacked first is not part of `load_s`.

    Raises QwlibError in one line: unknown model or scheme, package missing, gated without a token, not enough memory.
    """
    if weights not in ("trained", "random"):
        raise QwlibError(f"weights must be 'trained' or 'random', not {weights!r}")
    row = catalog.find(model)
    here = weights == "trained" and row.source is not None and Path(row.source).is_dir()
    manifest = artefacts.verify(row.source) if here else None
    saved = saved_scheme(row) if weights == "trained" else None
    scheme = schemes.find(scheme or saved or schemes.REFERENCE)
    if saved and saved != scheme.name:
        raise QwlibError(f"{row.name} was saved as {saved}: load it with that scheme, or load the 16-bit original")
    ready, why = BACKENDS[scheme.backend].available()
    if not ready:
        raise QwlibError(f"scheme {scheme.name} {why}")
    import transformers.integrations.bitsandbytes  # noqa: F401  imported now, so that its memory is not the model's

    where, where_reason = pick_device(device)
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
        return str(embedded.checkpoint(row.name))
    return row.source if Path(row.source).is_dir() else hub.fetch(row)


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
    memory.give_back()
    before = memory.used_bytes(lm.device)
    metered = memory.reset_peak(lm.device)
    began = time.perf_counter()
    with hub.explained(lm.row):
        _fill(lm, source)
    lm.load_s = time.perf_counter() - began
    lm.memory |= memory.measure(lm.model)
    peak = memory.peak_bytes(lm.device) if metered else None
    if peak is not None:
        lm.memory["load_peak_bytes"] = max(peak - before, 0)
    memory.give_back()
    lm.memory["steady_bytes"] = max(memory.used_bytes(lm.device) - before, 0)


def _fill(lm: Lm, source: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    quantization = _quantization(lm)
    with quiet():
        lm.model, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=lm.dtype,
            device_map={"": lm.device},
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in one line
            **({"quantization_config": quantization} if quantization else {}),  # None would hide what the folder says
        )
        lm.tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left", trust_remote_code=False)
    lm.model.eval()
    if absent := [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]:
        raise QwlibError(
            f"{lm.row.name} lacks {len(absent)} of its weights, {absent[0]} first: is the folder complete?"
        )
    if not lm.tokenizer("word").input_ids:
        raise QwlibError(f"{lm.row.name} has no tokenizer files: save the tokenizer beside the model")
    if lm.device.type == "cpu":
        memory.own(lm.model)
    if lm.scheme.backend == "bitsandbytes":
        from .backends import bnb

        bnb.finish(lm.model, lm.scheme, lm.dtype)
    if lm.row.adapter and lm.weights == "trained":
        lm.model = _adapted(lm)
    old = lm.model.generation_config
    lm.model.generation_config = GenerationConfig(  # sampling settings of the publisher would warn at every greedy call
        bos_token_id=old.bos_token_id, eos_token_id=old.eos_token_id, pad_token_id=old.pad_token_id
    )
    stray = {str(t.device) for t in lm.model.parameters()} - {str(lm.device)}
    if stray and lm.device.index is not None:
        raise QwlibError(f"parts of {lm.row.name} landed on {', '.join(sorted(stray))} instead of {lm.device}")


def _adapted(lm: Lm):
    from peft import PeftModel

    over = lm.row.adapter
    return PeftModel.from_pretrained(
        lm.model,
        over.source,
        revision=over.revision,
        subfolder=over.folder or None,
        autocast_adapter_dtype=False,  # else the adapter alone would be float32
    ).eval()


def _quantization(lm: Lm):
    """What transformers is to quantize while it loads: None for plain types, and for a folder that was saved quantized."""
    if lm.saved:
        return None
    if lm.scheme.backend != "bitsandbytes":
        return None
    from .backends import bnb

    shapes = estimates.meta_model(lm.row)
    formats = schemes.plan(shapes, lm.scheme)
    head = shapes.get_output_embeddings()
    keep = [name for name, module in shapes.named_modules() if name in formats and module is head]
    return bnb.config(lm.scheme.linear, lm.dtype, keep)


def saved_scheme(row: catalog.Model) -> str | None:
    """The scheme that a folder or Hub repository was saved in: None for floating point, else what its configuration says.

    Raises QwlibError for a format that nothing here runs.
    """
    saved = getattr(row.config(), "quantization_config", None)
    if saved is None:
        return None
    saved = saved if isinstance(saved, dict) else saved.to_dict()
    if saved.get("load_in_8bit"):
        return "int8"
    if saved.get("load_in_4bit"):
        return saved.get("bnb_4bit_quant_type", "fp4") + "-dq" * bool(saved.get("bnb_4bit_use_double_quant"))
    fmt = saved.get("quant_method", "an unknown format")
    raise QwlibError(f"{row.name} was saved as {fmt}, which nothing here runs: load the 16-bit original")


def _release(lm: Lm, *, tell: bool) -> None:
    """Drop what this object holds, collect, and `tell` if somebody else still holds the model.

    An error on its way out holds it through its traceback, and nothing is told then: the memory comes back with the error.
    """
    watch = weakref.ref(lm.model) if lm.model is not None else None
    memory.forget(lm.model)
    lm.model = lm.tokenizer = None
    memory.give_back()
    if tell and watch is not None and watch() is not None:
        gc.collect()
        warnings.warn(
            "the model is still referenced outside its `with` block, so its memory stays: delete that variable",
            stacklevel=4,
        )
