"""Quantize language models to 4 bits, measure the result, and run the notebooks.

For a first look: python -m qwlib estimate smollm2-135m

For help on one command: python -m qwlib COMMAND --help
"""

import contextlib
import sys
import textwrap
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
ModelName = Annotated[str | None, typer.Option(metavar="NAME", help="Another way to give MODEL.")]
FirstName = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL",
        help="A catalog name, a Hugging Face Hub id or a folder. The default is the embedded model, smollm2-135m.",
    ),
]
SchemeNames = Annotated[
    list[str] | None,
    typer.Option("--scheme", metavar="NAME", help="Another way to give SCHEME. Repeat it for several schemes."),
]


def _named(first: str | None, option: str | None) -> catalog.Model:
    """The catalog row of the model given as MODEL or by --model. Without either, the embedded model's row."""
    if first and option and first != option:
        raise QwlibError(f"two models are named, {first} and {option}: name only one")
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
        # long headings take several lines, so that the values below them take one
        lines = textwrap.fill(heading, 9, break_long_words=False, break_on_hyphens=False)
        table.add_column(lines, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))  # what a notebook wrote may look like markup
    console = Console()
    console.print(table) if console.is_terminal else Console(width=240).print(table)


@app.command()
def models() -> None:
    """List the models in the catalog.

    Commands that take a MODEL also accept a Hugging Face Hub id or a local folder.

    Example: python -m qwlib models
    """
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
    _table(
        "Models. A Hub id or a folder works as well.", ["name", "description", "source", "revision", "licence"], rows
    )


@app.command(name="schemes")
def list_schemes() -> None:
    """List the schemes, the formats that they store weights in, and where they can run.

    Linear layers, embedding and output head have a column each. In the
    column `runs in`, `here` is the Python environment of this command.
    `backends` is a second environment. To build it, run
    `python -m qwlib backends --install`.

    Example: python -m qwlib schemes
    """
    rows = []
    for s in schemes.SCHEMES.values():
        python, why = environment.where(s.backend)
        parts = [s.name, f"{s.bits_per_weight:.2f}", s.linear, s.embedding, s.head]
        rows.append([*parts, why if python else f"no: {why}", s.what])
    _table(
        "Schemes. bits/weight is for a weight of a linear layer.",
        ["name", "bits/weight", "linear layers", "embedding", "output head", "runs in", "description"],
        rows,
    )


@app.command()
def backends(
    install: Annotated[bool, typer.Option("--install", help="Build or complete the second environment first.")] = False,
) -> None:
    """List the backends, and where each of them can run.

    `here` is the Python environment of this command. `backends` is a second
    environment, which --install builds. If a backend cannot run on this
    machine, the table gives the reason.

    Example: python -m qwlib backends --install
    """
    if install:
        print(f"The second environment is ready: {environment.build()}")
    rows = []
    for row in BACKENDS.values():
        python, why = environment.where(row.name)
        used = [s.name for s in schemes.SCHEMES.values() if row.name in (s.backend, s.maker)]
        rows.append([row.name, why if python else f"no: {why}", ", ".join(used)])
    _table("Backends", ["name", "runs in", "schemes that it quantizes or runs"], rows)


@app.command()
def estimate(
    first: FirstName = None,
    more: Annotated[
        list[str] | None, typer.Argument(metavar="SCHEME", help="One or more schemes. The default is all.")
    ] = None,
    model: ModelName = None,
    scheme: SchemeNames = None,
    batch: Annotated[int, typer.Option(min=1, help="The batch size that the key-value cache is for.")] = 1,
    context: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="The number of tokens in the key-value cache. The default is 2048, or the model's limit if that is lower.",
        ),
    ] = None,
) -> None:
    """Predict how much memory a model takes under a scheme.

    The prediction uses only the shapes of the model's weights. No weights
    are loaded. For bitsandbytes, the scales have a column of their own. For
    most formats of other backends, `weights (GB)` includes them.

    Example: python -m qwlib estimate llama-3.1-8b nf4-dq
    """
    from .models import estimates

    row, rows = _named(first, model), []
    wanted = [schemes.find(name) for name in [*(more or []), *(scheme or [])] or schemes.SCHEMES]
    with processes.importing():
        found = [estimates.estimate(row, each, batch=batch, context=context) for each in wanted]
    for e in found:
        parts = (e.weights_bytes, e.state_bytes, e.kv_bytes, e.total_bytes)
        rows.append([e.scheme, f"{e.held_bits:.2f}", *(f"{part / 1e9:.3f}" for part in parts)])
    title = (
        f"{row.name}, {e.parameters / 1e9:.3f} billion parameters. 1 GB is 10⁹ bytes. "
        f"The key-value cache is for batch size {batch} and {e.context} tokens."
    )
    headings = ["bits/parameter in memory", "weights (GB)", "scales (GB)", "key-value cache (GB)", "total (GB)"]
    _table(title, ["scheme", *headings], rows)
    if (share := estimates.outside(row)) > 0.1:
        print(
            f"{share:.0%} of the parameters are outside the linear layers and stay in 16 bits. "
            "In a mixture of experts, the experts are among them."
        )


@app.command()
def quantize(
    first: FirstName = None,
    second: Annotated[
        str | None,
        typer.Argument(
            metavar="SCHEME", help="The scheme to store the weights in. `python -m qwlib schemes` lists all."
        ),
    ] = None,
    model: ModelName = None,
    scheme: Annotated[str | None, typer.Option(metavar="NAME", help="Another way to give SCHEME.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write. The default is a folder in the cache.")] = None,
    group_size: Annotated[
        int | None,
        typer.Option(min=1, help="The number of weights that share a scale. Only some schemes let you choose it."),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            help="The calibration text: a file, `wikitext2`, or the name of a guard. "
            "The default is docstrings of Python's standard library."
        ),
    ] = None,
) -> None:
    """Quantize a model and write it to a folder.

    The folder contains a manifest, which lists every file and says how the
    model was made. In Python, `qwlib.load(FOLDER)` loads it. To measure it,
    run `python -m qwlib bench --scheme FOLDER`.

    Example: python -m qwlib quantize smollm2-135m nf4-dq
    """
    from .loading import quantizing
    from .models import artefacts

    if second and scheme and second != scheme:
        raise QwlibError(f"two schemes are named, {second} and {scheme}: name only one")
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
        str | None, typer.Argument(metavar="MODEL", help="A model with an adapter: nemoguard-8b, or MODEL+ADAPTER.")
    ] = None,
    model: ModelName = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write. The default is a folder in the cache.")] = None,
) -> None:
    """Merge a LoRA adapter into the 16-bit weights of its model.

    The merged model can then be quantized. The command prints the folder that it wrote.

    Example: python -m qwlib merge nemoguard-8b
    """
    from .loading import merging

    print(merging.merge(_named(first, model), out))


@app.command()
def finetune(
    first: FirstName = None,
    second: Annotated[
        str | None, typer.Argument(metavar="SCHEME", help="The scheme of the frozen weights. The default is nf4-dq.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            help="A JSONL or CSV file with `prompt` and `answer`, or JSONL with `messages`. Or `guard:training`: messages of the "
            "project's own for a safety guard."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The new folder for what was trained.")] = None,
    method: Annotated[str, typer.Option(help="`lora`, `rslora`, `dora`, or `full` with the scheme fp32.")] = "lora",
    rank: Annotated[int, typer.Option(help="The rank of the adapter's matrices.")] = 16,
    alpha: Annotated[float, typer.Option(help="The adapter's output is multiplied by alpha ÷ rank.")] = 32,
    dropout: Annotated[float, typer.Option(help="The share of the adapter's inputs that a step leaves out.")] = 0.0,
    target: Annotated[
        list[str] | None,
        typer.Option(help="A linear layer's name, such as q_proj. Repeat it for several. The default is all of them."),
    ] = None,
    epochs: Annotated[float, typer.Option(help="How often each example is seen.")] = 1,
    steps: Annotated[int | None, typer.Option(help="The number of steps, in place of epochs.")] = None,
    batch: Annotated[int, typer.Option(help="Examples that are read at once.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Batches whose gradients are added up for a step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="The highest learning rate.")] = 2e-4,
    warmup: Annotated[float, typer.Option(help="The share of the steps in which the learning rate rises.")] = 0.05,
    longest: Annotated[int, typer.Option(help="How many tokens an example may have.")] = 512,
    emphasis: Annotated[
        float, typer.Option(help="How many times a token counts that an example's `emphasis` names.")
    ] = 1,
    validation: Annotated[float, typer.Option(help="The share of the examples that is held back to check.")] = 0.1,
    patience: Annotated[int | None, typer.Option(help="Stop after so many checks without a lower loss.")] = None,
    every: Annotated[int | None, typer.Option(help="Steps between two checks. The default is a tenth of all.")] = None,
    optimizer: Annotated[str, typer.Option(help="`adamw`, `adamw-8bit` or `paged`.")] = "adamw",
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Compute activations twice, and keep none: less memory.")
    ] = False,
    shard: Annotated[
        bool,
        typer.Option("--shard", help="With torchrun: split the weights over the GPUs. Less memory each, and slower."),
    ] = False,
    seed: Annotated[int, typer.Option(help="Draws the order, the split and the adapter's first values.")] = 0,
    device: Annotated[str | None, typer.Option(help="`cpu` or `cuda`. The default is a GPU if there is one.")] = None,
    weights: Annotated[
        str, typer.Option(help="`trained` or `random`: the model's true shape without a download, to see what fits.")
    ] = "trained",
    estimate: Annotated[
        bool,
        typer.Option(
            "--estimate", help="Predict the memory for batches of `--longest` tokens. Nothing is loaded or trained."
        ),
    ] = False,
) -> None:
    """Train a model on examples: LoRA, or QLoRA where the scheme has 4 bits.

    Only the answers are learnt. The folder that is written holds an adapter,
    which is named after its model: MODEL+FOLDER. If the command is killed, the
    same command goes on from the last checkpoint.

    Example: python -m qwlib finetune smollm2-135m nf4-dq --data examples.jsonl --out runs/mine
    """
    from .training import finetune as training
    from .training import ranks
    from .training.settings import Settings

    settings = {name: value for name, value in locals().items() if name in Settings.__dataclass_fields__} | {
        "targets": tuple(target or ())
    }
    if estimate:
        return _print_training(_named(first, None), second or "nf4-dq", device, settings)
    if data is None or out is None:
        raise QwlibError("name the examples with --data FILE and the folder to write with --out FOLDER")
    folder, told = training.finetune(
        _named(first, None), second or "nf4-dq", data, out, device=device, weights=weights, **settings
    )
    if not ranks.this().first:
        return
    found = told["training"]
    print(f"{folder}: {found['trained_parameters']:,} parameters trained in {found['steps']} steps")
    for kind in ("losses", "validation_losses"):
        if found.get(kind):
            ends = found[kind][0]["loss"], found[kind][-1]["loss"]
            print(f"{kind.replace('_', ' ')}: {ends[0]:.3f} to {ends[1]:.3f}")
    if found.get("kept_step", found["steps"]) != found["steps"]:
        print(f"kept: the weights of step {found['kept_step']}, which had the lowest validation loss")


def _print_training(row, scheme: str, device: str | None, settings: dict) -> None:
    """The predicted memory of a training step as a table, part by part."""
    from .training import predicted

    batch, length = settings.pop("batch"), settings.pop("longest")
    with processes.importing():
        found = predicted.estimate(row, scheme, batch=batch, length=length, device=device, **settings)
    rows = [[part, f"{size / 1e9:.3f}"] for part, size in found.told().items() if part != "all_gradients"]
    print(f"{row.name} in {scheme}: the peak of a training step with {batch} examples of {length} tokens, all learnt")
    _table("", ["part", "memory (GB)"], rows)
    print(
        f"All gradients together, at the end of the backward pass: {found.all_gradients / 1e9:.3f} GB. 1 GB is 10⁹ bytes."
    )


@app.command()
def distill(
    first: FirstName = None,
    second: Annotated[
        str | None,
        typer.Argument(
            metavar="FORM",
            help="`nf4-dq` (the default), `int4`, `int2`, `ternary`, `binary`, `sparse-50`, `2:4` or `layers-24`.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The new folder for the trained model.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="What it reads: a text file, `docstrings` of installed packages, or `own`, which the model writes itself. "
            "Repeat it for several. The default is the last two."
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many rows of text, over all sources.")] = 8192,
    longest: Annotated[int, typer.Option(help="The length of a row, in tokens.")] = 512,
    steps: Annotated[int, typer.Option(help="The number of steps.")] = 400,
    batch: Annotated[int, typer.Option(help="Rows that are read at once.")] = 32,
    learning_rate: Annotated[
        float | None, typer.Option(help="The highest learning rate. The default depends on the form.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="Scores are divided by it before they are compared.")] = 1.0,
    every: Annotated[int | None, typer.Option(help="Steps between two checks. The default is a tenth of all.")] = None,
    seed: Annotated[int, typer.Option(help="Draws the texts and their order.")] = 0,
    device: Annotated[str | None, typer.Option(help="`cpu` or `cuda`. The default is a GPU if there is one.")] = None,
) -> None:
    """Train a model in a smaller form to give its own 16-bit scores.

    The weights are rounded while they are trained (quantization-aware training),
    or some of them are taken out before. For nf4-dq, quantize the folder that is
    written. In the other forms the weights are stored in 16 bits. If the command is killed,
    the same command goes on from the last checkpoint.

    Example: python -m qwlib distill smollm2-135m nf4-dq --out runs/trained
    """
    from .training import distill as distilling
    from .training import forms, ranks

    names = ("steps", "batch", "longest", "learning_rate", "every", "seed")
    settings = {name: value for name, value in locals().items() if name in names and value is not None}
    if out is None:
        raise QwlibError("name the folder to write with --out FOLDER")
    form = forms.find(second or "nf4-dq")
    folder, told = distilling.distill(
        _named(first, None),
        form.name,
        out,
        data=data or distilling.SOURCES,
        rows=rows,
        temperature=temperature,
        device=device,
        **settings,
    )
    if ranks.this().first:
        _print_distilled(folder, told["training"], form)


def _print_distilled(folder: Path, found: dict, form) -> None:
    """What a run of `distill` has come to, and what to do with its folder."""
    losses = [check["loss"] for check in found["validation_losses"]]
    print(f"{folder}: {found['steps']} steps, divergence from 16 bits {losses[0]:.4f}, then {min(losses):.4f}")
    if "packed" in found:
        print(f"packed, a weight would take {found['packed']['bits_per_weight']:.2f} bits")
    if form.scheme != "bf16":
        print(f"next: python -m qwlib quantize {folder} --scheme {form.scheme}")


@app.command()
def bench(
    first: FirstName = None,
    more: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SCHEME",
            help="One or more schemes, folders of quantized models, or GGUF files. The default is nf4-dq.",
        ),
    ] = None,
    model: ModelName = None,
    scheme: SchemeNames = None,
    weights: Annotated[
        str,
        typer.Option(
            help="`trained` or `random`. Random weights have the model's true shape. They need no download and have no quality."
        ),
    ] = "trained",
    batch: Annotated[int, typer.Option(min=1, help="The batch size.")] = 1,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="The length of each prompt, in tokens.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, help="The number of tokens to generate.")] = 64,
    runs: Annotated[int, typer.Option(min=1, help="How often the generation is timed.")] = 3,
    engine: Annotated[
        str | None,
        typer.Option(
            help="`eager`, `graph` or `compiled`. The default is `graph` where that is possible, else `eager`."
        ),
    ] = None,
    quality: Annotated[bool, typer.Option(help="Also measure perplexity, and KL divergence from 16-bit.")] = False,
    protocol: Annotated[
        str,
        typer.Option(
            help="The perplexity protocol, such as gptq-2048, hf-sliding or llamacpp-512. "
            "The number is the window length. Other lengths are possible."
        ),
    ] = "gptq-512",
    blocks: Annotated[int, typer.Option(min=1, help="The number of windows of the text to read.")] = 16,
    text: Annotated[
        str | None,
        typer.Option(
            help="The text to measure quality on: a file, `wikitext2` or `wikitext2-raw`. The default is the embedded text."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to write the records to.")] = Path("runs/bench"),
) -> None:
    """Measure memory and speed of schemes. With --quality, also measure perplexity and KL divergence.

    Each scheme is measured in a new process. The 16-bit model is measured
    first, as the reference.

    Example: python -m qwlib bench --quality smollm2-135m int8 nf4-dq
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from .measuring import bench as benching

    row, wanted = _named(first, model), [*(more or []), *(scheme or [])] or ["nf4-dq"]
    rows = benching.targets(row, wanted)
    if weights not in ("trained", "random"):
        raise QwlibError(f"--weights takes trained or random, not {weights}")
    if quality and weights == "random":
        raise QwlibError("random weights have no quality: leave out --quality or use --weights trained")
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
        f"{row.name} ({weights} weights) on {device}. "
        f"Batch size {batch}, {prompt_tokens} prompt tokens, {new_tokens} new tokens, {runs} run{'s' * (runs > 1)}."
    )
    _table(title, *compare.cells([r for r in records if "failure" not in r]))
    for record in (r for r in records if "failure" in r):
        how = "skipped" if record["failure"].get("skipped") else "failed"
        print(f"{record['scheme']['name']} {how}: {record['failure']['reason']}")
    for line in compare.protocols(records):
        print(line)
    print(f"The records are in {out}.")
    if all("failure" in r for r in records):
        sys.exit(1)


@app.command()
def publish(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The folder that `quantize` wrote.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the Hugging Face Hub.")],
    public: Annotated[
        bool, typer.Option("--public", help="Make the repository public. The default is private.")
    ] = False,
    yes: Annotated[
        bool, typer.Option("--yes", help="Send the files. Without it, only the plan and the model card are shown.")
    ] = False,
    records: Annotated[
        Path, typer.Option(help="The folder with the records that `bench --scheme FOLDER` wrote.")
    ] = Path("runs/bench"),
) -> None:
    """Publish a quantized model on the Hugging Face Hub, with a model card.

    The card contains the measurements of this model from the folder of
    records. After sending, the command downloads the model again and compares
    it with what was sent.

    Example: python -m qwlib publish runs/smollm2-nf4 your-name/smollm2-nf4
    """
    from .measuring import record
    from .publishing import card, publish

    manifest, found = publish.check(folder), []
    for file in sorted(records.glob("*.json")):
        with contextlib.suppress(QwlibError):
            found.append(record.read(file))
    found = card.matching(manifest, found)
    if not found:
        print(
            f"There is no record of {folder} in {records}, so the card has no measurements. "
            f"To measure: python -m qwlib bench --quality --scheme {folder}"
        )
    done = publish.publish(folder, repository, private=not public, dry_run=not yes, records=found)
    if not yes:
        print(done.card)
    print(done)
    if not yes:
        print("nothing was sent: add --yes to send it")


def _setting(text: str) -> tuple[str, str]:
    """Split NAME=VALUE into a name and a text. The notebook that declares the name gives the type of the value."""
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise QwlibError(f"--set takes NAME=VALUE, such as ROWS=176, not {text!r}")
    return name, value


@app.command()
def run(
    notebooks: Annotated[
        list[Path] | None,
        typer.Argument(metavar="NOTEBOOK", help="One or more notebooks. The default is all in notebooks/."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to write results to.")] = Path("runs"),
    size: Annotated[
        str | None,
        typer.Option(
            help="Use the parameters for `smoke` or `nightly` from sizes.toml. The default is the notebooks' own parameters."
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Set a parameter of the notebooks. Repeat it for several."),
    ] = None,
) -> None:
    """Execute notebooks from the command line, and write a report page.

    The command prints the path of the report. The exit code is 0 if every
    notebook passed or was skipped.

    Example: python -m qwlib run notebooks/01_fundamentals.ipynb --size smoke
    """
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
    headings = ["notebook", "status", "seconds", "reason"]
    _table("Notebooks", headings, [[o.name, o.status, f"{o.seconds:.0f}", o.reason] for o in outcomes])


@app.command()
def nightly(
    size: Annotated[
        str, typer.Option(help="`nightly`, or `smoke` for a small run: a quarter of an hour on two cores.")
    ] = "nightly",
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue the last run. Only notebooks without a valid record are executed."),
    ] = False,
    update_baseline: Annotated[
        bool, typer.Option("--update-baseline", help="Accept the measured values as the new baseline of this device.")
    ] = False,
    notebooks: Annotated[Path, typer.Option(help="The folder with the notebooks and sizes.toml.")] = Path("notebooks"),
    out: Annotated[Path, typer.Option(help="The folder to write results and their history to.")] = Path("runs"),
    baselines: Annotated[Path, typer.Option(help="The folder with one baseline file for each device.")] = Path(
        "baselines"
    ),
) -> None:
    """Execute every notebook, compare each metric with its baseline, and write a report.

    docs/running.md explains when a notebook passes, and what counts as a
    regression.

    Exit code 0: everything passed.
    Exit code 1: a metric regressed.
    Exit code 2: a notebook failed.
    Exit code 3: the nightly run itself failed.

    Example: python -m qwlib nightly --size smoke
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
        _table("Regressions", ["metric", "expected", "measured", "probable cause"], cells)
    for line in (*night.trouble, *night.notes, report.verdict(night)):
        print(line)
    print(f"report: {night.folder / 'index.html'}")
    sys.exit(night.code)


@app.command()
def outputs(
    everything: Annotated[
        bool, typer.Option("--all", help="Also execute notebooks whose source has not changed.")
    ] = False,
    size: Annotated[str, typer.Option(help="`nightly`, or `smoke` for small parameters.")] = "nightly",
) -> None:
    """Execute the notebooks whose source has changed, and write the outputs into them.

    The outputs contain timings, so nothing else should run on the machine
    meanwhile. On a machine with a GPU, only the outputs of the cells for a GPU
    are written.

    Exit code 0: every notebook passed.
    Exit code 2: a notebook failed.

    Example: python -m qwlib outputs --all
    """
    from .nightly import outputs, suite

    plans, gpu = [plan for plan in suite.plans(Path("notebooks"), size) if not plan.skip], suite.has_gpu()
    wanted = [plan for plan in plans if outputs.stale(plan.path, gpu=gpu) or (everything and not gpu)]
    if not wanted:
        return print("Every notebook already has the outputs of its current source.")
    found = []
    # each is kept before the next one starts
    for plan in wanted:
        found += outputs.refresh([plan], Path("runs/outputs"), size, gpu=gpu)
    _outcomes(found)
    sys.exit(0 if all(outcome.status == "passed" for outcome in found) else 2)


@app.command()
def links() -> None:
    """Write the repository address from pyproject.toml into badges, set-up cells and workflows.

    Run it in the project's folder after you change the address, for example
    in a fork.

    Example: python -m qwlib links
    """
    from .nightly import opening

    for path in opening.write(Path(".")):
        print(f"updated {path}")


def main() -> None:
    """Run the command line. A user's mistake is reported in one line, without a traceback."""
    sys.stdout.reconfigure(errors="backslashreplace")  # whatever a model wrote can be printed
    with processes.whole_process():
        try:
            app()
        except QwlibError as error:
            print(f"qwlib: {error}", file=sys.stderr)
            sys.exit(2)


if __name__ == "__main__":
    main()
