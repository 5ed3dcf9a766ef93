"""Task accuracy: one task of EleutherAI's lm-evaluation-harness on a model that `load` gave.

The harness does the work (prompts, scoring, errors); here a local YAML file is read, its model handed over, and the result
cut down to what a record holds. It is an optional extra: `pip install "qwlib[eval]"`.

What it leaves out: the harness's own tasks, which want the Hub: call it yourself with `HFLM(pretrained=lm.model)`. How it
differs from the harness's command line: a task file runs no code. Its `!function` would be executed when it is loaded, and
its templates reach the operating system (lm-eval 0.4.13), so plain YAML with known keys and sandboxed templates is all that
passes; and nothing is fetched, cached or reseeded.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import math
import random
from pathlib import Path

from .. import files
from ..errors import QwlibError
from ..models import embedded
from ..running.engines import Transformers

_KEYS = {"task", "dataset_path", "dataset_kwargs", "output_type", "training_split", "validation_split", "test_split"}
_KEYS |= {"fewshot_split", "num_fewshot", "doc_to_text", "doc_to_target", "doc_to_choice", "target_delimiter"}
_KEYS |= {"fewshot_delimiter", "description", "metric_list", "metadata", "generation_kwargs"}


def available() -> tuple[bool, str]:
    """(whether tasks can run here, why not)."""
    ready = importlib.util.find_spec("lm_eval") is not None
    return ready, "" if ready else 'needs lm-evaluation-harness: pip install "qwlib[eval]"'


def evaluate(lm, path: Path, *, limit: int | None = None, batch: int = 8) -> dict:
    """The first metric of the task in the YAML file `path`, over `limit` of its documents (None: all), `batch` at once.

    The batch size is part of the result: bfloat16 sums round differently with it, which can flip a close choice. Returns an
    item of a record's `tasks`: `model, scheme, task, metric, value, stderr, n, shots, batch, harness, sha256` (of the YAML
    file and its data).

    Raises QwlibError where the harness is missing, the weights are random, the model is none of transformers', or the file is
    no plain local task.
    """
    ready, why = available()
    if not ready:
        raise QwlibError(f"a task {why}")
    if lm.weights == "random":
        raise QwlibError("random weights have no accuracy: load trained ones to evaluate a task")
    if not isinstance(lm.engine, Transformers):
        raise QwlibError(
            f"the harness takes transformers' models, and {lm.scheme.name} is none: measure its perplexity"
        )
    settings, digest = read(path)
    results = _run(lm, settings, limit, batch)
    row, name = results["results"][settings["task"]], settings["task"]
    key = next(k for k in row if "," in k and "_stderr" not in k)
    error = row.get(key.replace(",", "_stderr,"))
    out = {"model": lm.row.name, "scheme": lm.scheme.name, "task": name}
    out |= {"metric": key.removesuffix(",none"), "value": float(row[key])}
    if isinstance(error, float) and math.isfinite(error):
        out["stderr"] = error
    return out | {
        "n": results["n-samples"][name]["effective"],
        "shots": results["n-shot"][name],
        "batch": batch,
        "harness": f"lm-eval {importlib.metadata.version('lm-eval')}",
        "sha256": digest,
    }


def read(path: Path) -> tuple[dict, str]:
    """(the task as plain data with its data files' full paths, SHA-256 of the YAML file and its data).

    Data files are looked for beside the YAML file.

    Raises QwlibError for a missing or broken file, and for whatever could run code or fetch something.
    """
    import hashlib

    import yaml

    path = Path(path)
    try:
        raw = path.read_bytes()
        task = yaml.safe_load(raw)
    except OSError as error:
        raise QwlibError(f"there is no task at {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeError) as error:
        raise QwlibError(f"{path} is no plain YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(task, dict) or not isinstance(task.get("task"), str):
        raise QwlibError(f"{path} names no task")
    if unknown := sorted(set(map(str, task)) - _KEYS):
        raise QwlibError(
            f"{path} has the key {unknown[0]!r}, which is not taken here: known are {', '.join(sorted(_KEYS))}"
        )
    if any(set(metric) - {"metric", "aggregation", "higher_is_better"} for metric in task.get("metric_list", [])):
        raise QwlibError(f"{path} has a metric with more than metric, aggregation and higher_is_better")
    splits = (task.get("dataset_kwargs") or {}).get("data_files")
    if task.get("dataset_path") != "json" or not isinstance(splits, dict):
        raise QwlibError(
            f"{path} must have dataset_path: json and dataset_kwargs: {{data_files: {{split: FILE.jsonl}}}}"
        )
    digest = hashlib.sha256(raw)
    for split, name in splits.items():
        file = path.parent / str(name)
        if not file.is_file():
            raise QwlibError(f"{path} wants {name} beside it, which is not there")
        splits[split] = str(file.resolve())
        digest.update(file.read_bytes())
    return task, digest.hexdigest()


def _run(lm, settings: dict, limit: int | None, batch: int) -> dict:
    from unittest import mock

    import datasets
    import jinja2.sandbox
    import torch
    from lm_eval import utils
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate as harness
    from lm_eval.models.huggingface import HFLM

    class Local(ConfigurableTask):
        def download(self, dataset_kwargs=None, **_):  # the harness's own way writes a cache and asks a server
            self.dataset = {
                split: datasets.Dataset.from_list([json.loads(line) for line in Path(file).read_text().splitlines()])
                for split, file in dataset_kwargs["data_files"].items()
            }

    sandbox = jinja2.sandbox.SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    sandbox.filters["regex_replace"] = utils.regex_replace
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with (
        mock.patch.object(utils, "env", sandbox),
        mock.patch.object(lm.model, "tie_weights"),  # HFLM would tie a quantized head to its embedding
        contextlib.redirect_stderr(io.StringIO()),  # its progress bars have no switch
    ):
        try:
            task = Local(config=settings)
            task.set_fewshot_seed(seed=1234)
            # scores in float32: rounded to bfloat16, close choices tie
            model = HFLM(
                pretrained=lm.model,
                tokenizer=lm.tokenizer,
                backend="causal",
                batch_size=batch,
                softmax_dtype=torch.float32,
            )
            # with bootstrap_iters=0 there would be no standard error; that of a mean is not bootstrapped
            return harness(model, {settings["task"]: task}, limit=limit, bootstrap_iters=100, log_samples=False)
        except (KeyError, TypeError, ValueError, jinja2.TemplateError, json.JSONDecodeError) as error:
            raise QwlibError(f"the task {settings['task']} can't be run: {type(error).__name__}: {error}") from error


def write_topics(folder: Path, *, documents: int = 40) -> Path:
    """A task made from the embedded text, four choices a document: which continuation belongs to this beginning?

    The wrong ones are continuations of other topics, drawn with a fixed seed. The path of the YAML file comes back.
    """
    from pydoc_data.topics import topics

    draw = random.Random(0)
    texts = [" ".join(topics[name].split()) for name in sorted(topics)]
    parts = [_two_pieces(text) for text in texts if len(text) > 600]
    lines = []
    for number, (beginning, right) in enumerate(draw.sample(parts, min(documents, len(parts)))):
        choices = [right, *draw.sample([other for _, other in parts if other != right], 3)]
        draw.shuffle(choices)
        lines.append({"id": number, "beginning": beginning, "choices": choices, "right": choices.index(right)})
    task = {
        "task": "python_topics",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "python_topics.jsonl"}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{beginning}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "right",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0, "source": embedded.text_name()},
    }
    files.write_text(Path(folder) / "python_topics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return files.write_text(Path(folder) / "python_topics.yaml", json.dumps(task, indent=1) + "\n")  # JSON is YAML


def _two_pieces(text: str) -> tuple[str, str]:
    """Some 320 letters and the 80 after them, cut between words; the second piece begins with a space."""
    cut, end = text.rindex(" ", 0, 320), text.rindex(" ", 0, 400)
    return text[:cut], text[cut:end]
