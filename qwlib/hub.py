"""From a model's name to files on this disk, and what can go wrong on the way, each told in one line that says what to do."""

import contextlib
from collections.abc import Iterator

from .errors import QwlibError

WANTED = [
    "*.safetensors",
    "*.json",
    "*.model",
    "*.txt",
    "*.jinja",
    "*.onnx",
    "*.onnx.data",
]  # never pickles, never code


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
        return snapshot_download(row.source, revision=row.revision, allow_patterns=WANTED, ignore_patterns=["*/*"])


def fetch_data(repository: str, path: str) -> str:
    """One file of a data set on the Hub, in the Hub's own cache.

    Raises QwlibError where it can't be had.
    """
    import httpx
    from huggingface_hub import hf_hub_download

    try:
        return hf_hub_download(repository, path, repo_type="dataset")
    except (OSError, ValueError, httpx.TransportError) as error:  # the Hub's own errors are OSError or ValueError
        raise QwlibError(
            f"{repository} can't be fetched from the Hub ({type(error).__name__}): name a text file instead"
        ) from None


@contextlib.contextmanager
def explained(row) -> Iterator[None]:
    """Errors of the Hub, of a checkpoint and of the allocator as one line; `row` is a `catalog.Model`."""
    import httpx
    import safetensors

    try:
        yield
    except QwlibError:
        raise
    except (OSError, ValueError, ImportError, safetensors.SafetensorError, httpx.TransportError) as error:
        message = _of_the_hub(row, error)
        if message:
            raise QwlibError(message) from None
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise QwlibError(f"{row.name} can't be loaded: {first}") from error
    except RuntimeError as error:
        if type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error):
            # without its frames, which would keep what was loaded so far
            raise QwlibError(f"out of memory while loading {row.name}: choose a scheme with fewer bits") from None
        raise


def _of_the_hub(row, error: BaseException) -> str | None:
    import httpx
    import huggingface_hub.errors as hub

    known = hub.HfHubHTTPError | hub.LocalEntryNotFoundError | ConnectionError | httpx.TransportError
    cause = error
    while cause is not None and not isinstance(cause, known):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, hub.GatedRepoError):
        return f"{row.name} is gated and this token may not read it: accept its licence on the Hub"
    if isinstance(cause, hub.RevisionNotFoundError):
        return f"{row.source} has no revision {row.revision!r} on the Hub"
    if isinstance(cause, hub.RepositoryNotFoundError):
        return f"the Hub has no model {row.source!r}, or it is private and no token was given"
    if cause is not None or "couldn't connect" in str(error).lower():
        return (
            f"{row.name} can't be fetched from the Hub (no connection?): name a local folder, take smollm2-135m, "
            "or weights='random' for memory and speed"
        )
    return None
