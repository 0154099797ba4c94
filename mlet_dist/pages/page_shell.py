"""A self-contained HTML page: its style, and the parts that several pages have."""

import html
import re
from collections.abc import Iterable, Sequence

SERIES = ("#1a5fb4", "#c64600", "#26855c", "#8f4fb0", "#a8760a", "#007a8c", "#b0305c", "#5c6670")
"""Colours of the series of a chart on a light page, which differ in lightness too."""
INK, SOFT, RULE, PAGE, FILL = "#1f2328", "#59636e", "#d0d7de", "#fefefe", "#e3e7eb"
"""Text, minor text, lines of a grid, the page, and surfaces on a light page."""

_NAMES = ("ink", "soft", "rule", "page", "fill", *(f"s{index}" for index in range(len(SERIES))))
_DARK = (
    *("#e6edf3", "#9da7b3", "#3d444d", "#0d1117", "#262c34"),
    *("#78aeff", "#ff9a5c", "#5fd3a0", "#cf9bf0", "#e3b341", "#4fc7d9", "#ff8fb3", "#aab4be"),
)  # fmt: skip
VARIABLES = dict(zip((INK, SOFT, RULE, PAGE, FILL, *SERIES), (f"var(--{name})" for name in _NAMES), strict=True))
"""The CSS variable of each colour of a light page, so that it follows the reader's colour scheme."""


def _declared(colours: Iterable[str]) -> str:
    return "; ".join(f"--{name}: {colour}" for name, colour in zip(_NAMES, colours, strict=True))


_LIGHT = (INK, SOFT, RULE, PAGE, FILL, *SERIES)
_STYLE = f"""\
:root {{ color-scheme: light dark; {_declared(_LIGHT)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_declared(_DARK)} }} }}
@media print {{ :root {{ color-scheme: light; {_declared(_LIGHT)} }} }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 20px auto; padding: 0 16px; max-width: 1200px; color: var(--ink);
  background: var(--page); print-color-adjust: exact; -webkit-print-color-adjust: exact }}
h1 {{ font-size: 22px; line-height: 1.25; overflow-wrap: anywhere }} h2 {{ font-size: 17px; margin: 30px 0 8px }}
h3 {{ font-size: 14px; margin: 0 0 6px; overflow-wrap: anywhere }} p, li {{ max-width: 68em }} p {{ margin: 7px 0 }}
h2, h3, .note, .key {{ break-after: avoid }} small, .note {{ color: var(--soft); font-weight: normal }}
a {{ color: var(--s0) }} code, pre {{ font: 13px/1.45 ui-monospace, monospace }} pre {{ overflow-x: auto }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 2px 14px; margin: 0 }} dt {{ color: var(--soft) }}
dd {{ margin: 0; font-variant-numeric: tabular-nums }}
@media (max-width: 560px) {{ dl {{ grid-template-columns: 1fr }} dd {{ margin-bottom: 6px }} }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(340px, 100%), 1fr)); gap: 14px }}
.charts section {{ border: 1px solid var(--rule); border-radius: 6px; padding: 10px; min-width: 0;
  break-inside: avoid }}
body > section {{ max-width: 640px }}
.callout {{ border-left: 4px solid var(--s0); background: var(--fill); border-radius: 0 6px 6px 0; padding: 8px 14px }}
.callout p:first-child {{ font-weight: 600 }}
svg {{ width: 100%; height: auto; display: block }}
.table {{ overflow-x: auto; background: linear-gradient(to left, var(--page) 50%, transparent) 100% 0 / 28px 100%
  no-repeat local, linear-gradient(to left, var(--rule), transparent) 100% 0 / 14px 100% no-repeat scroll }}
table {{ border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; font-size: 13.5px;
  line-height: 20px }}
th, td {{ text-align: right; padding: 3px 7px; border-bottom: 1px solid var(--rule); white-space: nowrap }}
th {{ color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal }}
th:first-child, td:first-child {{ text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 11em;
  position: sticky; left: 0; background: var(--page) }}
td.text {{ white-space: normal; min-width: 16em; text-align: left }}
tr.marked td {{ background: var(--fill) }} tr {{ break-inside: avoid }}
.key {{ break-inside: avoid; display: flex; flex-wrap: wrap; gap: 2px 16px; max-width: none }}
.key span {{ display: flex; align-items: center; gap: 6px; overflow-wrap: anywhere }}
.key i, .key svg {{ flex: none; width: 13px; height: 13px; border-radius: 2px }} .key svg {{ width: 44px }}
@media print {{ body {{ margin: 0; max-width: none; font-size: 11px }} .table {{ overflow: visible;
  background: none }} th:first-child, td:first-child {{ position: static }}
  .charts {{ display: block }} .charts section {{ display: inline-block; box-sizing: border-box; width: 49%;
  margin: 0 0.5% 8px 0; vertical-align: top }} table {{ font-size: 10px;
  line-height: 15px }} th, td {{ padding: 2px 5px }} }}"""


def page(title: str, body: str, style: str = "") -> str:
    """Return the document.

    Args:
        title: of the window and of the page, as text.
        body: HTML below the title.
        style: CSS that this page alone needs.
    """
    text = html.escape(title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text}</title>\n<style>\n{_STYLE}\n{style}</style></head>\n<body><h1>{text}</h1>\n{body}\n</body></html>\n"
    )


def table(names: Sequence[str], rows: Iterable[Sequence[str]], marked: Iterable[int] = ()) -> str:
    """Return a table of texts, which scrolls sideways on a narrow screen; some rows may be marked by number."""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    of_marked = set(marked)
    lines = []
    for number, row in enumerate(rows):
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        lines.append(f'<tr class="marked">{cells}</tr>' if number in of_marked else f"<tr>{cells}</tr>")
    body = "\n".join(lines)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def paragraphs(*texts: str) -> str:
    """Return paragraphs of plain text, in which what stands between backticks is code."""
    escaped = (re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(text)) for text in texts)
    return "\n".join(f"<p>{text}</p>" for text in escaped)


def key(entries: Iterable[tuple[str, str]]) -> str:
    """Return the key of a chart: names, each with what marks it, which is HTML: a ``swatch``, or SVG."""
    parts = "".join(f"<span>{mark}{html.escape(name)}</span>" for name, mark in entries)
    return f'<p class="key">{parts}</p>'


def swatch(colour: str) -> str:
    """Return a square of a colour, which is one of ``VARIABLES``' keys, for a key."""
    return f'<i style="background: {VARIABLES[colour]}"></i>'


def chart_section(title: str, chart: str, caption: str = "") -> str:
    """Return a chart with its title and a sentence on what it shows; ``chart`` is SVG."""
    note = f'<p class="note">{html.escape(caption)}</p>' if caption else ""
    return f"<section><h3>{html.escape(title)}</h3>{chart}{note}</section>"
