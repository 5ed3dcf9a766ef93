"""Two processes train as one: each takes a part of every batch, and losses and weights are those of one process.

So do two that have split the weights between them (`sharded`).
"""

import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from qwlib import QwlibError, schemes
from qwlib.training import finetune, ranks, runs, sharded

SETTINGS = {"batch": 4, "rank": 4, "every": 2, "learning_rate": 3e-3, "validation": 0.25}
LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
# name → (scheme, settings, whether it is stopped in its third step and called again)
RUNS = {
    "fp32": ("fp32", SETTINGS, True),
    "nf4-dq": ("nf4-dq", SETTINGS | {"steps": 2}, False),
    "full": ("fp32", SETTINGS | {"method": "full", "learning_rate": 1e-4, "steps": 3}, True),
}
PROGRAM = """
import contextlib, json, sys
from pathlib import Path
from qwlib.machine import memory
from qwlib.training import finetune, loop, sharded

model, data, out, runs = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
plain, split, calls, held = loop.loss, sharded.split, [], []

def loss(*args, **kwargs):
    calls.append(1)
    if len(calls) == 5:  # two steps, a validation of two batches, and the third step's
        raise KeyboardInterrupt
    return plain(*args, **kwargs)

def measured(model, device):
    held.append(memory.measure(model)["weights_bytes"])
    split(model, device)
    held.append(memory.measure(model)["weights_bytes"])

loop.loss, sharded.split = loss, measured
for name, (scheme, settings, stopped) in runs.items():
    calls[:] = [] if stopped else [1] * 5
    for _ in range(1 + stopped):
        with contextlib.suppress(KeyboardInterrupt):
            finetune.finetune(str(model), scheme, data, out / name, device="cpu", shard=True, **settings)
    (out / f"{name}.held").write_text(json.dumps(held[-2:]))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """23 examples of different lengths: 17 to train on, so that the last batch of a pass is one row and one process has none."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"prompt": f"{n} and {n}?", "answer": f"It is {2 * n}." + " Sure." * (n % 4)} for n in range(23)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def one(data, shallow, tmp_path_factory):
    """A function of a name in RUNS: what one process makes of it, its folder and its record."""
    place = tmp_path_factory.mktemp("one")

    @functools.cache
    def made(name):
        scheme, settings, _ = RUNS[name]
        return finetune.finetune(str(shallow), scheme, data, place / name, device="cpu", **settings)

    return made


def launched(command) -> str:
    """What two processes print that run `command`."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*LAUNCH, *command], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def read(file):
    return json.loads(file.read_text(encoding="utf-8"))


def losses(told, kind="losses"):
    return [each["loss"] for each in told["training"][kind]]


def apart(one, two) -> float:
    """How far the trained weights of two folders are apart, as a share of the largest: second matrices, or queries."""
    one, two = (load_file(next(folder.glob("*.safetensors"))) for folder in (one, two))
    assert one.keys() == two.keys()
    learnt = [name for name in one if "lora_B" in name] or [name for name in one if "q_proj" in name]
    most = max((one[name].float() - two[name].float()).abs().max() for name in learnt)
    return float(most / max(one[name].float().abs().max() for name in learnt))


def test_two_processes_have_the_losses_and_weights_of_one(data, shallow, one, tmp_path):
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    command = ["-m", "qwlib", "finetune", str(shallow), "fp32", "--data", str(data), "--out", str(tmp_path / "two")]
    printed = launched([*command, "--device", "cpu", *options])
    assert printed.count("parameters trained in") == 1
    folder, told = one("fp32")
    two = read(tmp_path / "two" / runs.RECORD)
    assert [each["training"]["processes"] for each in (told, two)] == [1, 2]
    assert "sharded" not in two["training"]
    for kind in ("losses", "validation_losses"):
        assert losses(two, kind) == pytest.approx(losses(told, kind), abs=1e-4)
        assert losses(told, kind) != pytest.approx(losses(told, kind)[::-1], abs=1e-4)
    assert apart(folder, tmp_path / "two") < 0.01
    assert apart(folder, one("nf4-dq")[0]) > 0.1


@pytest.mark.parametrize("names", [("fp32", "nf4-dq"), pytest.param(("full",), marks=pytest.mark.slow)])
def test_split_weights_train_as_whole_ones_do(one, data, shallow, tmp_path, names):
    """One test, because it has one launch of two processes."""
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    asked = json.dumps({name: RUNS[name] for name in names})
    launched([str(tmp_path / "program.py"), str(shallow), str(data), str(tmp_path), asked])
    for name in names:
        (folder, told), own = one(name), tmp_path / name
        two = read(own / runs.RECORD)
        the_losses_are_equal(told, two, 0.03 if name == "nf4-dq" else 1e-4)
        training = two["training"]
        assert (training["sharded"], training["processes"]) == (True, 2)
        assert "predicted_bytes" not in training
        for kept in ("frozen_fingerprint", "kept_step", "trained_parameters"):
            assert training[kept] == told["training"][kept]
        assert training["resumed_at"] == (2 if RUNS[name][2] else 0)
        assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in own.iterdir())
        if name == "full":
            assert read(folder / "config.json") == read(own / "config.json")
        if name != "nf4-dq":
            # in bfloat16, where a number that is rounded the other way is a 128th away
            assert apart(folder, own) < 0.01
        whole, part = read(tmp_path / f"{name}.held")
        # an adapter is whole in both processes
        assert 0.5 <= part / whole < (0.501 if name == "full" else 0.51)
    if len(names) > 1:
        with pytest.raises(AssertionError):
            the_losses_are_equal(one("fp32")[1], one("nf4-dq")[1], 0.03)


def the_losses_are_equal(told, two, near):
    for kind in ("losses", "validation_losses"):
        assert losses(two, kind) == pytest.approx(losses(told, kind), abs=near)


def test_what_can_t_be_split_is_refused_in_one_line():
    for scheme, method, optimizer, said in (
        ("int8", "lora", "adamw", "int8 can't be split"),
        ("nf4-dq", "dora", "adamw", "dora reads whole weights of nf4-dq"),
        ("fp32", "full", "paged", "the optimizer paged keeps no split state"),
    ):
        with pytest.raises(QwlibError, match=said):
            sharded.possible(schemes.find(scheme), method, optimizer)
    sharded.possible(schemes.find("nf4-dq"), "lora", "adamw-8bit")


def test_a_batch_is_parted_without_loss():
    rows = list(range(7))
    parts = [ranks.Ranks(rank, 3).part(rows) for rank in range(3)]
    assert sorted(row for part in parts for row in part) == rows
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert ranks.Ranks().part(rows) == rows


def test_a_batch_that_can_t_be_parted_is_refused(data, shallow, tmp_path, monkeypatch):
    monkeypatch.setattr(ranks, "started", lambda device: (ranks.Ranks(0, 2, 0), device))
    with pytest.raises(QwlibError, match="batch of 3 can't be split over 2 processes"):
        finetune.finetune(str(shallow), "fp32", data, tmp_path / "out", device="cpu", batch=3)


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(QwlibError, match="more processes than there are GPUs: 1"):
        ranks.started(None)


def test_processes_that_were_connected_are_disconnected_at_the_end(monkeypatch, tmp_path):
    def start(device):
        if not torch.distributed.is_initialized():
            place = f"file://{tmp_path / 'store'}"
            torch.distributed.init_process_group("gloo", init_method=place, rank=0, world_size=1)
        return ranks.Ranks(0, 2, 0), device

    monkeypatch.setattr(ranks, "this", lambda: ranks.Ranks(0, 2, 0))
    monkeypatch.setattr(ranks, "started", start)
    with ranks.connected("cpu") as (own, device):
        assert (own.world, device) == (2, "cpu")
        assert torch.distributed.is_initialized()
        with ranks.connected("cpu"):
            pass
        assert torch.distributed.is_initialized()  # it was connected before that block
    assert not torch.distributed.is_initialized()
