"""The page of a night in a real Chromium, light and dark, wide and narrow; what notebooks wrote stays text."""

import base64
import json
import shutil
from pathlib import Path

import nbformat
import pytest

from qwlib.measuring import plots, record
from qwlib.nightly import gated, gates, nights, report, runner

EVIL = "$\\frac{</title></code>|`<script>window.evil = 1</script><img src=x onerror='window.evil = 2'>{{ 7 * 7 }}"
PNG = base64.b64encode(plots.arrivals({"tokens": [0.1, 0.3]})._repr_png_()).decode()
ACTING = [  # kinds of output, and metadata, that nbconvert puts into its page as they are
    ({"text/vnd.mermaid": "</pre><script>window.evil = 3</script>"},),
    ({"image/svg+xml": "<svg onload='window.evil = 4'></svg>"},),
    ({"application/javascript": "window.evil = 5"},),
    ({"text/latex": "<script>window.evil = 6</script>"},),
    ({"image/png": PNG}, {"image/png": {"width": "1' onerror='window.evil = 7' x='"}}),
]
SPEED = {"engine": "eager", "batch": 1, "prompt_tokens": 8, "new_tokens": 8}


def row(scheme: str, held: int, ppl: float, tok_s: float) -> dict:
    return {
        "scheme": scheme,
        "memory": {"weights_bytes": held, "state_bytes": held // 16},
        "quality": {"ppl": ppl, "ppl_stderr": 0.4, "protocol": "gptq-512", "tokens": 99, "text_sha256": "0" * 64},
        "speed": SPEED | {"decode_tok_s": tok_s, "ttft_s": {"p50": 0.1}},
    }


def executed(path: Path, *outputs: dict) -> Path:
    whole = nbformat.v4.new_notebook()
    whole.cells = [
        nbformat.v4.new_markdown_cell(f"## Heading {EVIL}\n\nFormula $H^{{-1}} = U^\\top U$ and `$5 or $6`."),
        nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("display_data", data) for data in outputs]),
        nbformat.v4.new_code_cell(
            "2",
            outputs=[
                nbformat.v4.new_output("display_data", *each[:1], metadata=each[-1] if len(each) > 1 else {})
                for each in ACTING
            ],
        ),
    ]
    nbformat.write(whole, path)
    return path


@pytest.fixture
def night(tmp_path):
    """Three notebooks, one of them evil; a history of nine nights; regressions, a skip, damage."""
    rows = [row("bf16", 269_000_000, 15.0, 25.0), row("nf4", 80_000_000, 19.1, 36.0), row(EVIL, 90_000_000, 17.0, 30.0)]
    written = record.new("notebook", model={"name": "m", "weights": "random"}, rows=rows)
    outputs = {"text/html": f"<b>bold</b>{EVIL}"}, {"image/png": PNG}, {"text/markdown": "a `code` span"}
    outcomes = [
        runner.Outcome(
            "03_fine", "passed", 91, peak_bytes=2 * 10**9, executed=executed(tmp_path / "03_fine.ipynb", *outputs)
        ),
        runner.Outcome("04_evil", "failed", 12, f"cell 3: ValueError: {EVIL}", "cell error", "0123456789ab"),
        runner.Outcome("05_skipped", "skipped", reason="takes an hour"),
    ]
    outcomes[0].record = written
    found = nights.Night(tmp_path, "smoke", "cpu", [o.name for o in outcomes], outcomes, finished=True)
    figures = gated.figures(outcomes)
    accepted = {name: {"value": 1000} for name, figure in figures.items() if figure.kind in ("exact", "paired")}
    baseline = {"packages": {"torch": "1.0"}, "given": {}, "figures": accepted}
    found.findings = gates.judge(outcomes, baseline, gates.Past())
    values = {name: figure.value for name, figure in figures.items()}
    found.nights = [{"night": str(n), "figures": {k: v * (1 + n / 50) for k, v in values.items()}} for n in range(9)]
    found.notes = [f"history.jsonl, line 3: {EVIL}"]
    return found


def test_the_page_says_all_and_lets_nothing_act(night):
    report.write_night(night)
    page = (night.folder / "index.html").read_text()
    assert "Failed: 1 of 2 notebooks passed, 1 skipped" in page
    for part in ("0123456789ab", "takes an hour", "2.00 GB", "torch 1.0 →", "9 nights", "memory against perplexity"):
        assert part in page, part
    assert page.count("data:image/png") == 4  # two plots of the night, and the notebook's own two
    for path in night.folder.glob("*.html"):
        text = path.read_text()
        assert "<script>window.evil" not in text
        assert "onerror='" not in text
        assert "http://" not in text.replace("http://www.w3.org/", "")
    assert "{{ 7 * 7 }}" in page
    assert "49" not in page.partition("{{ 7 * 7 }}")[0][-200:]


def test_the_summary_is_markdown_in_which_nothing_ends_a_cell(night, tmp_path, monkeypatch):
    shared = tmp_path / "step"
    shared.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(shared))
    report.write_night(night)
    summary = (night.folder / "summary.md").read_text()
    assert shared.read_text() == "before\n" + summary
    for line in (line for line in summary.splitlines() if line.startswith("|")):
        spans = line.split("`")
        assert len(spans) % 2 == 1  # every code span is closed
        assert all("<" not in outside for outside in spans[::2])
        assert line.count("|") in (6,)
    night.finished = False
    report.write_night(night)
    assert shared.read_text() == "before\n" + summary  # half a night adds nothing


def test_half_a_night_has_a_page(night):
    night.finished, night.findings, night.nights = False, [], []
    night.names.append("06_waiting")
    report.write_night(night)
    page = (night.folder / "index.html").read_text()
    assert "Not finished: 1 of 3 notebooks passed, 1 skipped so far" in page
    assert "06_waiting</td>" in page
    assert "not run yet" in page


def test_a_trend_stays_in_its_box_and_ends_with_tonight():
    for values in ([1.0, 2.0, 3.0], [5.0] * 40, [3.0, -1e9, 1e-9]):
        trend = report._trend(values)
        points = [tuple(map(float, point.split(","))) for point in trend["points"].split()]
        assert len(points) == min(30, len(values))
        assert all(0 <= x <= 110 and 0 <= y <= 24 for x, y in points)
        assert (float(trend["x"]), float(trend["y"])) == points[-1]
    up = report._trend([1.0, 2.0])["points"].split()
    assert float(up[0].split(",")[1]) > float(up[1].split(",")[1])  # more is higher, and SVG counts downwards
    assert report._trend([1.0]) is None


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver

    programs = [shutil.which("chromium"), shutil.which("chromedriver")]
    if None in programs:
        pytest.skip("needs Debian's chromium and chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    quiet = "no-first-run disable-background-networking disable-component-update disable-sync disable-quic"
    for option in f"headless no-sandbox disable-gpu hide-scrollbars {quiet}".split():
        options.add_argument(f"--{option}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield driver
    driver.quit()


def visit(browser, path: Path, theme: str, width: int) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": theme}]}
    )
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(path.as_uri())


def requests(browser) -> set[str]:
    """Where the page went since the last look."""
    events = (json.loads(entry["message"])["message"] for entry in browser.get_log("performance"))
    return {e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"}


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1100])
def test_in_chromium_the_page_is_readable_and_runs_nothing(browser, night, theme, width):
    report.write_night(night)
    for page in ("index.html", "03_fine.html"):
        visit(browser, night.folder / page, theme, width)
        assert browser.execute_script("return window.evil") is None
        assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []
        assert not [url for url in requests(browser) if url.startswith(("http", "ws"))]
    visit(browser, night.folder / "index.html", theme, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    lightness = """
        const seen = name => getComputedStyle(document.body)[name].match(/\\d+/g).slice(0, 3).reduce((a, b) => a + +b, 0);
        return [seen("backgroundColor"), seen("color")]"""
    ground, ink = browser.execute_script(lightness)
    assert (ground > ink) == (theme == "light")
    assert abs(ground - ink) > 400  # of 765: dark on light or light on dark, and not grey on grey
    loaded = "return [...document.images].every(i => i.complete && i.naturalWidth > 100)"
    assert browser.execute_script(loaded)


def test_in_chromium_formulas_are_drawn_and_code_is_monospace(browser, night):
    report.write_night(night)
    visit(browser, night.folder / "03_fine.html", "light", 1100)
    drawn = "return [...document.querySelectorAll('math')].map(m => m.getBoundingClientRect().height)"
    assert all(height > 8 for height in browser.execute_script(drawn))
    assert browser.execute_script("return document.querySelectorAll('math msup').length") == 2
    text = browser.execute_script("return document.body.innerText")
    assert "$5 or $6" in text  # in code, dollars are dollars
    assert "\\top" not in text
    fonts = "return [...document.querySelectorAll('code')].map(c => getComputedStyle(c).fontFamily)"
    assert all("monospace" in font for font in browser.execute_script(fonts))


def test_in_chromium_the_watch_sees_what_a_page_asks_for(browser, tmp_path):
    """So that the tests above can fail: a script that runs, an error, a request."""
    path = tmp_path / "bad.html"
    path.write_text("<script>window.evil = 1</script><img src='http://127.0.0.1:9/x.png'><script>throw 1</script>")
    visit(browser, path, "light", 1100)
    assert browser.execute_script("return window.evil") == 1
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert "http://127.0.0.1:9/x.png" in requests(browser)
