"""transformers: a folder of safetensors loaded with `from_pretrained`, and checked for what it silently leaves out.

Folders that GPTQ, AWQ or bitsandbytes wrote say in their configuration how they were quantized, and transformers hands them
to the package that reads them; qwlib only checks that every weight came. What other backends need of a folder or a maker is
here too: tokenizer, stop tokens, texts, a call of a command line.
"""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

from ..errors import QwlibError
from ..machine import memory
from ..models import artefacts
from ..running.engines import Transformers
from ..running.lm import quiet

# weights that files hold and no model reads; source: transformers 5.23, modeling_utils.py and gpt_neox/modeling_gpt_neox.py
HARMLESS = (
    r"rotary_emb\.inv_freq$",  # old checkpoints have it for each layer; it is calculated from the configuration
    r"\.(attn|attention)\.(bias|masked_bias)$",  # causal masks of GPT-2 and GPT-NeoX
)


def fill(lm, source: str) -> None:
    """Load model and tokenizer from `source` as they are."""
    read(lm, source)
    finish(lm)


def read(lm, source: str, quantization=None, place: dict | None = None) -> None:
    """The plain transformers model of `lm`, quantized while it is loaded if a configuration is given.

    `place`: a device map (`placed`) whose host part waits there to be dealt with; without it all goes to the device.

    Raises QwlibError where weights are missing or of another shape; transformers would make them up.
    """
    from transformers import AutoModelForCausalLM

    with quiet():
        lm.model, report = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=lm.dtype,
            device_map=place or {"": "cpu" if lm.waits else lm.device},
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, in one line
            **({"quantization_config": quantization} if quantization else {}),  # None would hide what the folder says
        )
    if place and len(place) > 1:  # transformers would carry that part to and fro at every call
        unhook(lm.model)
    lm.model.eval()
    lm.tokenizer = tokenizer(lm, source)
    strange = [key for key in report["unexpected_keys"] if not any(re.search(known, key) for known in HARMLESS)]
    if strange:
        raise QwlibError(
            f"{lm.row.name} holds {len(strange)} weights that the model does not use, {min(strange)} first: "
            "config.json describes another model"
        )
    if absent := [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]:
        raise QwlibError(
            f"{lm.row.name} lacks {len(absent)} of its weights, {absent[0]} first: is the folder complete?"
        )
    if lm.device.type == "cpu":
        memory.own(lm.model)


def unhook(model) -> None:
    """Take accelerate's hooks off `model` and all its parts.

    accelerate leaves each part's own `forward` on the instance, where it would go before that of a class that the part is given
    later (`mend`, `choose_kernel`).
    """
    from accelerate.hooks import remove_hook_from_submodules

    remove_hook_from_submodules(model)
    for module in model.modules():
        vars(module).pop("forward", None)


def placed(shapes, device, wait: list[str]) -> dict:
    """transformers' device map: everything on `device` but the modules named in `wait`; no entry lies within another."""
    if not wait or device.type == "cpu":
        return {"": device}

    def below(module, name):
        if name in wait:
            yield name, "cpu"
        elif any(other.startswith(f"{name}." if name else "") for other in wait):
            for child, part in module.named_children():
                yield from below(part, f"{name}.{child}" if name else child)
        else:
            yield name, device

    return dict(below(shapes, ""))


def finish(lm) -> None:
    """What every transformers model needs once its weights are there: the adapter, greedy settings, arithmetic, an engine."""
    from transformers import GenerationConfig

    from ..machine import arithmetic
    from ..models import adapters

    if lm.row.adapter and lm.weights == "trained":
        lm.model = adapters.put_over(lm)
    old = lm.model.generation_config
    lm.model.generation_config = GenerationConfig(  # sampling settings of the publisher would warn at every greedy call
        bos_token_id=old.bos_token_id, eos_token_id=old.eos_token_id, pad_token_id=old.pad_token_id
    )
    stray = {str(t.device) for t in lm.model.parameters()} - {str(lm.device)}
    if stray and lm.device.index is not None and not lm.waits:
        raise QwlibError(f"parts of {lm.row.name} landed on {', '.join(sorted(stray))} instead of {lm.device}")
    lm.arithmetic, lm.arithmetic_reason = arithmetic.choose(lm.dtype, lm.device)
    unhook = arithmetic.hook(lm.model) if lm.arithmetic != lm.dtype else None
    lm.engine = Transformers(lm.model, lm.device, unhook=unhook)


def tokenizer(lm, source: str, **options):
    """The tokenizer in `source`, padding on the left.

    Raises QwlibError where its files are missing.
    """
    from transformers import AutoTokenizer

    missing = QwlibError(
        f"{lm.row.name} has no tokenizer files (tokenizer.json, or a vocabulary): save the tokenizer beside the model"
    )
    try:
        found = AutoTokenizer.from_pretrained(source, padding_side="left", trust_remote_code=False, **options)
    except ValueError as error:
        if "backend tokenizer" not in str(error):
            raise
        raise missing from None
    fox, hen = (found(word, add_special_tokens=False).input_ids for word in ("fox", "hen"))
    if not fox or fox == hen:  # a class without its vocabulary makes one unknown token of every word
        raise missing
    return found


def stops(lm, source: str) -> list[int]:
    """Token ids that end an answer: those of the folder's generation_config.json, and the tokenizer's own."""
    path, told = Path(source) / "generation_config.json", None
    if path.is_file():
        told = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    ends = [lm.tokenizer.eos_token_id, *(told if isinstance(told, list) else [told])]
    return [end for end in dict.fromkeys(ends) if end is not None]


def copy_texts(source: str, out: Path) -> None:
    """Configuration and tokenizer of a checkpoint, without its weights."""
    for name in artefacts.parts(Path(source)):
        if name.endswith((".json", ".jinja", ".model", ".txt")) and not name.endswith(".index.json"):
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copy(Path(source) / name, out / name)
    for name in ("qwlib.json", "merged.json"):  # of another folder
        (out / name).unlink(missing_ok=True)


def call(module: str, options: list[str]) -> None:
    """A maker's own command line, in a process of its own.

    Raises QwlibError with its last words.
    """
    done = subprocess.run([sys.executable, "-m", module, *options], capture_output=True, text=True)
    if done.returncode:
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["no word"]
        raise QwlibError(f"{module} failed: {said[-1][:300]}")
