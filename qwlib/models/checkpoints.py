"""What a row of the catalog is on this disk: its checkpoint's folder, the scheme that it was saved in, what it was made from.

Each is found out once for a row (`catalog.once`), and travels with it.
"""

import json
from pathlib import Path

from .. import files, schemes
from ..errors import QwlibError
from . import adapters, artefacts, catalog, embedded, hub, random_weights

MERGED = "merged.json"  # in a checkpoint with an adapter in its weights: what it was made from


@catalog.once
def folder(row: catalog.Model, weights: str = "trained") -> str:
    """Folder of a model's 16-bit checkpoint, unpacked, written or downloaded where it has to be: what `from_pretrained` takes.

    Raises QwlibError for a gated model without a token, or no connection.
    """
    if weights == "random":
        return str(random_weights.checkpoint(row))
    if row.source is None:
        return str(embedded.checkpoint(catalog.base(row).name))
    return row.source if Path(row.source).is_dir() else hub.fetch(row)


def refuse_pickles(folder: Path) -> None:
    """Raises QwlibError for a folder whose weights are pickles alone."""
    names = [path.name for path in folder.iterdir()]
    pickles = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".ckpt")))
    if pickles and not any(name.endswith((".safetensors", ".gguf", ".onnx")) for name in names):
        raise QwlibError(
            f"{folder.name} holds its weights in {pickles[0]}, a pickle, which can run code when it is opened: "
            "convert them to safetensors where you trust them"
        )


@catalog.once
def manifest(row: catalog.Model) -> dict | None:
    """The manifest of the folder that a row names, None where it has none, or is no folder.

    Raises QwlibError as `artefacts.read` does.
    """
    return artefacts.read(row.source) if row.source and Path(row.source).is_dir() else None


@catalog.once
def verified(row: catalog.Model) -> dict | None:
    """The same with every file checked against it.

    Raises QwlibError as `artefacts.verify` does.
    """
    return artefacts.verify(row.source) if row.source and Path(row.source).is_dir() else None


@catalog.once
def saved_scheme(row: catalog.Model) -> str | None:
    """The scheme that a folder or Hub repository was saved in: None for floating point, else what it says of itself.

    A manifest says it, else the configuration, else a GGUF file. Raises QwlibError for a format that nothing here runs.
    """
    if held := manifest(row):
        return held["scheme"]
    folder = Path(row.source) if row.source else None
    if folder and folder.is_dir() and (file := catalog.gguf_file(folder)):
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

    try:
        told = gguf.GGUFReader(file).fields.get("general.file_type")
        kind = None if told is None else int(told.contents())
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise QwlibError(f"{file.name} is no whole GGUF file ({error}): download it again") from None
    if kind is None:
        raise QwlibError(
            f"{file.name} does not say how it is quantized (general.file_type): write it again with llama.cpp's llama-quantize"
        )
    known = {number: name for name, number in schemes.GGUF_TYPES.items()}
    if kind not in known:
        raise QwlibError(
            f"{file.name} is of llama.cpp's file type {kind}, which is no scheme here: {', '.join(schemes.GGUF_TYPES)} are"
        )
    return known[kind]


@catalog.once
def source(row: catalog.Model) -> dict[str, str]:
    """What a model is made from: its name, the revision of its repository or a hash of its files, and its adapter's.

    A folder that `merging.merge` wrote is made from what was merged.
    """
    if row.adapter:
        under = source(catalog.base(row))
        _, plus, over = row.name.rpartition("+")
        # a base that is a folder is called by its name: a path may name a person
        return under | {"name": f"{under['name']}+{over}" if plus else row.name, "adapter": adapters.version(row)}
    if row.source is None:
        return {"name": row.name, "sha256": embedded.sha256(row.name)}
    folder = Path(row.source)
    if folder.is_dir():
        held = artefacts.parts(folder)
        digest = files.sha256_text("".join(f"{name} {files.sha256(folder / name)}\n" for name in held))
        if (folder / MERGED).is_file():
            return json.loads((folder / MERGED).read_text(encoding="utf-8")) | {"files": digest}
        return {"name": folder.name, "sha256": digest}
    revision = row.revision or Path(hub.fetch(row)).name  # the Hub's cache names its folders by commit
    return {"name": row.name, "repository": row.source, "revision": revision}
