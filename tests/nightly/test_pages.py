"""Formulas and harmless HTML; the pages in a browser are test_report's."""

import pytest

from qwlib.nightly import pages


@pytest.mark.parametrize(
    ("text", "formulas"),
    [
        ("<p>$x^2$ and $\\alpha = 0$</p>", 2),
        ("$$\\frac{a}{b}$$", 1),
        ("a < b: $a &lt; b$", 1),
        ("it costs $5 and $6", 0),
        ("<code>$x$</code> <pre class='a'>$$y$$</pre> $z$", 1),
        ("no dollar", 0),
    ],
)
def test_formulas_become_mathml_and_prices_stay(text, formulas):
    made = pages._formulas(text)
    assert made.count("<math") == formulas
    if not formulas:
        assert made == text


def test_a_formula_that_cant_be_read_stays_and_one_with_a_tag_acts_not():
    assert pages._formulas("$\\frac{$") == "$\\frac{$"
    made = pages._formulas(r"$\text{&lt;script&gt;evil&lt;/script&gt;}$")
    assert "<script" not in made


def test_what_could_act_is_taken_out():
    cleaned = pages._clean('<a href="javascript:x()" onclick="x()">a</a><iframe src="x"></iframe><b style="x">b</b>')
    for word in ("javascript", "onclick", "iframe", "style"):
        assert word not in cleaned
    assert "<b>b</b>" in cleaned


def test_no_copy_no_page(tmp_path):
    assert pages.write(None) == pages.write(tmp_path / "none.ipynb") == ""
    (tmp_path / "half.ipynb").write_text('{"cells": [')
    assert pages.write(tmp_path / "half.ipynb") == ""
    assert pages.figures(tmp_path / "half.ipynb") == []
