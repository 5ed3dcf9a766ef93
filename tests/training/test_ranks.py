"""Two processes train as one: each takes a part of every batch, and losses and weights are those of one process."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from qwlib import QwlibError
from qwlib.training import finetune, ranks

SETTINGS = {"batch": 4, "rank": 4, "every": 5, "learning_rate": 3e-3, "validation": 0.25}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """23 examples of different lengths: 17 to train on, so that the last batch of a pass is one row and one process has none."""
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [{"prompt": f"{n} and {n}?", "answer": f"It is {2 * n}." + " Sure." * (n % 4)} for n in range(23)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def test_two_processes_have_the_losses_and_weights_of_one(data, shallow, tmp_path):
    _, told = finetune.finetune(str(shallow), "fp32", data, tmp_path / "one", device="cpu", **SETTINGS)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SETTINGS.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "qwlib", "finetune"]
    command += [str(shallow), "fp32", "--data", str(data), "--out", str(tmp_path / "two"), "--device", "cpu", *options]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("parameters trained in") == 1
    both = [told["training"], json.loads((tmp_path / "two" / finetune.RECORD).read_text(encoding="utf-8"))["training"]]
    assert [each["processes"] for each in both] == [1, 2]
    for kind in ("losses", "validation_losses"):
        one, two = ([each["loss"] for each in training[kind]] for training in both)
        assert two == pytest.approx(one, abs=1e-4)
        assert len(one) == 1 or one != pytest.approx(one[::-1], abs=1e-4)
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    learnt = [name for name in one if "lora_B" in name]
    apart = max((one[name].float() - two[name].float()).abs().max() for name in learnt)
    assert apart < 0.01 * max(one[name].float().abs().max() for name in learnt)


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
