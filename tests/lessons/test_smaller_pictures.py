"""What the figures of pruning, fake quantization and activations show is what they were given."""

import numpy
import pytest
import torch
from conftest import drawn

from qwlib.lessons import smaller_pictures


def test_masks_are_drawn_as_they_are_with_their_share_of_zeros():
    free, four = torch.tensor([[True, False], [True, True]]), torch.zeros(2, 8, dtype=torch.bool)
    axes = drawn(smaller_pictures.masks({"free": free, "none": four}))
    assert [ax.get_title() for ax in axes] == ["free\n25 % zeros", "none\n100 % zeros"]
    assert axes[0].collections[0].get_array().tolist() == [[1, 0], [1, 1]]
    assert axes[0].yaxis_inverted()


def test_values_by_sparsity_are_in_per_cent_with_their_intervals():
    series = {"a": [(0.25, 1.0), (0.5, 2.0)], "b": [(0.5, 4.0, (3.0, 6.0))]}
    (ax,) = drawn(smaller_pictures.by_sparsity(series, "error", ("dense", 0.5)))
    one, two = (line for line in ax.lines if line.get_label() in "ab")
    assert list(one.get_xdata()) == [25, 50]
    assert list(two.get_ydata()) == [4]
    (bar,) = ax.containers
    assert bar[2][0].get_segments()[0].tolist() == [[50, 3], [50, 6]]
    assert ax.get_yscale() == "log"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a", "b", "dense"]
    assert one.get_color() != two.get_color()


def test_without_a_reference_no_line_is_drawn():
    (ax,) = drawn(smaller_pictures.by_sparsity({"a": [(0.25, 1.0)]}, "error"))
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["a"]


def test_the_staircase_stands_left_and_its_gradients_right():
    figure = smaller_pictures.staircase([-1, 0, 1], [-1, 0, 0.5], {"straight-through": [1, 1, 1], "clipped": [0, 1, 0]})
    left, right = drawn(figure)
    assert [list(line.get_ydata()) for line in left.lines] == [[-1, 0, 1], [-1, 0, 0.5]]
    assert [list(line.get_ydata()) for line in right.lines] == [[0, 0, 0], [1, 1, 1], [0, 1, 0]]


def test_channels_go_from_the_largest_with_half_a_step_across():
    x = torch.tensor([[1.0, -8.0, 2.0], [3.0, 4.0, 2.0], [3.0, 4.0, 127.0]])
    (ax,) = drawn(smaller_pictures.channels(x, static=0.5))
    largest, median, token, static = ax.lines
    assert list(largest.get_ydata()) == [127, 8, 3]
    assert list(median.get_ydata()) == [2, 4, 3]
    assert token.get_ydata()[0] == pytest.approx(numpy.median([8, 4, 127]) / 127 / 2)
    assert static.get_ydata()[0] == 0.25
    (ax,) = drawn(smaller_pictures.channels(x))
    assert len(ax.lines) == 3
