"""How much it flatters formats that the embedded model was stored in 4 bits: a model like it, with weights off that grid.

    python benchmarks/off_grid.py FOLDER                  make it: some minutes on an H100
    python -m qwlib bench --quality FOLDER SCHEME ...     its table, to be put beside that of smollm2-135m

The file has 16 levels for each block of 32 weights, so a weight was within half a level of what the file says before it was
rounded. Each weight is moved by a random part of half a level. Then full fine-tuning brings the model nearer again: it learns
what the embedded model answers to questions on Python's functions, sampled at temperature 1. It prints how far the weights lie
from the nearest level: 0 levels is on the grid, and weights that know nothing of it are a quarter of a level away in the mean.
Fine-tuning alone does not leave the grid (`--apart 0` shows that).
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import qwlib
from qwlib import files
from qwlib.lessons import docstrings
from qwlib.models import catalog, embedded
from qwlib.training.finetune import finetune

BLOCK, LEVELS = 32, 16


def levels(grid):
    """(lowest level, distance of two levels) of each block of weights (rows × columns) as the file has them: blocks × 1."""
    lowest = (blocks := grid.float().reshape(-1, BLOCK)).amin(1, keepdim=True)
    return lowest, ((blocks.amax(1, keepdim=True) - lowest) / (LEVELS - 1)).clamp(min=1e-9)


def from_grid(weights, grid) -> float:
    """The mean distance of weights (rows × columns) from the nearest level of their block, in levels; `grid`: weights on it."""
    lowest, step = levels(grid)
    places = (weights.float().reshape(-1, BLOCK) - lowest) / step
    return float((places - places.round()).abs().mean())


def own_words(path: Path, answers: int, tokens: int, batch: int) -> int:
    """Write what the model answers to each question, `answers` times; how many lines there are comes back."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        docstrings.write(file := Path(folder) / "questions.jsonl")
        asked = [json.loads(line)["prompt"] for line in file.read_text(encoding="utf-8").splitlines()] * answers
    lines = []
    with qwlib.load(catalog.EMBEDDED, "bf16", engine="eager") as lm:
        tokenizer = lm.tokenizer
        tokenizer.pad_token = tokenizer.eos_token
        torch.manual_seed(0)
        said = [[{"role": "user", "content": question}] for question in asked]
        for first in range(0, len(asked), batch):
            given = tokenizer.apply_chat_template(
                said[first : first + batch],
                add_generation_prompt=True,
                padding=True,
                padding_side="left",
                return_tensors="pt",
                return_dict=True,
            ).to(lm.device)
            found = lm.model.generate(
                **given, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=tokens
            )
            for question, row in zip(
                asked[first : first + batch], found[:, given["input_ids"].shape[1] :], strict=True
            ):
                answer = tokenizer.decode(row, skip_special_tokens=True).strip()
                if answer:
                    lines.append(json.dumps({"prompt": question, "answer": answer}))
            print(f"{len(lines)} of {len(asked)} answers", flush=True)
    files.write_text(path, "\n".join(lines))
    return len(lines)


def moved(folder: Path, apart: float) -> Path:
    """Write the embedded model with each weight of its linear layers moved by up to `apart` levels, up or down."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(embedded.checkpoint(), folder)
    file = next(folder.glob("*.safetensors"))
    weights, draw = load_file(file), torch.Generator().manual_seed(0)
    for name, held in weights.items():
        if "_proj." in name:  # the embedding has 8 bits in the file
            by = (2 * torch.rand(held.numel() // BLOCK, BLOCK, generator=draw) - 1) * apart * levels(held)[1]
            weights[name] = (held.float() + by.reshape(held.shape)).to(held.dtype)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def main() -> None:
    from safetensors.torch import load_file

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--apart", type=float, default=0.5)
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=192)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    asked = parser.parse_args()
    if not asked.folder:
        return print("benchmarks/off_grid.py: no folder to write to, nothing made")
    with tempfile.TemporaryDirectory() as folder:
        own_words(words := Path(folder) / "own_words.jsonl", asked.answers, asked.tokens, 32 * asked.batch)
        out, told = finetune(
            str(moved(Path(folder) / "moved", asked.apart)),
            "fp32",
            words,
            asked.folder,
            method="full",
            batch=asked.batch,
            epochs=asked.epochs,
            learning_rate=asked.learning_rate,
        )
    losses = [check["loss"] for check in told["training"]["validation_losses"]]
    print(f"{told['training']['steps']} steps, loss on held-back answers {losses[0]:.3f}, then {min(losses):.3f}")
    before = load_file(next(embedded.checkpoint().glob("*.safetensors")))
    after = load_file(next(Path(out).glob("*.safetensors")))
    for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.15.self_attn.q_proj.weight"):
        apart = [from_grid(weights[name], before[name]) for weights in (before, after)]
        print(f"{name}: {apart[0]:.3f} levels from the grid before, {apart[1]:.3f} after")
    return None


if __name__ == "__main__":
    main()
