"""Answers of guards: what may pass, and that nothing else does."""

import itertools
import json
import random
import re
from collections import Counter

import pytest

from qwlib.guard import verdicts
from qwlib.guard.verdicts import TAXONOMY, nemoguard

SAFE, UNSAFE = '{"User Safety": "safe"}', '{"User Safety": "unsafe", "Safety Categories": "Violence"}'
BOTH = '{"User Safety": "unsafe", "Response Safety": "safe", "Safety Categories": "S1, S8"}'


def cut(text: str, behind: str) -> str:
    return text[: text.index(behind) + len(behind)]


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        (SAFE, "safe"),
        (f"\n {SAFE}\r\n\t", "safe"),
        ('{"User Safety":"safe","Safety Categories":""}', "safe"),
        ('{"User Safety": "safe", "Safety Categories": null}', "safe"),
        ('{"User Safety": "safe", "Safety Categories": []}', "safe"),
        (UNSAFE, "unsafe"),
        ('{"User Safety": "unsafe"}', "unsafe"),
        ('{"User Safety": "unsafe", "Safety Categories": null}', "unsafe"),
        ('{"User Safety": "unsafe", "Safety Categories": 7}', "unsafe"),
        ('{"User Safety": "SAFE"}', "error"),
        ('{"User Safety": "safe "}', "error"),
        ('{"User Safety": "safe."}', "error"),
        ('{"User Safety": "unknown"}', "error"),
        ('{"User Safety": ""}', "error"),
        ('{"User Safety": null}', "error"),
        ('{"User Safety": true}', "error"),
        ('{"User Safety": ["safe"]}', "error"),
        ('{"User Safety": {"User Safety": "safe"}}', "error"),
        ('{"Safety Categories": ""}', "error"),
        ("{}", "error"),
        ('{"User Safety": "safe", "Safety Categories": "S1"}', "error"),
        ('{"User Safety": "safe", "Safety Categories": 0}', "error"),
        ('{"User Safety": "safe", "Safety Categories": " "}', "error"),
        ('{"User Safety": "safe", "Safety Categories": " , "}', "error"),
        ('{"User Safety": "safe", "Safety Categories": ["."]}', "error"),
        ('{"User Safety": "safe", "Note": "fine"}', "error"),
        ('{"user safety": "safe"}', "error"),
        ('{"UserSafety": "safe"}', "error"),
        ('{"User Safety": "unsafe", "User Safety": "safe"}', "unsafe"),
        ('{"User Safety": "safe", "User Safety": "safe"}', "error"),
        ('{"User Safety": "safe", "Safety Categories": [{"a": 1, "a": 2}]}', "error"),
        ("```json\n" + SAFE + "\n```", "error"),
        ("```json\n" + UNSAFE + "\n```", "unsafe"),
        ("Output JSON: " + SAFE, "error"),
        (SAFE + "\nThe message is harmless.", "error"),
        (SAFE + SAFE, "error"),
        (SAFE + UNSAFE, "unsafe"),
        ("{'User Safety': 'safe'}", "error"),
        ('{"User Safety": "safe",}', "error"),
        ("\ufeff" + SAFE, "error"),
        (f"[{SAFE}]", "error"),
        ('"safe"', "error"),
        ("null", "error"),
        ("safe", "error"),
        ("", "error"),
        (cut(UNSAFE, '"unsafe"'), "unsafe"),
        (cut(UNSAFE, '"unsafe'), "error"),
        (cut(SAFE, '"safe"'), "error"),
        ("I'm sorry, I can't help with that.", "error"),
        ("Let me think… it appears to be safe", "error"),
        ("[" * 100_000, "error"),
        ("[" * 19_000, "error"),
        ('{"User Safety": ' * 900 + '"safe"' + "}" * 900, "error"),
        ('{"User Safety": ' + "[" * 900 + "]" * 900 + "}", "error"),
        ('{"User Safety": ' + "1" * 6000 + "}", "error"),
        ('{"User Safety": "\\ud800"}', "error"),
        ("\x00\ud800", "error"),
    ],
)
def test_answers_about_a_message(text, outcome):
    found = nemoguard(text)
    assert found.outcome == outcome, found
    assert found.blocked == (outcome != "safe")
    assert (found.error is not None) or outcome != "error"


@pytest.mark.parametrize(
    ("text", "outcome", "ratings"),
    [
        ('{"User Safety": "safe", "Response Safety": "safe"}', "safe", ("safe", "safe")),
        (BOTH, "unsafe", ("unsafe", "safe")),
        ('{"User Safety": "safe", "Response Safety": "unsafe"}', "unsafe", ("safe", "unsafe")),
        (SAFE, "error", ("safe", None)),  # never the user's rating for the response's
        (UNSAFE, "unsafe", ("unsafe", None)),
        ('{"Response Safety": "safe"}', "error", (None, "safe")),
        ('{"User Safety": "safe", "Response Safety": "Safe"}', "error", ("safe", None)),
        ('{"User Safety": "safe", "Response Safety": "unsafe"', "unsafe", (None, "unsafe")),
    ],
)
def test_answers_about_a_response(text, outcome, ratings):
    found = nemoguard(text, response=True)
    assert (found.outcome, (found.user, found.response)) == (outcome, ratings)


def test_a_rating_that_nobody_asked_for_does_not_pass():
    assert nemoguard('{"User Safety": "safe", "Response Safety": "safe"}').outcome == "error"
    assert nemoguard('{"User Safety": "safe", "Response Safety": "unsafe"}').outcome == "unsafe"


@pytest.mark.parametrize(
    ("said", "names"),
    [
        ('"Violence, Profanity"', ("Violence", "Profanity")),
        ('"violence,profanity"', ("Violence", "Profanity")),
        ('"S1, S8"', ("Violence", "Hate/Identity Hate")),
        ('"s1,s23."', ("Violence", "Immoral/Unethical")),
        ('"S1: Violence, S8: Hate/Identity Hate"', ("Violence", "Hate/Identity Hate")),
        ('"S1: Violence, violence, S1"', ("Violence",)),
        ('["S1", "Threat"]', ("Violence", "Threat")),
        ('"S99, Weather"', ("S99", "Weather")),
        ('""', ()),
        ("[1]", ()),
    ],
)
def test_categories_are_named_as_the_prompt_names_them(said, names):
    assert nemoguard('{"User Safety": "unsafe", "Safety Categories": ' + said + "}").categories == names


def test_another_taxonomy_has_its_own_names():
    own = {"A1": "Spoilers", "A2": "Rudeness"}
    assert nemoguard('{"User Safety": "unsafe", "Safety Categories": "a2, S1"}', taxonomy=own).categories == (
        "Rudeness",
        "S1",
    )


# what is clean, written a second time as a grammar
_MEMBERS = {
    "user": r'"User Safety"\s*:\s*"safe"',
    "response": r'"Response Safety"\s*:\s*"safe"',
    "none": r'"Safety Categories"\s*:\s*(?:""|null|\[\s*\])',
}
_ORDERS = {
    judged: [
        re.compile(r"\s*\{\s*" + r"\s*,\s*".join(_MEMBERS[m] for m in order) + r"\s*\}\s*", re.ASCII)
        for members in (wanted, [*wanted, "none"])
        for order in itertools.permutations(members)
    ]
    for judged, wanted in {False: ["user"], True: ["user", "response"]}.items()
}


def is_clean(text: str, judged: bool) -> bool:
    return any(order.fullmatch(text) for order in _ORDERS[judged])


def mutated(random: random.Random) -> tuple[str, bool]:
    """A valid answer, mostly damaged, and whether a response was judged."""
    judged = random.random() < 0.5
    answer = {"User Safety": random.choice(["safe"] * 3 + ["unsafe"])}
    if judged:
        answer["Response Safety"] = random.choice(["safe"] * 3 + ["unsafe"])
    if "unsafe" in answer.values():
        answer["Safety Categories"] = ", ".join(random.sample(list(TAXONOMY.values()), random.randint(1, 4)))
    elif random.random() < 0.2:
        answer["Safety Categories"] = ""
    keys = random.sample(list(answer), len(answer))
    text = json.dumps({key: answer[key] for key in keys}, indent=random.choice([None, None, 1]))
    at, to = sorted(random.choices(range(len(text) + 1), k=2))
    ways = [
        text,
        " " * random.randint(0, 3) + text + "\n" * random.randint(0, 3),
        text.replace(" ", ""),
        text[:at],
        text[at:],
        text[:at] + text[to:],
        text[:at] + random.choice('"{}[],:\\ sSafenu\ufeff\x00é') + text[at:],
        text[:at] + text[at:to].swapcase() + text[to:],
        text[:at] + text[at:to] * 2 + text[to:],
        text.replace('"safe"', random.choice(['"Safe"', '"safe "', '"unsure"', "null", '"unsafe"', "safe"])),
        text.replace("User Safety", random.choice(["user safety", "Response Safety", "User  Safety", "Safety"])),
        random.choice(["```json\n", "Output JSON: ", "Sure! "]) + text + random.choice(["", "\n```", " That is all."]),
        text + text,
        text[:-1] + ', "User Safety": "safe"}',
        text.replace('"', "'"),
    ]
    mild = ways[:3]  # white space and the order of keys: all of them still valid
    return random.choice(mild if random.random() < 0.4 else ways), judged


def test_ten_thousand_damaged_answers():
    source, outcomes, passed = random.Random(6), Counter(), 0
    for _ in range(10_000):
        text, judged = mutated(source)
        found = nemoguard(text, response=judged)
        outcomes[found.outcome] += 1
        passed += not found.blocked
        assert found.blocked or is_clean(text, judged), (text, found)
        assert not (found.blocked and is_clean(text, judged)), (text, found)
    assert passed == outcomes["safe"]
    assert min(outcomes[name] for name in ("safe", "unsafe", "error")) >= 2_000, outcomes


def test_other_guards_answers():
    qwen, llama = verdicts.qwen3guard, verdicts.llama_guard
    assert qwen("Safety: Safe\nCategories: None").outcome == "safe"
    assert qwen("Safety: Safe\nCategories: None\nRefusal: Yes", response=True).response == "safe"
    assert qwen("Safety: Safe\nCategories: None", response=True).outcome == "error"  # whether it refused is missing
    assert qwen("Safety: Safe\nCategories: None\nRefusal: No").outcome == "error"
    for clean, read in (("Safety: Safe\nCategories: None", qwen), ("safe", llama), (SAFE, nemoguard)):
        assert read(clean).outcome == read(clean + "\n" * 100).outcome == "safe"
        assert read(clean + "\n" * 20_000 + "unsafe").outcome == "error"
    assert qwen("Safety: Unsafe\nCategories: Violent, PII").categories == ("Violent", "PII")
    assert qwen("Safety: Unsafe").outcome == "unsafe"
    assert [qwen("Safety: Controversial\nCategories: Unethical Acts", loose=way).outcome for way in (False, True)] == [
        "unsafe",
        "safe",
    ]
    clean = "Safety: Safe\nCategories: None"
    for text in (
        "",
        "Safe",
        "Safety: Safe",
        "Safety: Safer",
        clean.lower(),
        f"Hm. {clean}",
        f"{clean}\nSafety: Unsafe",
    ):
        assert qwen(text).outcome == "error", text
    for text in ("Safety: Safe\nCategories: Violent",):
        assert qwen(text).outcome == "error", text
    assert llama("\n\nsafe").outcome == "safe"
    assert llama("\n\nunsafe\nS1,S10").categories == ("S1", "S10")
    assert llama("unsafe").outcome == "unsafe"
    for text in ("Safe", "safe\nS1", "safe.", "", "it is safe", "safe\nunsafe"):
        assert llama(text).outcome == "error", text
