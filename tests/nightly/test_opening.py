import json
import re
import shutil
from pathlib import Path

import pytest

from qwlib.nightly import opening, outputs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def copy(tmp_path) -> Path:
    for name in ("notebooks", "docs", ".github"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def test_badges_and_setup_cells_are_those_of_the_address(copy):
    """`make links` would change nothing."""
    assert opening.write(copy) == []


def test_a_fork_changes_the_address_with_one_command(copy):
    old = opening.address(ROOT)
    pyproject = (ROOT / "pyproject.toml").read_text().replace(f"github.com/{old}", "github.com/some-one/fork.x")
    (copy / "pyproject.toml").write_text(pyproject)
    changed = {path.name for path in opening.write(copy)}
    notebooks = {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert changed == {"README.md", "running.md", "nightly.yml"} | notebooks
    for path in (path for path in copy.rglob("*") if path.name in changed):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":  # its outputs are those of the run that was made
            assert not outputs.stale(path)
            text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
        assert "some-one/fork.x" in text
        assert not re.search(rf"\b{re.escape(old)}\b", text), path.name
    assert opening.write(copy) == []


def test_every_badge_of_a_workflow_leads_to_its_file():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    slug = opening.address(ROOT)
    linked = set(re.findall(rf"https://github\.com/{slug}/actions/workflows/([\w.-]+?)(?:/badge\.svg)?\)", text))
    assert linked == {path.name for path in (ROOT / ".github" / "workflows").glob("*.yml")}


def test_every_notebook_link_leads_to_a_file():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"/blob/main/(notebooks/[\w.-]+)", text)) | set(
        re.findall(r"\]\((notebooks/[\w.-]+)\)", text)
    )
    assert linked == {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
