"""What the figures of fine-tuning show is what they were given."""

import pytest
from conftest import drawn

from qwlib.lessons import training_pictures


def test_shares_of_a_rank_are_percentages_from_rank_1_on():
    (ax,) = drawn(training_pictures.ranks({"a": [0.5, 0.9, 1.0], "b": [0.2, 1.0]}, 2))
    assert [list(line.get_xdata()) for line in ax.lines[:2]] == [[1, 2, 3], [1, 2]]
    assert list(ax.lines[0].get_ydata()) == pytest.approx([50, 90, 100])
    assert list(ax.lines[2].get_xdata()) == [2, 2]
    assert [text.get_text() for text in ax.texts] == ["rank 2"]


def test_codes_are_percentages_by_rate_and_named_rates_are_marked():
    (ax,) = drawn(training_pictures.codes_by_rate({1e-5: 0.0, 1e-2: 0.25}, {"LoRA": 5e-4}))
    assert list(ax.lines[0].get_ydata()) == [0, 25]
    assert list(ax.lines[1].get_xdata()) == [5e-4, 5e-4]
    assert [text.get_text() for text in ax.texts] == ["LoRA"]


def test_losses_of_training_stand_left_and_of_validation_right():
    left, right = drawn(training_pictures.losses({"a": [(1, 3.0), (2, 2.5)]}, {"a": [(2, 2.7)]}))
    assert list(left.lines[0].get_ydata()) == [3.0, 2.5]
    assert list(right.lines[0].get_xdata()) == [2]


def test_parts_are_stacked_in_gb_and_the_peak_is_a_line():
    parts = {"weights": 1e9, "adapter": 0, "gradients": 5e8, "optimizer": 1e9, "activations": 2e9}
    (ax,) = drawn(training_pictures.memory({"one": parts, "two": {"weights": 1e9}}, {"one": 5e9}))
    assert [bar.get_width() for bar in ax.patches] == [1, 0, 0.5, 1, 2, 1, 0, 0, 0, 0]
    assert [bar.get_x() for bar in ax.patches][:5] == [0, 1, 1, 1.5, 2.5]
    assert list(ax.lines[0].get_xdata()) == [5, 5]
    assert [text.get_text() for text in ax.texts] == ["5.00", "1.00"]


def test_parts_that_no_run_has_are_left_out_and_keep_their_colour():
    both = ({"scores": 1e9}, {"weights": 1e9, "scores": 2e9})
    one, two = (drawn(training_pictures.memory({"a": parts}, {}))[0] for parts in both)
    assert [bar.get_width() for bar in one.patches] == [1]
    assert [bar.get_width() for bar in two.patches] == [1, 2]
    assert one.patches[0].get_facecolor() == two.patches[1].get_facecolor() != two.patches[0].get_facecolor()
