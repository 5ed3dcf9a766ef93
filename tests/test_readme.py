"""What the README says about the tree is what the tree holds."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short():
    assert len(README.splitlines()) <= 160


def test_the_tree_names_every_module_with_its_sentence():
    listed = set(re.findall(r"^ +([\w/]+\.py) ", README, flags=re.M))
    modules = {p.relative_to(ROOT / "qwlib").as_posix() for p in (ROOT / "qwlib").rglob("*.py")}
    assert listed == modules


def test_its_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", README, flags=re.M)) != set()
    for pair in re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", README, flags=re.M):
        assert set(pair) - {""} <= targets


def test_every_requirement_says_what_needs_it():
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+ +# .{8,}", line), line


def test_modules_begin_with_one_sentence():
    for path in (ROOT / "qwlib").rglob("*.py"):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith('"""'), path
        assert len(first) > 20, path
