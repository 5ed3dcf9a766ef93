"""What the README says about the tree is what the tree holds, and what it says of a GPU is in results/."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASURED = (ROOT / "docs" / "measured.md").read_text(encoding="utf-8")


def test_it_is_short():
    assert len(README.splitlines()) <= 170


def test_the_tree_names_every_room_with_its_sentence():
    listed = set(re.findall(r"^  (\w+)/ +\S.{15,}$", README, flags=re.M))
    assert listed == {path.parent.name for path in (ROOT / "qwlib").rglob("*/__init__.py")}


def test_its_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    assert set(re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", README, flags=re.M)) != set()
    for pair in re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", README, flags=re.M):
        assert set(pair) - {""} <= targets


def test_every_requirement_says_what_needs_it():
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+ +# .{8,}", line), line


def test_modules_begin_with_one_sentence():
    for path in (ROOT / "qwlib").rglob("*.py"):
        first = path.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith('"""'), path
        assert len(first) > 20, path


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", ROOT / "benchmarks" / "gpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def h100():
    return json.loads((ROOT / "results" / "h100.json").read_text(encoding="utf-8"))


def test_its_gpu_tables_are_printed_from_the_results(gpu, h100):
    assert gpu.schemes_table(h100) in README
    assert gpu.batches_table(h100) in MEASURED
    assert gpu.own_table(h100) in MEASURED
    packages = h100["env"]["packages"]
    for told in (h100["date"], *(f"{name} {packages[name]}" for name in ("torch", "transformers", "bitsandbytes"))):
        assert told in README
    h100["rows"][0]["load_s"] += 1
    assert gpu.schemes_table(h100) not in README


def test_its_sentence_on_speed_is_what_the_results_say(gpu, h100):
    speed = {
        (row["scheme"], s["name"], s["batch"]): s["decode_tok_s"]
        for row in h100["rows"]
        if row["model"] == "llama-3.1-8b"
        for s in row["speed"]
        if "failure" not in s
    }
    told = re.search(r"decodes at ([\d.]+) times the speed of bf16 as a graph and at ([\d.]+) compiled", README)
    for ratio, engine in zip(told.groups(), ("graph", "compiled"), strict=True):
        assert f"{speed['nf4-dq', engine, 1] / speed['bf16', engine, 1]:.2f}" == ratio
    rows = int(re.search(r"from (\d+) rows on it is slower", README)[1])
    slower = [b for b in gpu.BATCHES if speed["nf4-dq", "graph", b] < speed["bf16", "graph", b]]
    assert slower == [b for b in gpu.BATCHES if b >= rows]


def test_the_goals_that_were_set_for_a_gpu_were_measured(h100):
    rows = {row["scheme"]: row for row in h100["rows"] if row["model"] == "llama-3.1-8b"}
    large = {row["scheme"]: row for row in h100["rows"] if row["model"] == "gpt-neox-20b"}
    held = {name: row["memory"]["weights_bytes"] + row["memory"]["state_bytes"] for name, row in rows.items()}
    share = {(n, s["name"]): s.get("roofline_share") for n, r in rows.items() for s in r["speed"] if s["batch"] == 1}
    assert held["nf4-all"] <= 4.2e9
    assert held["nf4-mixed"] <= 4.7e9
    for name in ("nf4-all", "nf4-mixed"):
        assert rows[name]["memory"]["load_peak_bytes"] < 1.05 * held[name]
    for name, most in {"nf4": 12.5e9, "nf4-dq": 11.6e9}.items():
        assert large[name]["memory"]["weights_bytes"] + large[name]["memory"]["state_bytes"] <= most
    assert share["nf4-dq", "graph"] > 0.19
    assert share["nf4-dq", "compiled"] > 0.27
    assert share["bf16", "compiled"] > 0.65
    assert rows["nf4-dq"]["long_prompt"]["p50"] < 1.15 * rows["bf16"]["long_prompt"]["p50"]
