"""Charts by matplotlib, and pages around them: one HTML file that needs no network, no script and no font, fits a phone and
follows the reader's light or dark mode (charts keep a white card). Everything that is given as text is escaped here."""

from __future__ import annotations

import base64
import html
import io
import math
import re
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

STYLE = """
:root { color-scheme: light dark; }
* { box-sizing: border-box; }
body { background: Canvas; color: CanvasText; font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto;
  padding: 1rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin: 2rem 0 0.4rem; } h3 { font-size: 1rem; margin: 0 0 0.3rem; }
.note, small { opacity: 0.75; font-size: 0.9rem; } small { white-space: nowrap; }
.warn { border-left: 0.3rem solid orange; padding: 0.3rem 0.8rem; }
.grid { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.grid > * { min-width: 0; border: 1px solid #8886; border-radius: 6px; margin: 0; padding: 0.7rem; }
figure { background: white; color: black; } figcaption { font-weight: 600; } figure img { width: 100%; }
.scroll, pre { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.92rem; } th, td { text-align: left; padding: 0.28rem 0.9rem 0.28rem 0;
  border-bottom: 1px solid #8886; vertical-align: top; overflow-wrap: normal; font-variant-numeric: tabular-nums; }
tbody th { font-weight: 400; min-width: 5rem; } meter { width: 2rem; }
.pictures { display: grid; grid-template-columns: repeat(4, 1fr); gap: 0.5rem; font-size: 0.8rem; line-height: 1.25; }
.pictures img { width: 100%; display: block; image-rendering: pixelated; } .wrong { color: #d33; }
"""


@dataclass
class Line:
    """Points (x, y), drawn in ascending order of x; those that are not finite are left out. `band` holds (x, low, high).
    Lines of one colour number look the same in all charts."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    band: Sequence[tuple[float, float, float]] = ()
    faint: bool = False

    @classmethod
    def over_seeds(cls, label: str, values: Sequence[tuple[float, list[float]]], colour: int) -> Line:
        """Through the means of the values at each x; the band goes from the lowest to the highest."""
        band = [(x, min(v), max(v)) for x, v in values if len(v) > 1]
        return cls(label, [(x, statistics.fmean(v)) for x, v in values], colour, band)


def page(title: str, body: str) -> str:
    """A whole HTML page. `title` is text, `body` HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def escape(value: object) -> str:
    return html.escape(str(value))


def ranged(value: str) -> str:
    """Text as HTML; the range at its end, `50.1 (49.0 to 51.0)`, small and in one piece."""
    return re.sub(r" (\([^()]* to [^()]*\))$", r" <small>\1</small>", escape(value))


def table(rows: Sequence[Sequence[str]], head: Sequence[str] = ()) -> str:
    """Cells are HTML. The first cell of a row is its heading."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>\n" for row in rows)
    thead = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f'<div class="scroll"><table>{thead}<tbody>\n{body}</tbody></table></div>'


def embedded(content: bytes, kind: str, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:image/{kind};base64,{base64.b64encode(content).decode()}">'


def picture(pixels: np.ndarray, alt: str) -> str:
    """uint8 H x W x C (C is 1 or 3) as an embedded PNG."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return embedded(buffer.getvalue(), "png", alt)


def chart(title: str, lines: Sequence[Line], **options) -> str:
    """A line chart as an HTML figure; the title says what is drawn. options: see `draw`."""
    return framed(title, draw(lines, **options))


def framed(title: str, drawn: Figure) -> str:
    """A drawing of matplotlib's as an HTML figure with a title."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": title}):  # the same lines give the same bytes
        drawn.savefig(buffer, format="svg", metadata={"Date": None})
    image = embedded(buffer.getvalue(), "svg+xml", title)
    return f"<figure><figcaption>{escape(title)}</figcaption>{image}</figure>\n"


def draw(
    lines: Sequence[Line],
    *,
    x: str,
    percent: bool = False,
    log_x: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    levels: Sequence[tuple[float, str]] = (),
) -> Figure:
    """`x` names the horizontal axis. `percent`: the vertical one goes from 0 to 1 and is labelled in per cent; otherwise it
    begins at 0. `marks` are labelled vertical lines, `levels` horizontal ones. Several lines have a legend."""
    several = len(lines) > 1
    figure = Figure(figsize=(4.6, 3 + 0.2 * several * len(lines)), layout="constrained")
    axes = figure.add_subplot(xlabel=plain(x), xscale="log" if log_x else "linear")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    for line in lines:
        look = {"color": f"C{line.colour % 10}", "linestyle": ("-", "--", ":", "-.")[line.colour // 10 % 4]}
        if band := [at for at in sorted(line.band) if all(map(math.isfinite, at))]:
            axes.fill_between(*zip(*band, strict=True), color=look["color"], alpha=0.16, linewidth=0)
        points = np.array(sorted(p for p in line.points if all(map(math.isfinite, p)))).reshape(-1, 2)
        look |= {"alpha": 0.5, "linewidth": 1} if line.faint else {"marker": "o" if len(points) <= 40 else None}
        axes.plot(*points.T, label=f" {plain(line.label)}", markersize=4, clip_on=False, **look)  # a first `_` would hide it
    if not any(map(len, (drawn.get_xdata() for drawn in axes.lines))):
        axes.text(0.5, 0.5, "nothing was recorded", ha="center", transform=axes.transAxes)
    if percent:
        axes.set_ylim(-0.02, 1.02)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    else:
        axes.set_ylim(bottom=0)
    if not log_x:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=x.endswith(("epoch", "epochs"))))
    dashed = {"color": "grey", "linestyle": "--", "linewidth": 1}
    for at, text in levels:
        axes.axhline(at, **dashed)
        axes.text(1, at, plain(text), ha="right", va="bottom", transform=axes.get_yaxis_transform())
    for at, _ in marks:
        axes.axvline(at, **dashed)
    middle = math.prod(axes.get_xlim()) ** 0.5 if log_x else sum(axes.get_xlim()) / 2
    for row, (at, text) in enumerate(marks):
        place = {"ha": "right" if at > middle else "left", "va": "top", "transform": axes.get_xaxis_transform()}
        axes.text(at, 1 - 0.07 * row, f" {plain(text)} ", **place)
    if several:
        figure.legend(loc="outside lower center", frameon=False, fontsize="small")
    return figure


def plain(text: str) -> str:
    """Text for matplotlib, which reads what stands between dollars as a formula."""
    return textwrap.fill(text.replace("$", r"\$"), 60)
