"""How notebooks are written; that they run is `make run`'s to show, and the runner's tests say what counts as a run."""

import ast
import contextlib
import importlib
import json
import re
import statistics
import types
from pathlib import Path

import pytest

import qwlib
from qwlib.nightly import outputs

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def source(cell: dict) -> str:
    return "".join(cell["source"])


def tagged(path: Path, tag: str) -> list[dict]:
    return [cell for cell in cells(path) if tag in cell["metadata"].get("tags", [])]


def taken_from(module: str, name: str):
    """What `from module import name` gives, whether or not the name is a module that nobody has imported yet."""
    with contextlib.suppress(ModuleNotFoundError):
        return importlib.import_module(f"{module}.{name}")
    return getattr(importlib.import_module(module), name)


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
class TestNotebook:
    def test_it_shows_outputs_of_its_own_source_or_none(self, path):
        """`make outputs` executes what has changed."""
        if any(cell.get("outputs") for cell in cells(path)):
            assert not outputs.stale(path), f"{path.name} has changed since its outputs were made: make outputs"

    def test_its_outputs_are_clean_and_small(self, path):
        whole = json.loads(path.read_text(encoding="utf-8"))
        assert path.stat().st_size <= 1_200_000
        assert set(whole["metadata"]) <= {"kernelspec", "language_info", outputs.KEY}
        for cell in whole["cells"]:
            assert cell.get("execution_count") is None
            assert set(cell["metadata"]) <= {"tags"}
        shown = [output for cell in whole["cells"] for output in cell.get("outputs", [])]
        assert {output["output_type"] for output in shown} <= {"stream", "display_data", "execute_result"}
        for output in shown:
            assert len("".join(output.get("data", {}).get("image/png", ""))) * 3 / 4 <= 60_000
        text = json.dumps([{k: v for k, v in o.get("data", o).items() if k != "image/png"} for o in shown])
        assert not re.search(r"Traceback|\bhf_[A-Za-z0-9]{20,}|/home/|/root/|/Users/|/tmp/|widget", text)

    def test_the_opening_is_the_same_everywhere(self, path):
        first, second, third, *_ = cells(path)
        assert first["cell_type"] == "markdown"
        for part in ("colab-badge.svg", "\n# ", "At the end you will be able to", "**Time**", "**Hardware**"):
            assert part in source(first)
        assert tagged(path, "setup") == [second]
        assert "print(qwlib.banner())" in source(third)

    def test_what_it_takes_from_qwlib_is_there(self, path):
        """And where it is defined: a name that a module only imported may leave it again."""
        code = "\n".join(source(cell) for cell in cells(path) if cell["cell_type"] == "code")
        tree = ast.parse(re.sub(r"^( *)[%!].*$", r"\1pass", code, flags=re.M))
        held = {"qwlib": qwlib}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("qwlib"):
                held |= {a.name: taken_from(node.module, a.name) for a in node.names}
        assert sum(isinstance(each, types.ModuleType) for each in held.values()) > 3
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in held:
                module, name = held[node.value.id], node.attr
                taken = getattr(module, name)
                if isinstance(module, types.ModuleType) and module is not qwlib and hasattr(taken, "__module__"):
                    assert taken.__module__ == module.__name__, f"{node.value.id}.{name}"

    def test_parameters_are_plain_lines_with_help(self, path):
        (cell,) = tagged(path, "parameters")
        names = []
        for line in source(cell).splitlines():
            code, _, text = line.partition("  # ")
            (statement,) = ast.parse(code).body
            assert isinstance(statement, ast.AnnAssign)
            assert statement.annotation.id in ("str", "int", "float", "bool")
            assert statement.target.id.isupper()
            assert len(text) > 10
            names.append(statement.target.id)
        assert "OUT" in names

    def test_the_last_cell_writes_the_record(self, path):
        assert tagged(path, "record") == [cells(path)[-1]]
        assert 'record.write(record.new("notebook"' in source(cells(path)[-1])

    def test_shell_commands_stand_in_the_setup_cell_only(self, path):
        for cell in cells(path):
            if cell["cell_type"] == "code" and "setup" not in cell["metadata"].get("tags", []):
                assert not any(line.lstrip().startswith(("!", "%")) for line in source(cell).splitlines())

    def test_it_reads_at_a_walking_pace(self, path):
        kinds = [cell["cell_type"] for cell in cells(path)]
        assert "codecodecode" not in "".join(kinds[3:])  # the opening has set-up and imports, then parameters
        lines = [len(source(c).splitlines()) for c in cells(path) if c["cell_type"] == "code"]
        assert statistics.median(lines) <= 8
        assert sorted(lines)[int(0.9 * (len(lines) - 1))] <= 20
        assert 1 <= kinds.count("markdown") / kinds.count("code") <= 2

    def test_what_became_of_every_prediction_is_computed(self, path):
        """Before the next one is made."""
        told = True
        for cell in cells(path)[1:]:
            made = cell["cell_type"] == "markdown" and "**Prediction" in source(cell)
            assert told or not made, source(cell)
            told = not made and (told or "came_true(" in source(cell))
        assert told

    def test_it_ends_with_a_summary_and_exercises(self, path):
        closing = next(source(c) for c in reversed(cells(path)) if c["cell_type"] == "markdown")
        for part in ("## Summary", "**Exercises**", "**Next**"):
            assert part in closing
