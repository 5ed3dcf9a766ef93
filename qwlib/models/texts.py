"""The texts that quality is measured on: Python's own documentation, WikiText-2 from the Hub, or a file that a user names.

WikiText-2's test set (CC BY-SA) is stored on the Hub as rows, one a line. `wikitext2` joins them by two newlines, as the
GPTQ paper's code and most papers after it do; `wikitext2-raw` rebuilds the raw file, which llama.cpp's figures are on. The
two differ in every blank line, so their perplexities differ too.
"""

from pathlib import Path

from ..errors import QwlibError
from . import embedded, hub

_WIKITEXT = ("Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet")


def read(name: str | None = None) -> tuple[str, str]:
    """(text, what it is called in a record): `wikitext2`, `wikitext2-raw`, a UTF-8 file, or (None) the embedded text.

    Raises QwlibError where it can't be fetched or read, or is empty.
    """
    if name is None:
        return embedded.text(), embedded.text_name()
    if name in ("wikitext2", "wikitext2-raw"):
        rows = _wikitext_rows()
        raw = "".join(row or " \n" for row in rows)
        return ("\n\n".join(rows) if name == "wikitext2" else raw), f"{name} test"
    try:
        with open(name, encoding="utf-8", newline="") as file:  # as it is: its hash must not depend on the platform
            text = file.read()
    except (OSError, UnicodeError) as error:
        raise QwlibError(f"can't read the text {name}: {error}") from None
    if not text.strip():
        raise QwlibError(f"the text {name} is empty")
    return text, Path(name).name


def checked(text: str, what: str = "the text") -> str:
    """The text itself if it is one and can be written in UTF-8.

    Raises QwlibError that names it `what`: half of a surrogate pair, as JSON can hold it, is no character to any tokenizer.
    """
    if not isinstance(text, str):
        raise QwlibError(f"{what} is no text but a {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = ascii(text[error.start])
        raise QwlibError(f"{what} holds half of a character, {found} at {error.start}: take it out") from None
    return text


def _wikitext_rows() -> list[str]:
    try:
        import pyarrow.parquet
    except ImportError:
        raise QwlibError("WikiText-2 is stored as Parquet: pip install pyarrow, or name a text file") from None
    return pyarrow.parquet.read_table(hub.fetch_data(*_WIKITEXT)).column("text").to_pylist()
