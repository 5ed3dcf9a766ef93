"""Nights with tiny notebooks, and everything that can happen to one: kills, full disks, hangs, cut files, two at once."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from qwlib import files
from qwlib.errors import QwlibError
from qwlib.measuring import record
from qwlib.nightly import executing, gates, history, nights, runner, suite

ROWS = """
held = json.loads(pathlib.Path(FACTS).read_text())
rows = [{"scheme": name, "memory": {"weights_bytes": held[name], "state_bytes": 0}} for name in held]
MORE = {"model": {"name": "m", "weights": "trained"}, "rows": rows}
"""


class Place:
    """A folder with notebooks that report what `facts.json` says, and where a night's files go."""

    def __init__(self, folder: Path, notebook, record_cell: str):
        self.notebooks, self.out, self.baselines = folder / "notebooks", folder / "runs", folder / "baselines"
        self.facts, self.notebook, self.record_cell = folder / "facts.json", notebook, record_cell
        self.report(nf4=100, bf16=400)
        self.write("a", "b")

    def report(self, **held: int) -> None:
        self.facts.write_text(json.dumps(held))

    def write(self, *names: str, **cells: str) -> None:
        sizes = ""
        for name in names:
            parameters = 'OUT: str = ""  # folder\nFACTS: str = "../facts.json"  # what to report'
            rows = f"import json, pathlib\n{ROWS}{self.record_cell}"
            self.notebook(cells.get(name, "x = 1"), rows, name=name, parameters=parameters, folder=self.notebooks)
            sizes += f"[{name}]\ntimeout_s = 60\nsmoke = {{}}\nnightly = {{}}\n"
        (self.notebooks / "sizes.toml").write_text(sizes)

    def run(self, **options) -> nights.Night:
        return nights.run(self.notebooks, self.out, size="smoke", baselines=self.baselines, **options)

    def again(self, *names: str, **options) -> nights.Night:
        """The finished night judged anew, its notebooks `names` executed anew."""
        for name in names:
            (self.folder() / name / "record.json").unlink()
        return self.run(resume=True, **options)

    def folder(self) -> Path:
        return (self.out / "latest").resolve()

    def kept(self, name: str) -> runner.Outcome | None:
        """What `--resume` would take over of a notebook."""
        (plan,) = (each for each in suite.plans(self.notebooks, "smoke") if each.path.stem == name)
        began = datetime.fromisoformat(json.loads((self.out / "last-smoke.json").read_text())["began"])
        return runner.kept(plan, self.folder(), began)

    def command(self, *options: str) -> list[str]:
        where = ("--notebooks", self.notebooks, "--out", self.out, "--baselines", self.baselines, "--size", "smoke")
        return [sys.executable, "-m", "qwlib", "nightly", *map(str, where), *options]

    def page(self) -> str:
        return (self.folder() / "index.html").read_text()


@pytest.fixture
def fresh(tmp_path, notebook, record_cell):
    """Two notebooks, and no night yet."""
    return Place(tmp_path, notebook, record_cell)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, record_cell):
    """The files of a night that both notebooks passed."""
    import conftest

    folder = tmp_path_factory.mktemp("finished")
    place = Place(folder, conftest.made, record_cell)
    assert place.run().code == 0
    return folder


@pytest.fixture
def place(finished, tmp_path, notebook, record_cell):
    """A night that both notebooks passed, to do something to; no baseline yet."""
    shutil.copytree(finished / "runs", tmp_path / "runs", symlinks=True)
    return Place(tmp_path, notebook, record_cell)


def until(condition, seconds: float = 90) -> None:
    for _ in range(int(seconds * 10)):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen")


def states(night) -> dict[str, str]:
    return {
        finding.name.partition("/")[2]: finding.state for finding in night.findings if "seconds" not in finding.name
    }


def test_nights_from_the_first_to_a_regression(place):
    """By the command line: no baseline, accepted, fine, one byte more, accepted again."""

    def night(*options: str) -> tuple[int, str]:
        done = subprocess.run(place.command("--resume", *options), capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    code, said = night("--update-baseline")
    assert code == 0, said
    assert "a passed before, and its record is valid" in said
    assert "Fine: 2 of 2 notebooks passed, 8 metrics accepted as baseline" in said
    code, said = night()
    assert code == 0, said
    assert "Fine: 2 of 2 notebooks passed, 8 metrics within tolerance" in said
    place.report(nf4=101, bf16=400)
    (place.folder() / "a" / "record.json").unlink()
    code, said = night()
    assert code == 1, said
    assert "Regression: 2 of 2 notebooks passed, 1 of 8 metrics regressed" in said
    assert "a/m/nf4/weights_bytes" in said
    assert "a/m/nf4/weights_bytes" in place.page()
    assert place.again(update_baseline=True).code == 0
    (baseline,) = place.baselines.glob("*.json")
    assert '"value": 101' in baseline.read_text()
    assert place.again().code == 0


def test_without_a_baseline_nothing_is_judged_and_the_page_says_so(place):
    night = place.again()
    assert night.code == 0
    assert set(states(night).values()) == {"new"}
    assert "no baseline for smoke" in place.page()
    assert "no metric was judged" in place.page()


def test_a_notebook_that_fails_is_2_and_takes_nothing_with_it(place):
    place.again(update_baseline=True)
    place.write("a", "b", a="raise ValueError('[/no] markup [cuda]')")
    night = place.again()  # another notebook than the one that passed: it is run again
    assert night.code == 2
    assert [outcome.status for outcome in night.outcomes] == ["failed", "passed"]
    assert states(night)["m/nf4/weights_bytes"] == "fine"  # b's; a's are named as not run
    assert {f.cause for f in night.findings if f.name.startswith("a/")} == {"the status of notebook a is: failed"}


def test_a_harness_that_fails_is_3_before_or_after(place):
    (place.notebooks / "c.ipynb").write_text("{}")
    with pytest.raises(QwlibError, match="does not list c"):
        place.run()
    done = subprocess.run(place.command(), capture_output=True, text=True)
    assert done.returncode == 3
    assert "does not list c" in done.stderr
    (place.notebooks / "c.ipynb").unlink()
    text = (place.notebooks / "sizes.toml").read_text().replace("smoke = {}", "smoke = {MODLE = 1}", 1)
    (place.notebooks / "sizes.toml").write_text(text)
    night = place.again()  # other parameters: it is run again
    assert night.code == 3
    assert night.outcomes[0].category == "parameters"
    assert night.outcomes[1].status == "passed"


@pytest.mark.slow
def test_a_killed_night_reports_and_goes_on_where_it_was(fresh):
    """kill -9 of the runner: what was done is shown, nothing that it started goes on, and --resume runs the rest alone."""
    place = fresh
    wait = f"import time, pathlib\nif not pathlib.Path('{place.facts}.go').exists(): time.sleep(600)"
    place.write("a", "b", b=wait)
    runner = subprocess.Popen(place.command(), stdout=subprocess.DEVNULL)
    until(lambda: len(list(place.out.glob("2*/b.ipynb"))) == 1)
    (folder,) = place.out.glob("2*")
    until(lambda: executing.running(folder / "b.ipynb") == "cell 3 of 4")
    os.kill(runner.pid, signal.SIGKILL)
    runner.wait()
    assert "Not finished: 1 of 2 notebooks passed so far" in place.page()
    assert "not run yet" in place.page()
    until(lambda: not executing.processes(str(folder / "b")), 30)
    before = record.read(folder / "a" / "record.json")["created"]
    Path(f"{place.facts}.go").touch()
    done = subprocess.run(place.command("--resume"), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"the night of process {runner.pid} was interrupted" in done.stdout
    assert "a passed before, and its record is valid" in done.stdout
    assert "b passed in" in done.stdout
    assert record.read(folder / "a" / "record.json")["created"] == before
    assert list(place.out.glob("2*")) == [folder]
    assert "Fine: 2 of 2" in place.page()


@pytest.mark.parametrize("harm", ["cut", "gone", "old"])
def test_a_record_that_proves_nothing_any_more_is_made_again(place, harm):
    path = place.folder() / "b" / "record.json"
    if harm == "cut":
        path.write_text(path.read_text()[: path.stat().st_size // 2])
    elif harm == "gone":
        path.unlink()
    else:
        files.write_text(path, json.dumps(json.loads(path.read_text()) | {"created": "2020-01-01T00:00:00+00:00"}))
    kept = record.read(place.folder() / "a" / "record.json")["created"]
    night = place.again()
    assert len(list(place.out.glob("2*"))) == 1
    assert night.code == 0
    assert record.read(night.folder / "a" / "record.json")["created"] == kept
    assert record.read(path)["created"] > kept


def test_a_record_without_an_outcome_is_proof_enough(place):
    """The runner died after the notebook's last cell: nothing is measured again."""
    (place.folder() / "b" / "outcome.json").unlink()
    kept = record.read(place.folder() / "b" / "record.json")["created"]
    night = place.again()
    assert night.code == 0
    assert record.read(night.folder / "b" / "record.json")["created"] == kept
    assert 0 < night.outcomes[1].seconds < 120


def test_a_baseline_of_an_older_schema_is_3_and_the_night_is_kept(place):
    place.again(update_baseline=True)
    (path,) = place.baselines.glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 0}))
    night = place.again()
    assert night.code == 3
    assert [outcome.status for outcome in night.outcomes] == ["passed", "passed"]
    assert "has schema 0, but this version reads 1: write a new one with --update-baseline" in place.page()
    assert place.again(update_baseline=True).code == 0
    assert Path(f"{path}.old").exists()
    assert place.again().code == 0


def test_a_damaged_line_of_the_history_is_told(place):
    with open(place.out / "history.jsonl", "a") as file:
        file.write('{"schema": 1, "nig')
    night = place.again()
    assert night.code == 0
    assert any("line 2" in note for note in night.notes)
    assert "line 2" in place.page()
    assert len((place.out / "history.jsonl").read_text().splitlines()) == 3


def test_a_device_that_is_gone_is_3(place):
    """The nights before had a GPU, or one notebook of tonight had."""
    line = json.loads((place.out / "history.jsonl").read_text())
    gpu = line | {"night": "20200101-000000", "device": "NVIDIA H100", "gpu": True}
    (place.out / "history.jsonl").write_text(json.dumps(gpu) + "\n")
    night = place.again()
    assert night.code == 3
    assert "the nights before were on NVIDIA H100" in place.page()
    path = place.folder() / "b" / "record.json"
    written = json.loads(path.read_text())
    files.write_text(path, json.dumps(written | {"env": written["env"] | {"device": "NVIDIA H100"}}))
    before = (place.out / "history.jsonl").read_text()
    night = place.again(update_baseline=True)
    assert night.code == 3
    assert any("changed during the night" in line for line in night.trouble)
    assert not list(place.baselines.glob("*"))  # of two devices nothing is accepted, or kept
    assert (place.out / "history.jsonl").read_text() == before


def judged(place, name: str, *, device: str = "a CPU", decode: float = 37.5, update_baseline: bool = False):
    """A night of nightly size, judged without running anything: 4 bits decode at `decode` tokens/s, 16 at 25."""
    speeds = {"bf16": 25.0, "nf4": decode}
    rows = [{"scheme": scheme, "speed": {"decode_tok_s": tok_s}} for scheme, tok_s in speeds.items()]
    env = {"python": "3.11", "packages": {}, "device": device, "cpu": f"{device}, 2 cores"}
    night = nights.Night(place.out / name, "nightly", device, ["03"])
    night.outcomes = [runner.Outcome("03", "passed", 100.0, record={"rows": rows, "env": env})]
    nights._judge(night, place.out / "nights.jsonl", gates.path_of(place.baselines, device), update_baseline)
    return night


def test_an_accepted_night_is_fine_when_it_is_judged_again(place):
    for number in range(3):
        assert judged(place, f"2026010{number}-000000").code == 0
    assert judged(place, "20260104-000000", decode=20.0).code == 1
    assert judged(place, "20260104-000000", decode=20.0, update_baseline=True).code == 0
    assert judged(place, "20260104-000000", decode=20.0).code == 0
    nights, _ = history.read(place.out / "nights.jsonl", size="nightly")
    assert history.past(nights).passes["03/model/nf4/decode_over_16_bit"] == [0.8]


def test_a_row_that_can_not_be_read_is_noted(place):
    night = judged(place, "20260101-000000")
    assert not night.trouble
    night.outcomes[0].record["rows"].append({"scheme": "odd", "speed": 3})
    nights._judge(night, place.out / "nights.jsonl", gates.path_of(place.baselines, night.device), False)
    assert night.trouble == ["the row 03/model/odd can't be read: it was not judged"]
    assert night.code == 3
    assert [
        finding.state for finding in night.findings if finding.name.endswith("decode_tok_s")
    ]  # the others are judged


def test_another_processor_is_noted(place):
    """Hosted runners have one today and another tomorrow; the night is compared with its own only."""
    judged(place, "20260101-000000", decode=99.0)
    night = judged(place, "20260102-000000", device="another CPU")
    assert night.code == 0
    assert (
        "the nights before were on a CPU, and this one is on another CPU: it is compared only with nights on the same device"
        in night.notes
    )
    assert len(night.nights) == 1


def test_a_row_without_a_figure_costs_no_page(place):
    held = {"memory": {"weights_bytes": 4, "state_bytes": 1}}
    rows = [{"scheme": name, "speed": {"decode_tok_s": 9.5}} | held for name in ("bf16", "nf4")]
    path = place.folder() / "a" / "record.json"
    more = {"rows": [*rows, {"scheme": "int8", "speed": {"ttft_s": {"p50": 1.0}}, "quality": {"ppl": 15.0}} | held]}
    files.write_text(path, json.dumps(json.loads(path.read_text()) | more))
    assert place.again().code == 0
    assert "tokens/s while decoding" in place.page()


def test_what_a_record_holds_can_stop_no_night(place):
    """Rows are free of a schema: a shape that the gates don't expect is told, and the page and the other notebooks stand."""
    path = place.folder() / "a" / "record.json"
    files.write_text(path, json.dumps(json.loads(path.read_text()) | {"rows": [{"scheme": "nf4", "memory": 5}]}))
    night = place.again()
    assert night.code == 3
    assert [outcome.status for outcome in night.outcomes] == ["passed", "passed"]
    assert "The nightly run itself failed" in place.page()


def test_a_token_reaches_no_file_by_way_of_a_record(place, monkeypatch):
    token = "hf_" + "Qw3r" * 9
    path = place.folder() / "a" / "record.json"
    rows = [{"scheme": token, "memory": {"weights_bytes": 1, "state_bytes": 1}}]
    files.write_text(path, json.dumps(json.loads(path.read_text()) | {"rows": rows}))
    monkeypatch.setenv("HF_TOKEN", token + "\n")
    assert place.again(update_baseline=True).code == 0
    found = [path for path in place.out.parent.rglob("*") if path.is_file() and path.stat().st_size]
    assert len(found) > 10
    assert not [path for path in found if token.encode() in path.read_bytes()]
    assert "a/m/***/weights_bytes" in next(place.baselines.glob("*.json")).read_text()


def test_a_damaged_state_is_told_and_no_other_night_is_taken_for_the_last(place):
    folder, state = place.folder(), place.out / "last-smoke.json"
    shutil.copytree(folder, place.out / "20991231-235959")  # a copy, or a night of a clock that was wrong
    assert place.again().folder == folder
    for content in ("[]", "{", '{"folder": "x"}', '{"folder": 3, "began": "2026-11-26"}'):
        state.write_text(content)
        with pytest.raises(QwlibError, match="damaged"):
            place.again()
    state.write_text('{"folder": "../../elsewhere", "began": "2026-11-26"}')
    with pytest.raises(QwlibError, match="is gone: start a new one"):
        place.again()


def test_two_nights_at_once_do_not_mix(place):
    with nights.alone(place.out):
        done = subprocess.run(place.command(), capture_output=True, text=True)
    assert done.returncode == 3
    assert f"a night is running already, as process {os.getpid()}" in done.stderr
    assert len(list(place.out.glob("2*"))) == 1
    assert place.again().code == 0


def test_nothing_to_resume_is_told(fresh):
    with pytest.raises(QwlibError, match="no smoke night"):
        fresh.run(resume=True)
    assert (fresh.out / "night.lock").read_text() == ""  # this was no night that died


def test_a_broken_torch_is_3_in_one_line(fresh):
    (fresh.notebooks / "sizes.toml").write_text(
        "".join(f'[{name}]\nsmoke = "x"\nnightly = {{}}\ngpu = {{ X = 1 }}\n' for name in "ab")
    )
    broken = fresh.out.parent / "broken"
    broken.mkdir()
    (broken / "torch.py").write_text("raise ImportError('libcuda.so.1 is gone')")
    command = [*fresh.command(), "--size", "nightly"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(broken)})
    assert (done.returncode, done.stderr) == (3, "qwlib: ImportError: libcuda.so.1 is gone\n")


def test_a_pass_counts_for_the_code_that_it_passed_under(place, monkeypatch):
    assert place.kept("b").status == "passed"
    monkeypatch.setattr(runner, "_code", lambda: "another")
    assert place.kept("b") is None


def test_a_record_without_an_outcome_proves_nothing_where_the_notebook_failed_after_it(place):
    (place.folder() / "b" / "outcome.json").unlink()
    assert place.kept("b").status == "passed"
    (place.folder() / "b" / "ended.json").write_text('{"status": "failed"}')
    assert place.kept("b") is None


def test_a_disk_that_is_full_for_one_write_costs_that_write(place, monkeypatch):
    """Report, baseline and history in turn: each is told, the rest is written, and the exit code says so."""
    plain = files.write_text
    for name in ("index.html", "summary.md", "baseline"):

        def full(path, text, name=name):
            if Path(path).name == name or (name == "baseline" and Path(path).parent == place.baselines):
                raise OSError(errno.ENOSPC, "No space left on device")
            return plain(path, text)

        monkeypatch.setattr(files, "write_text", full)
        night = place.again(update_baseline=True)
        assert night.code == 3
        assert "No space left on device" in night.trouble[0]
        assert all(record.read(night.folder / each / "record.json") for each in "ab")
        monkeypatch.undo()
    assert place.again(update_baseline=True).code == 0
    assert gates.read(next(place.baselines.glob("*.json")))


@pytest.mark.slow
def test_a_full_disk_keeps_what_was_valid(fresh):
    """A real one, of a megabyte: the second notebook fills it, the third finds no room."""
    place = fresh
    place.out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place.out], capture_output=True).returncode:
        pytest.skip("a file system can't be mounted here")
    try:
        fill = "open(OUT + '/fill', 'wb').write(bytes(1 << 22))"
        place.write("a", "b", "c", b=fill)
        night = place.run()
        assert night.code == 3
        assert night.outcomes[0].status == "passed"
        assert all(outcome.status in ("failed", "error") for outcome in night.outcomes[1:])
        assert all("No space left on device" in outcome.reason for outcome in night.outcomes[1:])
        assert record.read(night.folder / "a" / "record.json")
        (night.folder / "b" / "fill").unlink()
        place.write("a", "b", "c")
        again = place.run(resume=True)
        assert again.code == 0
        assert again.folder == night.folder
    finally:
        subprocess.run(["umount", place.out], check=True)
