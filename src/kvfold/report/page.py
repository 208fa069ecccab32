"""A report's page: headings, tables, drawings and commands in one HTML file, and how they look."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvfold.names import printable
from kvfold.report.verdict import Verdict
from kvfold.version import __version__

Rows = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Table:
    """Columns and rows of words; numbers are set to the right."""

    columns: Sequence[str]
    rows: Rows
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A drawing, and what it shows.

    Attributes:
        markup: SVG drawn here, or what :func:`embedded` makes of a file.
    """

    markup: str
    caption: str


@dataclass(frozen=True)
class Section:
    """A part of the report; ``details`` stand behind all others."""

    title: str
    parts: "Sequence[Part]" = field(default_factory=list)
    details: bool = False


Part = Table | Figure | str


# Whatever else goes wrong, a report runs no script and fetches nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --rule: #ccc; --soft: #666; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181c; --rule: #3a3d44; --soft: #9aa0a8; } }
body { font: 17px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem;
  border-top: 1px solid var(--rule); padding-top: 1rem; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .92rem; display: block;
  overflow-x: auto; }
th, td { padding: .25rem .8rem .25rem 0; text-align: left; border-bottom: 1px solid var(--rule);
  vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
caption, figcaption, .soft { color: var(--soft); font-size: .88rem; text-align: left;
  caption-side: bottom; padding-top: .4rem; }
.verdict { font-size: 1.35rem; line-height: 1.4; margin: 1rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: 1rem;
  margin: 1.2rem 0; }
.tiles div { border: 1px solid var(--rule); border-radius: 8px; padding: .8rem 1rem; }
.tiles b { display: block; font-size: 2rem; line-height: 1.2; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--soft); font-size: .88rem; overflow-wrap: anywhere; }
figure { margin: 1.2rem 0; } figure > div { background: #fff; border-radius: 6px;
  padding: .5rem; } svg { max-width: 100%; height: auto; }
pre { background: rgba(127, 127, 127, .14); padding: .6rem .8rem; border-radius: 6px;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .86rem; }
@media print { body { font-size: 11pt; max-width: none; margin: 0; }
  figure, tr { break-inside: avoid; } h2 { break-after: avoid; } }
"""


def _escape(text: str) -> str:
    return html.escape(printable(text))


def embedded(data: bytes, kind: str, words: str) -> str:
    """An image that holds its own data; browsers run and fetch nothing in it.

    Args:
        kind: of the data, for instance ``image/png``. words: for those who cannot see it.
    """
    source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
    return f'<img alt="{html.escape(words)}" style="max-width:100%" src="{source}">'


def render(title: str, sections: Sequence[Section], lead: Verdict | None = None) -> str:
    """The page, as one string; ``lead`` is what it says first."""
    body = "\n".join(_section(section) for section in sections)
    contents = " · ".join(f'<a href="#s{i}">{_escape(s.title)}</a>' for i, s in enumerate(sections))
    for index in range(len(sections)):
        body = body.replace("<h2>", f'<h2 id="s{index}">', 1)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{_escape(title)}</h1>\n{_lead(lead) if lead else ''}<p>{contents}</p>\n{body}\n"
        f'<p class="soft">Made by kvfold {__version__}.</p>\n</body>\n</html>\n'
    )


def _lead(lead: Verdict) -> str:
    tiles = "".join(
        f"<div><b>{_escape(tile.number)}</b><span>{_escape(tile.words)}</span></div>"
        for tile in lead.tiles
    )
    return f'<p class="verdict">{_escape(lead.sentence)}</p>\n<div class="tiles">{tiles}</div>\n'


def _section(section: Section) -> str:
    parts = [f"<section>\n<h2>{_escape(section.title)}</h2>"]
    for part in section.parts:
        if isinstance(part, Table):
            parts.append(_table(part))
        elif isinstance(part, Figure):
            caption = _escape(part.caption)
            parts.append(
                f"<figure><div>{part.markup}</div><figcaption>{caption}</figcaption></figure>"
            )
        elif part.startswith("$ "):
            parts.append(f"<pre>{_escape(part)}</pre>")
        else:
            parts.append(f"<p>{_escape(part)}</p>")
    return "\n".join([*parts, "</section>"])


def _table(table: Table) -> str:
    numeric = [
        index > 0 and all(row[index][:1].isdigit() or not row[index] for row in table.rows)
        for index in range(len(table.columns))
    ]

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="number">{_escape(cell)}</{tag}>'
            if number and any(table.columns)
            else f"<{tag}>{_escape(cell)}</{tag}>"
            for cell, number in zip(row, numeric, strict=True)
        )

    head = f"<tr>{cells('th', table.columns)}</tr>" if any(table.columns) else ""
    rows = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    caption = f"<caption>{_escape(table.caption)}</caption>" if table.caption else ""
    return f"<table>{caption}{head}\n{rows}</table>"
