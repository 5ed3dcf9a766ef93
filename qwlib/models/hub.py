"""From a model's name to files on this disk, and what can go wrong on the way, each told in one line that says what to do."""

import contextlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

from .. import files
from ..errors import QwlibError

WANTED = [
    "*.safetensors",
    "*.json",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.onnx",
    "*.onnx.data",
]  # never pickles, never code
# the one sub-folder that loading reads: templates besides the default one, by name (transformers.utils.hub.CHAT_TEMPLATE_DIR)
TEMPLATES = "additional_chat_templates"


def fetch(row) -> str:
    """Folder of the model's files, downloaded into the Hub's own cache where they are not there yet.

    Raises QwlibError where a licence has to be accepted first, or the Hub refuses or can't be reached.
    """
    from huggingface_hub import get_token, snapshot_download

    if row.licence_page and not get_token():
        raise QwlibError(
            f"{row.name} is gated: accept its licence at {row.licence_page} and set HF_TOKEN, "
            "or take an open model such as phi-3-mini"
        )
    with explained(row):
        found = snapshot_download(row.source, revision=row.revision, allow_patterns=WANTED, ignore_patterns=["*/*"])
        return snapshot_download(row.source, revision=Path(found).name, allow_patterns=[f"{TEMPLATES}/*.jinja"])


def gguf_folder(name: str) -> tuple[str, str | None]:
    """(a folder that holds one GGUF file and nothing else, its commit): `name` is a path, or `owner/name/file` on the Hub.

    Repositories keep a model in many such files side by side; only the one that is named is downloaded. Of a local file there is
    no commit.

    Raises QwlibError where there is no such file, or the Hub refuses or can't be reached.
    """
    from huggingface_hub import hf_hub_download

    path, commit = Path(name).expanduser(), None
    if not path.is_file():
        owner, _, rest = name.partition("/")
        repository, _, file = rest.partition("/")
        if not file or owner in ("", ".", "..", "~"):
            raise QwlibError(f"no such file: {name}; name a GGUF file, or one on the Hub as owner/name/file.gguf")
        with explained(SimpleNamespace(name=name, source=f"{owner}/{repository}", revision=None)):
            path = Path(hf_hub_download(f"{owner}/{repository}", file))
        commit = path.parents[file.count("/")].name  # the Hub's cache names its folders by commit
    path = path.absolute()
    folder = files.cache_dir() / "gguf" / files.sha256_text(str(path))[:12] / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (folder / f"{path.stem}.gguf").symlink_to(path)  # whatever case its ending has
    return str(folder), commit


def fetch_data(repository: str, path: str) -> str:
    """One file of a data set on the Hub, in the Hub's own cache.

    Raises QwlibError where it can't be had.
    """
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repository, path, repo_type="dataset")
    except (OSError, ValueError, transport_error()) as error:  # the Hub's own errors are OSError or ValueError
        raise QwlibError(
            f"{repository} can't be fetched from the Hub ({type(error).__name__}): name a text file instead"
        ) from None


@contextlib.contextmanager
def explained(row) -> Iterator[None]:
    """Errors of the Hub, of a checkpoint and of the allocator as one line; `row` is a `catalog.Model`."""
    try:
        yield
    except QwlibError:
        raise
    except Exception as error:  # configurations and tokenizers are read by code that raises whatever it raises
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            # without its frames, which would keep what was loaded so far
            raise QwlibError(f"out of memory while loading {row.name}: choose a scheme with fewer bits") from None
        if message := _of_the_hub(row, error):
            raise QwlibError(message) from None
        raise QwlibError(f"{row.name} can't be loaded: {point(error)}") from error


def point(error: BaseException) -> str:
    """What an error says, in one line: with its type where words alone don't tell, all lines where the first ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines) if lines and lines[0].endswith(":") else lines[0] if lines else ""
    plain = isinstance(error, OSError | ValueError | ImportError)
    return (said if plain and said else f"{type(error).__name__}: {said}".removesuffix(": "))[:400]


def transport_error() -> type[Exception]:
    """What the Hub's client raises where a connection breaks; it speaks by httpx or, as version 2.4 does, httpx2."""
    from huggingface_hub import get_session

    return import_module(type(get_session()).__module__.partition(".")[0]).TransportError


def _of_the_hub(row, error: BaseException) -> str | None:
    import huggingface_hub.errors as hub

    known = hub.HfHubHTTPError | hub.LocalEntryNotFoundError | ConnectionError | transport_error()
    cause = error
    while cause is not None and not isinstance(cause, known):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, hub.GatedRepoError):
        return f"{row.name} is gated and this token may not read it: accept its licence on the Hub"
    if isinstance(cause, hub.RevisionNotFoundError):
        return f"{row.source} has no revision {row.revision!r} on the Hub"
    if isinstance(cause, hub.RepositoryNotFoundError):
        return f"the Hub has no model {row.source!r}, or it is private and no token was given"
    if isinstance(cause, hub.RemoteEntryNotFoundError):
        return f"{row.source} has no such file on the Hub: {row.name}"
    if cause is not None or "couldn't connect" in str(error).lower():
        return (
            f"{row.name} can't be fetched from the Hub (no connection?): name a local folder, take smollm2-135m, "
            "or weights='random' for memory and speed"
        )
    return None
