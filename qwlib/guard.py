"""Content safety: a language model asked whether a message is safe, and its answer as a probability.

A guard is a row: how a message becomes the model's prompt, which words say safe and unsafe, and how its text is read. `Judge`
puts a row over any `Lm`, so that every scheme and backend can be measured, and any chat model stand in where the guard's own
weights can't be had.

Two measurements. `score` writes the beginning of the answer itself and asks for the probabilities of the next word, one forward
pass a batch: P(unsafe) = softmax over the two verdicts, in float32. The beginning of the prompt (task and categories) is the same
for every message: it is read once, and its keys and values are used again. `generate_verdicts` lets the model write: categories,
parse failures and latency come from there.

What it leaves out: conversations of more than one message and its answer.

NemoGuard's prompt is data/nemoguard_prompt.txt, byte for byte that of examples/configs/content_safety/prompts.yml in NVIDIA's
NeMo Guardrails, the literal `response: agent:` included. The others' prompts are their chat templates.
"""

import functools
import math
import re
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources

from . import lm as lms
from . import verdicts
from .errors import QwlibError, unknown
from .verdicts import TAXONOMY


def nemoguard_prompt(prompt: str, response: str | None = None, taxonomy: dict[str, str] = TAXONOMY) -> str:
    """NemoGuard's official prompt for a message, and a response to it where there is one; `taxonomy` maps codes to names.

    Text that would look like a part of the prompt is broken up (see `defused`); all other text goes in as it is.
    """
    text = (resources.files("qwlib") / "data" / "nemoguard_prompt.txt").read_text(encoding="utf-8").removesuffix("\n")
    if response is None:
        text = text.replace("response: agent: {{ bot_response }}\n\n", "")
    begin, end = "<BEGIN UNSAFE CONTENT CATEGORIES>\n", "\n<END UNSAFE CONTENT CATEGORIES>"
    text = f"{text.partition(begin)[0]}{begin}{{{{ categories }}}}{end}{text.partition(end)[2]}"
    listed = "\n".join(f"{code}: {defused(name)}." for code, name in taxonomy.items())
    said = {"user_input": defused(prompt), "bot_response": defused(response or ""), "categories": listed}
    return re.sub(r"\{\{ (\w+) \}\}", lambda place: said[place[1]], text)


_HIDDEN = "\u200b-\u200f\u2060\ufeff"  # characters that show nothing
_MARKERS = re.compile(rf"[<＜‹](?=[\t{_HIDDEN}]*/?[\t{_HIDDEN}]*(?:BEGIN|END)\b)", re.IGNORECASE)
_SPEAKERS = "user|agent|assistant|response|output json"
_TURNS = re.compile(
    rf"((?:^|[\n\r\x0b\x0c\x85\u2028\u2029])[ \t{_HIDDEN}]*(?:{_SPEAKERS})[{_HIDDEN}]*)([:：])", re.IGNORECASE
)


def defused(text: str, special: Sequence[str] = ()) -> str:
    """The text with a space put into whatever would end its place in the prompt.

    That is markers such as `<END CONVERSATION>`, lines that begin with a speaker (`response: agent:`), and a tokenizer's
    `special` tokens. A guard reads no more than words then; the words themselves are left for it to judge. Letters of other
    scripts that look like these are not undone, nor are other models' markers that are plain text here.
    """
    text = _TURNS.sub(r"\1 \2", _MARKERS.sub(r"\g<0> ", text))
    while found := next((token for token in special if token in text), None):
        text = text.replace(found, f"{found[0]} {found[1:]}")
    return text


def _nemoguard(prompt, response, taxonomy) -> list[dict]:
    return [{"role": "user", "content": nemoguard_prompt(prompt, response, taxonomy)}]


def _turns(prompt, response, taxonomy) -> list[dict]:
    answer = [] if response is None else [{"role": "assistant", "content": response}]
    return [{"role": "user", "content": prompt}, *answer]


@dataclass(frozen=True)
class Guard:
    """How one guard is asked and read. `model` is a catalog name or Hub id.

    `begin` is the beginning of its answer up to the verdict, `safe` and `unsafe` the words that can stand there, `between` what
    lies between the verdict on the user and the one on the response (None: one verdict, on the last message).
    """

    name: str
    model: str
    what: str
    messages: Callable[[str, str | None, dict], list[dict]]
    parse: Callable[..., verdicts.Verdict]
    begin: str
    safe: tuple[str, ...]
    unsafe: tuple[str, ...]
    between: str | None = None
    lists_categories: bool = False  # in its prompt, so that others can be given
    options: dict = field(default_factory=dict)  # of the chat template
    published: dict = field(
        default_factory=dict
    )  # a set of `labelled` → figures that the maker gives for the 16-bit model


_NEMO = dict(
    messages=_nemoguard,
    parse=verdicts.nemoguard,
    begin='{"User Safety": "',
    between='", "Response Safety": "',
    safe=("safe",),
    unsafe=("unsafe",),
    lists_categories=True,
    options={"date_string": "26 Jul 2024"},  # Llama 3.1's template prints a date: this is its own default
)
_QWEN = dict(messages=_turns, begin="Safety:")
GUARDS = {
    row.name: row
    for row in (
        Guard(
            "nemoguard-8b",
            "nemoguard-8b",
            "NVIDIA's, a LoRA adapter over Llama-3.1-8B-Instruct",
            published={"aegis2": {"f1": 0.868}},  # the model card's, on prompts
            **_NEMO,
        ),
        Guard(
            "nemotron-safety-guard-8b-v3",
            "nvidia/Llama-3.1-Nemotron-Safety-Guard-8B-v3",
            "its successor, merged weights",
            **_NEMO,
        ),
        Guard(
            "qwen3guard-0.6b",
            "Qwen/Qwen3Guard-Gen-0.6B",
            "small and open; what it calls controversial is unsafe here",
            parse=verdicts.qwen3guard,
            safe=(" Safe",),
            unsafe=(" Unsafe", " Controversial"),
            **_QWEN,
        ),
        Guard(
            "qwen3guard-0.6b-loose",
            "Qwen/Qwen3Guard-Gen-0.6B",
            "the same; what it calls controversial is safe",
            parse=functools.partial(verdicts.qwen3guard, loose=True),
            safe=(" Safe", " Controversial"),
            unsafe=(" Unsafe",),
            **_QWEN,
        ),
        Guard(
            "llama-guard-3-8b",
            "meta-llama/Llama-Guard-3-8B",
            "Meta's; gated",
            messages=_turns,
            parse=verdicts.llama_guard,
            begin="\n\n",
            safe=("safe",),
            unsafe=("unsafe",),
        ),
    )
}


def find(name: str) -> Guard:
    """The guard of that name.

    Raises QwlibError with the nearest names.
    """
    if isinstance(name, Guard):
        return name
    if name in GUARDS:
        return GUARDS[name]
    raise unknown("guard", name, GUARDS)


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
        self.lm, self.row, self.taxonomy = lm, find(row), taxonomy
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
        texts = [text if text is None else defused(text, self._special) for text in (prompt, response)]
        messages = self.row.messages(*texts, self.taxonomy)
        if not self.lm.tokenizer.chat_template:
            return "\n\n".join(message["content"] for message in messages) + "\n"
        options = {"tokenize": False, "add_generation_prompt": True, **self.row.options}
        return self.lm.tokenizer.apply_chat_template(messages, **options)

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
        rows = self._rows(prompts, responses)
        if not rows:
            return []
        if reuse and (self._model is None or self._model() is not self.lm.model):
            constant = self.constant
            self._kept, self._model = self.lm.prefix(constant) if constant else None, weakref.ref(self.lm.model)
        jobs, found = [], {}  # a job: (row, way, whether it is read whole, ids)
        for number, row in enumerate(rows):
            for way, ids in enumerate(self._ways(*row)):
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
        rows, answers = self._rows(prompts, responses), []
        for first in range(0, len(rows), batch):
            part = rows[first : first + batch]
            ids = lms.pad_left([self.ids(*row) for row in part])
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

    def _without_kept(self, ids: list[int], reuse: bool) -> tuple[bool, list[int]]:
        """(whether the row has to be read whole, the ids to read)."""
        kept = self._kept.ids if reuse and self._kept else []
        return (False, ids[len(kept) :]) if kept and ids[: len(kept)] == kept else (True, ids)

    def _read(self, rows: list[list[int]], after):
        """Log-probabilities of (safe, unsafe) at the last positions: (rows × positions × 2), float32, on the host.

        A row's last position is the verdict on what was judged last; the one on the user lies a word and `between` before it.
        """
        import torch

        wide = lms.pad_left(rows)
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
