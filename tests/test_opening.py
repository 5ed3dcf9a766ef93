import re
import shutil
from pathlib import Path

from qwlib import opening

ROOT = Path(__file__).parent.parent


def test_badges_and_setup_cells_are_those_of_the_address(tmp_path):
    """`make links` would change nothing."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    assert opening.write(tmp_path) == []


def test_a_fork_changes_the_address_with_one_command(tmp_path):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copy(ROOT / "README.md", tmp_path)
    old = opening.address(ROOT)
    pyproject = (ROOT / "pyproject.toml").read_text().replace(f"github.com/{old}", "github.com/some-one/fork.x")
    (tmp_path / "pyproject.toml").write_text(pyproject)
    changed = {path.name for path in opening.write(tmp_path)}
    assert changed == {"README.md"} | {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    for path in [tmp_path / "README.md", *(tmp_path / "notebooks").glob("*.ipynb")]:
        text = path.read_text(encoding="utf-8")
        assert "some-one/fork.x" in text
        assert not re.search(rf"\b{re.escape(old)}\b", text)
    assert opening.write(tmp_path) == []


def test_every_notebook_link_leads_to_a_file():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"/blob/main/(notebooks/[\w.-]+)", text)) | set(
        re.findall(r"\]\((notebooks/[\w.-]+)\)", text)
    )
    assert linked == {f"notebooks/{path.name}" for path in (ROOT / "notebooks").glob("*.ipynb")}
