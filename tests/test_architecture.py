"""The house is as docs/architecture.md draws it: every module has its line there, and rooms import only from those above them."""

import ast
import json
import re
from pathlib import Path

import pytest

import qwlib

ROOT = Path(__file__).parent.parent
MAP = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FILES = {path.relative_to(ROOT / "qwlib").as_posix(): path for path in sorted((ROOT / "qwlib").rglob("*.py"))}


def drawn(text: str = MAP) -> dict[str, str]:
    """Name → what the map says of it, in the map's order; a file in a room as room/file.py."""
    found, room = {}, ""
    for line in text.partition("## The map")[2].partition("```\n")[2].partition("\n```")[0].splitlines():
        if match := re.fullmatch(r"( +)([\w.]+/?) +(\S.*)", line):
            indent, name, what = match.groups()
            room = name if name.endswith("/") else room if len(indent) > 2 else ""
            found[room + name if room != name else name] = what
    return found


def imported(path: str, text: str) -> set[str]:
    """The files of the package that a file imports from, at its top or within a function, as paths below qwlib/."""
    here, out = Path(path).parent.parts, set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            targets = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(("qwlib", *here)[: len(here) + 2 - node.level]) if node.level else []
            base += node.module.split(".") if node.module else []
            targets = [[*base, alias.name] for alias in node.names]
        else:
            continue
        for target in targets:
            if target[0] != "qwlib" or (len(target) > 1 and target[1].startswith("__")):
                continue
            names = ["/".join(target[1:]) + ".py", "/".join(target[1:-1]) + ".py"]
            names += ["/".join([*target[1:], "__init__.py"]), "/".join([*target[1:-1], "__init__.py"])]
            out |= set([name for name in names if name in FILES][:1])
    return out - {path}


def room(path: str) -> str:
    return f"{path.split('/')[0]}/" if "/" in path else path


def against_the_order(imports: dict[str, set[str]]) -> list[str]:
    """Arrows from one room to another that does not stand above it."""
    order = list(dict.fromkeys(room(name) for name in drawn()))
    return [
        f"{path} imports {other}"
        for path, others in imports.items()
        for other in others
        if room(path) != room(other) and order.index(room(other)) > order.index(room(path))
    ]


def circle(imports: dict[str, set[str]]) -> list[str] | None:
    """Files that import each other in a loop, None where there are none."""
    done: set[str] = set()

    def below(path: str, above: list[str]) -> list[str] | None:
        if path in above:
            return above[above.index(path) :]
        if path in done:
            return None
        for other in sorted(imports.get(path, ())):
            if found := below(other, [*above, path]):
                return found
        done.add(path)
        return None

    return next((found for path in imports if (found := below(path, []))), None)


@pytest.fixture(scope="module")
def imports():
    return {path: imported(path, file.read_text(encoding="utf-8")) for path, file in FILES.items()}


def test_the_map_names_every_module_with_its_sentence():
    rooms = {f"{path.parent.name}/" for path in FILES.values() if path.name == "__init__.py"} - {"qwlib/"}
    inside = {path for path in FILES if not path.endswith("/__init__.py")}
    assert {name.replace("//", "/") for name in drawn()} == rooms | inside
    assert all(len(what) > 15 for what in drawn().values())


def test_rooms_import_in_one_direction(imports):
    assert sum(map(len, imports.values())) > 150  # else the imports were not read
    assert against_the_order(imports) == []


def test_no_files_import_each_other_in_a_circle(imports):
    assert circle(imports) is None


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("models/catalog.py", "from ..loading.load import load"),
        ("models/catalog.py", "def late():\n    from ..measuring import bench"),
        ("files.py", "from .machine import memory"),
        ("running/lm.py", "import qwlib.nightly.runner"),
        ("lessons/integers.py", "from qwlib.backends import BACKENDS"),
    ],
)
def test_a_planted_arrow_is_rejected(imports, path, line):
    planted = imports | {path: imports[path] | imported(path, line)}
    assert len(against_the_order(planted)) == 1


def test_a_planted_circle_is_rejected(imports):
    planted = imports | {"models/hub.py": imports["models/hub.py"] | imported("models/hub.py", "from . import catalog")}
    assert set(circle(planted)) == {"models/hub.py", "models/catalog.py"}


def in_strings(text: str) -> list[str]:
    """What `from qwlib… import …` names anywhere in a text and the package has not: programs in strings and cells too."""
    missing = []
    for module, names in re.findall(r"from (qwlib[\w.]*) import \(?([\w, ]+)", text):
        folder = "/".join(module.split(".")[1:])
        file = FILES.get(f"{folder}.py") or FILES.get(f"{folder}/__init__.py".lstrip("/"))
        inside = file.read_text(encoding="utf-8") if file else ""
        for name in re.findall(r"(\w+)(?: as \w+)?", names):
            below = f"{folder}/{name}".lstrip("/")
            if not {f"{below}.py", f"{below}/__init__.py"} & set(FILES) and not re.search(rf"\b{name}\b", inside):
                missing.append(f"{module}: {name}")
    return missing


def test_programs_in_strings_import_what_is_there():
    folders = [ROOT / name for name in ("tests", "benchmarks", "docs", "notebooks", ".github")]
    texts = [ROOT / "README.md", *(path for folder in folders for path in folder.rglob("*.*") if path.is_file())]
    texts = [path for path in texts if path.suffix in (".py", ".ipynb", ".md", ".yml") and path != Path(__file__)]
    assert [name for path in texts for name in in_strings(path.read_text("utf-8"))] == []
    assert in_strings("from qwlib.remote import Remote") == ["qwlib.remote: Remote"]
    assert in_strings('run("from qwlib.loading.load import load, lode")') == ["qwlib.loading.load: lode"]


def test_it_can_be_drawn_on_a_napkin():
    assert len(list((ROOT / "qwlib").glob("*.py"))) <= 8
    assert len([path for path in (ROOT / "qwlib").iterdir() if (path / "__init__.py").is_file()]) <= 12


def test_a_room_says_what_it_is_for_and_hands_nothing_on():
    for path, file in FILES.items():
        if path.endswith("/__init__.py"):
            text = file.read_text(encoding="utf-8")
            assert len(text.splitlines()) <= 75, path
            assert path == "backends/__init__.py" or not imported(path, text), path


def test_tests_lie_in_the_rooms_of_what_they_test():
    rooms = {path.parent.name for path in FILES.values()}
    for file in (ROOT / "tests").rglob("test_*.py"):
        assert file.parent.name in rooms | {"tests"}, file


def test_the_face_offers_what_notebooks_use():
    cells = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "notebooks").glob("*.ipynb"))
    assert all(getattr(qwlib, name) is not None for name in qwlib.__all__)
    for name in qwlib.MODULES:
        assert re.search(rf"\b{name}\.", cells), f"no notebook uses {name}"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        qwlib.nothing  # noqa: B018


def test_the_map_tells_which_notebook_uses_which_room():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        cells = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        used = {room for name, room in qwlib.MODULES.items() if re.search(rf"\b{name}\.", cells)}
        row = re.search(rf"^\| {path.stem.replace('_', ' ')} \| (.+) \|$", MAP, flags=re.M)
        assert row, f"{path.name} has no row"
        assert set(row[1].split(", ")) == used, path.name
