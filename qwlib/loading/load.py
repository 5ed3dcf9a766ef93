"""`load`: a model under a scheme, with the reasons for what was chosen, and its memory given back at the end.

with qwlib.load("smollm2-135m", "nf4") as lm:
    lm.model, lm.tokenizer        # the plain transformers objects
    lm.stream(ids, new_tokens=64, on_token=print)
    lm.logits(ids)
"""

import contextlib
import gc
import time
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

from .. import schemes
from ..backends import BACKENDS
from ..errors import QwlibError
from ..machine import devices, memory, processes
from ..models import artefacts, catalog, checkpoints, estimates, hub, intact, random_weights
from ..running.lm import Lm


@contextlib.contextmanager
def load(
    model: str,
    scheme: str | None = None,
    *,
    weights: str = "trained",
    device: str | None = None,
    engine: str | None = None,
    kernel: str | None = None,
    split: bool = False,
) -> Iterator[Lm]:
    """Load `model` (catalog name, Hub id or folder) under `scheme` and yield an `Lm`; leaving gives the memory back.

    Without `scheme` that is bf16, or what a quantized folder holds. The files of an artefact are checked first. Schemes of
    backends that read files of their own (GGUF, GPTQ, AWQ, ONNX, ExLlama) open folders only: `quantize` writes them.

    `weights="random"` builds the model's exact shape with random values and no download: true bytes and times, no quality.
    What has to be downloaded or unpacked first is not part of `load_s`. `engine` is what decodes, see `Lm.use`.
    On a GPU, bitsandbytes' 4-bit layers are multiplied by qwlib's kernels where these can, and `engine.why` says so. With
    `kernel="bitsandbytes"` its own do it, and with `kernel="qwlib"` it is an error if no layer can be multiplied by ours.

    `split`: training is going to split the weights over GPUs (`training.sharded`). Those of 16 or 32 bits stay on the host until
    then, and 4-bit layers are multiplied by bitsandbytes.

    Raises QwlibError in one line: unknown model or scheme, package missing, gated without a token, not enough memory.
    """
    if weights not in ("trained", "random"):
        raise QwlibError(f"weights must be 'trained' or 'random', not {weights!r}")
    with processes.importing():
        import transformers.modeling_utils  # noqa: F401 what everything below needs, torch among it
    if kernel not in (None, "qwlib", "bitsandbytes"):
        raise QwlibError(f"kernel must be 'qwlib', 'bitsandbytes' or left out, not {kernel!r}")
    row = catalog.find(model)
    here = weights == "trained" and row.source is not None and Path(row.source).is_dir()
    manifest = checkpoints.verified(row) if here else None
    if here:
        checkpoints.refuse_pickles(Path(row.source))
        if manifest is None:  # else each file was compared with it
            intact.check(Path(row.source))
    saved = checkpoints.saved_scheme(row) if weights == "trained" else None
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
    if kernel and backend.name != "bitsandbytes":
        raise QwlibError(f"kernel={kernel!r} is for 4-bit schemes of bitsandbytes, not for {scheme.name}: leave it out")
    ready, why = backend.available()
    if not ready:
        raise QwlibError(f"scheme {scheme.name} {why}")
    where, where_reason = devices.pick_device(device or backend.device)
    if backend.device and not device:
        where_reason = f"{backend.name} runs on {'a GPU' if backend.device == 'cuda' else 'the CPU'} here"
    if kernel == "qwlib" and where.type != "cuda":
        raise QwlibError(f"kernel={kernel!r} needs a GPU: leave it out")
    if scheme.made_on == "cuda" and not scheme.maker and where.type != "cuda":
        raise QwlibError(f"{scheme.name} needs a GPU: choose another scheme (`python -m qwlib schemes`)")
    dtype, dtype_reason = devices.pick_dtype(scheme, where)
    waits = split and backend.name == "transformers" and where.type != "cpu"
    if split and backend.name == "bitsandbytes":
        kernel = "bitsandbytes"
    _check_room(row, scheme, devices.pick_device("cpu")[0] if waits else where)
    source = checkpoints.folder(row, weights)
    if weights == "trained" and not here:
        manifest = artefacts.verify(source)
    if random_weights.is_random(row):
        weights = "random"
    lm = Lm(
        row,
        scheme,
        weights,
        where,
        where_reason,
        dtype,
        dtype_reason,
        saved=saved,
        manifest=manifest,
        waits=waits,
        kernel=kernel,
    )
    failed = True
    try:
        _fill_metered(lm, source)
        lm.use(engine)
        yield lm
        failed = False
    finally:
        _release(lm, tell=not failed)


def _check_room(row: catalog.Model, scheme: schemes.Scheme, device) -> None:
    total, free = estimates.held_bytes(row, scheme), memory.free_bytes(device)
    if total > free:
        raise QwlibError(
            f"{row.name} in {scheme.name} takes {total / 1e9:.1f} GB and {device} has {free / 1e9:.1f} GB free: "
            "choose a scheme with fewer bits or a smaller model (`python -m qwlib estimate`)"
        )


def _fill_metered(lm: Lm, source: str) -> None:
    began = time.perf_counter()
    with processes.importing():
        backend = BACKENDS[lm.scheme.backend].load_module()  # imported now, so that its memory is not the model's
    lm.import_s = time.perf_counter() - began
    memory.give_back()
    before = memory.used_bytes(lm.device)
    metered = memory.reset_peak(lm.device)
    began = time.perf_counter()
    lm.folder = source
    with hub.explained(lm.row):
        backend.fill(lm, source)
    lm.load_s = time.perf_counter() - began
    lm.memory |= lm.engine.held()
    peak = memory.peak_bytes(lm.device) if metered else None
    if peak is not None:
        lm.memory["load_peak_bytes"] = max(peak - before, 0)
    memory.give_back()
    lm.memory["steady_bytes"] = max(memory.used_bytes(lm.device) - before, 0)


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
