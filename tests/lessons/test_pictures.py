"""What the figures show is what they were given."""

import itertools
import sys
import types

import pytest
import torch
from conftest import drawn

from qwlib.lessons import fourbit, integers, pictures
from qwlib.models import estimates


def test_values_are_tied_to_their_nearest_level():
    (ax,) = drawn(pictures.number_line({"even": [-1, 0, 1], "other": [-1, 1]}, [0.4, 0.6]))
    ties = [list(line.get_xdata()) for line in ax.lines if list(line.get_ydata()) == [0.8, 0.2]]
    assert ties == [[0.4, 0], [0.6, 1]]


def test_error_maps_share_their_colours():
    small, large = torch.full((4, 5), 0.01), torch.full((4, 5), 1.0)
    *panels, _ = drawn(pictures.error_maps({"small": small, "large": large}))
    limits = {ax.images[0].get_clim() for ax in panels}
    assert len(limits) == 1
    assert limits.pop()[1] == 1
    drawn(pictures.error_maps({"none": torch.zeros(4, 5)}))


def test_histograms_are_densities():
    (ax,) = drawn(pictures.weights_and_normal({"layer": torch.randn(50, 100)}))
    path = ax.patches[0].get_xy()
    area = abs(sum((x1 - x0) * (y0 + y1) / 2 for (x0, y0), (x1, y1) in itertools.pairwise(path)))
    assert area == pytest.approx(1, abs=0.02)


def test_levels_stand_where_they_belong():
    (ax,) = drawn(pictures.levels_on_density(fourbit.normal_float(), 1.85))
    at = [segment[0][0] for segment in ax.collections[-1].get_segments()]
    assert at == pytest.approx((1.85 * fourbit.normal_float()).tolist())


def test_usage_is_in_per_cent():
    left, right = drawn(pictures.code_usage({"a": [1, 1, 2], "b": [0, 0, 0]}))
    assert [bar.get_height() for bar in left.patches] == [25, 25, 50]
    assert left.get_ylim() == right.get_ylim()


def test_error_by_block_has_a_point_a_size():
    left, right = drawn(pictures.error_by_block({"x": [(32, 5.0, 0.1), (64, 4.5, 0.2)]}))
    assert left.lines[0].get_xydata().tolist() == [[32, 10], [64, 20]]
    assert right.lines[0].get_xydata().tolist() == [[1, 10], [0.5, 20]]


def test_bars_are_as_long_as_the_bytes():
    parts = {scheme: estimates.breakdown("llama-3.1-8b", scheme) for scheme in ("bf16", "nf4-dq")}
    (ax,) = drawn(pictures.where_bytes_go(parts))
    whole = sum(parts["bf16"].values())
    for row, values in enumerate(parts.values()):
        widths = [bar.get_width() for bar in ax.patches if abs(bar.get_y() + bar.get_height() / 2 + row) < 0.01]
        assert sum(widths) == pytest.approx(100 * sum(values.values()) / whole)
    for model in ("smollm2-135m", "gpt-neox-20b"):
        assert set(estimates.breakdown(model)) <= set(pictures._PARTS)


def test_levels_stand_among_the_weights_with_their_error():
    torch.manual_seed(0)
    weight = torch.randn(64, 100)
    titles = []
    for levels in (fourbit.normal_float(), fourbit.float4().sort().values):
        (ax,) = drawn(pictures.levels_on_histogram(weight, levels, 128))
        assert [segment[0][0] for segment in ax.collections[0].get_segments()] == pytest.approx(levels.tolist())
        titles.append(ax.get_title())
    error = integers.errors(weight, fourbit.dequantize_4bit(fourbit.quantize_4bit(weight, block_size=128)))["relative"]
    assert titles[0] == f"blocks of 128: relative error {100 * error:.2f} %, 4.25 bits a weight"
    assert titles[1] != titles[0]


class TestSlider:
    @pytest.fixture
    def shown(self, monkeypatch):
        """What is displayed, in order, and what takes its place."""
        said = []

        def display(each, display_id=None):
            said.append(each)
            return types.SimpleNamespace(update=lambda new: said.append(("update", new)))

        monkeypatch.setattr("IPython.display.display", display)
        return said

    def test_moving_it_draws_the_figure_again(self, shown):
        pictures.slider(lambda size: f"figure of {size}", (32, 64, 128), 64, "block size")
        figure, knob = shown
        assert figure == "figure of 64"
        assert (knob.options, knob.value, knob.description) == ((32, 64, 128), 64, "block size")
        knob.value = 128
        assert shown[2:] == [("update", "figure of 128")]

    def test_without_ipywidgets_the_figure_stays(self, shown, monkeypatch):
        monkeypatch.setitem(sys.modules, "ipywidgets", None)
        pictures.slider(lambda size: f"figure of {size}", (32, 64), 64, "block size")
        assert shown == ["figure of 64"]
