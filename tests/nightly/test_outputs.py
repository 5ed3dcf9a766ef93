"""What a committed notebook shows: of its own source, and nothing of the machine that it ran on."""

import base64
import io
import json

import nbformat
import numpy
import pytest
from PIL import Image

from qwlib.errors import QwlibError
from qwlib.nightly import outputs

V4 = nbformat.v4


def png(size: int = 200) -> str:
    """A picture with more colours than a palette has."""
    x, noise = numpy.linspace(0, 240, size), numpy.random.default_rng(0).integers(0, 9, (size, size, 3))
    smooth = numpy.dstack([*numpy.meshgrid(x, x), numpy.full((size, size), 90)])
    image = Image.fromarray((smooth + noise).astype("uint8"))
    image.save(out := io.BytesIO(), "PNG")
    return base64.b64encode(out.getvalue()).decode()


def shown(data: dict):
    return V4.new_output("display_data", data=data, metadata={"image/png": {"width": 3}})


@pytest.fixture
def pair(tmp_path):
    """A function: outputs of the second cell → (notebook, its executed copy), as papermill leaves it."""

    def write(*results):
        first = V4.new_code_cell("X = 1", metadata={"tags": ["parameters"]})
        cells = [V4.new_markdown_cell("# n"), first, V4.new_code_cell("print(X)")]
        path, executed = tmp_path / "n" / "n.ipynb", tmp_path / "executed.ipynb"
        path.parent.mkdir(exist_ok=True)
        nbformat.write(V4.new_notebook(cells=cells), path)
        added = V4.new_code_cell("X = 2", metadata={"tags": ["injected-parameters"]}, execution_count=2)
        ran = V4.new_code_cell(
            "print(X)", execution_count=3, outputs=[*results], metadata={"papermill": {"duration": 1}}
        )
        nbformat.write(V4.new_notebook(cells=[*cells[:2], added, ran]), executed)
        return path, executed

    return write


def taken(path, executed) -> list[dict]:
    outputs.take(executed, path, "smoke")
    return json.loads(path.read_text())["cells"][-1]["outputs"]


def test_outputs_come_under_their_cells_and_belong_to_their_source(pair):
    path, executed = pair(V4.new_output("stream", name="stdout", text="2\n"))
    assert outputs.stale(path)
    assert taken(path, executed) == [{"output_type": "stream", "name": "stdout", "text": ["2\n"]}]
    assert not outputs.stale(path)
    whole = nbformat.read(path, as_version=4)
    nbformat.validate(whole)
    assert [cell.source for cell in whole.cells] == ["# n", "X = 1", "print(X)"]
    assert whole.cells[-1].metadata == {}
    assert whole.cells[-1].execution_count is None
    whole.cells[-1].source = "print(X, X)"
    nbformat.write(whole, path)
    assert outputs.stale(path)
    with pytest.raises(QwlibError, match=r"n\.ipynb has changed since it was executed"):
        outputs.take(executed, path, "smoke")


def test_a_forks_address_makes_no_outputs_stale():
    def notebook(address: str, text: str = "print(1)"):
        first = V4.new_markdown_cell(f"[![badge](colab-badge.svg)]({address})\n# n")
        setup = V4.new_code_cell(f"%pip install {address}", metadata={"tags": ["setup"]})
        return V4.new_notebook(cells=[first, setup, V4.new_code_cell(text)])

    assert outputs.source_hash(notebook("a/b")) == outputs.source_hash(notebook("c/d"))
    assert outputs.source_hash(notebook("a/b")) != outputs.source_hash(notebook("a/b", "print(2)"))


def test_what_differs_from_run_to_run_is_left_out(pair, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_" + "x" * 20)
    styled = '<style>#T_3fa85 th</style><table id="T_3fa85"><td id="T_3fa85_row0"></table><i id="T_00c1f ">'
    found = taken(
        *pair(
            V4.new_output("stream", name="stderr", text="a warning"),
            V4.new_output("stream", name="stdout", text=" 10%\r 50%\rdone hf_" + "x" * 20 + "\nnext\n"),
            shown({"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "a slider"}),
            V4.new_output("execute_result", data={"text/html": styled, "x/y": "z"}, execution_count=7),
        )
    )
    assert [each["output_type"] for each in found] == ["stream", "execute_result"]
    assert found[0]["text"] == ["done ***\n", "next\n"]
    text = "".join(found[1]["data"]["text/html"])
    assert list(found[1]["data"]) == ["text/html"]
    assert found[1]["execution_count"] is None
    assert 'id="T_0"' in text
    assert 'id="T_0_row0"' in text
    assert 'id="T_1 "' in text


def test_pictures_get_smaller_and_look_alike(pair):
    old = png()
    (found,) = taken(*pair(shown({"image/png": old, "text/plain": "a figure"})))
    new = found["data"]["image/png"]
    assert len(new) < len(old)
    assert found["metadata"] == {}
    before, after = (
        numpy.asarray(Image.open(io.BytesIO(base64.b64decode(each))).convert("RGB")).astype(int) for each in (old, new)
    )
    assert abs(before - after).mean() < 12
    assert abs(before - after[::-1]).mean() > 12


@pytest.mark.parametrize("what", ["error", "folder"])
def test_errors_and_folders_of_this_machine_are_refused(pair, what, tmp_path):
    bad = V4.new_output("error", ename="E", evalue="v", traceback=[])
    path, executed = pair(
        bad if what == "error" else V4.new_output("stream", name="stdout", text=f"wrote {tmp_path}/x\n")
    )
    before = path.read_bytes()
    with pytest.raises(
        QwlibError, match="is no output to show" if what == "error" else "shows a folder of this machine"
    ):
        outputs.take(executed, path, "smoke")
    assert path.read_bytes() == before


class TestAGpusOutputs:
    LINE = "**On one H100** (torch 2):"

    @pytest.fixture
    def runs(self, tmp_path):
        """(the notebook, a function: what both code cells print and the second one's source → its executed copy)."""
        path, executed = tmp_path / "n" / "n.ipynb", tmp_path / "executed.ipynb"
        path.parent.mkdir()

        def cells(source, printed=None):
            made = [V4.new_markdown_cell("# n"), V4.new_code_cell("print(1)"), V4.new_code_cell(source)]
            made[2].metadata["tags"] = ["gpu"]
            for cell in made[1:] if printed else ():
                cell.outputs = [V4.new_output("stream", name="stdout", text=printed)]
            return made

        nbformat.write(V4.new_notebook(cells=cells("print(2)")), path)

        def ran(printed, source="print(2)"):
            nbformat.write(V4.new_notebook(cells=cells(source, printed)), executed)
            return executed

        return path, ran

    @staticmethod
    def told(path) -> list[list[str]]:
        shown = nbformat.read(path, as_version=4).cells[1:]
        return [[o.get("text") or o.data["text/markdown"] for o in cell.outputs] for cell in shown]

    def test_stand_under_the_cells_for_a_gpu_alone_and_stay_there(self, runs):
        path, ran = runs
        assert outputs.stale(path, gpu=True)
        outputs.take(ran("fast"), path, "nightly", gpu=self.LINE)
        assert self.told(path) == [[], [self.LINE, "fast"]]
        assert not outputs.stale(path, gpu=True)
        assert outputs.stale(path)
        for _ in range(2):
            outputs.take(ran("skipped"), path, "nightly")
            assert self.told(path) == [["skipped"], ["skipped", self.LINE, "fast"]]
        assert not outputs.stale(path)
        outputs.take(ran("faster"), path, "nightly", gpu=self.LINE)
        assert self.told(path) == [["skipped"], ["skipped", self.LINE, "faster"]]
        nbformat.validate(nbformat.read(path, as_version=4))

    def test_go_when_those_cells_change(self, runs):
        path, ran = runs
        outputs.take(ran("fast"), path, "nightly", gpu=self.LINE)
        notebook = nbformat.read(path, as_version=4)
        notebook.cells[2].source = "print(3)"
        nbformat.write(notebook, path)
        assert outputs.stale(path, gpu=True)
        outputs.take(ran("skipped", "print(3)"), path, "nightly")
        assert self.told(path) == [["skipped"], ["skipped"]]
        assert outputs.stale(path, gpu=True)

    def test_are_nothing_where_no_cell_is_for_a_gpu(self, pair):
        assert not outputs.stale(pair()[0], gpu=True)
