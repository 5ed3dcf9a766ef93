"""The guards: how each is asked, which words its verdict is, and how its answer reads.

NemoGuard's prompt is nemoguard_prompt.txt, byte for byte that of examples/configs/content_safety/prompts.yml in NVIDIA's
NeMo Guardrails, the literal `response: agent:` included. The others' prompts are their chat templates.
"""

import functools
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources

from ..errors import unknown
from . import labelled, verdicts
from .verdicts import TAXONOMY


def nemoguard_prompt(prompt: str, response: str | None = None, taxonomy: dict[str, str] = TAXONOMY) -> str:
    """NemoGuard's official prompt for a message, and a response to it where there is one; `taxonomy` maps codes to names.

    Text that would look like a part of the prompt is broken up (see `defused`); all other text goes in as it is.
    """
    text = (resources.files(__package__) / "nemoguard_prompt.txt").read_text(encoding="utf-8").removesuffix("\n")
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


def taught(row: labelled.Row) -> list[dict]:
    """A labelled row as a conversation in NemoGuard's official format: its prompt, and the answer that is right."""
    rated = row.response if row.response_label is not None else None
    answer = dict(zip(("User Safety", "Response Safety"), verdicts_of(row), strict=False))
    if "unsafe" in answer.values() and row.category:
        answer["Safety Categories"] = row.category
    asked = _nemoguard(row.prompt, rated, TAXONOMY)
    return [*asked, {"role": "assistant", "content": json.dumps(answer)}]


def verdicts_of(row: labelled.Row) -> tuple[str, ...]:
    """The right verdicts of a labelled row as words: on the message, and on its response where that is labelled."""
    return tuple(("safe", "unsafe")[label] for label in (row.label, row.response_label) if label is not None)


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
            "smollm2-guard",
            "smollm2-guard",
            "qwlib's own, a LoRA adapter over SmolLM2-135M: small enough for a CPU, to learn with",
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
