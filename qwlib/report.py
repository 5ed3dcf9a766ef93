"""The index page of a run: one self-contained HTML file, no network, light and dark.

Verdict first, a row a notebook, then each notebook's figures. Everything that a notebook or a model wrote is escaped.
"""

import html
import json
from pathlib import Path

from . import files

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #0072b2; --bad: #d55e00; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .4rem .6rem; border-bottom: 1px solid var(--line); }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
.passed { color: var(--good); font-weight: 600; } .failed, .timeout { color: var(--bad); font-weight: 600; }
figure { margin: 1.5rem 0; } figure img { max-width: 100%; border-radius: 6px; } .scroll { overflow-x: auto; }
"""


def write(folder: Path, outcomes: list) -> Path:
    """Write `index.html` into the run's folder, and each executed notebook as a page beside it."""
    passed = sum(o.status == "passed" for o in outcomes)
    environment = next((o.record["env"] for o in outcomes if o.record), None)
    parts = [
        f"<h1>{passed} of {len(outcomes)} notebooks passed</h1>",
        f"<p>{html.escape(_where(folder, environment))}</p>",
    ]
    parts.append('<div class="scroll"><table><tr><th>notebook</th><th>status</th><th>time</th><th>reason</th></tr>')
    for o in outcomes:
        page = _page(o.executed)
        name = f'<a href="{html.escape(page.name)}">{html.escape(o.name)}</a>' if page else html.escape(o.name)
        parts.append(
            f'<tr><td>{name}</td><td class="{o.status}">{o.status}</td><td class="n">{o.seconds:.0f} s</td>'
            f"<td>{html.escape(o.reason)}</td></tr>"
        )
    parts.append("</table></div>")
    for o in outcomes:
        figures = _figures(o.executed)
        if figures:
            parts.append(f"<h2>{html.escape(o.name)}</h2>")
            parts += [
                f'<figure><img alt="{html.escape(a)}" src="data:image/png;base64,{f}"></figure>' for a, f in figures
            ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>qwlib</title><style>{_STYLE}</style>'
    return files.write_text(
        folder / "index.html",
        f"<!doctype html>\n<html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n",
    )


def _where(folder: Path, environment: dict | None) -> str:
    if environment is None:
        return folder.name
    versions = ", ".join(f"{name} {version}" for name, version in environment["packages"].items())
    return f"{folder.name} UTC on {environment['device']} ({environment['cpu']}); Python {environment['python']}, {versions}"


def _cells(executed: Path) -> list[dict]:
    try:
        return json.loads(executed.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError):
        return []


def _figures(executed: Path) -> list[tuple[str, str]]:
    """(heading that the figure stands under, PNG as base64) of every figure in an executed notebook."""
    figures, heading = [], executed.stem
    for cell in _cells(executed):
        if cell["cell_type"] == "markdown":
            lines = "".join(cell["source"]).splitlines()
            heading = next((line.lstrip("# ") for line in lines if line.startswith("#")), heading)
        for output in cell.get("outputs", []):
            if png := output.get("data", {}).get("image/png"):
                figures.append((heading, "".join(png).replace("\n", "")))
    return figures


def _page(executed: Path) -> Path | None:
    """The executed notebook as HTML, with harmless tags only and nothing from the network; None where there is no copy."""
    if not _cells(executed):
        return None
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    page = executed.with_suffix(".html")
    if not page.exists():
        urls = dict.fromkeys(("mathjax_url", "require_js_url", "mermaid_js_url", "jquery_url"), "")
        tags = Config(SanitizeHTML={"tags": _harmless_tags()})
        exporter = HTMLExporter(config=tags, sanitize_html=True, filters={"clean_html": _clean}, **urls)
        body, _ = exporter.from_notebook_node(_without_style_sheets(executed))
        files.write_text(page, body)
    return page


def _without_style_sheets(executed: Path):
    """The notebook, its tables bare: cleaning would take a style sheet's tag away and leave its text standing."""
    import re

    import nbformat

    notebook = nbformat.read(executed, as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if html_text := output.get("data", {}).get("text/html"):
                output["data"]["text/html"] = re.sub(r"(?is)<style.*?</style>", "", html_text)
    return notebook


def _harmless_tags() -> list[str]:
    from bleach import ALLOWED_TAGS

    more = "p h1 h2 h3 h4 table thead tbody tr th td pre span div details summary hr br"
    return [*ALLOWED_TAGS, *more.split()]


def _clean(fragment) -> str:
    """A fragment of HTML with harmless tags left; nbconvert's own filter would show headings and paragraphs as markup."""
    from bleach import clean

    return clean(str(fragment), tags=_harmless_tags(), attributes={"a": ["href"], "*": ["class", "id"]}, strip=True)
