"""Charts and pages without a library: SVG inside one HTML file that needs no network, no script and no font, fits a phone
and follows the reader's light or dark mode. Everything that is given as text is escaped here."""

from __future__ import annotations

import base64
import html
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

COLOURS = 8
WIDTH, HEIGHT = 360, 230  # of a chart, in units of its own
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 10, 38

STYLE = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1c2128; --muted: #5a6572; --line: #d5dbe1; --card: #f5f7f9;
  --warn: #fff3d6; --c0: #0b62c4; --c1: #c2410c; --c2: #0f7a4b; --c3: #a21caf; --c4: #8a6100; --c5: #0e7490; --c6: #be123c;
  --c7: #57534e; }
@media (prefers-color-scheme: dark) { :root { --bg: #14181d; --fg: #e3e8ee; --muted: #98a4b1; --line: #333b45;
  --card: #1c2229; --warn: #40330f; --c0: #6cb0ff; --c1: #ff9a5c; --c2: #58c993; --c3: #e48bf0; --c4: #e2b93f;
  --c5: #5cc8de; --c6: #ff8096; --c7: #b8b2ac; } }
* { box-sizing: border-box; }
body { background: var(--bg); color: var(--fg); font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 0 auto;
  padding: 1rem 1rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 0.4rem; }
h3 { font-size: 1rem; margin: 1rem 0 0.3rem; } .card h3 { margin-top: 0; } .card .note { margin-top: 0.4rem; }
.card th, .card td { padding-right: 0.6rem; }
p { margin: 0.3rem 0 0.8rem; max-width: 46rem; } .note { color: var(--muted); font-size: 0.9rem; }
.warn { background: var(--warn); padding: 0.6rem 0.8rem; border-radius: 6px; max-width: none; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.grid > * { min-width: 0; }
figure, .card { background: var(--card); border-radius: 8px; margin: 0; padding: 0.7rem 0.7rem 0.5rem; }
figcaption { font-weight: 600; font-size: 0.92rem; }
.legend { display: flex; flex-wrap: wrap; gap: 0.1rem 0.9rem; font-size: 0.82rem; color: var(--muted); font-weight: 400; }
.legend i { display: inline-block; width: 1.1rem; height: 0.22rem; margin-right: 0.35rem; vertical-align: middle; }
svg { display: block; width: 100%; height: auto; } svg text { font-size: 11px; fill: var(--muted); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.92rem; } th, td { text-align: left; padding: 0.28rem 0.9rem 0.28rem 0;
  border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: normal; }
th { font-weight: 600; } tbody th { font-weight: 400; color: var(--muted); } td { font-variant-numeric: tabular-nums; }
td small { color: var(--muted); white-space: nowrap; }
tbody th { min-width: 5.5rem; } .card tbody th { min-width: 0; }
.sticky { position: sticky; top: 0; z-index: 1; background: var(--bg); padding: 0.35rem 0; }
.bar { display: flex; height: 1.1rem; border-radius: 4px; overflow: hidden; background: var(--line); }
.meter { position: relative; height: 0.55rem; min-width: 3.2rem; background: var(--line); border-radius: 3px;
  margin: 0.45rem 0 0; }
.meter i { position: absolute; inset: 0 auto 0 0; border-radius: 3px; }
.pictures { display: grid; grid-template-columns: repeat(4, 1fr); gap: 0.5rem 0.5rem; font-size: 0.8rem; line-height: 1.25; }
.pictures img { width: 100%; display: block; image-rendering: pixelated; border-radius: 3px; }
.pictures b { font-weight: 600; } .pictures .wrong { color: var(--c6); }
pre { background: var(--card); padding: 0.8rem; border-radius: 8px; overflow-x: auto; font-size: 0.82rem; }
details { margin: 0.4rem 0; } summary { cursor: pointer; }
"""
for _i in range(COLOURS):
    STYLE += f".s{_i} {{ stroke: var(--c{_i}); }} .f{_i} {{ fill: var(--c{_i}); }} .b{_i} {{ background: var(--c{_i}); }}\n"


@dataclass
class Line:
    """Points (x, y), drawn in ascending order of x; those that are not finite are left out. `band` holds (x, low, high)."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0
    band: Sequence[tuple[float, float, float]] = field(default_factory=list)
    dots: bool = True
    faint: bool = False


def page(title: str, body: str) -> str:
    """A whole HTML page. `title` is text, `body` HTML."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
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


def legend(entries: Sequence[tuple[str, int]], sticky: bool = False) -> str:
    """`entries` are (label, colour). A sticky one stays in sight while its page is scrolled."""
    marks = "".join(f'<span><i class="b{c % COLOURS}"></i>{escape(label)}</span>' for label, c in entries)
    return f'<div class="legend{" sticky" if sticky else ""}">{marks}</div>'


def picture(pixels: np.ndarray, alt: str) -> str:
    """uint8 H x W x C (C is 1 or 3) as an embedded PNG."""

    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'


def ticks(low: float, high: float, log: bool = False) -> list[float]:
    """About five round numbers from low to high (both positive, low < high, if log)."""
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = max(1, len(decades) // 6)
        found = [m * 10.0**d for d in decades if d % every == 0 for m in ((1, 2, 5) if len(decades) <= 3 else (1,))]
        return [t for t in found if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]
    raw = (high - low) / 5
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float, percent: bool = False) -> str:
    """A short label: 0.05, 25%, 12k, 3e-05."""
    if percent:
        return f"{value * 100:.4g}%"
    if abs(value) >= 10_000:
        return f"{value / 1000:,.4g}k"
    return f"{value:.3g}" if abs(value) < 100 else f"{value:.4g}"


def _span(values: list[float], given: tuple[float, float] | None, log: bool) -> tuple[float, float]:
    """The range of an axis: of the values, a little wider than a point."""
    if given:
        return given
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low <= 1e-12 * max(1.0, abs(high)):
        return (low / 2, low * 2) if log else (low - 0.5 * abs(low) - 1e-3, high + 0.5 * abs(high) + 1e-3)
    return low, high


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    x: str,
    percent: bool = False,
    log_x: bool = False,
    log_y: bool = False,
    y_range: tuple[float, float] | None = None,
    marks: Sequence[tuple[float, str]] = (),
    levels: Sequence[tuple[float, str]] = (),
    note: str = "",
    keys: bool = True,
) -> str:
    """A line chart as an HTML figure. `x` names the horizontal axis; the title says what is drawn. `marks` are labelled
    vertical lines, `levels` horizontal ones; `keys` shows a legend where there are several lines."""

    def drawable(px: float, py: float) -> bool:
        return math.isfinite(px) and math.isfinite(py) and (px > 0 or not log_x) and (py > 0 or not log_y)

    shown = [sorted(p for p in line.points if drawable(*p)) for line in lines]
    xs = [px for points in shown for px, _ in points] + [at for at, _ in marks if math.isfinite(at)]
    ys = [py for points in shown for _, py in points]
    ys += [v for line in lines for bx, *edges in line.band for v in edges if drawable(bx, v)]
    (x0, x1), (y0, y1) = _span(xs, None, log_x), _span(ys, y_range, log_y)
    if not y_range and not log_y and ys and min(ys) >= 0 and y0 < 0.6 * y1:
        y0 = 0.0

    def at(value: float, low: float, high: float, log: bool, begin: float, end: float) -> float:
        if log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return begin + (min(max(value, low), high) - low) / (high - low) * (end - begin)

    def place(px: float, py: float) -> str:
        across = at(px, x0, x1, log_x, LEFT, WIDTH - RIGHT)
        return f"{across:.1f},{at(py, y0, y1, log_y, HEIGHT - BOTTOM, TOP):.1f}"

    parts = []
    for tick in ticks(y0, y1, log_y):
        ty = at(tick, y0, y1, log_y, HEIGHT - BOTTOM, TOP)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{ty:.1f}" y2="{ty:.1f}" stroke="var(--line)"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{ty + 4:.1f}" text-anchor="end">{number(tick, percent)}</text>')
    for tick in ticks(x0, x1, log_x):
        tx = at(tick, x0, x1, log_x, LEFT, WIDTH - RIGHT)
        parts.append(f'<text x="{tx:.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{number(tick)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x)}</text>')
    for level, text in levels:
        ly = at(level, y0, y1, log_y, HEIGHT - BOTTOM, TOP)
        line = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{ly:.1f}" y2="{ly:.1f}"'
        parts.append(f'<line {line} stroke="var(--muted)" stroke-dasharray="4 3"/>')
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{ly - 4:.1f}" text-anchor="end">{escape(text)}</text>')
    for row, (where, text) in enumerate(marks):
        mx = at(where, x0, x1, log_x, LEFT, WIDTH - RIGHT)
        side = ("end", -4) if mx > WIDTH / 2 else ("start", 4)
        line = f'x1="{mx:.1f}" x2="{mx:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"'
        parts.append(f'<line {line} stroke="var(--muted)" stroke-dasharray="4 3"/>')
        parts.append(f'<text x="{mx + side[1]:.1f}" y="{TOP + 12 + 13 * row}" text-anchor="{side[0]}">{escape(text)}</text>')
    for line, points in zip(lines, shown, strict=True):
        colour = line.colour % COLOURS
        band = sorted((bx, lo, hi) for bx, lo, hi in line.band if drawable(bx, lo) and drawable(bx, hi))
        if band:
            outline = [place(bx, hi) for bx, _, hi in band] + [place(bx, lo) for bx, lo, _ in reversed(band)]
            parts.append(f'<polygon class="f{colour}" fill-opacity="0.16" points="{" ".join(outline)}"/>')
        path = " ".join(place(*p) for p in points)
        stroke = 'stroke-width="1" stroke-opacity="0.5"' if line.faint else 'stroke-width="2"'
        parts.append(f'<polyline class="s{colour}" fill="none" {stroke} points="{path}"/>')
        for px, py in points if line.dots or len(points) == 1 else []:
            cx, cy = place(px, py).split(",")
            tip = f"{escape(line.label)}: {number(py, percent)} at {number(px)}"
            parts.append(f'<circle class="f{colour}" cx="{cx}" cy="{cy}" r="2.6"><title>{tip}</title></circle>')
    if not any(shown):
        parts.append(f'<text x="{middle}" y="{HEIGHT / 2}" text-anchor="middle">nothing was recorded</text>')
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    key = legend([(line.label, line.colour) for line in lines]) if keys and len(lines) > 1 else ""
    below = f'<div class="note">{escape(note)}</div>' if note else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{key}{svg}{below}</figure>\n"
