"""Training data: prompts with answers, or conversations, checked line by line and turned into token ids.

Only the answers are learnt. The labels of all other tokens are -100, which PyTorch's cross-entropy leaves out. A prompt and its
answer are tokenized apart, because a model that is asked reads the prompt alone and then generates.

What it leaves out: several conversations in one row (packing). Without attention kernels for it, tokens would see other rows.
"""

import csv
import io
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import files
from ..errors import QwlibError
from ..guard import guards, labelled
from ..models import texts
from ..running import chats

GUARD = "guard:"
IGNORED = -100  # torch.nn.functional.cross_entropy's ignore_index
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """A conversation (`[{"role", "content"}]`) that ends with an answer, and where it stands in its file.

    `emphasis`: words of that answer, in their order, that matter most.
    """

    messages: list[dict]
    line: int
    emphasis: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """Token ids and labels of one example, and the places of those that its `emphasis` names."""

    ids: list[int]
    labels: list[int]
    line: int
    emphasis: tuple[int, ...] = ()

    @property
    def learnt(self) -> int:
        return sum(label != IGNORED for label in self.labels)


def read(data: Path | str) -> list[Example]:
    """The examples of a JSONL or CSV file, in its order.

    A line has `prompt` and `answer`, or `messages` in the form of chat templates, the last one by the assistant. It may have
    `emphasis`, a word of the answer or a list of them, which count more (`Settings.emphasis`). `guard:SET` are the messages of a
    set that `labelled.load` knows, in NemoGuard's official format with the right answers, and the verdicts as their emphasis.

    Raises QwlibError that names the first line that is something else.
    """
    if str(data).startswith(GUARD):
        rows = labelled.load(str(data).removeprefix(GUARD)).rows
        return [Example(guards.taught(row), line, guards.verdicts_of(row)) for line, row in enumerate(rows, start=1)]
    path = Path(data).expanduser()
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise QwlibError(f"{path} can't be read ({error}): name a JSONL or CSV file in UTF-8") from None
    rows = _csv(path.name, text) if path.suffix.lower() == ".csv" else _jsonl(path.name, text)
    found = []
    for line, row in rows:
        messages = _messages(row, where := f"line {line} of {path.name}")
        found.append(Example(messages, line, _emphasis(row, messages[-1]["content"], where)))
    if not found:
        raise QwlibError(f"{path.name} holds no examples")
    return found


def _csv(name: str, text: str) -> list[tuple[int, dict]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(reader.line_num, cells) for cells in reader if cells]
    except csv.Error as error:
        raise QwlibError(f"line {reader.line_num} of {name} can't be read as CSV: {error}") from None
    if not rows or not {"prompt", "answer"} <= set(rows[0][1]):
        raise QwlibError(f"{name} needs a head with the columns prompt and answer")
    head = rows[0][1]
    if twice := [column for column in head if head.count(column) > 1]:
        raise QwlibError(f"{name} has two columns called {twice[0]!r}: rename the one that is not meant")
    for line, cells in rows[1:]:
        if len(cells) != len(head):
            raise QwlibError(
                f"line {line} of {name} has {len(cells)} cells, its head {len(head)}: put texts with commas in quotes"
            )
    return [(line, dict(zip(head, cells, strict=True))) for line, cells in rows[1:]]


def _jsonl(name: str, text: str) -> list[tuple[int, dict]]:
    found = []
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        try:
            row = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise QwlibError(f"line {line} of {name} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise QwlibError(f"line {line} of {name} is no object with prompt and answer, or with messages")
        found.append((line, row))
    return found


def _messages(row: dict, where: str) -> list[dict]:
    if ("messages" in row) == ("prompt" in row):
        raise QwlibError(f"{where} needs either messages, or prompt and answer")
    if "prompt" in row:
        if "answer" not in row:
            raise QwlibError(f"{where} has a prompt and no answer")
        given = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["answer"]}]
    else:
        given = row["messages"]
    if not isinstance(given, list) or not given:
        raise QwlibError(f"{where}: messages are a list of objects with role and content")
    found = []
    for message in given:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise QwlibError(f"{where}: each message has a role, which is one of {', '.join(ROLES)}")
        content = texts.checked(message.get("content"), f"{where}: what the {message['role']} says")
        if not content.strip():
            raise QwlibError(f"{where}: what the {message['role']} says is empty")
        found.append({"role": message["role"], "content": content})
    if found[-1]["role"] != "assistant":
        raise QwlibError(f"{where} ends with the {found[-1]['role']}: the last message is the answer to learn")
    return found


def _emphasis(row: dict, answer: str, where: str) -> tuple[str, ...]:
    words = row.get("emphasis") or ()
    words = (words,) if isinstance(words, str) else words
    if not isinstance(words, list | tuple) or not all(isinstance(word, str) and word for word in words):
        raise QwlibError(f"{where}: its emphasis is a word of the answer, or a list of them")
    _spans(answer, words, where)
    return tuple(words)


def _spans(text: str, words: Sequence[str], where: str) -> list[tuple[int, int]]:
    """(first letter, letter behind the last) of each word, which stands behind the one before."""
    found, at = [], 0
    for word in words:
        begin = text.find(word, at)
        if begin < 0:
            raise QwlibError(f"{where}: its emphasis {word[:40]!r} is not a part of the answer there")
        found.append((begin, at := begin + len(word)))
    return found


def sha256(examples: Sequence[Example]) -> str:
    """A hash of what is said in them, and of what is emphasised."""
    said = [each.messages if not each.emphasis else [*each.messages, *each.emphasis] for each in examples]
    return files.sha256_text(json.dumps(said, ensure_ascii=False))


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(for training, for validation): `share` of the examples, drawn by `seed`, are held back. Both keep the file's order."""
    held = set(random.Random(seed).sample(range(len(examples)), round(share * len(examples))))
    kept = [each for place, each in enumerate(examples) if place not in held]
    return kept, [each for place, each in enumerate(examples) if place in held]


def tokenized(lm, examples: Sequence[Example], longest: int) -> list[Tokens]:
    """Token ids and labels by the model's chat template, or as prompt, answer and end of text where it has none.

    Raises QwlibError where examples have more than `longest` ids, or more than the model has positions. None is cut, because it
    would teach answers that do not end.
    """
    if lm.longest and longest > lm.longest:
        raise QwlibError(f"{lm.row.name} has {lm.longest} positions: longest can't be {longest}")
    found = []
    for example in examples:
        ids, labels, pieces = [], [], _pieces(lm, example.messages)
        for text, learnt in pieces:
            piece = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += piece
            labels += piece if learnt else [IGNORED] * len(piece)
        places = ()
        if example.emphasis:
            begin = len(ids) - len(piece)
            places = tuple(begin + place for place in _emphasised(lm, text, example))
        found.append(Tokens(ids, labels, example.line, places))
    if long := [each for each in found if len(each.ids) > longest]:
        most = max(len(each.ids) for each in long)
        raise QwlibError(
            f"{len(long)} of {len(found)} examples have more than {longest} tokens, line {long[0].line} first and up to {most}: "
            "raise longest, or shorten them"
        )
    return found


def _emphasised(lm, answer: str, example: Example) -> list[int]:
    """The places of the answer's tokens that belong to the example's emphasis."""
    if not lm.tokenizer.is_fast:
        raise QwlibError(f"{lm.row.name}: its tokenizer does not tell where tokens stand: leave out the emphasis")
    spans = _spans(answer, example.emphasis, f"line {example.line}")
    letters = lm.tokenizer(answer, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    return [place for place, (a, b) in enumerate(letters) if any(a < end and b > begin for begin, end in spans)]


def _pieces(lm, messages: list[dict]) -> list[tuple[str, bool]]:
    """The text of a conversation in pieces, and whether each is learnt: answers are, with what ends them."""
    tokenizer = lm.tokenizer
    if not tokenizer.chat_template:
        found = [(tokenizer.bos_token or "", False)]
        for message in messages:
            answer = message["role"] == "assistant"
            found.append((message["content"] + ((tokenizer.eos_token or "") if answer else "\n"), answer))
        return found
    found, so_far = [], ""
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = chats.rendered(tokenizer, messages[:place], lm.row.name)
        whole = chats.rendered(tokenizer, messages[: place + 1], lm.row.name, add_generation_prompt=False)
        if not (asked.startswith(so_far) and whole.startswith(asked)):
            raise QwlibError(
                f"{lm.row.name}: its chat template changes earlier messages when later ones follow: answers can't be told apart"
            )
        answer = whole[len(asked) :].rstrip()  # some templates end with a new line, which belongs to the next message
        found += [(asked[len(so_far) :], False), (answer, True)]
        so_far = asked + answer
    return found


def batch(rows: Sequence[Tokens], pad: int, emphasis: float = 1):
    """One batch: `input_ids`, `attention_mask` and `labels` (rows × longest), padded on the right with `pad` and -100.

    `weights`: how much a token counts: `emphasis` where its row says so, 1 for others that are learnt, else 0. `lines`: (rows,).
    """
    import torch

    width = max(len(row.ids) for row in rows)
    weights = torch.zeros(len(rows), width)
    for place, row in enumerate(rows):
        weights[place, : len(row.labels)] = torch.tensor([float(label != IGNORED) for label in row.labels])
        weights[place, list(row.emphasis)] *= emphasis

    def filled(lists, fill: int):
        return torch.tensor([[*each, *[fill] * (width - len(each))] for each in lists])

    return {
        "input_ids": filled([row.ids for row in rows], pad),
        "attention_mask": filled([[1] * len(row.ids) for row in rows], 0),
        "labels": filled([row.labels for row in rows], IGNORED),
        "weights": weights,
        "lines": torch.tensor([row.line for row in rows]),
    }
