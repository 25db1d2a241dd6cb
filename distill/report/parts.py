"""What pages are made of: a document that needs nothing else, tables that can be sorted, legends. Texts are escaped."""

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from distill.progress import shown
from distill.report import svg
from distill.report.marks import Mark

CSS = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif;color:#1c1c1c;background:#fff;
margin:0 auto;padding:1rem;max-width:1180px;overflow-wrap:anywhere}
h1{font-size:1.5rem;margin:.2rem 0 .8rem}h2{font-size:1.15rem;margin:2rem 0 .6rem}h3{font-size:1rem;margin:0 0 .3rem}
p{margin:.4rem 0}.quiet{color:#5a5a5a;font-size:.88rem}
.verdict{font-size:1.15rem;padding:.7rem 1rem;border-left:5px solid #777;background:#f4f4f4}
.verdict.good{border-color:#1b8a3a;background:#eef8f0}.verdict.bad{border-color:#c4161c;background:#fdf0f0}
.warn{border-left:5px solid #b36b00;background:#fff6e8;padding:.4rem .8rem;margin:.5rem 0}
.scroll{overflow-x:auto;border:1px solid #ddd;border-radius:4px}
table{border-collapse:collapse;font-size:.86rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .55rem;text-align:right;border-bottom:1px solid #eee;white-space:nowrap;vertical-align:top}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:#fff}
td.text{text-align:left;white-space:normal;min-width:12rem}
thead th{background:#f6f6f6;vertical-align:bottom;white-space:normal;overflow-wrap:normal}
thead th:first-child{background:#f6f6f6}
th button{font:inherit;font-weight:600;border:0;background:none;padding:0;cursor:pointer;
text-align:inherit;color:inherit}
th[aria-sort=ascending] button::after{content:" ▲"}th[aria-sort=descending] button::after{content:" ▼"}
.name{white-space:normal;min-width:9rem;max-width:16rem}.confusion .name{min-width:0}
.grid2{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));gap:1.2rem}
.plot{width:100%;height:auto;display:block}.plot .tick{fill:#444}.plot .grid{stroke:#000;stroke-opacity:.09}
.plot .front{fill:none;stroke:#999;stroke-dasharray:3 3}
.legend{list-style:none;margin:.4rem 0;padding:0;display:flex;flex-wrap:wrap;gap:.2rem .9rem;font-size:.86rem}
.legend li{display:flex;align-items:center;gap:.3rem;min-width:0}.key{flex:none;vertical-align:middle}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,230px),1fr));gap:.8rem}
.card{border:1px solid #ddd;border-radius:4px;padding:.6rem;font-size:.84rem}
.card img{width:96px;height:96px;object-fit:contain;image-rendering:pixelated;background:#eee;display:block}
.card ul{margin:.3rem 0 0;padding-left:1rem}
dl{display:grid;grid-template-columns:fit-content(40%) 1fr;gap:.15rem .9rem;font-size:.9rem;margin:0}
dt{color:#5a5a5a}dd{margin:0}code{font:.86rem ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap}
pre{margin:.3rem 0;padding:.6rem;background:#f6f6f6;border-radius:4px;white-space:pre-wrap}
.right{background:#e4f2e7}@media(max-width:600px){body{padding:.7rem}dl{grid-template-columns:1fr}dt{margin-top:.4rem}}
"""
SCRIPT = """
document.querySelectorAll("table.sortable").forEach(function(table){
  table.querySelectorAll("thead th").forEach(function(head,column){
    head.querySelector("button").addEventListener("click",function(){
      var up=head.getAttribute("aria-sort")==="descending",body=table.tBodies[0];
      table.querySelectorAll("thead th").forEach(function(other){other.removeAttribute("aria-sort")});
      head.setAttribute("aria-sort",up?"ascending":"descending");
      Array.from(body.rows).sort(function(a,b){
        var x=a.cells[column].dataset.sort,y=b.cells[column].dataset.sort;
        if(x===""||y==="")return (x==="")-(y==="");
        var order=isNaN(x)||isNaN(y)?x.localeCompare(y):x-y;
        return up?order:-order;
      }).forEach(function(row){body.appendChild(row)});
    });
  });
});
"""


class Html(str):
    """Text that is HTML already."""


class Cell(NamedTuple):
    text: str  # escaped, unless it is Html
    sort: str | float | None = None  # what the column is sorted by; None: last
    kind: str = ""  # CSS class


def text(value) -> str:
    """In HTML, as it is, on one line; signs that would turn or hide what stands beside them are written out."""
    return value if isinstance(value, Html) else escape(shown(" ".join(str(value).split())))


def document(title: str, body: Iterable[str]) -> str:
    """A page that opens from the disk. It may load nothing and run nothing but its own script."""
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script}'"
    page = "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            f"<title>{text(title)}</title><style>{CSS}</style></head><body>",
            *body,
            f"<script>{SCRIPT}</script></body></html>",
            "",
        ]
    )
    return page.encode("utf-8", "replace").decode()  # halves of signs, which JSON can hold and no file can


def table(headers: Sequence[str], rows: Iterable[Sequence[Cell]], hints: Sequence[str] = ()) -> str:
    """A table that is sorted by a click on a header; `hints` are shown over the headers."""
    told = [*hints, *[""] * (len(headers) - len(hints))]
    head = "".join(
        f'<th scope="col"{f" title={quoted(hint)}" if hint else ""}><button type="button">{text(header)}</button></th>'
        for header, hint in zip(headers, told, strict=True)
    )
    body = "".join(f"<tr>{''.join(map(_cell, cells))}</tr>" for cells in rows)
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def quoted(value: str) -> str:
    return f'"{text(value)}"'


def _cell(cell: Cell) -> str:
    kind = f' class="{cell.kind}"' if cell.kind else ""
    sort = "" if cell.sort is None else cell.sort
    return f"<td{kind} data-sort={quoted(sort)}>{text(cell.text)}</td>"


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """(key as SVG, name) by entry."""
    return f'<ul class="legend">{"".join(f"<li>{key}<span>{text(name)}</span></li>" for key, name in entries)}</ul>'


def marked(name: str, mark: Mark) -> Html:
    return Html(f"{svg.key(mark)} {text(name)}")


def values(pairs: Iterable[tuple[str, object]]) -> str:
    """What is known by name."""
    return f"<dl>{''.join(f'<dt>{text(name)}</dt><dd>{text(value)}</dd>' for name, value in pairs)}</dl>"


def figure(title: str, *parts: str) -> str:
    return f"<div><h3>{text(title)}</h3>{''.join(parts)}</div>"


def section(title: str, *parts: str) -> str:
    """Nothing, where it has no parts."""
    return f"<section><h2>{text(title)}</h2>{''.join(parts)}</section>" if any(parts) else ""


def side_by_side(*parts: str) -> str:
    return f'<div class="grid2">{"".join(parts)}</div>'
