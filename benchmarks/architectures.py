"""Every causal architecture of transformers, as a model of two small layers: what qwlib says of it, against transformers alone.

    python benchmarks/architectures.py [KIND ...]      # all: 10 minutes; written to results/architectures.json

For each architecture whose configuration can be made tiny, and for bf16, nf4-dq and int8: scores of a row, of a short row beside
a long one, of a row behind a prefix, and greedy answers to one row and to two of other lengths, against the calls that a user of
transformers would write, a row at a time. An outcome is `agrees`, or the one line that refuses the model, or what is wrong.
"""

import argparse
import gc
import inspect
import json
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KINDS

import qwlib
from qwlib import files
from qwlib.machine import processor

SCHEMES = ("bf16", "nf4-dq", "int8")
RESULT = Path(__file__).parents[1] / "results" / "architectures.json"
LARGEST = 4_000_000  # parameters: what is larger has no configuration that these sizes make tiny
SIZES = {
    64: "hidden_size n_embd d_model dim emb_dim embed_dim word_embed_proj_dim attention_hidden_size",
    128: "intermediate_size ffn_dim d_ff n_inner decoder_ffn_dim encoder_ffn_dim ffn_hidden_size "
    "max_position_embeddings n_positions n_ctx max_seq_len",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_key_value_heads num_experts_per_tok",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
    "num_local_experts num_experts n_routed_experts",
    16: "head_dim kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim",
    32: "moe_intermediate_size",
}
OWN = {  # so many layers that one of them is attention, and what else an architecture can't do without
    "lfm3": {"num_hidden_layers": 4},
    "qwen3_5_moe_text": {"num_hidden_layers": 4},
    "qwen3_5_text": {"num_hidden_layers": 4},
    "qwen3_next": {"num_hidden_layers": 4},
    "qwen4_exp_text": {"num_hidden_layers": 4},
    "bailing_hybrid": {"num_hidden_layers": 6, "n_group": 1, "topk_group": 1},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"num_hidden_layers": 5},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "xmod": {"default_language": "en_XX"},
    "axk1": {"n_group": 1, "topk_group": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]},
}
WORDS = {"vocab_size": 320, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LONG = [1, 20, 30, 40, 50, 60, 70, 80, 90, 100, 33, 44, 55, 66, 77, 88, 99]
SHORT = [7, 150, 211, 19, 300]
NEW = 6
OFF = 0.05  # of the standard deviation of a position's scores, root mean square


def tiny(kind: str):
    """A small configuration of an architecture, None where these sizes make none."""
    cls = CONFIG_MAPPING[kind]
    known = set(inspect.signature(cls.__init__).parameters) | set(getattr(cls, "attribute_map", {}))
    for base in cls.__mro__:
        known |= set(getattr(base, "__annotations__", {}))
    sizes = {name: size for size, names in SIZES.items() for name in names.split() if name in known}
    if "kv_lora_rank" in known:  # latent attention has no groups of heads
        sizes["num_key_value_heads"] = 4
    if "is_decoder" in known:
        sizes["is_decoder"] = True
    sizes |= OWN.get(kind, {})
    try:
        config = cls(**WORDS, **sizes)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except Exception:  # whatever a configuration says of sizes that do not fit it
        return None
    return config if sum(p.numel() for p in model.parameters()) <= LARGEST else None


def write(config, folder: Path) -> Path:
    """A random checkpoint in bf16 with a tokenizer of one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.15)
    model.to(torch.bfloat16).save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def outcome(folder: Path, scheme: str) -> str:
    """`agrees`, `refused: …`, or what is wrong; the folder goes by its name."""
    return _said(folder, scheme).replace(str(folder), folder.name)


def _said(folder: Path, scheme: str) -> str:
    try:
        with qwlib.load(str(folder), scheme, device="cpu") as lm:
            plain = lm.model
            if scheme == "bf16":
                plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
            return _compared(lm, plain)
    except qwlib.QwlibError as error:
        lines = str(error).splitlines()
        return f"refused: {lines[0]}" if len(lines) == 1 else f"wrong: {len(lines)} lines: {lines[0]}"
    except Exception as error:
        return f"wrong: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _compared(lm, plain) -> str:
    """What is wrong with some rows only is taken for rounding: it can send a token to other experts of a mixture."""
    said = ""
    for shift in range(3):
        long, short = ([(i + shift) % 320 for i in row] for row in (LONG, SHORT))
        if (said := _one_pair(lm, plain, long, short)) == "agrees":
            break
    return said


def _one_pair(lm, plain, long: list[int], short: list[int]) -> str:
    def scores(*rows):
        with torch.inference_mode():
            return plain(torch.tensor(rows)).logits.float()

    mixture = any("expert" in name for name, _ in plain.named_parameters())

    def off(found, wanted) -> float:
        """By how much the worst position moved; of a mixture the middle one, since rounding may send single tokens elsewhere."""
        moved = (found.float() - wanted).square().mean(-1).sqrt() / wanted.std(-1)
        return (moved.median() if mixture else moved.max()).item()

    def answer(row) -> list[int]:
        ids = torch.tensor([row])
        settings = {
            "do_sample": False,
            "max_new_tokens": NEW,
            "min_new_tokens": NEW,
            "pad_token_id": 0,
            "eos_token_id": 2,
        }
        with torch.inference_mode():
            return plain.generate(ids, attention_mask=torch.ones_like(ids), **settings)[0, len(row) :].tolist()

    # ours first: what can't be read at all is refused here
    ours, beside = lm.logits([long])[0], lm.logits([long, short])[1, -len(short) :]
    behind = lm.logits([short], after=lm.prefix(long))[0]
    own, alone = scores(long)[0], scores(short)[0]
    # noise: another row in the batch, and enough rows for another arithmetic (`machine/arithmetic.py`)
    noise = max(off(scores(long, long[::-1])[0], own), off(scores(*[short] * 4)[0], alone))
    allowed = max(OFF, 2 * noise)
    found = {
        "a row": off(ours, own),
        "a short row": off(beside, alone),
        "a prefix": off(behind, scores(long + short)[0, -len(short) :]),
    }
    if wrong := {what: round(moved, 3) for what, moved in found.items() if not moved <= allowed}:
        return f"wrong: scores are off by {wrong}, {allowed:.2g} allowed"
    for rows in ([long], [long, short]):
        for row, got in zip(rows, lm.stream(rows, new_tokens=NEW).tolist(), strict=True):
            wanted = answer(row)
            if got == wanted:
                continue
            at = next(i for i in range(NEW) if got[i] != wanted[i])
            last = scores(row + wanted[:at])[0, -1]
            if ((last[wanted[at]] - last[got[at]]) / last.std()).item() > 4 * allowed:  # else they are as good as equal
                return f"wrong: the answer to row {rows.index(row)} of {len(rows)} is {got} instead of {wanted}"
    return "agrees"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*")
    asked = parser.parse_args().kinds
    found = {}
    for kind in asked or sorted(KINDS):
        if (config := tiny(kind)) is None:
            continue
        with tempfile.TemporaryDirectory() as above:
            folder = Path(above) / kind
            try:
                write(config, folder)
            except Exception as error:
                print(f"{kind}: not built: {type(error).__name__}: {str(error)[:100]}", flush=True)
                continue
            gc.freeze()  # every load collects, and what was imported by now stays
            found[kind] = {scheme: outcome(folder, scheme) for scheme in SCHEMES}
        for scheme, said in found[kind].items():
            print(f"{kind:24}{scheme:8}{said[:150]}", flush=True)
    print(told(found))
    if not asked:
        facts = {"transformers": transformers.__version__, "processor": processor.name()}
        files.write_text(RESULT, json.dumps(facts | {"outcomes": found}, indent=1) + "\n")


def told(found: dict) -> str:
    """How many architectures agree, are refused, are wrong, in one line."""
    counts = Counter(said.partition(":")[0] for each in found.values() for said in each.values())
    shares = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
    return f"{len(found)} architectures under {', '.join(SCHEMES)}: {shares}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity(50)
    torch.set_num_threads(1)
    sys.exit(main())
