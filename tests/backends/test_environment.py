"""Where a backend runs, with environments that only look like ones; the real one is `test_backends.py`'s."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwlib.backends import BACKENDS, environment
from qwlib.errors import QwlibError
from qwlib.loading import quantizing
from qwlib.measuring import bench, worker


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An environment's folder with an interpreter, no packages, and nothing of what is installed here for backends."""
    folder = tmp_path / "other"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "python").symlink_to(sys.executable)
    (folder / "lib" / "python3" / "site-packages").mkdir(parents=True)
    real = importlib.util.find_spec
    hidden = {name for row in BACKENDS.values() for name in row.packages} - set(BACKENDS["bitsandbytes"].packages)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else real(name))
    monkeypatch.setenv("QWLIB_BACKENDS", str(folder))
    monkeypatch.setenv("QWLIB_CACHE", str(tmp_path / "cache"))
    return folder


def install(place, *names):
    for name in names:
        (place / "lib" / "python3" / "site-packages" / name).mkdir()
        (place / "lib" / "python3" / "site-packages" / name / "__init__.py").touch()


def test_what_is_installed_runs_here():
    assert environment.where("transformers") == (sys.executable, environment.HERE)


def test_without_the_environment_the_command_that_builds_it_is_named(place):
    python, why = environment.where("llama.cpp")
    assert python is None
    assert "needs llama-cpp-python" in why
    assert "`make backends`" in why


def test_an_environment_that_lacks_a_package_is_told(place):
    (place / ".ready").touch()
    install(place, "llama_cpp")
    assert environment.where("llama.cpp") == (None, "other lacks gguf: `make backends` builds it again")


def test_a_complete_one_is_found(place):
    (place / ".ready").touch()
    install(place, "llama_cpp", "gguf")
    assert environment.where("llama.cpp") == (str(place / "bin" / "python"), "other")


def test_a_gpu_is_named_where_one_is_needed(place):
    python, why = environment.where("exllamav3")
    assert python is None
    assert "a GPU" in why


def test_the_other_interpreter_imports_this_very_package_and_nothing_beside_it(place):
    (place / ".ready").touch()
    install(place, "llama_cpp", "gguf")
    call = environment.command("llama.cpp", "qwlib.measuring.worker", "job", "record")
    assert call["args"] == [str(place / "bin" / "python"), "-m", "qwlib.measuring.worker", "job", "record"]
    found = call["env"]["PYTHONPATH"]
    assert os.listdir(found) == ["qwlib"]
    assert os.path.realpath(os.path.join(found, "qwlib")) == str(environment.PACKAGE)
    said = subprocess.run(
        [sys.executable, "-c", "import qwlib; print(qwlib.__file__)"],
        env=os.environ | {"PYTHONPATH": found},
        cwd=place,
        capture_output=True,
        text=True,
    )
    assert said.stdout.startswith(found)


def test_a_scheme_that_can_not_run_is_a_skipped_row(place, tmp_path, monkeypatch):
    def measured(job, scheme, path, **_):
        return worker.fail(job, scheme, "not now", path)

    monkeypatch.setattr(worker, "measured", measured)
    rows = list(bench.bench("smollm2-135m", ["gguf-q4_k_m", "awq-4bit", "torchao-int4"], tmp_path))
    assert [row["scheme"]["name"] for row in rows] == ["bf16", "gguf-q4_k_m", "awq-4bit", "torchao-int4"]
    assert "skipped" not in rows[0]["failure"]
    assert all(row["failure"]["skipped"] for row in rows[1:])
    assert all("make backends" in row["failure"]["reason"] for row in rows[1:])
    (row,) = [
        r for r in bench.bench("llama-3.1-8b", ["gguf-q4_0"], tmp_path, weights="random") if len(r["failure"]) > 1
    ]
    assert "random weights have none" in row["failure"]["reason"]


def broken(code):
    """An `environment.command` whose process does something else."""
    return lambda *_: {"args": [sys.executable, "-c", code], "env": dict(os.environ)}


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os.abort()", "gguf-q4_0 could not be made: killed by SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL (out of memory?)"),
        ("raise SystemExit('the maker has no idea')", "the maker has no idea"),
        ("import time; time.sleep(60)", "was stopped after 1 s"),
    ],
)
def test_a_maker_that_dies_is_told_and_leaves_nothing(place, tmp_path, monkeypatch, code, said):
    monkeypatch.setattr(environment, "command", broken(code))
    monkeypatch.delenv("QWLIB_CACHE")
    with pytest.raises(QwlibError) as error:
        quantizing.quantize("smollm2-135m", "gguf-q4_0", tmp_path / "new" / "out", timeout=1 if "sleep" in code else 60)
    assert said in str(error.value)
    assert not list((tmp_path / "new").iterdir())


def test_a_maker_that_writes_no_weights_is_told(place, tmp_path, monkeypatch):
    monkeypatch.delenv("QWLIB_CACHE")
    monkeypatch.setattr(environment, "command", broken("pass"))
    with pytest.raises(QwlibError, match="its maker wrote no weights"):
        quantizing.quantize("smollm2-135m", "gguf-q4_0", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("scheme", "options", "said"),
    [
        (
            "gptq-4bit",
            {"group_size": 128},
            r"groups of 128 do not divide the 576 inputs of .*q_proj: choose 64 or 32 or 16",
        ),
        ("gguf-q4_0", {"group_size": 32}, "gguf-q4_0 has no group size to choose"),
        ("nf4-dq", {"text": "wikitext2"}, "nf4-dq reads no text while it quantizes"),
        ("hqq-4bit", {}, "HQQ writes pickles"),
        ("torchao-int8", {}, "quantized while it is loaded"),
        ("gptq-4bti", {}, "did you mean gptq-4bit"),
    ],
)
def test_what_can_not_be_made_is_refused_before_anything_is_done(tmp_path, scheme, options, said):
    with pytest.raises(QwlibError, match=said):
        quantizing.quantize("smollm2-135m", scheme, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_every_backend_has_its_module_and_every_scheme_its_backend():
    from qwlib import schemes

    for row in BACKENDS.values():
        assert (environment.PACKAGE / "backends" / f"{row.module}.py").is_file()
    for scheme in schemes.SCHEMES.values():
        assert {scheme.backend, scheme.maker or scheme.backend} <= set(BACKENDS)


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """`build`'s commands, which do nothing but what `fails` says; an environment that is made has a pip of its own."""
    folder, made, fails = tmp_path / "built", [], set()
    monkeypatch.setenv("QWLIB_BACKENDS", str(folder))

    def run(arguments):
        made.append(arguments)
        if fails & set(arguments):
            (folder / "bin").mkdir(parents=True, exist_ok=True)
            (folder / "bin" / "python").touch()  # what a failed step leaves behind
            raise QwlibError(f"{arguments[-1]} failed")
        if "venv" in arguments:
            (folder / "bin").mkdir(parents=True, exist_ok=True)
            (folder / "pyvenv.cfg").touch()
            if "--without-pip" not in arguments:
                (folder / "bin" / "pip").touch()

    monkeypatch.setattr(environment, "_run", run)
    return made, fails, folder


def test_building_installs_torch_first_and_is_done_once(calls):
    made, _, folder = calls
    assert environment.build() == folder
    assert "venv" in made[0]
    assert made[1][-1].startswith("torch==")
    assert [step[-1] for step in made[-3:-1]] == [environment.COMPILED, environment.LAST]
    assert all(step[0] == str(folder / "bin" / "python") for step in made[1:])
    before = len(made)
    environment.build()
    assert len(made) == before


def test_a_backend_that_can_not_be_built_leaves_the_others_and_is_tried_again(calls):
    made, fails, folder = calls
    fails.add(environment.COMPILED)
    with pytest.raises(QwlibError, match=r"ready but for this.*llama-cpp-python.* failed"):
        environment.build()
    assert environment.LAST in made[-2]
    assert (folder / ".ready").is_file()
    fails.clear()
    made.clear()
    environment.build()
    assert environment.COMPILED in [step[-1] for step in made]
    assert not any("venv" in step for step in made)


def test_without_a_pip_to_copy_this_one_installs_there(calls, monkeypatch):
    made, fails, folder = calls
    fails.add(str(folder))  # the last word of both ways to make an environment
    with pytest.raises(QwlibError):
        environment.build()
    assert not (folder / "pyvenv.cfg").exists()
    fails.clear()
    real = environment._run
    monkeypatch.setattr(environment, "_run", lambda step: real([*step, "--without-pip"] if "venv" in step else step))
    environment.build()
    assert made[-1][:5] == [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python")]


def test_a_text_is_named_from_where_the_user_is(place, tmp_path, monkeypatch):
    """The maker's process works in a folder of its own."""
    (tmp_path / "mine.txt").write_text("word " * 20000)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("QWLIB_CACHE")
    seen = []

    def command(name, module, job, result):
        seen.append(json.loads(Path(job).read_text()))
        return broken("pass")()

    monkeypatch.setattr(environment, "command", command)
    with pytest.raises(QwlibError, match="wrote no weights"):
        quantizing.quantize("smollm2-135m", "gptq-4bit", tmp_path / "out", text="mine.txt")
    assert seen[0]["text"] == "word " * 20000
    assert seen[0]["calibration"]["text"] == "mine.txt"
