"""The processor's name and capability, with what Linux and PyTorch say of it in the test's hand."""

import os
import subprocess
import sys

import pytest
import torch

from qwlib.machine import about, processor

CPUINFO = "processor : 0\nmodel name : AMD EPYC\nflags : fpu avx2 {}\n\nprocessor : 1\nmodel name : AMD EPYC\n"


@pytest.fixture
def told(monkeypatch):
    """A function: what PyTorch uses, the flags, the machine → capability."""

    def ask(used: str, flags: str = "", machine: str = "x86_64") -> str:
        known = {"model name": "AMD EPYC", "flags": f"fpu avx2 {flags}" if machine == "x86_64" else ""}
        known["Features"] = flags if machine == "aarch64" else ""
        monkeypatch.setattr(processor, "_told", known.__getitem__)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: used)
        monkeypatch.setattr("platform.machine", lambda: machine)
        processor.capability.cache_clear()
        return processor.capability()

    yield ask
    processor.capability.cache_clear()


def test_two_processors_of_one_name_are_two(told):
    assert told("AVX512", "avx512f avx512_bf16") == "AVX512-BF16"
    assert processor.name() == "AMD EPYC (AVX512-BF16)"
    assert told("AVX512", "avx512f") == "AVX512"
    assert processor.name() == "AMD EPYC (AVX512)"


@pytest.mark.parametrize(
    ("used", "flags", "machine", "wanted"),
    [
        ("AVX2", "", "x86_64", "AVX2"),
        ("AVX2", "avx512f avx512_bf16 amx_bf16", "x86_64", "AVX2"),  # taken away by ATEN_CPU_CAPABILITY
        ("AVX512", "avx512_bf16 amx_bf16 amx_tile", "x86_64", "AMX-BF16"),
        ("DEFAULT", "", "x86_64", "DEFAULT"),
        ("DEFAULT", "fp asimd", "aarch64", "NEON"),
        ("DEFAULT", "fp asimd bf16", "aarch64", "NEON-BF16"),
        ("SVE256", "fp asimd sve bf16", "aarch64", "SVE256-BF16"),
    ],
)
def test_the_widest_that_is_used_counts(told, used, flags, machine, wanted):
    assert told(used, flags, machine) == wanted


def test_linux_is_asked_for_the_first_processor(monkeypatch, tmp_path):
    file = tmp_path / "cpuinfo"
    file.write_text(CPUINFO.format("avx512f"))
    plain = open
    monkeypatch.setattr("builtins.open", lambda path, *more: plain(file if path == "/proc/cpuinfo" else path, *more))
    assert processor._told("model name") == "AMD EPYC"
    assert processor._told("flags").split() == ["fpu", "avx2", "avx512f"]
    assert processor._told("Features") == ""
    file.unlink()
    assert processor._told("flags") == ""


def test_records_name_the_capability():
    env = about.environment()
    assert f"({processor.capability()})" in env["cpu"]
    if not torch.cuda.is_available():
        assert env["cpu"].startswith(env["device"])  # how a record says that it is of no GPU


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="there is nothing to take away")
def test_pytorchs_variable_takes_some_of_it_away():
    code = "from qwlib.machine import processor; print(processor.capability())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"ATEN_CPU_CAPABILITY": "avx2"},
        check=True,
    )
    assert done.stdout.split() == ["AVX2"]
