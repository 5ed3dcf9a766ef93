"""One repository of the Hugging Face Hub: looked at, filled in one commit, read back; what it refuses told in one line.

Only public calls of huggingface_hub are used, which chooses how bytes travel (Xet, LFS), finds the token and keeps it.
"""

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from .. import files
from ..errors import QwlibError
from ..loading import fresh
from ..models import artefacts, hub

CARD = "README.md"


@dataclass
class File:
    """One file of a plan; `what` is new, changed, same or gone."""

    name: str
    size: int
    what: str


@dataclass
class Known:
    """What a repository holds: its head, digests by name, its card, and names of an earlier manifest."""

    head: str | None = None
    held: dict[str, str] = field(default_factory=dict)
    card: str = ""
    earlier: set[str] = field(default_factory=set)


def size(content: Path | bytes) -> int:
    return len(content) if isinstance(content, bytes) else content.stat().st_size


def digests(content: Path | bytes) -> set[str]:
    """What the Hub may know a file by: SHA-256 of a large one, git's SHA-1 of a small one."""
    data = content if isinstance(content, bytes) else None
    if data is None and content.stat().st_size > 50e6:
        return {files.sha256(content)}
    data = content.read_bytes() if data is None else data
    return {hashlib.sha256(data).hexdigest(), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}


class Remote:
    """One repository of the Hub, its errors told in one line."""

    def __init__(self, repo_id: str, token: str | None):
        from huggingface_hub import HfApi, get_token

        self.repo_id, self.user = repo_id, token or get_token()
        self.api = HfApi(token=self.user)

    def look(self, private: bool) -> Known:
        """What is there; a `Known` of nothing where the repository is still to be made.

        Raises QwlibError: a token that is not known, a repository that is not as private as is meant, of another name, or whose
        `.gitignore` might leave files out.
        """
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

        if not self.user:
            raise QwlibError("publishing needs a token that may write: set HF_TOKEN, or log in with `hf auth login`")
        with told(self.repo_id):
            self.api.whoami()
            try:
                known = Known(head=self._head(private))
            except GatedRepoError:
                raise
            except RepositoryNotFoundError:
                return Known()
            for entry in self.api.list_repo_tree(self.repo_id, recursive=True, revision=known.head):
                if hasattr(entry, "blob_id"):
                    known.held[entry.path] = entry.lfs.sha256 if entry.lfs else entry.blob_id
            if ".gitignore" in known.held:
                raise QwlibError(f"{self.repo_id} has a .gitignore, which may leave files out: remove it on its page")
            if CARD in known.held:
                known.card = self.text(CARD, known.head)
            if artefacts.MANIFEST in known.held:
                with contextlib.suppress(ValueError, TypeError, KeyError):
                    known.earlier = set(json.loads(self.text(artefacts.MANIFEST, known.head))["files"])
            return known

    def _head(self, private: bool) -> str:
        """The commit that the repository stands at, if it is the one that is meant."""
        info = self.api.model_info(self.repo_id)
        if info.id != self.repo_id:
            raise QwlibError(f"{self.repo_id} is called {info.id} now: publish under that name")
        if bool(info.private) != private:
            there, wanted = ("private", "public") if info.private else ("public", "private")
            raise QwlibError(
                f"{self.repo_id} is there and {there}, not {wanted}: change that on its settings page, or choose another name"
            )
        return info.sha

    def text(self, name: str, revision: str | None = None) -> str:
        """A text file of the repository.

        Raises QwlibError where it is none.
        """
        with tempfile.TemporaryDirectory() as cache:
            path = self.api.hf_hub_download(self.repo_id, name, revision=revision, cache_dir=cache)
            try:
                return Path(path).read_text(encoding="utf-8")
            except UnicodeDecodeError:
                raise QwlibError(f"{name} of {self.repo_id} is not UTF-8: mend it on its page") from None

    def send(self, content: dict, plan: list[File], known: Known, private: bool) -> str:
        """Upload what is new or changed, and commit all of it at once; the commit's hash."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        wanted = [f.name for f in plan if f.what in ("new", "changed")]
        gone = [CommitOperationDelete(f.name) for f in plan if f.what == "gone"]
        if known.head and not wanted and not gone:
            return known.head
        with told(self.repo_id):
            if known.head is None:
                self.api.create_repo(self.repo_id, private=private)
            parent = known.head or self._head(private)
            operations = []
            for name in wanted:  # one by one: what has arrived is not sent again by the next run
                each = content[name]
                operations.append(CommitOperationAdd(name, each if isinstance(each, bytes) else str(each)))
                self.api.preupload_lfs_files(self.repo_id, operations[-1:], free_memory=False)
        try:
            with told(self.repo_id):
                done = self.api.create_commit(
                    self.repo_id, [*operations, *gone], commit_message="Publish with qwlib", parent_commit=parent
                )
        except QwlibError:
            moved = False
            with contextlib.suppress(Exception):  # the answer may be what was lost, not the commit
                moved = self._head(private) != parent
            if moved:
                raise QwlibError(f"{self.repo_id} was changed, but not checked: run the same command again") from None
            raise
        return done.oid

    def prove(self, commit: str, content: dict, manifest: dict, ids, said, again, private: bool = True) -> None:
        """Download into a clean cache and compare: every file, and what a fresh process reads out of them.

        `said` are the scores of the folder itself, `again` a call that gives them once more: where sums come in another order
        each time, a difference as small as that passes. Raises QwlibError where anything differs.
        """
        broken = f"{self.repo_id} holds something else than was sent"
        with tempfile.TemporaryDirectory() as cache:
            with told(self.repo_id, "was sent but could not be downloaded to be checked"):
                self._head(private)
                folder = Path(self.api.snapshot_download(self.repo_id, revision=commit, cache_dir=cache))
            for name, each in content.items():
                path = folder / name
                if not path.is_file() or files.sha256(path) not in digests(each):
                    raise QwlibError(f"{broken} ({name}): publish again")
            try:
                there = fresh.logits(folder, manifest["scheme"], ids)
            except QwlibError as error:
                raise QwlibError(f"{self.repo_id} was sent but could not be read to be checked: {error}") from None
            if not alike(said, there, again):
                raise QwlibError(f"{broken}: its scores differ; publish again")


def alike(one, other, again) -> bool:
    """Whether scores are equal, or differ by no more than `one` does from `again()`, the same once more."""
    import torch

    if one.shape != other.shape or torch.equal(one, other):
        return one.shape == other.shape
    noise = (one.float() - again().float()).abs().max()
    return bool((one.float() - other.float()).abs().max() <= 2 * noise)


@contextlib.contextmanager
def told(repo_id: str, state: str = "is not published") -> Iterator[None]:
    """What the Hub or the way there refuses, as one line: the `state` of the repository, why, and what to do."""
    try:
        yield
    except QwlibError:
        raise
    except Exception as error:
        if line := explained(repo_id, error):
            raise QwlibError(f"{repo_id} {state}: {line}") from None
        raise


AGAIN = "run the same command again: what has arrived is not sent twice"


def explained(repo_id: str, error: BaseException) -> str | None:
    """Why, and what to do, of an error that huggingface_hub or what carries its bytes raised; None for a mistake of ours."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and cause not in chain:
        chain.append(cause)
    said = " ".join((str(error) or type(error).__name__).split())[:200]
    if any(isinstance(each, HFValidationError) for each in chain):
        return f"the Hub takes no such name: {said}"
    if any(isinstance(each, OfflineModeIsEnabled) for each in chain):
        return "HF_HUB_OFFLINE is set: unset it"
    answer = next((e.response for e in chain if isinstance(e, HfHubHTTPError) and e.response is not None), None)
    if answer is not None:
        source = next(e for e in chain if isinstance(e, HfHubHTTPError) and e.response is answer)
        return refused(repo_id, answer.status_code, " ".join((source.server_message or "").split()), answer.headers)
    if any(isinstance(each, ConnectionError) for each in chain) and (found := re.search(r"\((\d{3}) ", str(error))):
        return refused(repo_id, int(found[1]), said, {})  # Xet's errors have the answer's code in their text alone
    if any(isinstance(each, hub.transport_error() | ConnectionError) for each in chain):
        return f"the connection broke off, {AGAIN}"
    if isinstance(error, RuntimeError | OSError | ValueError):  # LFS, Xet, answers that are none, a full disk
        full = re.search(r"quota|storage (limit|space)", said, flags=re.I)
        return f"the Hub has no room ({said}): free some" if full else f"the way to the Hub broke off ({said}), {AGAIN}"
    return None


def refused(repo_id: str, code: int, said: str, headers) -> str:
    """An answer of the Hub that is no success, in words."""
    if code == 429:
        wait = headers.get("Retry-After")
        return f"the Hub asks to wait{f' {wait} s' if wait else ' some minutes'} (429), then {AGAIN}"
    if code in (413, 507) or re.search(r"quota|storage (limit|space)|exceed", said, flags=re.I):
        return f"the Hub has no room ({said or code}): free some, or publish fewer files"
    if code >= 500:
        return f"the Hub failed ({code}), {AGAIN}"
    known = {
        400: f"the Hub refused what was sent ({said or 400})",
        401: "the Hub does not know this token: make one that may write at https://huggingface.co/settings/tokens",
        403: f"this token may not write to {repo_id}, or not read it: take one with write access, or a name of your own",
        404: "the Hub has no such repository, or this token may not see it: check the owner's name",
        409: f"it conflicts with something else on the Hub ({said or 409}): run again, or choose another name",
        412: "somebody else changed it meanwhile: look at it, and run again",
    }
    return known.get(code, f"the Hub answered {code} ({said}), {AGAIN}")
