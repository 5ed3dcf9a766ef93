from pathlib import Path

import papermill
import pytest

from qwlib.errors import QwlibError
from qwlib.nightly import suite

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"


def listed(tmp_path: Path, text: str, *names: str) -> Path:
    (tmp_path / "sizes.toml").write_text(text)
    for name in names or ("a",):
        (tmp_path / f"{name}.ipynb").touch()
    return tmp_path


@pytest.mark.parametrize("size", suite.SIZES)
@pytest.mark.parametrize("gpu", [False, True])
def test_every_notebook_is_listed_with_parameters_that_it_declares(size, gpu):
    """And of the type that it declares them with."""
    found = suite.plans(NOTEBOOKS, size, gpu=gpu)
    assert [plan.path.stem for plan in found] == sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    for plan in found:
        declared = papermill.inspect_notebook(str(plan.path))
        for name, value in plan.parameters.items():
            assert declared[name]["inferred_type_name"] == type(value).__name__, (plan.path.stem, name)


def test_a_gpu_has_parameters_of_its_own_at_night_only(tmp_path):
    folder = listed(tmp_path, "[a]\ntimeout_s = 5\nsmoke = {X = 1}\nnightly = {X = 2, Y = 3}\ngpu = {X = 4}")
    assert [suite.plans(folder, "smoke", gpu=gpu)[0].parameters for gpu in (False, True)] == [{"X": 1}, {"X": 1}]
    assert suite.plans(folder, "nightly", gpu=False)[0].parameters == {"X": 2, "Y": 3}
    assert suite.plans(folder, "nightly", gpu=True)[0].parameters == {"X": 4, "Y": 3}
    assert suite.plans(folder, "smoke")[0].timeout_s == 5


def test_a_notebook_is_skipped_with_a_reason_only(tmp_path):
    (plan,) = suite.plans(listed(tmp_path, '[a]\nsmoke = "takes an hour"\nnightly = {}'), "smoke")
    assert plan.skip == "takes an hour"


@pytest.mark.parametrize(
    ("text", "names", "match"),
    [
        ("[a]\nsmoke = {}", ("a", "b"), "does not list b"),
        ("[a]\nsmoke = {}\n[b]\nsmoke = {}", ("a",), "lists b, and there are no such"),
        ("[a]\nnightly = {}", ("a",), "a has no smoke"),
        ("[a]\nsmoke = {}\ntimeout = 3", ("a",), "a has timeout; known are"),
        ("[a", ("a",), "can't be read"),
        ("a = 5", ("a",), "a is not a table"),
        ("[a]\nsmoke = 5", ("a",), "or a reason to skip"),
        ('[a]\nsmoke = " "', ("a",), "or a reason to skip"),
        ("[a]\nsmoke = {X = 2026-11-23}", ("a",), "or a reason to skip"),
        *(
            (f"[a]\nsmoke = {{}}\ntimeout_s = {bad}", ("a",), "a number of seconds")
            for bad in ('"60"', "nan", "0", "true", "inf")
        ),
    ],
)
def test_what_does_not_agree_is_told(tmp_path, text, names, match):
    with pytest.raises(QwlibError, match=match):
        suite.plans(listed(tmp_path, text, *names), "smoke")


def test_an_unknown_size_or_folder_is_told(tmp_path):
    with pytest.raises(QwlibError, match="take smoke or nightly"):
        suite.plans(NOTEBOOKS, "huge")
    with pytest.raises(QwlibError, match="start in the project's folder"):
        suite.plans(tmp_path, "smoke")
