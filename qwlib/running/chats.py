"""A conversation as the text that a model reads: by its tokenizer's chat template, and with what was said in it.

A template is a program in a model's files. Some want a message in parts (`[{"type": "text", …}]`) and leave out a plain one, some
refuse a conversation without a system message, some are broken. What is measured then would be the answer to another question, so
each text that goes in has to come out again; white space may differ, since many templates trim it.
"""

from collections.abc import Sequence

from ..errors import QwlibError


def rendered(tokenizer, messages: Sequence[dict], who: str, **options) -> str:
    """The text of one conversation (`[{"role", "content"}]`, contents are texts); `options` go to `apply_chat_template`.

    Raises QwlibError, which names the model `who`, for a template that drops a message, refuses, or can't be read.
    """
    options = {"tokenize": False, "add_generation_prompt": True} | options
    parts = [each | {"content": [{"type": "text", "text": each["content"]}]} for each in messages]
    why = []
    for form in (messages, parts):
        try:
            text = tokenizer.apply_chat_template(list(form), **options)
        except Exception as error:  # jinja2's errors, and whatever the template's own code raises
            why.append(f"refuses it ({(str(error).splitlines() or [type(error).__name__])[0][:120]})")
            continue
        if all(_plain(each["content"]) in _plain(text) for each in messages):
            return text
        why.append("leaves out what is asked")
    raise QwlibError(
        f"{who} can't be asked: its chat template {why[0]}; mend `tokenizer.chat_template`, or set it to None to ask without one"
    )


def _plain(text: str) -> str:
    return " ".join(text.split())
