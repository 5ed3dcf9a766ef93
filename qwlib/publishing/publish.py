"""From an artefact to the Hugging Face Hub, and back: nothing counts as published that was not downloaded again and found alike.

    publish(folder, "me/smollm2-nf4")                    # a plan and the card; nothing is sent
    publish(folder, "me/smollm2-nf4", dry_run=False)     # into a private repository

The folder is checked against its manifest and read in a fresh process; files go up one by one, and one commit makes all of them
the repository's, so that it holds the whole artefact or what it held before. What went up before an interruption is not sent
again. Then the repository is downloaded into a clean cache, every file's SHA-256 compared, and the scores of a fresh process.
"""

import contextlib
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import partial
from pathlib import Path

from .. import schemes
from ..errors import QwlibError
from ..loading import fresh
from ..machine import devices
from ..models import artefacts, catalog, checkpoints, hub, random_weights
from ..running.lm import Lm
from . import card, licences
from .remote import CARD, File, Known, Remote, alike, digests, size, told

EXTRA = (
    "LICENSE",
    "LICENSE.md",
    "NOTICE",
    "NOTICE.md",
    "USE_POLICY.md",
)  # may lie beside the manifest's files, and go along
TOKEN = re.compile(rb"\b(?:hf|api_org)_(?:[a-z]+_)?[A-Za-z0-9]{30,}")  # huggingface.co/docs/hub/security-tokens


@dataclass
class Published:
    """What was done, or would be. `commit` is None in a dry run; `files` and `warnings` are for a reader."""

    repo_id: str
    private: bool
    card: str
    files: list[File] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    commit: str | None = None

    def __str__(self) -> str:
        visible = "private" if self.private else "public"
        lines = [f"{self.repo_id} ({visible})"]
        lines += [f"  {f.what:8} {f.size / 1e6:10.3f} MB  {f.name}" for f in self.files]
        lines += [f"  note: {warning}" for warning in self.warnings]
        sent = sum(f.size for f in self.files if f.what in ("new", "changed"))
        if self.commit:
            lines.append(f"  published as commit {self.commit[:12]}, downloaded again and found alike")
        else:
            lines.append(f"  a dry run: {sent / 1e6:.3f} MB would be sent")
        return "\n".join(lines)


def publish(
    artefact,
    repo_id: str,
    *,
    private: bool = True,
    dry_run: bool = True,
    token: str | None = None,
    records: list[dict] = (),
) -> Published:
    """Publish a folder that `quantize` wrote, or an `Lm`, as the Hub's model `repo_id`.

    `records` (of `bench --scheme FOLDER`) fill the card. `token`: else the one that huggingface_hub finds (`HF_TOKEN`, Colab's
    secrets, its cache). A dry run looks at the repository if there is a token, and sends nothing.

    Raises QwlibError in one line: a scheme that can't be saved, a folder that is no artefact, was changed, or holds what its
    manifest does not name, a name or licence that does not fit, a model that reads back different, and what the Hub refuses.
    """
    for name, value in {"private": private, "dry_run": dry_run}.items():
        if not isinstance(value, bool):  # "false" is a text, and so true
            raise QwlibError(f"{name} is True or False, not {value!r}")
    check_name(repo_id)
    wanted = {"private": private, "dry_run": dry_run, "token": token, "records": records}
    if isinstance(artefact, Lm):
        with saved(artefact) as (folder, said):
            return _publish(folder, repo_id, said, **wanted)
    return _publish(Path(artefact).expanduser(), repo_id, None, **wanted)


def check_name(repo_id: str) -> None:
    """Raises QwlibError for a name that the Hub will not take, so that a dry run tells it too."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not isinstance(repo_id, str) or not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id, flags=re.ASCII):
        raise QwlibError(f"{repo_id!r} is no repository: name it as OWNER/NAME, of letters a to z, digits, -, _ and .")
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise QwlibError(f"the Hub takes no such name: {' '.join(str(error).split())}") from None


def _publish(
    folder: Path, repo_id: str, said, *, private: bool, dry_run: bool, token: str | None, records
) -> Published:
    """`publish` for a folder; `said` are its scores in a fresh process where they are known."""
    manifest = check(folder)
    warnings = licence(folder, manifest, repo_id, private)
    if random_weights.is_random(catalog.find(str(folder))):
        warnings.append("its weights are random: it measures, and says nothing")
    ids = probe(manifest)
    said = fresh.logits(folder, manifest["scheme"], ids) if said is None else said
    if not said.isfinite().all():
        raise QwlibError(f"{folder.name} gives scores that are no numbers: quantize again")
    remote = Remote(repo_id, token)
    known = remote.look(private) if remote.user or not dry_run else None
    if known is None:
        warnings.append(
            "no token, so what is on the Hub was not looked at: set HF_TOKEN, or log in with `hf auth login`"
        )
    content = files_of(folder, manifest)
    content[CARD] = card.write(repo_id, folder, manifest, list(records), known.card if known else "").encode()
    if TOKEN.search(content[CARD]):
        raise QwlibError(f"the card of {repo_id} would hold a token: take it out of your own words, and revoke it")
    plan = planned(content, known)
    result = Published(repo_id, private, content[CARD].decode(), plan, warnings)
    if not dry_run:
        result.commit = remote.send(content, plan, known, private)
        again = partial(fresh.logits, folder, manifest["scheme"], ids)
        remote.prove(result.commit, content, manifest, ids, said, again, private)
    return result


def who(token: str | None = None) -> tuple[str | None, str]:
    """(the name that a token belongs to, a line on it); None where there is no token, or the Hub does not take it."""
    remote = Remote("", token)
    if not remote.user:
        return None, "no token: set HF_TOKEN, make a Colab secret of that name, or log in with `hf auth login`"
    try:
        with told("the Hub", "was not asked"):
            name = remote.api.whoami()["name"]
    except QwlibError as error:
        return None, str(error)
    return name, f"a token of {name}"


def words(repo_id: str, own: str, token: str | None = None) -> None:
    """Put an author's own words into the card of a published model.

    Raises QwlibError where there is no such card, or the Hub refuses.
    """
    remote = Remote(repo_id, token)
    with told(repo_id, "keeps its card"):
        head = remote.api.model_info(repo_id).sha
        text = remote.text(CARD, head)
        if not all(mark in text for mark in card.OWN):
            raise QwlibError(f"the card of {repo_id} was not written by qwlib: edit it on its page")
        before, _, rest = text.partition(card.OWN[0])
        after = rest.rpartition(card.OWN[1])[2]
        new = f"{before}{card.OWN[0]}\n{own}\n{card.OWN[1]}{after}"
        remote.api.upload_file(repo_id=repo_id, path_or_fileobj=new.encode(), path_in_repo=CARD, parent_commit=head)


@contextlib.contextmanager
def saved(lm: Lm) -> Iterator[tuple[Path, object]]:
    """A loaded model as an artefact: where it lies, or in a folder for the time being. What it says is compared.

    The folder, and its scores on `probe` in a fresh process, None where they were not asked for on the device that `load` picks.
    Raises QwlibError where it can't be saved, or its files say something else than it does.
    """
    if lm.saved:
        yield Path(lm.row.source), None
        return
    if lm.weights != "trained":
        raise QwlibError(f"{lm.row.name} has random weights: they measure, and say nothing")
    if lm.row.adapter:
        raise QwlibError(
            f"{lm.row.name} has an adapter: `python -m qwlib merge` first, quantize that folder, and publish it"
        )
    if lm.scheme.bits_per_weight >= 16:
        raise QwlibError(f"{lm.scheme.name} quantizes nothing: what is published here is a quantized model")
    with tempfile.TemporaryDirectory() as above:
        folder = Path(above) / "made"
        folder.mkdir()
        lm.save(folder)
        dtype = str(lm.dtype).removeprefix("torch.")
        source = checkpoints.source(lm.row)
        artefacts.seal(folder, source=source, scheme=lm.scheme.name, dtype=dtype, made_on=lm.device.type)
        ids = probe(artefacts.read(folder))
        here, there = lm.logits(ids).cpu(), fresh.logits(folder, lm.scheme.name, ids, device=str(lm.device))
        if not alike(here, there, lambda: lm.logits(ids).cpu()):
            raise QwlibError(f"{lm.row.name} says something else once it is saved as {lm.scheme.name}: not published")
        yield folder, there if devices.pick_device()[0] == lm.device else None


def probe(manifest: dict):
    """Token ids (2 × 24) that a model is asked for its scores on."""
    import torch

    seed = int(artefacts.digest(manifest)[:8], 16)
    return torch.randint(3, 900, (2, 24), generator=torch.Generator().manual_seed(seed))


def check(folder: Path) -> dict:
    """The manifest of a folder that may be published.

    Raises QwlibError: see `publish`.
    """
    if not folder.is_dir():
        raise QwlibError(f"no such folder: {folder}; `python -m qwlib quantize` writes one")
    manifest = artefacts.verify(folder)
    if manifest is None:
        raise QwlibError(
            f"{folder} has no {artefacts.MANIFEST}: only what `python -m qwlib quantize` wrote is published"
        )
    if why := schemes.find(manifest["scheme"]).unsavable:
        raise QwlibError(why)
    if odd := sorted(set(manifest["files"]) - set(artefacts.parts(folder))):
        raise QwlibError(f"{odd[0]} in {folder} is no file that loading reads: quantize again")
    named = {*manifest["files"], artefacts.MANIFEST, CARD, *EXTRA}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in named and not path.is_dir():
            raise QwlibError(f"{name} in {folder} is not in its manifest: take it out before publishing")
        if path.is_file():
            with open(path, "rb") as file:
                if TOKEN.search(file.read(1 << 24)):  # texts, and what large files say of themselves
                    raise QwlibError(f"{name} in {folder} holds a token: take it out before publishing, and revoke it")
    return manifest


def licence(folder: Path, manifest: dict, repo_id: str, private: bool) -> list[str]:
    """What a publisher has to know of the base model's licence.

    Raises QwlibError where it does not allow a public copy, or asks for what is not there.
    """
    parent, found, row = licences.base(manifest)
    told = []
    if row is not None and row.licence_page:
        told.append(
            f"{parent} is gated: who downloads this copy has not accepted {row.licence_page}; its licence binds them all the same"
        )
    if found is None:
        if not private:
            raise QwlibError(f"the licence of {manifest['source']['name']} is not known here: publish it privately")
        return [*told, f"the licence of {manifest['source']['name']} is not known here: the card names none"]
    if not private and not found.public:
        raise QwlibError(
            f"{parent} is under {row.licence}, which was not found to allow public copies: publish it privately"
        )
    asked = []
    if found.first and not repo_id.partition("/")[2].startswith(found.first):
        asked.append(f"a name that begins with {found.first}")
    if found.copy and not any(name.startswith("LICENSE") for name in extras(folder)):
        asked.append("a copy of it in a file LICENSE")
    if asked:
        told.append(f"{row.licence} asks for {' and '.join(asked)}")
        if not private:
            raise QwlibError(told[-1] + " where a copy is public")
    return told


def files_of(folder: Path, manifest: dict) -> dict[str, Path | bytes]:
    """Everything that goes up, by its name there, the card left out."""
    out: dict[str, Path | bytes] = {name: folder / name for name in (*manifest["files"], artefacts.MANIFEST)}
    out |= extras(folder)
    found = licences.base(manifest)[1]
    if found and found.notice and not any(name.startswith("NOTICE") for name in out):
        out["NOTICE"] = f"{found.notice}\n".encode()
    return out


def extras(folder: Path) -> dict[str, Path]:
    """Licences and notices that lie beside the artefact, empty ones left out."""
    return {name: folder / name for name in EXTRA if (folder / name).is_file() and (folder / name).stat().st_size}


def planned(content: dict[str, Path | bytes], known: Known | None) -> list[File]:
    """What publishing would do to each file.

    Raises QwlibError where the repository holds weights of something else.
    """
    held, out = known.held if known else {}, []
    for name, each in content.items():
        what = "new" if name not in held else "same" if held[name] in digests(each) else "changed"
        if what == "changed" and name not in (CARD, *EXTRA) and artefacts.MANIFEST not in held:
            raise QwlibError(f"the repository holds another {name}, which qwlib did not put there: choose another name")
        out.append(File(name, size(each), what))
    for name in sorted(set(held) - set(content)):
        if known and name in known.earlier:
            out.append(File(name, 0, "gone"))
        elif any(fnmatch(name, wanted) for wanted in (*hub.WANTED, *artefacts.WEIGHTS)):
            raise QwlibError(f"the repository holds {name}, which is not of this artefact: choose another name")
    return out
