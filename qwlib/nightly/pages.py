"""Executed notebooks as HTML pages that load nothing and run no scripts. nbconvert makes them, and active content is removed.

If a notebook can't be shown, its page gives the reason. Cleaning takes 3.5 seconds per megabyte of HTML (one core of an AMD
EPYC). Cells and outputs larger than `LARGEST`, and everything after `MOST` in all, are therefore replaced by their size. A page
that still takes longer than `TIME_S` is given up.

Formulas become MathML, which browsers draw without scripts: https://developer.mozilla.org/docs/Web/MathML.
"""

import html
import json
import re
from pathlib import Path

from .. import files
from ..machine.processes import within, without

TAGS = "p h1 h2 h3 h4 table thead tbody tr th td pre span div details summary hr br"
MATH = "math mrow mi mo mn msub msup msubsup mfrac msqrt mtext mspace munder mover munderover mstyle mtable mtr mtd"
SHOWN = ("text/html", "text/markdown", "text/plain", "image/png")  # of what a cell put out; the rest could act
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; font-src data:"
HEAD = f'<head><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
LARGEST, MOST = 300_000, 1_500_000  # characters of text and HTML: of one cell or output, and of a page
TIME_S = 60
CODE = "<style>.jp-RenderedMarkdown code, .jp-RenderedMarkdown pre { font-family: monospace; }</style>"


def cells(executed: Path | None) -> list[dict]:
    """The cells of an executed copy, or an empty list if there is no readable copy."""
    try:
        return json.loads(Path(executed).read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def figures(executed: Path | None) -> list[tuple[str, str]]:
    """(heading above the figure, PNG as base64) of every figure in an executed notebook."""
    found, heading = [], ""
    for cell in cells(executed):
        if cell["cell_type"] == "markdown":
            lines = "".join(cell["source"]).splitlines()
            heading = next((line.lstrip("# ") for line in lines if line.startswith("#")), heading)
        for output in cell.get("outputs", []):
            if png := output.get("data", {}).get("image/png"):
                found.append((heading, "".join(png).replace("\n", "")))
    return found


def write(executed: Path | None) -> str:
    """Write the page beside an executed notebook, if it is not there yet. Returns its name, or nothing without a copy."""
    if not cells(executed):
        return ""
    own = executed.stem if executed.stem.lower() != "index" else "index-notebook"  # index.html is the run's own page
    page = executed.with_name(f"{own}.html")
    if not page.exists() or page.stat().st_mtime_ns < executed.stat().st_mtime_ns:
        try:
            with within(TIME_S):
                body = _rendered(executed)
        except Exception as error:  # a missing attachment, a table too deep: whatever a notebook holds, the run goes on
            why = html.escape(f"{type(error).__name__}: {error}"[:500])
            body = f"<html><head></head><body><h1>This notebook can't be shown</h1><p>{why}</p>"
            body += f"<p>Its outputs are in the file {html.escape(executed.name)}.</p></body></html>"
        files.write_text(page, body.replace("<head>", HEAD, 1).replace("</head>", f"{CODE}</head>", 1))
    return page.name


def _rendered(executed: Path) -> str:
    with without("rfc3987_syntax"):
        from nbconvert import HTMLExporter
    from traitlets.config import Config

    urls = dict.fromkeys(("mathjax_url", "require_js_url", "mermaid_js_url", "jquery_url"), "")
    tags = Config(SanitizeHTML={"tags": _harmless_tags()})
    exporter = HTMLExporter(config=tags, sanitize_html=True, filters={"clean_html": _clean}, **urls)
    body, _ = exporter.from_notebook_node(_shown(executed))
    return re.sub(r"(?is)<script\b.*?</script>", "", body)  # the template's own: nothing is to run


def _shown(executed: Path):
    """The notebook with outputs of known kinds only, its tables bare: cleaning would take a style sheet's tag away and leave its
    text standing.
    """
    import nbformat

    notebook, left = nbformat.read(executed, as_version=4), MOST

    def fits(text: str) -> bool:
        nonlocal left
        if len(text) > min(LARGEST, left):
            return False
        left -= len(text)
        return True

    for cell in notebook.cells:
        if not fits(cell.source):
            said = f"too long for this page: {len(cell.source):,} characters"
            cell.source = f"# {said}" if cell.cell_type == "code" else f"({said})"
        for output in cell.get("outputs", []):
            if "data" in output:
                output["metadata"] = {}
                shown = {kind: data for kind, data in output["data"].items() if kind in SHOWN}
                output["data"] = shown or {
                    "text/plain": f"(an output of type {', '.join(output['data'])}, which this page does not show)"
                }
                if html_text := output["data"].get("text/html"):
                    output["data"]["text/html"] = re.sub(r"(?is)<style.*?</style>", "", html_text)
                for kind, text in shown.items():
                    if kind.startswith("text/") and not fits(output["data"][kind]):
                        output["data"] = {"text/plain": f"(too long for this page: {len(text):,} characters of {kind})"}
                        break
            elif not fits(output.get("text", "")):
                output["text"] = f"(too long for this page: {len(output['text']):,} characters)"
    return notebook


def _harmless_tags() -> list[str]:
    from bleach import ALLOWED_TAGS

    return [*ALLOWED_TAGS, *TAGS.split()]


def _clean(fragment) -> str:
    """A fragment of HTML with harmless tags left; nbconvert's own filter would show headings and paragraphs as markup."""
    from bleach import clean

    allowed = {"a": ["href"], "*": ["class", "id"]}
    return _formulas(clean(str(fragment), tags=_harmless_tags(), attributes=allowed, strip=True))


def _formulas(text: str) -> str:
    """`$…$` and `$$…$$` as MathML, outside of code; what the converter does not read stays as it was."""
    from bleach import clean
    from latex2mathml.converter import convert

    def formula(found: re.Match) -> str:
        if found["code"]:
            return found["code"]
        try:
            made = convert(
                html.unescape(found["block"] or found["line"]), display="block" if found["block"] else "inline"
            )
        except Exception:  # it raises its own errors and others
            return found[0]
        attributes = {"math": ["xmlns", "display"], "mo": ["stretchy", "fence", "form"], "*": ["mathvariant"]}
        return clean(made, tags=MATH.split(), attributes=attributes, strip=True)

    pattern = r"(?s)(?P<code><(code|pre)\b.*?</\2>)|\$\$(?P<block>.+?)\$\$|\$(?P<line>[^\s$](?:[^$\n]*[^\s$])?)\$(?!\d)"
    return re.sub(pattern, formula, text)
