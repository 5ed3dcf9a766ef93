"""What figures say without words: which scheme is which, and which one is beaten."""

import pytest

from qwlib import schemes
from qwlib.figures import COLOURS, looks
from qwlib.measuring import plots


def test_a_scheme_looks_alike_beside_any_others():
    whole = looks(schemes.SCHEMES)
    for name in schemes.SCHEMES:
        assert looks([name, "bf16"])[name] == whole[name]
        assert looks(["even levels", "nf4", name])[name] == whole[name]


def test_no_two_schemes_look_alike():
    each = [tuple(look.values()) for look in looks(schemes.SCHEMES).values()]
    assert len(set(each)) == len(each)


def test_variants_of_a_scheme_do_not_look_alike():
    taken = looks(["bf16", "nf4-dq", "nf4-dq, merged", "nf4-dq, again"])
    assert len({tuple(look.values()) for look in taken.values()}) == 4
    assert taken["nf4-dq"] == looks(["nf4-dq"])["nf4-dq"]
    assert {taken[name]["color"] for name in taken if name != "bf16"} == {taken["nf4-dq"]["color"]}


def test_an_unknown_name_takes_a_colour_that_is_left():
    taken = looks(["bf16", "nf4", "mine", "yours"])
    assert len({look["color"] for look in taken.values()}) == 4
    assert {look["color"] for look in taken.values()} <= set(COLOURS)


@pytest.mark.parametrize(
    ("error", "beaten"),
    [(0.1, {"fp4"}), (0.6, set())],
)
def test_hollow_is_what_another_one_beats_beyond_the_error(error, beaten):
    rows = {
        "bf16": (3.0, 10.0, 0.0),
        "nf4": (1.0, 11.0, error),
        "nf4-dq": (0.9, 11.01, error),
        "fp4": (1.0, 12.0, error),
    }
    (ax,) = plots.pareto(rows).axes
    points = {
        tuple(line.get_xydata()[0]): line
        for line in ax.lines
        if line.get_marker() != "_" and len(line.get_xdata()) == 1
    }
    hollow = {
        name
        for name, (x, y, _) in rows.items()
        if points[x, y].get_markerfacecolor() != points[x, y].get_markeredgecolor()
    }
    assert hollow == beaten


def test_names_at_the_ends_of_lines_do_not_touch():
    sweep = {
        name: [{"batch": b, "itl_s": {"p50": s * b}} for b in (1, 2, 4)] for name, s in (("bf16", 1.0), ("nf4", 1.001))
    }
    for ax in plots.batch_sweep(sweep).axes:
        low, high = ax.get_ylim()
        first, second = sorted(text.xy[1] for text in ax.texts)
        assert second - first >= 0.069 * (high - low)
