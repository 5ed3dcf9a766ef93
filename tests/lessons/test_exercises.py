"""Exercises ship unanswered and run clean; a right answer is told from a wrong one."""

import ast
import contextlib
import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import qwlib
from qwlib import QwlibError, artefacts, classify, estimates, schemes, streaming, verdicts
from qwlib.lessons import exercises, fourbit, integers, lowrank, tiles

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
LIBRARY = {
    each.__name__.rpartition(".")[2]: each
    for each in (
        *(qwlib, torch, exercises, fourbit, integers, lowrank, tiles),
        *(artefacts, classify, estimates, schemes, streaming, verdicts),
    )
}

# for each exercise of a notebook: a right answer, and wrong ones that somebody might give
ANSWERS = {
    "01_fundamentals": [
        (
            "4 + 8 / 128 + 32 / (128 * 256)",
            ["4 + 8 / 64 + 32 / (64 * 256)", "4 + 32 / 128", "4 + 8 / 128", "4.063", "4.0", "'four'"],
        ),
        (
            "tuple(0.5 * fourbit.normal_float()[[0b0011, 0b1110]])",
            ["tuple(0.5 * fourbit.normal_float()[[0b1110, 0b0011]])", "(-0.3949, 0.723)", "0.5", "(-0.1975,)"],
        ),
        ("3 * 16 + 13", ["13 * 16 + 3", "4 * 16 + 13", "3", "'0x3d'"]),
        ("[12, 8, 6, 4, 3, 2, 0, -12] * 8", ["torch.randn(64).tolist()", "[1.0] * 63", "[1.0] * 64"]),
        ("2", ["1", "4", "0.5"]),
        (
            "fourbit.normal_float(0.93)",
            ["fourbit.normal_float()", "fourbit.float4()", "2 * fourbit.normal_float(0.93)"],
        ),
        ("3.60", ["3.49", "3.93", "5.70"]),
        ('["nf4-dq"]', ['["nf4-dq", "int8"]', "[]", "'all'"]),
    ],
    "02_streaming_metrics": [
        ("(20, 19.417)", ["(19.417, 20)", "(20.2, 19.4)", "20"]),
        ("3350", ["3350 / 8", "6700", "'fast'"]),
        ("4", ["8", "1", "5"]),
    ],
    "03_model_comparison": [
        ("4", ["8", "64", "3.43"]),
        ("0.144", ["0.131", "0.208", "-0.144"]),
        ("8000 * 25", ["8000 * 5", "8000", "8000 * 0.5"]),
    ],
    "04_backends": [
        ("4 + 20 / 64", ["4.25", "4.5", "20"]),
        ("10", ["11", "0.1", "None or 0"]),
    ],
    "05_nemoguard_safety": [
        ("(0.5, 0.5)", ["(0.5, 0)", "(1, 0.5)", "0.5"]),
        ("0.15", ["0.5", "0.9", "0"]),
        ("""'{"User Safety": "safe"'""", ["""'{"User Safety": "safe"}'""", "'safe'", "3"]),
    ],
    "06_publish": [
        ("70", ["30", "0.7", "'b'"]),
        ("spoiled", ["[name for name in 'ABC' if name != spoiled][0]", "'D'"]),
    ],
    "07_a_fast_kernel": [
        ("160", ["128", "144", "192", "'160'"]),
        ("(5, 4)", ["(4, 5)", "(4, 3)", "(3.56, 3.56)", "5"]),
        ("(6, 1)", ["(6, 0)", "(6, 3)", "(9, 1)", "6"]),
    ],
    "08_finetuning": [
        ("2 * 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432) / 1e6", ["41.9", "167.8", "2 * 41.9 * 7"]),
        ('"a"', ['"b"', '"x"', "0"]),
        ("0.14", ["5e-4", "10", "0.3", "'0.14'"]),
        ("6", ["5", "7", "8", "6.3"]),
    ],
}


def off(tensor):
    """As notebook 01 defines it."""
    restored = {kind.upper(): fourbit.dequantize_4bit(fourbit.quantize_4bit(tensor, kind)) for kind in ("nf4", "fp4")}
    return {name: 100 * integers.errors(tensor, each)["relative"] for name, each in restored.items()}


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """What the exercises of a notebook build on, small enough to compute in no time."""
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path_factory.mktemp("artefact")
    (folder / "a").write_bytes(bytes(70))
    (folder / "b").write_bytes(bytes(30))
    gap = {1: 0.010, 2: 0.011, 4: 0.014, 8: 0.020}
    quality = {"tokens": 8000, "kld": {"ppl_ratio_stderr": 0.005}}
    scores = [0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9]
    return LIBRARY | {
        "Path": Path,
        "off": off,
        "weight": torch.randn(64, 64, generator=generator),
        "gradient": torch.randn(64, 64, generator=generator),
        "SCHEME": "nf4-dq",
        "batches": [*gap],
        "sweeps": {"nf4-dq": [{"itl_s": {"p50": s}} for s in gap.values()]},
        "predicted": {"nf4-dq": SimpleNamespace(read_bytes=1e9)},
        "done": [{"quality": {}}, {"quality": quality}],
        "gptq": lambda weight, inputs: weight,
        "output_error": lambda weight, inputs: 0.1,
        "held_out": None,
        "unsafe": {"bf16": scores, "nf4-dq": [s / 4 for s in scores]},
        "test": SimpleNamespace(labels=[0, 1] * 4),
        "threshold": 0.5,
        "folder": folder,
        "manifest": {"files": {file.name: {"bytes": file.stat().st_size} for file in folder.iterdir()}},
        "OUT": str(tmp_path_factory.mktemp("out")),
    }


def asked(notebook: str) -> list[str]:
    cells = json.loads((NOTEBOOKS / f"{notebook}.ipynb").read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if "exercise" in cell["metadata"].get("tags", [])]


def run(exercise: str, answer: str, names: dict) -> str:
    """What the cell prints with that answer, which may use what the cell computes."""
    lines = ast.parse(exercise).body
    assert ast.unparse(lines[0]) == "answer = None"
    *rest, check = lines[1:]
    torch.manual_seed(0)
    names, out = dict(names), io.StringIO()
    for source in (ast.Module(rest, []), f"answer = {answer}", ast.Module([check], [])):
        with contextlib.redirect_stdout(out):
            exec(compile(source, "exercise", "exec"), names)
    return out.getvalue().strip()


def test_every_notebook_asks_and_every_question_is_answered_here():
    assert {path.stem: len(asked(path.stem)) for path in NOTEBOOKS.glob("*.ipynb")} == {
        name: len(answers) for name, answers in ANSWERS.items()
    }


@pytest.mark.parametrize(
    ("notebook", "number"), [(name, n) for name, each in ANSWERS.items() for n in range(len(each))]
)
def test_a_right_answer_a_wrong_one_and_none(notebook, number, story):
    exercise, (right, wrong) = asked(notebook)[number], ANSWERS[notebook][number]
    assert run(exercise, right, story) == "right"
    for answer in wrong:
        assert run(exercise, answer, story).startswith("not yet: "), answer
    assert run(exercise, "None", story) == "not answered yet"


def test_an_answer_that_breaks_is_wrong_and_says_how():
    assert exercises.check("x", lambda answer: answer + 1 > 0, "a number") == (
        'not yet: TypeError: can only concatenate str (not "int") to str. a number'
    )
    assert exercises.check(0, lambda answer: answer == 0, "zero is an answer too") == "right"


def test_the_spoiled_copy_is_the_one_that_verify_refuses(tmp_path):
    folder = tmp_path / "artefact"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(5000))
    artefacts.seal(folder, source={"name": "x"}, scheme="nf4", dtype="bfloat16")
    copies = {name: tmp_path / name for name in "ABC"}
    for _ in range(2):
        spoiled = exercises.spoil_one(folder, copies)
        for name, copy in copies.items():
            with pytest.raises(QwlibError, match="safetensors") if name == spoiled else contextlib.nullcontext():
                artefacts.verify(copy)
