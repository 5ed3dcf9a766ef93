"""What a licence is called on the Hub, whether copies may be public, and what a copy has to bring along."""

import re
from dataclasses import dataclass

from ..models import catalog, embedded


@dataclass(frozen=True)
class Licence:
    """What the Hub calls a licence, whether copies may be public, and what a copy has to bring along.

    `copy`: its text, in a file LICENSE. `notice`: a line for a file NOTICE. `first`: what a public name begins with.
    """

    tag: str
    public: bool
    name: str | None = None
    link: str | None = None
    copy: bool = False
    notice: str | None = None
    shown: str | None = None
    first: str = ""


# Tags: the Hub's list (huggingface.co/docs/hub/repositories-licenses). Llama: sections 1.b.i and 1.b.iii of its community
# licence (llama.com/llama3_1/license). Gemma: section 3.1 of its terms (ai.google.dev/gemma/terms).
_LLAMA = {
    "copy": True,
    "notice": "Llama 3.1 is licensed under the Llama 3.1 Community License, "
    "Copyright © Meta Platforms, Inc. All Rights Reserved.",
    "shown": "Built with Llama",
    "first": "Llama",
}


LICENCES = {
    "Apache-2.0": Licence("apache-2.0", True),
    "MIT": Licence("mit", True),
    "Gemma terms of use": Licence(
        "gemma",
        True,
        copy=True,
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    ),
    "Llama 3.1 community": Licence("llama3.1", True, **_LLAMA),
    "NVIDIA Open Model + Llama 3.1 community": Licence(
        "other",
        True,
        "nvidia-open-model-license",
        "https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license/",
        **_LLAMA,
    ),
    "Qwen research licence": Licence(
        "other", False, "qwen-research", "https://huggingface.co/Qwen/Qwen2.5-3B-Instruct/blob/main/LICENSE"
    ),
    "OPT licence, research only": Licence(
        "other", False, "opt-license", "https://huggingface.co/facebook/opt-350m/blob/main/LICENSE.md"
    ),
}


def base(manifest: dict) -> tuple[str | None, Licence | None, catalog.Model | None]:
    """(the base model's id on the Hub, its licence, its catalog row) as far as the manifest tells them."""
    source = manifest["source"]
    repository, row = source.get("repository"), catalog.MODELS.get(source["name"].partition("+")[0])
    if row is None or row.source != repository:  # a folder may bear any name
        row = next(
            (m for m in catalog.MODELS.values() if repository and m.source == repository and not m.adapter), None
        )
    if row is None:
        return repository if re.fullmatch(r"[\w.-]+/[\w.-]+", repository or "") else None, None, None
    if "adapter" in source and source["name"] != row.name:  # whose licence nobody here knows
        return row.source, None, None
    if row.source is None:
        packaged = catalog.base(row).name
        if packaged not in embedded.installed() or source.get("sha256") != embedded.sha256(packaged):
            return None, None, None
        return embedded.PACKAGED[packaged].published, LICENCES.get(row.licence), row
    return row.source, LICENCES.get(row.licence), row
