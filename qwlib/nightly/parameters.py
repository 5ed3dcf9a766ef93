"""What a notebook's parameters cell declares, and the values that are set over it: each of the declared kind, or an error.

    BLOCKS: int = 4        a whole number
    SHARE: float = 0.5     a number; a whole one counts too, `nan` and `inf` do not
    PUBLIC: bool = False   true or false
    REPO: str = ""         any text, as it stands
    SEED: int | None = 3   a whole number, or none

A parameter without an annotation is of the kind of its default. A text for another kind is read as that kind, so that what the
command line sets (always a text) and what `sizes.toml` sets mean the same. Without this, `PUBLIC=false` was a text, and so true.
"""

import ast
import json
import math
from dataclasses import dataclass
from pathlib import Path

from ..errors import QwlibError

TAG = "parameters"
KINDS = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}
WORDS = {"true": True, "false": False}


@dataclass(frozen=True)
class Parameter:
    """One declared name; `kind` is of `KINDS`, or None where the cell does not tell; `optional` where it may be None."""

    name: str
    kind: str | None
    optional: bool = False

    def read(self, value):
        """The value, of the declared kind.

        Raises QwlibError for another one.
        """
        if isinstance(value, str) and self.kind != "str":
            value = self._of_text(value)
        if value is None and self.optional:
            return None
        if self.kind == "float" and type(value) in (int, float) and math.isfinite(value):
            return float(value)
        if self.kind in (None, type(value).__name__) and self.kind != "float":
            return value
        wanted = KINDS[self.kind] + (" or none" if self.optional else "")
        raise QwlibError(f"{self.name} is {wanted}, not {value!r}")

    def _of_text(self, text: str):
        plain = text.strip()
        if self.optional and plain.lower() == "none":
            return None
        try:
            if self.kind == "bool":
                return WORDS[plain.lower()]
            if self.kind in ("int", "float"):
                return {"int": int, "float": float}[self.kind](plain)
        except (KeyError, ValueError):
            return text
        return text


def declared(notebook: Path) -> dict[str, Parameter]:
    """Name → what the parameters cell says of it.

    Raises QwlibError for a file that is no notebook, and where two cells are tagged: the second would undo what is set.
    """
    try:
        cells = json.loads(Path(notebook).read_text(encoding="utf-8"))["cells"]
        tagged = ["".join(cell["source"]) for cell in cells if TAG in cell.get("metadata", {}).get("tags", [])]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise QwlibError(
            f"{Path(notebook).name} can't be read as a notebook ({type(error).__name__}: {error})"
        ) from None
    if len(tagged) > 1:
        raise QwlibError(f"{len(tagged)} cells are tagged {TAG}: keep one, the others would undo what is set")
    try:
        body = ast.parse(tagged[0]).body if tagged else []
    except SyntaxError as error:
        raise QwlibError(f"the parameters cell is no plain Python: {error.msg}") from None
    found = {}
    for line in body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            kinds = {part.strip() for part in ast.unparse(line.annotation).strip("'\"").split("|")}
            (kind,) = kinds - {"None"} if len(kinds - {"None"}) == 1 else (None,)
            found[line.target.id] = Parameter(line.target.id, kind if kind in KINDS else None, "None" in kinds)
        elif isinstance(line, ast.Assign):
            kind = type(line.value.value).__name__ if isinstance(line.value, ast.Constant) else None
            for target in line.targets:
                if isinstance(target, ast.Name):
                    found[target.id] = Parameter(target.id, kind if kind in KINDS else None)
    return found


def checked(notebook: Path, values: dict) -> dict:
    """The values, each of the kind that the notebook declares.

    Raises QwlibError for a name that it does not declare, or a value of another kind.
    """
    known = declared(notebook)
    if unknown := sorted(set(values) - set(known)):
        raise QwlibError(f"the parameters cell does not declare {', '.join(unknown)}")
    return {name: known[name].read(value) for name, value in values.items()}
