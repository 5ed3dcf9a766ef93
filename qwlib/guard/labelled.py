"""Sets of messages with labels, on which a guard is measured: safe or unsafe, and why.

The project's own set, `own`, needs no network: 264 prompts in mild words, half of them unsafe in intent, half safe, most of the
safe ones look-alikes ("How do I kill a Python process?"). A third of it, `tune`, is there to fix a threshold on. `training` has
more messages of the same kind, to train a guard on. The sets that others published are read from the Hub or from a file, and are
for evaluation only.

What it leaves out: conversations, and languages other than English.
"""

import contextlib
import csv
import io
import json
from collections import Counter
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

from ..errors import QwlibError
from ..models import hub, texts
from .verdicts import TAXONOMY

# names in Aegis 2.0 that differ from those of NemoGuard's prompt, as far as known; others stay as they are
ALIASES = {"Guns/Illegal Weapons": "Guns and Illegal Weapons"}
_AEGIS = ("nvidia/Aegis-AI-Content-Safety-Dataset-2.0", "test.json")
_XSTEST = ("Paul/XSTest", "xstest_prompts.csv")
PACKAGED = {"own": "safety_prompts.jsonl", "training": "training_prompts.jsonl"}
LABELS = {"safe": 0, "unsafe": 1}


@dataclass(frozen=True)
class Row:
    """A message and, where there is one, the answer to it; labels are 1 for unsafe. `category` is "" where none was named."""

    prompt: str
    label: int
    response: str | None = None
    response_label: int | None = None
    category: str = ""
    split: str = "test"


@dataclass(frozen=True)
class Labelled:
    """Rows of one set. `skipped` counts, by reason, the rows that it held and that can't be judged."""

    name: str
    rows: list[Row]
    skipped: Counter = field(default_factory=Counter)

    @property
    def prompts(self) -> list[str]:
        return [row.prompt for row in self.rows]

    @property
    def responses(self) -> list[str | None]:
        return [row.response for row in self.rows]

    @property
    def labels(self) -> list[int]:
        return [row.label for row in self.rows]

    def part(self, split: str) -> "Labelled":
        """The rows of one split.

        Raises QwlibError where there are none.
        """
        rows = [row for row in self.rows if row.split == split]
        if not rows:
            there = ", ".join(sorted({row.split for row in self.rows}))
            raise QwlibError(f"{self.name} has no split {split!r}, only {there}")
        return Labelled(self.name, rows, self.skipped)

    def first(self, count: int) -> "Labelled":
        """So many rows, unsafe and safe by turns, each in the set's order."""
        kinds = [[row for row in self.rows if row.label == label] for label in (1, 0)]
        mixed = [row for pair in zip(*kinds, strict=False) for row in pair]
        mixed += [row for kind in kinds for row in kind[len(mixed) // 2 :]]
        return Labelled(self.name, mixed[:count], self.skipped)


def load(source: str = "own") -> Labelled:
    """`own`, `training`, `xstest` or `aegis2` (both from the Hub), or a CSV, JSON or JSONL file with `prompt` and `label`.

    Further columns that are read: `response`, `response_label`, `category`, `split`. Labels are safe and unsafe. Messages are
    taken byte for byte; empty and redacted ones are counted in `skipped`.

    Raises QwlibError for a file or set that can't be had, a missing column, a label that is neither, a set of one kind, and for a
    row that would lose something: too many or too few cells, two of one name, a message that is no text.
    """
    if source in PACKAGED:
        text = (resources.files(__package__) / PACKAGED[source]).read_text(encoding="utf-8")
        return _labelled(source, [json.loads(line) for line in text.splitlines()])
    if source == "xstest":
        return _labelled("XSTest", _read(Path(hub.fetch_data(*_XSTEST))))
    if source == "aegis2":
        return _labelled("Aegis 2.0 test", [_of_aegis(row) for row in _read(Path(hub.fetch_data(*_AEGIS)))])
    try:
        path = Path(source).expanduser()
        there = path.is_file()
    except (OSError, RuntimeError, ValueError, TypeError):
        there = False  # a name that no file can have, an unknown `~user`, no text at all
    if not there:
        shown = source if isinstance(source, str) and len(source) < 100 else f"{str(source)[:60]}…"
        raise QwlibError(
            f"no such set of messages: {shown}; name own, xstest, aegis2, training, or a CSV, JSON or JSONL file"
        )
    found = _read(path)
    return _labelled(path.name, [_of_aegis(row) if "prompt_label" in row else row for row in found])


def _read(path: Path) -> list[dict]:
    """The rows of a file, none of which lost a cell or a key."""
    try:
        text = path.read_bytes().decode("utf-8-sig")  # line ends within a message stay as they are
        if path.suffix.lower() == ".csv":
            return _cells(path.name, text)
        rows = _objects(text, lines=path.suffix.lower() != ".json")
    except (ValueError, OSError, csv.Error, RecursionError) as error:
        if isinstance(error, QwlibError):
            raise
        raise QwlibError(f"{path.name} can't be read as CSV, JSON or JSONL: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise QwlibError(f"{path.name} is no list of rows with names")
    return rows


def _cells(name: str, text: str) -> list[dict]:
    """The rows of a CSV file under the names in its head; blank lines are none."""
    longest = csv.field_size_limit(len(text) + 1)  # else a message of more than 131,072 letters is an error
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        rows = [(reader.line_num, cells) for cells in reader if cells]
    finally:
        csv.field_size_limit(longest)
    if not rows:
        return []
    (_, head), *rows = rows
    if twice := [column for column, count in Counter(head).items() if count > 1]:
        raise QwlibError(f"{name} has two columns called {twice[0]!r}: rename the one that is not meant")
    for line, cells in rows:
        if len(cells) != len(head):
            raise QwlibError(
                f"line {line} of {name} has {len(cells)} cells, its head {len(head)}: put texts with commas in quotes"
            )
    return [dict(zip(head, cells, strict=True)) for _, cells in rows]


def _objects(text: str, *, lines: bool):
    """What a JSON or JSON Lines file holds; one whose lines are objects counts as the latter, whatever it is called."""

    def once(pairs: list[tuple]) -> dict:
        if twice := [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]:
            raise ValueError(f"two values are called {twice[0]!r}")
        return dict(pairs)

    def each() -> list:
        return [json.loads(line, object_pairs_hook=once) for line in text.split("\n") if line.strip()]

    if lines:
        return each()
    try:
        return json.loads(text, object_pairs_hook=once)
    except ValueError as error:
        with contextlib.suppress(ValueError):
            return each()
        raise error


def _of_aegis(row: dict) -> dict:
    """A row in this module's names; of several categories the first."""
    first = str(row.get("violated_categories") or "").split(",")[0].strip()
    own = {"label": row.get("prompt_label"), "category": ALIASES.get(first, first)}
    return {key: row.get(key) for key in ("prompt", "response", "response_label")} | own


def _labelled(name: str, found: list[dict]) -> Labelled:
    if not found:
        raise QwlibError(f"{name} holds no rows")
    if absent := [column for column in ("prompt", "label") if not any(column in row for row in found)]:
        there = ", ".join(map(str, found[0]))
        raise QwlibError(f"{name} has no column {absent[0]!r}, only {there}: rename the one that is meant")
    rows, skipped = [], Counter()
    for number, row in enumerate(found, start=1):
        for key in ("prompt", "response", "category", "type", "split"):
            if row.get(key) is not None:
                texts.checked(row[key], f"row {number} of {name}: its {key}")
        prompt = row.get("prompt")
        if not prompt or not prompt.strip():
            skipped["empty prompt"] += 1
        elif prompt.strip() == "REDACTED":  # Aegis 2.0 keeps back texts of another licence so
            skipped["redacted prompt"] += 1
        else:
            rows.append(_row(name, number, row))
    if len({row.label for row in rows}) < 2:
        raise QwlibError(f"{name} holds rows of one label only: a classifier can't be measured on them")
    return Labelled(name, rows, skipped)


def _row(name: str, number: int, row: dict) -> Row:
    response = row.get("response")
    response = response if response and response.strip() not in ("", "REDACTED") else None
    labels = [row.get("label"), row.get("response_label") if response else None]
    for label in labels[: 2 if labels[1] else 1]:
        if not isinstance(label, str) or label not in LABELS:
            raise QwlibError(f"row {number} of {name} is labelled {str(label)[:40]!r}: labels are safe and unsafe")
    return Row(
        row["prompt"],
        LABELS[labels[0]],
        response,
        LABELS[labels[1]] if labels[1] else None,
        str(row.get("category") or row.get("type") or ""),  # XSTest's word for it
        str(row.get("split") or "test"),
    )


def categories(labelled: Labelled) -> dict[str, tuple[int, int]]:
    """Category → (unsafe rows, safe rows that resemble it), in the taxonomy's order."""
    counts = Counter((row.category, row.label) for row in labelled.rows)
    return {name: (counts[name, 1], counts[name, 0]) for name in TAXONOMY.values() if counts[name, 1] + counts[name, 0]}
