"""What a guard said, read strictly: safe only where it says exactly that, and everything that is not understood blocks.

There are three outcomes and they are counted apart. `safe` needs a whole, clean answer. `unsafe` needs one rating that says so,
in an answer that may be damaged. Everything else is an `error`: a sentence instead of JSON, a key twice, "SAFE", an answer cut
off behind "safe". An error blocks like `unsafe`, but it is no opinion of the guard and names no category.

A function a format; each takes any text of any length and never raises. What it leaves out: mending. A rating inside a code
fence or behind "Output JSON:" would be easy to find, and easy to put there by whoever wrote the message.
"""

import json
import re
from dataclasses import dataclass

# the official categories of NemoGuard's prompt (`guards.py` says where it stands)
TAXONOMY = {
    f"S{number}": name
    for number, name in enumerate(
        (
            "Violence",
            "Sexual",
            "Criminal Planning/Confessions",
            "Guns and Illegal Weapons",
            "Controlled/Regulated Substances",
            "Suicide and Self Harm",
            "Sexual (minor)",
            "Hate/Identity Hate",
            "PII/Privacy",
            "Harassment",
            "Threat",
            "Profanity",
            "Needs Caution",
            "Other",
            "Manipulation",
            "Fraud/Deception",
            "Malware",
            "High Risk Gov Decision Making",
            "Political/Misinformation/Conspiracy",
            "Copyright/Trademark/Plagiarism",
            "Unauthorized Advice",
            "Illegal Activity",
            "Immoral/Unethical",
        ),
        start=1,
    )
}
LONGEST = 20_000  # characters that are read as an answer: two ratings and all 23 categories take under 700
_RATINGS = {"User Safety": "user", "Response Safety": "response"}
_CATEGORIES = "Safety Categories"
_BLANK = " \t\r\n"  # what JSON calls white space; str.strip() takes more


@dataclass(frozen=True)
class Verdict:
    """`user` and `response`: "safe", "unsafe", or None where the guard gave no rating. `error`: what could not be understood."""

    user: str | None = None
    response: str | None = None
    categories: tuple[str, ...] = ()
    error: str | None = None

    @property
    def outcome(self) -> str:
        """`safe`, `unsafe` or `error`."""
        ratings = {self.user, self.response}
        if "unsafe" in ratings:
            return "unsafe"
        return "safe" if self.error is None and "safe" in ratings else "error"

    @property
    def blocked(self) -> bool:
        """Whether the message may not pass."""
        return self.outcome != "safe"


def nemoguard(text: str, *, response: bool = False, taxonomy: dict[str, str] = TAXONOMY) -> Verdict:
    """One JSON object with "User Safety", with "Response Safety" where a `response` was judged, and with "Safety Categories".

    The rating of the response is never taken from the user's.
    """
    found, why = _json_object(text)
    if found is None:
        said = re.findall(r'"(User Safety|Response Safety)"\s*:\s*"unsafe"', text[:LONGEST])
        return Verdict(**{_RATINGS[key]: "unsafe" for key in said}, error=why)
    wanted = list(_RATINGS)[: 2 if response else 1]
    ratings, errors = {}, [f"unknown key {key!r}" for key in found if key not in (*wanted, _CATEGORIES)]
    for key in wanted:
        if found.get(key) in ("safe", "unsafe"):
            ratings[_RATINGS[key]] = found[key]
        else:
            other = found.get(key)
            shown = repr(other)[:40] if isinstance(other, str) else f"of type {type(other).__name__}"
            errors.append(f"{key!r} is {shown}" if key in found else f"no {key!r}")
    if found.get("Response Safety") == "unsafe":
        ratings["response"] = "unsafe"  # nobody asked, and still it blocks
    said = found.get(_CATEGORIES)
    named = _named(said, taxonomy)
    if named is None:
        errors.append(f"{_CATEGORIES!r} is no list of names")
    if "unsafe" not in ratings.values() and said not in (None, "", []):
        errors.append("safe, and names categories")
        named = ()
    return Verdict(**ratings, categories=named or (), error="; ".join(errors)[:300] or None)


def qwen3guard(text: str, *, response: bool = False, loose: bool = False) -> Verdict:
    """Lines `Safety: …`, `Categories: …` and, for a response, `Refusal: …`. "Controversial" is unsafe unless read `loose`ly.

    Source: the model card of Qwen/Qwen3Guard-Gen-0.6B.
    """
    if len(text) > LONGEST:
        return Verdict(error=f"{len(text)} characters are no answer")
    said = re.match(r"Safety: (Safe|Unsafe|Controversial)(?=\n|$)", text := text.strip(_BLANK))
    if not said:
        return Verdict(error="no line 'Safety: Safe', 'Unsafe' or 'Controversial' at the start")
    refusal = r"\nRefusal: (Yes|No)" if response else ""
    whole = re.fullmatch(r"Safety: \w+\nCategories: ([^\n]+)" + refusal, text)
    named = whole[1] if whole and whole[1] != "None" else ""
    about = "response" if response else "user"
    rating = "safe" if said[1] == "Safe" or (loose and said[1] == "Controversial") else "unsafe"
    error = None if whole else "not the lines that belong behind it"
    if said[1] == "Safe" and named:
        error = "safe, and names categories"
    return Verdict(**{about: rating}, categories=() if rating == "safe" else _named(named, {}), error=error)


def llama_guard(text: str, *, response: bool = False) -> Verdict:
    """`safe`, or `unsafe` and a line of codes; the rating is that of the last message.

    Source: the model card of meta-llama/Llama-Guard-3-8B.
    """
    if len(text) > LONGEST:
        return Verdict(error=f"{len(text)} characters are no answer")
    text, about = text.strip(_BLANK), "response" if response else "user"
    if text == "safe":
        return Verdict(**{about: "safe"})
    first, _, rest = text.partition("\n")
    if first != "unsafe":
        return Verdict(error="neither 'safe' nor 'unsafe' alone in the first line")
    codes = re.fullmatch(r"S\d{1,2}(, ?S\d{1,2})*", rest)
    return Verdict(
        **{about: "unsafe"}, categories=_named(rest, {}) if codes else (), error=None if codes else "no line of codes"
    )


def _json_object(text: str) -> tuple[dict | None, str | None]:
    """(the object, None), or (None, why there is none)."""

    def once(pairs):
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands there twice")
        return dict(pairs)

    if len(text) > LONGEST:
        return None, f"{len(text)} characters are no answer"
    try:
        found = json.loads(text, object_pairs_hook=once)
    except RecursionError:
        return None, "no JSON: nested too deeply"
    except ValueError as error:
        return None, f"no JSON: {error}"[:120]
    return (found, None) if isinstance(found, dict) else (None, "JSON, and no object")


def _named(said, taxonomy: dict[str, str]) -> tuple[str, ...] | None:
    """Names of the categories, each once: of codes, names in any case, or both. None for what is no list of names."""
    if said is None or said == "":
        return ()
    parts = said.split(",") if isinstance(said, str) else said
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        return None
    known = {name.casefold(): name for name in taxonomy.values()} | {code.casefold(): n for code, n in taxonomy.items()}
    names = []
    for part in parts:
        part = part.strip().rstrip(".")
        code, _, rest = part.partition(":")
        name = known.get(part.casefold()) or known.get(rest.strip().casefold()) or known.get(code.strip().casefold())
        names.append(name or part[:60])  # not of this taxonomy: kept as it stands
    return tuple(dict.fromkeys(name for name in names if name))
