"""The command line: models, schemes, backends, estimate, quantize, merge, bench, publish, run, nightly, links."""

import contextlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from . import schemes
from .backends import BACKENDS, environment
from .errors import QwlibError
from .machine import processes
from .measuring import compare
from .models import catalog

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
ModelName = Annotated[str | None, typer.Option(help="the same as MODEL")]
FirstName = Annotated[
    str | None, typer.Argument(metavar="[MODEL]", help="catalog name, Hub id or folder; else the embedded model")
]
SchemeNames = Annotated[list[str] | None, typer.Option("--scheme", help="the same as SCHEME; repeat for more")]


def _named(first: str | None, option: str | None) -> catalog.Model:
    """The row of the model that was named in front, or by --model; else the embedded one's."""
    if first and option and first != option:
        raise QwlibError(f"two models are named, {first} and {option}: name one")
    name = first or option or catalog.EMBEDDED
    if first in schemes.SCHEMES and not Path(first).exists():
        raise QwlibError(f"{first} is a scheme: name the model before it, such as {catalog.EMBEDDED} {first}")
    return catalog.find(name)


def _table(title: str, headings: list[str], rows: list[list[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))  # what a notebook wrote may look like markup
    console = Console()
    console.print(table) if console.is_terminal else Console(width=200).print(table)


@app.command()
def models() -> None:
    """List the models of the catalog."""
    rows = [
        [
            m.name,
            m.what,
            m.source or "PyPI",
            (m.revision or ("unpinned" if m.source else "sha256"))[:8],
            m.licence + (" (gated)" * bool(m.licence_page)),
        ]
        for m in catalog.MODELS.values()
    ]
    _table("Models: any Hub id or folder works as well", ["name", "what", "source", "revision", "licence"], rows)


@app.command(name="schemes")
def list_schemes() -> None:
    """List the schemes, what they store in which format, and whether they can run here."""
    rows = []
    for s in schemes.SCHEMES.values():
        python, why = environment.where(s.backend)
        parts = [s.name, f"{s.bits_per_weight:.2f}", s.linear, s.embedding, s.head]
        rows.append([*parts, why if python else f"no: {why}", s.what])
    _table(
        "Schemes; bits of a linear layer's weight",
        ["name", "bits/weight", "linear", "embedding", "head", "runs", "what"],
        rows,
    )


@app.command()
def backends(
    install: Annotated[bool, typer.Option("--install", help="build the second environment, or complete it")] = False,
) -> None:
    """List the backends and where each one runs: here, in the environment that --install builds, or why nowhere."""
    if install:
        print(f"ready: {environment.build()}")
    rows = []
    for row in BACKENDS.values():
        python, why = environment.where(row.name)
        used = [s.name for s in schemes.SCHEMES.values() if row.name in (s.backend, s.maker)]
        rows.append([row.name, why if python else f"no: {why}", ", ".join(used)])
    _table("Backends", ["name", "runs", "schemes that it makes or runs"], rows)


@app.command()
def estimate(
    first: FirstName = None,
    more: Annotated[list[str] | None, typer.Argument(metavar="[SCHEME]...", help="schemes; else all")] = None,
    model: ModelName = None,
    scheme: SchemeNames = None,
    batch: Annotated[int, typer.Option(min=1)] = 1,
    context: Annotated[
        int | None,
        typer.Option(min=1, help="tokens in the key-value cache; else 2048, or as many as the model has positions"),
    ] = None,
) -> None:
    """Predict memory from shapes alone; nothing is loaded."""
    from .models import estimates

    row, rows = _named(first, model), []
    wanted = [schemes.find(name) for name in [*(more or []), *(scheme or [])] or schemes.SCHEMES]
    with processes.importing():
        found = [estimates.estimate(row, each, batch=batch, context=context) for each in wanted]
    for e in found:
        parts = (e.weights_bytes, e.state_bytes, e.kv_bytes, e.total_bytes)
        rows.append([e.scheme, f"{e.held_bits:.2f}", *(f"{part / 1e9:.3f}" for part in parts)])
    title = f"{row.name}, {e.parameters / 1e9:.3f} billion parameters; GB (10⁹ bytes); cache of {batch} × {e.context} tokens"
    _table(title, ["scheme", "held bits", "weights", "state", "cache", "total"], rows)
    if (share := estimates.outside(row)) > 0.1:
        print(f"{share:.0%} of the parameters lie in no linear layer, as experts of a mixture do, and stay in 16 bits.")


@app.command()
def quantize(
    first: FirstName = None,
    second: Annotated[
        str | None, typer.Argument(metavar="[SCHEME]", help="what to store the weights as: `schemes` lists all")
    ] = None,
    model: ModelName = None,
    scheme: Annotated[str | None, typer.Option(help="the same as SCHEME")] = None,
    out: Annotated[Path | None, typer.Option(help="folder to write; else one in the cache")] = None,
    group_size: Annotated[
        int | None, typer.Option(min=1, help="weights that share a scale, if it can be chosen")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="to calibrate on: a file, wikitext2 or a guard; else docstrings")
    ] = None,
) -> None:
    """Quantize a model into a folder that says what it is; `bench --scheme FOLDER` measures it, `qwlib.load` opens it."""
    from .loading import quantizing
    from .models import artefacts

    if second and scheme and second != scheme:
        raise QwlibError(f"two schemes are named, {second} and {scheme}: name one")
    row = _named(first, model)
    if not (scheme := second or scheme):
        raise QwlibError(
            f"name a scheme after the model, such as {row.name} nf4-dq: `python -m qwlib schemes` lists all"
        )
    folder = quantizing.quantize(row, scheme, out, group_size=group_size, text=text)
    held = artefacts.read(folder)["files"]
    print(f"{folder}: {len(held)} files, {sum(file['bytes'] for file in held.values()) / 1e9:.3f} GB")


@app.command()
def merge(
    first: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="a model with an adapter: nemoguard-8b, or model+adapter")
    ] = None,
    model: ModelName = None,
    out: Annotated[Path | None, typer.Option(help="folder to write; else one in the cache")] = None,
) -> None:
    """Merge a LoRA adapter into its model's 16-bit weights, to be quantized afterwards."""
    from .loading import merging

    print(merging.merge(_named(first, model), out))


@app.command()
def bench(
    first: FirstName = None,
    more: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SCHEME]...", help="schemes, quantized folders or GGUF files; else nf4-dq"),
    ] = None,
    model: ModelName = None,
    scheme: SchemeNames = None,
    weights: Annotated[str, typer.Option(help="trained, or random: true shape and speed, no download")] = "trained",
    batch: Annotated[int, typer.Option(min=1)] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 64,
    new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    runs: Annotated[int, typer.Option(min=1)] = 3,
    engine: Annotated[str | None, typer.Option(help="eager, graph or compiled; else a graph where it can be")] = None,
    quality: Annotated[bool, typer.Option(help="measure perplexity and divergence from 16-bit too")] = False,
    protocol: Annotated[str, typer.Option(help="gptq-2048, hf-sliding, llamacpp-512, or other lengths")] = "gptq-512",
    blocks: Annotated[int, typer.Option(min=1, help="windows of the text that are read")] = 16,
    text: Annotated[str | None, typer.Option(help="a file, wikitext2 or wikitext2-raw; else the embedded text")] = None,
    out: Annotated[Path, typer.Option(help="folder for the records")] = Path("runs/bench"),
) -> None:
    """Measure memory, speed and (--quality) perplexity and divergence, one fresh process a row, 16-bit as the reference."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from .measuring import bench as benching

    row, wanted = _named(first, model), [*(more or []), *(scheme or [])] or ["nf4-dq"]
    rows = benching.targets(row, wanted)
    if weights not in ("trained", "random"):
        raise QwlibError(f"--weights is trained or random, not {weights}")
    if quality and weights == "random":
        raise QwlibError("random weights have no quality: leave out --quality or take trained weights")
    job = {"weights": weights, "batch": batch, "prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "runs": runs}
    job["engine"] = engine
    if quality:
        job["quality"] = {"protocol": protocol, "blocks": blocks, "text": text}
    records = []
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(row.name, total=len(rows))
        for record in benching.bench(row, wanted, out, **job):
            records.append(record)
            progress.update(task, advance=1, description=f"{row.name} {record['scheme']['name']}")
    device = next((r["env"]["device"] for r in records), "")
    title = (
        f"{row.name} ({weights} weights) on {device}; batch {batch}, {prompt_tokens} + {new_tokens} tokens, {runs} runs"
    )
    _table(title, *compare.cells([r for r in records if "failure" not in r]))
    for record in (r for r in records if "failure" in r):
        how = "skipped" if record["failure"].get("skipped") else "failed"
        print(f"{record['scheme']['name']} {how}: {record['failure']['reason']}")
    for line in compare.protocols(records):
        print(line)
    print(f"records: {out}")
    if all("failure" in r for r in records):
        sys.exit(1)


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(help="what `quantize` wrote")],
    repository: Annotated[str, typer.Argument(help="OWNER/NAME on the Hub")],
    public: Annotated[bool, typer.Option("--public", help="for everybody to see; else private")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="send it; else a plan and the card are shown")] = False,
    records: Annotated[Path, typer.Option(help="where `bench --scheme FOLDER` put its records")] = Path("runs/bench"),
) -> None:
    """Publish a quantized folder on the Hugging Face Hub, with a card of what was measured, and download it again to be sure."""
    from .measuring import record
    from .publishing import card, publish

    manifest, found = publish.check(folder), []
    for file in sorted(records.glob("*.json")):
        with contextlib.suppress(QwlibError):
            found.append(record.read(file))
    found = card.matching(manifest, found)
    if not found:
        print(
            f"no record of it in {records}: `python -m qwlib bench --quality --scheme {folder}` makes one for the card"
        )
    done = publish.publish(folder, repository, private=not public, dry_run=not yes, records=found)
    if not yes:
        print(done.card)
    print(done)
    if not yes:
        print("nothing was sent: --yes sends it")


def _setting(text: str) -> tuple[str, str]:
    """NAME=VALUE; the notebook that declares the name says of what kind the value is."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise QwlibError(f"--set takes NAME=VALUE, such as ROWS=176, not {text!r}")
    return name, value


@app.command()
def run(
    notebooks: Annotated[
        list[Path] | None, typer.Argument(help="notebooks; all of notebooks/ if none is named")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder for runs")] = Path("runs"),
    size: Annotated[
        str | None, typer.Option(help="smoke or nightly of sizes.toml; else what the notebooks say")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="NAME=VALUE for a parameter of the notebooks; repeat for more")
    ] = None,
) -> None:
    """Execute the notebooks without a screen, and write an index page."""
    from .nightly import runner, suite

    parameters = dict(map(_setting, settings or []))
    paths = notebooks or sorted(Path("notebooks").glob("*.ipynb"))
    plans = [runner.Plan(path) for path in paths]
    if size:
        listed = {
            plan.path.resolve(): plan for folder in {p.parent for p in paths} for plan in suite.plans(folder, size)
        }
        plans = [listed.get(path.resolve(), runner.Plan(path)) for path in paths]
    for plan in plans:
        plan.parameters |= parameters
    outcomes, folder = runner.run(plans, out)
    _outcomes(outcomes)
    print(f"report: {folder / 'index.html'}")
    sys.exit(0 if all(o.status in ("passed", "skipped") for o in outcomes) else 1)


def _outcomes(outcomes: list) -> None:
    headings = ["notebook", "status", "s", "reason"]
    _table("Notebooks", headings, [[o.name, o.status, f"{o.seconds:.0f}", o.reason] for o in outcomes])


@app.command()
def nightly(
    size: Annotated[str, typer.Option(help="nightly, or smoke: a quarter of an hour on two cores")] = "nightly",
    resume: Annotated[
        bool, typer.Option("--resume", help="go on with the last night: what has no valid record")
    ] = False,
    update_baseline: Annotated[
        bool, typer.Option("--update-baseline", help="accept what is measured as baselines/<device>.json")
    ] = False,
    notebooks: Annotated[Path, typer.Option(help="folder with notebooks and sizes.toml")] = Path("notebooks"),
    out: Annotated[Path, typer.Option(help="folder for runs, and their history")] = Path("runs"),
    baselines: Annotated[Path, typer.Option(help="folder with a baseline a device")] = Path("baselines"),
) -> None:
    """Execute every notebook, hold each figure to its baseline, and write a report; docs/running.md tells more.

    Exit codes: 0 fine, 1 a regression, 2 a notebook failed, 3 the harness itself.
    """
    from .nightly import nights, report

    try:
        night = nights.run(
            notebooks, out, size=size, baselines=baselines, resume=resume, update_baseline=update_baseline
        )
    except Exception as error:  # a broken torch too: exit code 1 would say that a figure regressed
        print(
            f"qwlib: {error if isinstance(error, QwlibError) else f'{type(error).__name__}: {error}'}", file=sys.stderr
        )
        sys.exit(3)
    _outcomes(night.outcomes)
    worse = [finding for finding in night.findings if finding.state == "regression"]
    if worse:
        cells = [[f.name, report.number(f.before), report.number(f.now), f.cause] for f in worse]
        _table("Regressions", ["figure", "before", "now", "probable cause"], cells)
    for line in (*night.trouble, *night.notes, report.verdict(night)):
        print(line)
    print(f"report: {night.folder / 'index.html'}")
    sys.exit(night.code)


@app.command()
def outputs(
    everything: Annotated[bool, typer.Option("--all", help="also those whose source has not changed")] = False,
    size: Annotated[str, typer.Option(help="nightly, or smoke")] = "nightly",
) -> None:
    """Execute the notebooks whose source has changed, and write their outputs into them; the machine should be idle.

    Exit codes: 0 fine, 2 a notebook failed.
    """
    from .nightly import outputs, suite

    plans = [plan for plan in suite.plans(Path("notebooks"), size) if not plan.skip]
    wanted = [plan for plan in plans if everything or outputs.stale(plan.path)]
    if not wanted:
        return print("every notebook's outputs are of its source")
    found = []
    for plan in wanted:  # each is kept before the next one starts
        found += outputs.refresh([plan], Path("runs/outputs"), size)
    _outcomes(found)
    sys.exit(0 if all(outcome.status == "passed" for outcome in found) else 2)


@app.command()
def links() -> None:
    """Write the address that stands in pyproject.toml into badges and set-up cells."""
    from .nightly import opening

    for path in opening.write(Path(".")):
        print(f"updated {path}")


def main() -> None:
    """The command line with a user's mistakes told in one line."""
    sys.stdout.reconfigure(errors="backslashreplace")  # whatever a model wrote can be printed
    with processes.whole_process():
        try:
            app()
        except QwlibError as error:
            print(f"qwlib: {error}", file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
