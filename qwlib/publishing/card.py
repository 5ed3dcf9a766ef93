"""The model card of an artefact, written from its manifest and its records. The author's own words in a card are kept.

    text = card.write("me/smollm2-nf4", folder, manifest, records)

The code for loading uses the library that reads the files, where possible without qwlib. Tests run this code exactly as it
stands in the card. The card contains only what was measured. Metadata are written by huggingface_hub's ModelCard and EvalResult.

What it leaves out: intended use, training data and bias. They are in the base model's card, which is linked.
"""

import json
import re
from pathlib import Path

from .. import schemes
from ..errors import QwlibError
from ..models import artefacts, catalog
from .licences import Licence, base

OWN = ("<!-- your own words begin -->", "<!-- your own words end -->")


def own_words(text: str) -> str:
    """What an author wrote into a card: the text between the markers, or the whole card if it has no markers."""
    if OWN[0] in text:
        rest = text.partition(OWN[0])[2]
        return (rest.rpartition(OWN[1])[0] if OWN[1] in rest else rest).strip("\n")
    return _FRONT.sub("", text, count=1).strip("\n")


# what huggingface_hub 2.4 reads as a card's head (repocard.REGEX_YAML_BLOCK): behind blank lines too, and at the file's end
_FRONT = re.compile(r"\A\s*---(?:\r\n|\r|\n)([\s\S]*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|\Z)")


def own_metadata(text: str) -> dict:
    """An author's metadata: the keys of a card's head that qwlib does not write (language, extra_gated_prompt, …).

    Raises QwlibError if the head can't be read.
    """
    import yaml

    head = _FRONT.match(text)
    try:
        found = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError:
        found = None
    if not isinstance(found or {}, dict) or found is None:
        raise QwlibError(
            "the metadata of the existing model card can't be read: repair the card on its page on the Hub"
        )
    return {key: value for key, value in (found or {}).items() if key not in WRITTEN}


# every key that a card written here may have; model_name and eval_results are the model-index
WRITTEN = {
    "license",
    "license_name",
    "license_link",
    "base_model",
    "base_model_relation",
    "library_name",
    "pipeline_tag",
}
WRITTEN |= {"tags", "model-index", "model_name", "eval_results"}


def plain(text) -> str:
    """A text from elsewhere, in one line and escaped, so that it contains no Markdown, HTML or marker."""
    out = " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace("`", "'")
    return re.sub(r"([|\[\]*_\\])", r"\\\1", out)


def matching(manifest: dict, records: list[dict]) -> list[dict]:
    """The records that are measurements of this artefact."""
    from ..measuring.describing import describe_artefact

    made = describe_artefact(manifest)
    return [
        r
        for r in records
        if r.get("artefact") == made and r["scheme"]["name"] == manifest["scheme"] and "failure" not in r
    ]


def write(repo_id: str, folder: Path, manifest: dict, records: list[dict], there: str = "") -> str:
    """The whole README.md. `there` is the card that it replaces. The author's words and metadata are copied from that card.

    Raises QwlibError if a record is not a measurement of this artefact.
    """
    from huggingface_hub import ModelCard

    measured = matching(manifest, records)
    if len(measured) != len(records):
        raise QwlibError(f"{len(records) - len(measured)} of the records did not measure {Path(folder).name}")
    data, scheme = metadata(repo_id, manifest, measured, own_metadata(there)), schemes.find(manifest["scheme"])
    parent, licence, row = base(manifest)
    made_from = f"[{parent}](https://huggingface.co/{parent})" if parent else plain(manifest["source"]["name"])
    parts = [
        f"# {repo_id.partition('/')[2]}",
        f"{licence.shown}.\n" if licence and licence.shown else "",
        f"{made_from}, stored in the scheme `{scheme.name}`: {scheme.what}. {_stored(manifest)}",
        "## Loading",
        lines(repo_id, folder, manifest),
        "## Measured",
        "\n\n".join(_measured(record) for record in measured) or "Nothing has been measured yet.",
        "## How it was made",
        _made(manifest),
        "## Licence",
        _licence(licence, parent, row),
        "\n".join((OWN[0], own_words(there), OWN[1])),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in parts if part) + "\n"))


def metadata(repo_id: str, manifest: dict, records: list[dict], own: dict):
    """huggingface_hub's ModelCardData, with an author's `own` keys."""
    from huggingface_hub import EvalResult, ModelCardData

    parent, licence, _ = base(manifest)
    scheme = schemes.find(manifest["scheme"])
    results = []
    for record in records:
        if quality := record.get("quality"):
            about = {
                "task_type": "text-generation",
                "dataset_type": "text",
                "dataset_name": f"{' '.join(quality['text'].split()).replace('<', '')} (sha256 {quality['text_sha256'][:12]})",
            }
            results.append(
                EvalResult(
                    **about,
                    metric_type="perplexity",
                    metric_name=f"perplexity, {quality['protocol']}, {quality['tokens']} tokens",
                    metric_value=round(quality["ppl"], 4),
                )
            )
            if kld := quality.get("kld"):
                results.append(
                    EvalResult(
                        **about,
                        metric_type="kl-divergence",
                        metric_name=f"mean KL divergence from {kld['reference']}, nats per token",
                        metric_value=round(kld["mean"], 5),
                    )
                )
    bits = f"{min(int(scheme.bits_per_weight), 16)}-bit"
    return ModelCardData(
        license=licence.tag if licence else None,
        license_name=licence.name if licence else None,
        license_link=licence.link if licence else None,
        base_model=parent,
        base_model_relation="quantized" if parent else None,
        library_name=LIBRARY[scheme.backend],
        pipeline_tag="text-generation",
        tags=["quantized", bits, scheme.backend, scheme.name, "qwlib"],
        model_name=repo_id.partition("/")[2] if results else None,
        eval_results=results or None,
        **own,
    )


# libraries that the Hub knows: huggingface.js, packages/tasks/src/model-libraries.ts
LIBRARY = {
    "transformers": "transformers",
    "bitsandbytes": "transformers",
    "gptqmodel": "transformers",
    "auto-round": "transformers",
    "llama.cpp": "gguf",
    "onnxruntime": "onnx",
    "exllamav2": "exllamav2",
    "exllamav3": "exllamav3",
}
PACKAGES = {
    "transformers": ["transformers", "accelerate"],
    "bitsandbytes": ["transformers", "accelerate", "bitsandbytes"],
    "gptqmodel": ["transformers", "accelerate", "gptqmodel"],
    "llama.cpp": ["huggingface_hub", "llama-cpp-python"],
    "onnxruntime": ["huggingface_hub", "onnxruntime-genai"],
}
LINES = {
    "transformers": """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({repo})
model = AutoModelForCausalLM.from_pretrained({repo}, device_map="auto")
ids = tokenizer("The capital of France is", return_tensors="pt").to(model.device)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=8, do_sample=False)[0]))""",
    "gguf": """from huggingface_hub import hf_hub_download
from llama_cpp import Llama

model = Llama(hf_hub_download({repo}, {file}), verbose=False)
print(model("The capital of France is", max_tokens=8, temperature=0)["choices"][0]["text"])""",
    "onnx": """import onnxruntime_genai
from huggingface_hub import snapshot_download

model = onnxruntime_genai.Model(snapshot_download({repo}))
tokenizer, settings = onnxruntime_genai.Tokenizer(model), onnxruntime_genai.GeneratorParams(model)
settings.set_search_options(max_length=16, do_sample=False)
generator = onnxruntime_genai.Generator(model, settings)
generator.append_tokens(tokenizer.encode("The capital of France is"))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))""",
    "qwlib": """import qwlib
from huggingface_hub import snapshot_download

with qwlib.load(snapshot_download({repo})) as lm:
    ids = lm.stream(lm.encode("The capital of France is"), new_tokens=8)
    print(lm.tokenizer.decode(ids[0]))""",
}


def code(repo_id: str, folder: Path, manifest: dict) -> str:
    """Python code that loads the artefact from the Hub and generates a few tokens."""
    kind = LIBRARY[schemes.find(manifest["scheme"]).backend]
    return LINES.get(kind, LINES["qwlib"]).format(
        repo=json.dumps(str(repo_id)), file=json.dumps(catalog.gguf_file(folder))
    )


def lines(repo_id: str, folder: Path, manifest: dict) -> str:
    """The packages to install, followed by `code`."""
    packages = PACKAGES.get(schemes.find(manifest["scheme"]).backend)
    install = f"```sh\npip install {' '.join(packages)}\n```\n\n" if packages else ""
    return f"{install}```python\n{code(repo_id, folder, manifest)}\n```"


def _stored(manifest: dict) -> str:
    total = artefacts.weight_bytes(manifest)
    grouped = f" Groups of {manifest['group_size']} weights share a scale." if "group_size" in manifest else ""
    rest = f" Weights that are not quantized are stored in {manifest['dtype']}."
    return f"The weight files take {total / 1e9:.3f} GB.{grouped}{rest}"


def _measured(record: dict) -> str:
    memory, speed, env = record["memory"], record["speed"], record["env"]
    held = (memory["weights_bytes"] + memory["state_bytes"]) / 1e9
    rows = [("weights in memory, scales included", f"{held:.3f} GB")]
    if "load_peak_bytes" in memory:
        rows.append(("peak memory while loading", f"{memory['load_peak_bytes'] / 1e9:.3f} GB"))
    shape = (
        f"batch size {speed['batch']}, {speed['prompt_tokens']} prompt tokens, {speed['new_tokens']} new tokens, "
        f"engine: {plain(speed['engine'])}"
    )
    if "decode_tok_s" in speed:
        rows.append((f"decoding speed ({shape})", f"{speed['decode_tok_s']:.1f} tokens/s"))
    rows.append(("time to first token, median", f"{speed['ttft_s']['p50'] * 1e3:.0f} ms"))
    if quality := record.get("quality"):
        text = f"{quality['protocol']}, {quality['tokens']} tokens of {plain(quality['text'])}"
        rows.append((f"perplexity ({text})", f"{quality['ppl']:.2f} ± {quality['ppl_stderr']:.2f}"))
        if kld := quality.get("kld"):
            reference = plain(kld["reference"])
            if "ppl_ratio" in kld:
                change, error = kld["ppl_ratio"] * 100 - 100, kld["ppl_ratio_stderr"] * 100
                rows.append((f"perplexity change from {reference}", f"{change:+.1f} ± {error:.1f} %"))
            rows.append(
                (
                    f"mean KL divergence from {reference}",
                    f"{kld['mean']:.4f} ± {kld['stderr']:.4f} nats per token",
                )
            )
            rows.append((f"top-1 agreement with {reference}", f"{kld['top1'] * 100:.1f} %"))
    table = "\n".join(["| measurement | value |", "|---|--:|", *(f"| {name} | {value} |" for name, value in rows)])
    packages = ", ".join(plain(f"{name} {version}") for name, version in env["packages"].items())
    machine = env["cpu"] if env["cpu"].startswith(env["device"]) else f"{env['device']} ({env['cpu']})"
    where = f"Measured on {plain(machine)}, on {record['created'][:10]}, with {packages}."
    return f"{where}\n\n{table}"


def _made(manifest: dict) -> str:
    tools = ", ".join(plain(f"{name} {version}") for name, version in manifest["tools"].items())
    source = manifest["source"]
    told = [f"{key} `{plain(source[key])}`" for key in ("revision", "sha256", "adapter") if key in source]
    out = [f"Made from {plain(source['name'])}{' (' + ', '.join(told) + ')' if told else ''}, with {tools}."]
    if chosen := manifest.get("calibration"):
        out.append(
            f"Calibrated on {chosen['samples']} samples of {chosen['length']} tokens each, from {plain(chosen['text'])}."
        )
    out.append(
        f"`{artefacts.MANIFEST}` lists every file with its SHA-256. [qwlib](https://github.com/qwlib/qwlib) wrote this card."
    )
    return " ".join(out)


def _licence(licence: Licence | None, parent: str | None, row: catalog.Model | None) -> str:
    if licence is None:
        return "The licence is that of the model it was made from. qwlib does not know that licence."
    told = f"The licence is that of [{parent}](https://huggingface.co/{parent}): {row.licence}."
    return told + (f" {licence.notice.rstrip('.')}." if licence.notice else "")
