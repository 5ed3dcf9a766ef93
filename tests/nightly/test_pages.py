"""Formulas and harmless HTML; the pages in a browser are test_report's."""

import re
import time
from html import unescape
from urllib.parse import unquote, urlsplit

import nbformat
import pytest

from qwlib.nightly import pages, report
from qwlib.nightly.runner import Outcome


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


def copy(folder, *cells, name: str = "n"):
    whole = nbformat.v4.new_notebook(cells=list(cells))
    nbformat.write(whole, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def test_what_can_not_be_shown_costs_its_own_page(tmp_path):
    path = copy(tmp_path, nbformat.v4.new_markdown_cell("![x](attachment:image.png)"))
    page = (tmp_path / pages.write(path)).read_text()
    assert "can't be shown" in page
    assert "image.png" in page
    assert pages.POLICY in page


def test_what_is_long_is_named_by_its_size(tmp_path):
    def output(size: int, kind: str = "text/html"):
        data = nbformat.v4.new_output("display_data", data={kind: "<b>bold</b>" + "x" * size, "text/plain": "plain"})
        return nbformat.v4.new_code_cell("1", outputs=[data])

    stream = nbformat.v4.new_code_cell("2", outputs=[nbformat.v4.new_output("stream", text="y" * (pages.LARGEST + 1))])
    page = (tmp_path / pages.write(copy(tmp_path, output(10), output(pages.LARGEST), stream))).read_text()
    assert page.count("<b>bold</b>") == 1
    assert f"(too long for this page: {pages.LARGEST + 11:,} characters of text/html)" in page
    assert f"(too long for this page: {pages.LARGEST + 1:,} characters)" in page
    assert len(page) < 2 * pages.MOST
    many = [output(pages.LARGEST - 100) for _ in range(pages.MOST // pages.LARGEST + 3)]
    page = (tmp_path / pages.write(copy(tmp_path, *many, name="many"))).read_text()
    assert page.count("too long for this page") == 3
    prose = [make("z" * (pages.LARGEST + 7)) for make in (nbformat.v4.new_markdown_cell, nbformat.v4.new_code_cell)]
    page = (tmp_path / pages.write(copy(tmp_path, *prose, name="prose"))).read_text()
    assert page.count(f"too long for this page: {pages.LARGEST + 7:,} characters") == 2


def test_a_page_that_takes_too_long_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(pages, "TIME_S", 0.05)
    monkeypatch.setattr(pages, "_shown", lambda executed: time.sleep(5))
    page = (tmp_path / pages.write(copy(tmp_path, nbformat.v4.new_markdown_cell("# never shown")))).read_text()
    assert "This notebook can't be shown" in page
    assert "it took more than 0.05 s" in page
    assert "never shown" not in page


@pytest.mark.parametrize("name", ["50% a#b?c", "index", "Index", "ä.b c", "a&b"])
def test_the_link_leads_to_the_page_whatever_the_name(tmp_path, name):
    path = copy(tmp_path, nbformat.v4.new_markdown_cell("# its own heading"), name=name)
    index = report.write(tmp_path, [Outcome(name, "passed", executed=path)]).read_text()
    (link,) = [unescape(link) for link in re.findall(r'<a [^>]*href="([^"#][^"]*)"', index)]
    assert "its own heading" in (tmp_path / unquote(urlsplit(link).path)).read_text()
    assert "its own heading" not in index


def test_a_run_that_was_interrupted_does_not_count_what_is_missing(tmp_path):
    done = [Outcome("a", "passed"), Outcome("b", "passed")]
    page = report.write(tmp_path, done, ["a", "b", "c"]).read_text()
    assert "Not finished: 2 of 3 notebooks passed so far" in page
    assert "not run yet" in page
    page = report.write(tmp_path, [*done, Outcome("c", "failed")], ["a", "b", "c"]).read_text()
    assert "2 of 3 notebooks passed" in page
    assert "Not finished" not in page
