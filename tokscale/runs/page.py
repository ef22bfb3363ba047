"""One HTML file that needs nothing beside it: sections of tables, curves and images, for any screen and for paper.

Whatever comes from a run is text and is escaped; nothing is fetched; the only program in the page is ours and plotly's.
"""

import base64
import html
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from tokscale.base.errors import EnvironmentRefused

Row = Sequence[object]
Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]
"""By name: places and values."""
Bands = Mapping[str, tuple[Sequence[float], Sequence[float], Sequence[float]]]
"""By name of a line: places, and the least and the largest values there."""

_COLOURS = ["#3b82f6", "#f97316", "#10b981", "#d946ef", "#eab308", "#ef4444", "#06b6d4", "#8b5cf6"]
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --soft: #667; --paper: #fff; --line: #d9dce1; --box: #f5f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e7ea; --soft: #9aa; --paper: #16181c; --line: #343840; --box: #1f2228; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 1100px; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .3rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem;
  border-bottom: 1px solid var(--line); padding-bottom: .25rem; } p.soft, figcaption { color: var(--soft); }
nav a { color: inherit; margin-right: 1rem; white-space: nowrap; } .wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; } td, th { padding: .25rem .8rem .25rem 0; text-align: left;
  border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
th { white-space: nowrap; } td.number, th.number { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
pre { background: var(--box); padding: .8rem; overflow: auto; max-height: 26rem; font-size: .8rem;
  white-space: pre-wrap; overflow-wrap: anywhere; } pre.whole { max-height: none; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(420px, 1fr)); gap: .5rem; }
.curve { height: 280px; min-width: 0; } img { max-width: 100%; image-rendering: auto; } figure { margin: 0 0 1rem; }
input[type=range] { width: 100%; max-width: 30rem; vertical-align: middle; }
@media print { :root { --ink: #000; --soft: #444; --paper: #fff; --line: #bbb; --box: #fff; color-scheme: light; }
  section { break-inside: auto; } .curve, figure, tr { break-inside: avoid; } h2 { break-after: avoid; }
  nav, input[type=range] { display: none; } details > * { display: block; } pre { max-height: none; } }
"""

_SCRIPT = """
const curves = JSON.parse(document.getElementById('curves').textContent);
const config = {displayModeBar: false, responsive: true};
for (const curve of curves) Plotly.newPlot(curve.id, curve.traces, curve.layout, config);
for (const box of document.querySelectorAll('.slider')) {
  const images = box.querySelectorAll('img'), shown = box.querySelector('output'), range = box.querySelector('input');
  const show = () => images.forEach((image, number) => {
    image.hidden = number !== +range.value;
    if (!image.hidden) shown.textContent = image.alt;
  });
  range.addEventListener('input', show);
  show();
}
"""


class Page:
    """Sections in the order in which they are added; what has nothing to show is left out."""

    def __init__(self, title: str, words: str):
        """Begin a page with a heading and a line below it."""
        self._title, self._words = title, words
        self._sections: list[tuple[str, str]] = []
        self._curves: list[dict[str, Any]] = []

    def add(self, heading: str, *parts: str) -> None:
        """A section of parts that the functions below made; none without a part."""
        shown = [part for part in parts if part]
        if shown:
            self._sections.append((heading, "\n".join(shown)))

    def curves(
        self, panels: Mapping[str, Lines], names: Sequence[str] = (), bands: Mapping[str, Bands] | None = None
    ) -> str:
        """Panels of lines.

        Args:
            panels: By title; of each line, by name, its places and values.
            names: Of lines that have the same colour in every panel, whichever lines stand beside them.
            bands: By title: around lines that are among `names`.
        """
        own = {name: {"line": {"color": _COLOURS[n % len(_COLOURS)]}} for n, name in enumerate(names)}
        found = []
        for title, lines in panels.items():
            if not lines:
                continue
            number = f"curve{len(self._curves)}"
            traces = [
                {"name": name, "x": list(x), "y": list(y), "mode": "lines" if len(x) > 1 else "markers"}
                | own.get(name, {})
                for name, (x, y) in lines.items()
            ]
            around = (bands or {}).get(title, {})
            traces += [_band(name, own[name]["line"]["color"], *band) for name, band in around.items()]
            named = {"showlegend": list(lines) != [title]}  # a single line says what it is, too
            self._curves.append({"id": number, "traces": traces, "layout": _layout(title, lines) | named})
            found.append(f'<div class="curve" id="{number}"></div>')
        return f'<div class="curves">{"".join(found)}</div>' if found else ""

    def html(self) -> str:
        """The whole file.

        Raises:
            EnvironmentRefused: When plotly, which draws the curves, is not installed.
        """
        body = "".join(
            f'<section><h2 id="s{number}">{escape(heading)}</h2>{content}</section>'
            for number, (heading, content) in enumerate(self._sections)
        )
        links = " ".join(f'<a href="#s{n}">{escape(heading)}</a>' for n, (heading, _) in enumerate(self._sections))
        data = json.dumps(self._curves).replace("<", "\\u003c")
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(self._title)}</title>'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<style>{_STYLE}</style></head><body><h1>{escape(self._title)}</h1>"
            f'<p class="soft">{escape(self._words)}</p><nav>{links}</nav>{body}'
            f'<script type="application/json" id="curves">{data}</script>'
            f"<script>{_plotly()}</script><script>{_SCRIPT}</script></body></html>\n"
        )


def escape(text: object) -> str:
    """Text as HTML shows it."""
    return html.escape(str(text))


def table(rows: Sequence[Row], heading: Row = ()) -> str:
    """Rows of cells; numbers to the right, in four digits. Nothing without a row."""
    if not rows:
        return ""
    right = [any(map(_is_number, column)) for column in zip(*rows, strict=True)]
    headed = zip(heading, right, strict=False)
    head = "".join(f"<th{' class=number' * is_right}>{escape(cell)}</th>" for cell, is_right in headed)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return f'<div class="wide"><table>{f"<tr>{head}</tr>" if head else ""}{body}</table></div>'


def text(content: str, summary: str = "", *, whole: bool = False) -> str:
    """Text as it is, behind a line that opens it if one is given; long ones scroll unless they are shown `whole`."""
    kind = ' class="whole"' if whole else ""
    pre = f"<pre{kind}>{escape(content)}</pre>"
    return f"<details><summary>{escape(summary)}</summary>{pre}</details>" if summary else pre


def note(words: str) -> str:
    """A sentence that says how to read what stands beside it."""
    return f'<p class="soft">{escape(words)}</p>'


def image(path: Path, words: str) -> str:
    """An image from a file; nothing when it is not there."""
    return (
        f'<figure><img src="{_data(path)}" alt="{escape(words)}"><figcaption>{escape(words)}</figcaption></figure>'
        * path.is_file()
    )


def slider(images: Sequence[tuple[Path, str]]) -> str:
    """Images of which one is shown, chosen by a slider; the last one at first."""
    there = [(path, words) for path, words in images if path.is_file()]
    if not there:
        return ""
    shown = "".join(f'<img src="{_data(path)}" alt="{escape(words)}" hidden>' for path, words in there)
    last = len(there) - 1
    return (
        f'<figure class="slider"><input type="range" min="0" max="{last}" value="{last}" aria-label="step"> '
        f"<output></output><div>{shown}</div></figure>"
    )


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return f"<td>{'' if value is None else 'yes' if value else 'no'}</td>"
    if _is_number(value):
        return (
            f'<td class="number">{value:,}</td>' if isinstance(value, int) else f'<td class="number">{value:.4g}</td>'
        )
    return f"<td>{escape(value)}</td>"


def _data(path: Path) -> str:
    if not path.is_file():
        return ""
    kind = "jpeg" if path.suffix.lower() in (".jpg", ".jpeg") else "png"
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def _layout(title: str, lines: Lines) -> dict[str, Any]:
    """Greys that are read on white paper and on a dark screen alike; no background of its own."""
    axis = {"gridcolor": "rgba(128,128,128,.25)", "zerolinecolor": "rgba(128,128,128,.4)", "automargin": True}
    return {
        "title": {"text": escape(title), "font": {"size": 14}},
        "font": {"color": "#7d8590", "size": 11},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "colorway": _COLOURS,
        "margin": {"l": 50, "r": 10, "t": 36, "b": 36},
        "legend": {"orientation": "h", "y": -0.14},
        "xaxis": axis,
        "yaxis": axis | _level(lines),
        "hovermode": "x unified",
    }


def _band(name: str, colour: str, x: Sequence[float], low: Sequence[float], high: Sequence[float]) -> dict[str, Any]:
    """The area between two lines, there and back."""
    area = {"x": [*x, *reversed(x)], "y": [*high, *reversed(low)], "fill": "toself", "fillcolor": f"{colour}33"}
    return area | {"name": name, "line": {"width": 0}, "mode": "lines", "hoverinfo": "skip", "showlegend": False}


def _level(lines: Lines) -> dict[str, Any]:
    """An axis from 0 for what never changes, which plotly would draw from -1 to 1, whatever its size."""
    values = {value for _, every in lines.values() for value in every}
    only = values.pop() if len(values) == 1 else 0
    return {"range": sorted((0, 2 * only))} if only else {}


def _plotly() -> str:
    if importlib.util.find_spec("plotly") is None:
        raise EnvironmentRefused(
            "plotly, which draws the curves of a report, is not installed: pip install 'tokscale[report]'"
        )
    from plotly.offline import get_plotlyjs

    return get_plotlyjs()
