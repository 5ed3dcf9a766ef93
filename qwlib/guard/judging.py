"""Content safety: a language model asked whether a message is safe, and its answer as a probability.

`Judge` puts a row of `guards` over any `Lm`, so that every scheme and backend can be measured, and any chat model stand in
where the guard's own weights can't be had.

Two measurements. `score` writes the beginning of the answer itself and asks for the probabilities of the next word, one forward
pass a batch: P(unsafe) = softmax over the two verdicts, in float32. The beginning of the prompt (task and categories) is the same
for every message: it is read once, and its keys and values are used again. `generate_verdicts` lets the model write: categories,
parse failures and latency come from there.

What it leaves out: conversations of more than one message and its answer.
"""

import math
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

from ..errors import QwlibError, whole_number
from ..models import texts
from ..running import chats, padding
from . import guards, labelled, verdicts
from .verdicts import TAXONOMY


@dataclass(frozen=True)
class Score:
    """Probabilities of one row. `user` and `response`: P(unsafe), None where the guard gives none.

    `margin` is the difference of the logarithms, unsafe − safe, of what was judged last; `off_verdict` the probability of all
    other words in its place, which says whether the guard still speaks its own language.
    """

    user: float | None
    response: float | None
    margin: float
    off_verdict: float

    @property
    def unsafe(self) -> float:
        """P(unsafe) of what was judged last: the response where there is one."""
        return self.user if self.response is None else self.response

    def blocked(self, threshold: float) -> bool:
        """Whether it may not pass: also where there is no number, which is greater than nothing."""
        return not self.unsafe < threshold


@dataclass(frozen=True)
class Answer:
    """What the guard wrote about one row, how it reads, and the seconds until its batch was written."""

    text: str
    verdict: verdicts.Verdict
    tokens: int
    seconds: float


class Judge:
    """A guard over a loaded model.

        with qwlib.load("nemoguard-8b", "nf4-dq") as lm:
            judge = Judge(lm, "nemoguard-8b")
            judge.score(["How do I kill a Python process?"])[0].unsafe

    Raises QwlibError for an unknown guard, and where the model's tokenizer can't tell the verdicts apart by one token.
    """

    def __init__(self, lm, row: str = "nemoguard-8b", *, taxonomy: dict[str, str] = TAXONOMY):
        self.lm, self.row, self.taxonomy = lm, guards.find(row), taxonomy
        if taxonomy is not TAXONOMY and not self.row.lists_categories:
            raise QwlibError(f"{self.row.name} has categories of its own: leave out the taxonomy")
        self._special = sorted({*lm.tokenizer.all_special_tokens, *lm.tokenizer.get_added_vocab()}, key=len)[::-1]
        self._special = [token for token in self._special if len(token.strip()) > 1]
        self._begin = self._ids(self.row.begin)
        self._words = {word: self._word(word) for word in (*self.row.safe, *self.row.unsafe)}
        self._between = self._behind(self.row.safe[0], self.row.between) if self.row.between else []
        firsts = {ids[0] for ids in self._words.values()}
        if len(firsts) < len(self._words):
            raise QwlibError(f"{lm.row.name} begins {' and '.join(self._words)} with one token: it can't be scored")
        self._kept = self._model = None  # what every prompt begins with, and the model that read it

    def render(self, prompt: str, response: str | None = None) -> str:
        """The text that the model reads, up to where its answer begins."""
        for text in (prompt,) if response is None else (prompt, response):
            if not isinstance(text, str) or not text.strip():
                raise QwlibError(
                    "a message to judge is a text that is not empty, and so is a response where there is one"
                )
            texts.checked(text, "a message to judge")
        said = [text if text is None else guards.defused(text, self._special) for text in (prompt, response)]
        messages = self.row.messages(*said, self.taxonomy)
        if not self.lm.tokenizer.chat_template:
            return "\n\n".join(message["content"] for message in messages) + "\n"
        return chats.rendered(self.lm.tokenizer, messages, self.lm.row.name, **self.row.options)

    def ids(self, prompt: str, response: str | None = None) -> list[int]:
        """The same as token ids."""
        return self._ids(self.render(prompt, response), whole=True)

    @property
    def constant(self) -> list[int]:
        """The token ids that every prompt begins with."""
        one, other = self.ids("a"), self.ids("7")
        same = next((i for i, (x, y) in enumerate(zip(one, other, strict=False)) if x != y), 0)
        return one[:same]

    def score(
        self,
        prompts: Sequence[str],
        responses: Sequence[str | None] | None = None,
        *,
        batch: int = 8,
        reuse: bool = True,
    ) -> list[Score]:
        """P(unsafe) of each row, in order. `batch` rows go through the model at once, the longest first.

        `reuse=False` reads the constant part of the prompt again for every row. For a response, P(unsafe) is the sum over both
        verdicts on the user's message: two continuations a row.

        Raises QwlibError for lists that differ in length, an empty message, or a prompt longer than the model's context.
        """
        rows, batch = self._rows(prompts, responses), whole_number(batch, "batch")
        if not rows:
            return []
        if reuse and (self._model is None or self._model() is not self.lm.model):
            constant = self.constant
            self._kept, self._model = self.lm.prefix(constant) if constant else None, weakref.ref(self.lm.model)
        jobs, found = [], {}  # a job: (row, way, whether it is read whole, ids)
        for number, row in enumerate(rows):
            for way, ids in enumerate(self._ways(*row)):
                self._check_room(number, ids)
                jobs.append((number, way, *self._without_kept(ids, reuse)))
        for whole in (True, False):  # rows whose tokens differ before the message begins are read whole
            some = sorted((job for job in jobs if job[2] is whole), key=lambda job: -len(job[3]))
            for first in range(0, len(some), batch):
                part = some[first : first + batch]
                read = self._read([ids for *_, ids in part], None if whole else self._kept)
                found |= {(number, way): each for (number, way, *_), each in zip(part, read, strict=True)}
        return [self._score(found, number, response) for number, (_, response) in enumerate(rows)]

    def generate_verdicts(
        self,
        prompts: Sequence[str],
        responses: Sequence[str | None] | None = None,
        *,
        new_tokens: int = 128,
        batch: int = 1,
        on_token: Callable | None = None,
    ) -> list[Answer]:
        """The guard's own words on each row, greedy, up to `new_tokens` (two ratings and all 23 categories take 122).

        `seconds` are those of the row's batch: with `batch=1` a row's latency. `on_token` as in `Lm.stream`.

        Raises QwlibError as `score` does.
        """
        rows, answers, batch = self._rows(prompts, responses), [], whole_number(batch, "batch")
        asked = [self.ids(*row) for row in rows]
        for number, ids in enumerate(asked):
            self._check_room(number, ids, new_tokens)
        for first in range(0, len(rows), batch):
            part, ids = rows[first : first + batch], padding.pad_left(asked[first : first + batch])
            began = time.perf_counter()
            out = self.lm.stream(ids, new_tokens=new_tokens, on_token=on_token, stop_at_eos=True)
            took = time.perf_counter() - began
            for (_, response), tokens in zip(part, out.tolist(), strict=True):
                end = next((i for i, token in enumerate(tokens) if token in self.lm.engine.stops), len(tokens))
                text = self.lm.tokenizer.decode(tokens[:end])  # with special tokens: they are no part of a clean answer
                answers.append(Answer(text, self.parse(text, response is not None), end, took))
        return answers

    def parse(self, text: str, response: bool = False) -> verdicts.Verdict:
        """How this guard's answer reads."""
        own = {"taxonomy": self.taxonomy} if self.row.lists_categories else {}
        return self.row.parse(text, response=response, **own)

    def _ids(self, text: str, whole: bool = False) -> list[int]:
        """Token ids; a `whole` prompt gets a tokenizer's first token where no chat template has written it."""
        special = whole and not self.lm.tokenizer.chat_template
        return self.lm.tokenizer(text, add_special_tokens=special, verbose=False).input_ids

    def _word(self, word: str) -> list[int]:
        return self._behind("", word)

    def _behind(self, word: str, text: str) -> list[int]:
        """The ids of a text behind the beginning of the answer and a verdict, where the tokenizer does not join them."""
        before = self._begin + (self._words[word] if word else [])
        whole = self._ids(self.row.begin + word + text)
        return whole[len(before) :] if whole[: len(before)] == before else self._ids(text)

    def _rows(self, prompts, responses) -> list[tuple[str, str | None]]:
        if isinstance(prompts, str):
            raise QwlibError("messages are a list: put the one into brackets")
        responses = [None] * len(prompts) if responses is None else responses
        if len(prompts) != len(responses):
            raise QwlibError(f"{len(prompts)} messages and {len(responses)} responses: give None where there is none")
        return list(zip(prompts, responses, strict=True))

    def _ways(self, prompt: str, response: str | None) -> list[list[int]]:
        """The prompt and each beginning of the answer after which a verdict follows.

        One, or two where the verdict on the response comes behind that on the user: behind "safe" and behind "unsafe".
        """
        text = self.render(prompt, response)
        ids = self._ids(text, whole=True) + ([] if text.endswith(self.row.begin) else self._begin)
        if response is None or not self._between:
            return [ids]
        return [ids + self._words[words[0]] + self._between for words in (self.row.safe, self.row.unsafe)]

    def _check_room(self, number: int, ids: list[int], new_tokens: int = 0) -> None:
        """Before anything is read: one message that is too long must not cost the time of all others."""
        if self.lm.longest and len(ids) + new_tokens > self.lm.longest:
            more = f" and {new_tokens} new ones" if new_tokens else ""
            raise QwlibError(
                f"message {number} (from 0) makes {len(ids)} tokens{more}, more than the model's {self.lm.longest} positions: "
                "shorten it or leave it out"
            )

    def _without_kept(self, ids: list[int], reuse: bool) -> tuple[bool, list[int]]:
        """(whether the row has to be read whole, the ids to read)."""
        kept = self._kept.ids if reuse and self._kept else []
        return (False, ids[len(kept) :]) if kept and ids[: len(kept)] == kept else (True, ids)

    def _read(self, rows: list[list[int]], after):
        """Log-probabilities of (safe, unsafe) at the last positions: (rows × positions × 2), float32, on the host.

        A row's last position is the verdict on what was judged last; the one on the user lies a word and `between` before it.
        """
        import torch

        wide = padding.pad_left(rows)
        reach = min(1 + max(map(len, self._words.values())) + len(self._between), wide.shape[1])
        found = self.lm.logits(wide, last=reach, after=after, precise=True).float().log_softmax(-1)
        first = [[self._words[word][0] for word in words] for words in (self.row.safe, self.row.unsafe)]
        return torch.stack([found[..., ids].logsumexp(-1) for ids in first], -1).cpu()

    def _score(self, found: dict, number: int, response: str | None) -> Score:
        """One row's `Score` out of the log-probabilities behind its ways, by (row, way)."""
        safe, unsafe = found[number, 0][-1].tolist()
        if (number, 1) not in found:
            p, off = _share(unsafe - safe), _off(safe, unsafe)
            return Score(*((p, None) if response is None else (None, p)), margin=unsafe - safe, off_verdict=off)
        back = len(self._words[self.row.safe[0]]) + len(self._between)
        user_safe, user_unsafe = found[number, 0][-1 - back].tolist()
        other = found[number, 1][-1].tolist()
        weights = _log_share(user_safe - user_unsafe), _log_share(user_unsafe - user_safe)
        each = (
            [_log_share(u - s) for s, u in ((safe, unsafe), other)],
            [_log_share(s - u) for s, u in ((safe, unsafe), other)],
        )
        is_unsafe, is_safe = (_log_sum(w + p for w, p in zip(weights, part, strict=True)) for part in each)
        off = sum(math.exp(w) * _off(*way) for w, way in zip(weights, ((safe, unsafe), other), strict=True))
        return Score(math.exp(weights[1]), math.exp(is_unsafe), margin=is_unsafe - is_safe, off_verdict=off)


def calibration_text(name: str, tokenizer) -> str:
    """What a guard reads at work, to calibrate on: its prompts over the project's own messages, and the right verdicts.

    Only messages of the split `tune`; guards are measured on `test`. The tokenizer is the guard's, with its chat template.

    Raises QwlibError for an unknown guard.
    """
    judge = Judge(SimpleNamespace(tokenizer=tokenizer, row=SimpleNamespace(name=name)), name)
    begin, words, texts = judge.row.begin, (judge.row.safe[0], judge.row.unsafe[0]), []
    for row in labelled.load().part("tune").rows:
        texts.append(judge.render(row.prompt).removesuffix(begin) + begin + words[row.label])
        if row.response is not None:
            on_user = words[row.label] + judge.row.between if judge.row.between else ""
            asked = judge.render(row.prompt, row.response).removesuffix(begin)
            texts.append(asked + begin + on_user + words[row.response_label])
    return "\n".join(texts)


def _log_share(margin: float) -> float:
    """Logarithm of 1 / (1 + exp(-margin))."""
    return min(margin, 0.0) - math.log1p(math.exp(-abs(margin)))


def _share(margin: float) -> float:
    return math.exp(_log_share(margin))


def _log_sum(logs) -> float:
    logs = list(logs)
    return max(logs) + math.log(sum(math.exp(each - max(logs)) for each in logs))


def _off(safe: float, unsafe: float) -> float:
    return max(1 - math.exp(safe) - math.exp(unsafe), 0.0)  # in this order NaN stays NaN
