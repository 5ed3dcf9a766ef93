"""What the figures of a kernel show is what they were given."""

import pytest
import torch
from conftest import drawn

from qwlib.lessons import kernel_pictures, tiles


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def test_bars_are_stacked_and_add_up():
    parts = [{"kind": "products", "ms": 2.0}, {"kind": "rest", "ms": 0.5}, {"kind": "idle", "ms": 0.01}]
    (ax,) = drawn(kernel_pictures.time_by_kind({"a": parts, "b": parts[:1]}))
    assert [bar.get_x() for bar in ax.patches] == [0, 2, 2.5, 0]
    assert [bar.get_width() for bar in ax.patches] == pytest.approx([2, 0.5, 0.01, 2])
    assert texts(ax) == ["2.00", "0.50", "2.51 ms", "2.00", "2.00 ms"]


def test_every_element_of_a_fragment_has_its_lane():
    a, b, c = drawn(kernel_pictures.fragments())
    assert [len(ax.patches) for ax in (a, b, c)] == [256, 128, 128]
    lanes = {text.xy: text.get_text() for text in a.texts}
    assert lanes[0, 0] == lanes[9, 8] == "0"  # column, row
    assert lanes[15, 15] == "31"


def test_a_column_has_its_product_and_its_lane():
    (ax,) = drawn(kernel_pictures.orders({"plain": torch.arange(64).view(4, 16)}))
    shown = {text.xy: text.get_text() for text in ax.texts}
    assert [shown[column, 0] for column in (0, 15, 16, 63)] == ["0", "0", "1", "3"]
    colours = {round(patch.get_x() + 0.5): patch.get_facecolor() for patch in ax.patches}
    assert colours[0] == colours[1] == colours[8] == colours[16] != colours[2]


def test_banks_show_words_and_shares():
    lookups = {"one": 128 * torch.arange(32), "own": 4 * torch.arange(32)}
    fronts = {name: tiles.wavefronts(torch.stack([each, 4 * torch.arange(32)])) for name, each in lookups.items()}
    left, right = drawn(kernel_pictures.banks(lookups, fronts))
    assert [bar.get_height() for bar in left.patches] == [32] + 31 * [0] + 32 * [1]
    assert [bar.get_height() for bar in right.patches if bar.get_height()] == [50, 50, 100]


def test_a_piece_is_on_the_way_waits_and_is_used():
    (ax,) = drawn(kernel_pictures.pipeline({"x": [(0, 6, 6, 8), (1, 7, 8, 10)]}, "steps"))
    assert [(bar.get_x(), bar.get_width()) for bar in ax.patches] == [(0, 6), (1, 6), (6, 0), (7, 1), (6, 2), (8, 2)]
    assert ax.get_title() == "x: done after 10"


def test_rounds_are_full_but_for_the_last():
    one, two = drawn(kernel_pictures.rounds({"apart": [("q", 20), ("k", 4)], "joined": [("q, k", 24)]}, 8))
    assert texts(one) == ["8", "8", "4", "4"]
    assert texts(two) == ["8", "8", "8"]
    assert one.get_title() == "apart: 4 rounds"
    assert one.get_xlim() == two.get_xlim()


def test_a_ladder_has_its_limits():
    (ax,) = drawn(kernel_pictures.ladder({"slow": 10, "fast": 40, "bf16": 20}, {"least": 30, "most": 50}))
    assert [bar.get_width() for bar in ax.patches] == [10, 40, 20]
    assert [line.get_xdata()[0] for line in ax.lines] == [30, 50]
    assert {"10", "40", "20", "least: 30", "most: 50"} == set(texts(ax))


def test_lines_have_a_point_for_each_number_of_rows():
    left, right = drawn(kernel_pictures.by_rows({"ms": {"a": [(1, 2.0), (16, 3.0)]}, "s": {"a": [(4, 1.0)]}}))
    assert left.lines[0].get_xydata().tolist() == [[1, 2], [16, 3]]
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["4"]
