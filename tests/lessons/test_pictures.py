"""What the figures show is what they were given."""

import io
import itertools

import pytest
import torch

from qwlib.lessons import fourbit, pictures
from qwlib.models import estimates


def drawn(figure):
    png = io.BytesIO()
    figure.savefig(png, format="png")
    assert png.getvalue().startswith(b"\x89PNG")
    return figure.axes


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
    assert right.lines[0].get_xydata().tolist() == [[5, 10], [4.5, 20]]


def test_bars_are_as_long_as_the_bytes():
    parts = {scheme: estimates.breakdown("llama-3.1-8b", scheme) for scheme in ("bf16", "nf4-dq")}
    (ax,) = drawn(pictures.where_bytes_go(parts))
    whole = sum(parts["bf16"].values())
    for row, values in enumerate(parts.values()):
        widths = [bar.get_width() for bar in ax.patches if abs(bar.get_y() + bar.get_height() / 2 + row) < 0.01]
        assert sum(widths) == pytest.approx(100 * sum(values.values()) / whole)
    for model in ("smollm2-135m", "gpt-neox-20b"):
        assert set(estimates.breakdown(model)) <= set(pictures._PARTS)
