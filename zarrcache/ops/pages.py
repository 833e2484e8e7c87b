"""Self-contained HTML pages with tables and charts (inline SVG).

No script, no font and no picture is fetched from elsewhere. A chart has the width of a small
screen; on a large one, charts stand side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Axis", "Series", "columns", "lines", "page", "short", "table"]

#: Light and dark, as the reader's system is set. Colours of charts from dark to light, distinct for
#: red-green blindness; lines also differ in their dashes.
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --faint: #6b7280;
  --line: #d8dee4; --shade: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117;
  --faint: #9198a1; --line: #30363d; --shade: #161b22; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p.faint, figcaption { color: var(--faint); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .7rem; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { background: var(--shade); }
table.numbers { font-size: .9rem; } table.numbers th { vertical-align: bottom; }
table.numbers td, table.numbers th { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
table.numbers td:first-child, table.numbers th:first-child { text-align: left; }
figure { margin: 1.2rem 0; } img, svg { max-width: 100%; height: auto; }
code { background: var(--shade); padding: .1rem .3rem; border-radius: .2rem; }
:root { --c0: #1f6feb; --c1: #bc4c00; --c2: #1a7f64; --c3: #8250df; --c4: #bf3989; --c5: #6e7781; }
@media (prefers-color-scheme: dark) { :root { --c0: #58a6ff; --c1: #f0883e; --c2: #3fc39d;
  --c3: #b98aff; --c4: #f778ba; --c5: #8b949e; } }
.charts { display: grid; gap: 1.2rem 2rem; margin: 1.2rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.charts figure { margin: 0; min-width: 0; } .charts svg { display: block; width: 100%; }
.charts figcaption { color: var(--ink); font-weight: 600; }
.key { display: flex; flex-wrap: wrap; gap: 0 1rem; font-size: .85rem; color: var(--faint); }
.key svg { display: inline-block; width: 1.7rem; height: .7rem; margin-right: .35rem; }
svg text { font: 12.5px system-ui, sans-serif; fill: var(--faint); }
svg .grid { stroke: var(--line); } svg .mark { stroke: var(--ink); stroke-dasharray: 3 3; }
svg text.now { fill: var(--ink); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .8rem;
  margin: 1.5rem 0; }
.tiles div { background: var(--shade); border-radius: .5rem; padding: .7rem .9rem; }
.tiles dt { color: var(--faint); font-size: .85rem; } .tiles dd { margin: 0; font-size: 1.5rem; }
.tiles dd small { display: block; color: var(--faint); font-size: .8rem; line-height: 1.3; }
.say { border-left: .25rem solid var(--c0); padding: .4rem 1rem; background: var(--shade); }
summary { cursor: pointer; color: var(--faint); }
pre { background: var(--shade); padding: .8rem 1rem; overflow-x: auto; border-radius: .3rem; }
pre code { background: none; padding: 0; } code { overflow-wrap: anywhere; }
"""
_WIDTH, _HEIGHT = 420, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 16, 26, 44
_DASHES = ("", "7 4", "2 4", "9 3 2 3")
_WIDTHS = (3.6, 2.2, 2.2, 2.2)


def page(title: str, body: str) -> str:
    """A whole document around ``body``, which is HTML already."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # A browser then loads nothing from elsewhere, and runs nothing.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    """A table of text; with ``numbers`` all columns but the first are aligned to the right."""
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = (f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    kind = ' class="numbers"' if numbers else ""
    return (
        f'<div class="wide"><table{kind}><thead><tr>{names}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


@dataclass(frozen=True)
class Series:
    """Numbers with a name. ``points`` are (x, y)."""

    name: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    """An axis: its title with the unit, and how its numbers are written.

    ``top`` fixes its upper end, otherwise the numbers do.
    """

    title: str
    show: Callable[[float], str]
    top: float | None = None


def short(value: float) -> str:
    """``950``, ``12 k``, ``3.4 M``."""
    for unit, size in (("", 1), (" k", 1e3), (" M", 1e6), (" G", 1e9)):
        if abs(value) < 999.5 * size or unit == " G":
            return f"{value / size:.3g}{unit}"
    raise AssertionError


def lines(
    title: str, series: Sequence[Series], x: Axis, y: Axis, mark: tuple[float, str] | None = None
) -> str:
    """Lines over numbers, with an optional vertical mark."""
    places = [place for one in series for place, _ in one.points]
    low, high = min(places), max(places)
    if x.top is not None:
        low, high = 0.0, x.top
    steps = _ticks(low, high) if high > low else [low]
    across = _scale(low, high, _LEFT, _WIDTH - _RIGHT)
    up, body = _frame(series, y)
    for tick in steps:
        body.append(_text(across(tick), _HEIGHT - _BOTTOM + 18, x.show(tick), "middle"))
    if mark is not None:
        place = across(mark[0])
        body.append(
            f'<path class="mark" d="M{place:.1f} {_TOP - 8}V{_HEIGHT - _BOTTOM}" fill="none"/>'
        )
        # Above the lines, which may be anywhere below.
        within = min(max(place, _LEFT + 80), _WIDTH - _RIGHT - 60)
        body.append(_text(within, 13, mark[1], "middle", "now"))
    for number, one in enumerate(series):
        drawn = [(across(a), up(b)) for a, b in one.points]
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in drawn)
        body.append(
            f'<path d="{path}" fill="none" stroke="var(--c{number})" '
            f'stroke-width="{_WIDTHS[number]}" stroke-dasharray="{_DASHES[number]}" '
            'stroke-linejoin="round"/>'
        )
        if len(drawn) > 30:
            continue
        for (a, b), (value, height) in zip(drawn, one.points, strict=True):
            said = f"{x.show(value)}: {y.show(height)}"
            if len(series) > 1:
                said = f"{one.name}, {said}"
            body.append(
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="{4 if not number else 2.6}" '
                f'fill="var(--c{number})"><title>{escape(said)}</title></circle>'
            )
    return _figure(title, series, body, x.title, dashed=True)


def columns(
    title: str, labels: Sequence[str], series: Sequence[Series], x_title: str, y: Axis
) -> str:
    """Columns over labels, one series upon the other. A point's x is the position of its label."""
    wide = (_WIDTH - _LEFT - _RIGHT) / len(labels)
    stacks = zip(*(one.points for one in series), strict=True)
    heights = [sum(height for _, height in stack) for stack in stacks]
    up, body = _frame([Series("", list(enumerate(heights)))], y)
    every = math.ceil(max(len(label) for label in labels) * 8 / wide + 12 / wide)
    for place in range(0, len(labels), every):
        middle = _LEFT + (place + 0.5) * wide
        body.append(_text(middle, _HEIGHT - _BOTTOM + 18, labels[place], "middle"))
    thick = min((0.72 if wide > 8 else 1) * wide, 46)
    base = [0.0] * len(labels)
    for number, one in enumerate(series):
        for place, (label, (_, height)) in enumerate(zip(labels, one.points, strict=True)):
            left = _LEFT + (place + 0.5) * wide - thick / 2
            top, bottom = up(base[place] + height), up(base[place])
            said = f"{one.name}, {label}: {y.show(height)}"
            body.append(
                f'<rect x="{left:.2f}" y="{top:.1f}" width="{thick - min(1, 0.1 * thick):.2f}" '
                f'height="{max(0.0, bottom - top):.1f}" fill="var(--c{number})">'
                f"<title>{escape(said)}</title></rect>"
            )
            base[place] += height
    return _figure(title, series, body, x_title, dashed=False)


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Numbers from ``low`` to ``high`` as places in the drawing."""
    span = high - low
    return lambda value: start + ((value - low) / span if span else 0.5) * (end - start)


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from ``low`` to ``high``."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * size for size in (1, 2, 2.5, 5, 10) if power * size >= raw * 0.999)
    if low == int(low) and high == int(high) and high - low >= 1:
        step = max(1, step if step == int(step) else math.ceil(step))
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def _frame(series: Sequence[Series], y: Axis) -> tuple[Callable[[float], float], list[str]]:
    """The vertical scale from 0, with its lines and numbers."""
    top = y.top
    if top is None:
        top = max((height for one in series for _, height in one.points), default=0.0)
    ticks = _ticks(0.0, top) if top > 0 else [0.0]
    if top > ticks[-1] and y.top is None:
        ticks.append(ticks[-1] + (ticks[1] if len(ticks) > 1 else top))
    up = _scale(0.0, max(ticks[-1], top if y.top else 0) or 1.0, _HEIGHT - _BOTTOM, _TOP)
    body = [_text(0, 13, y.title, "start")]
    for tick in ticks:
        place = up(tick)
        body.append(f'<path class="grid" d="M{_LEFT} {place:.1f}H{_WIDTH - _RIGHT}" fill="none"/>')
        body.append(_text(_LEFT - 8, place + 4, y.show(tick), "end"))
    return up, body


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    name = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{name}>{escape(text)}</text>'


def _figure(
    title: str, series: Sequence[Series], body: list[str], x_title: str, *, dashed: bool
) -> str:
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    body.append(_text(middle, _HEIGHT - 6, x_title, "middle"))
    key = "".join(_key(series, dashed=dashed)) if len(series) > 1 else ""
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        + (f'<div class="key">{key}</div>' if key else "")
        + f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(body)}</svg></figure>"
    )


def _key(series: Sequence[Series], *, dashed: bool) -> Iterator[str]:
    for number, one in enumerate(series):
        if dashed:
            drawn = (
                f'<path d="M0 6H28" stroke="var(--c{number})" stroke-width="{_WIDTHS[number]}" '
                f'stroke-dasharray="{_DASHES[number]}" fill="none"/>'
            )
        else:
            drawn = f'<rect x="9" width="12" height="12" fill="var(--c{number})"/>'
        yield (
            f'<span><svg viewBox="0 0 28 12" aria-hidden="true">{drawn}</svg>'
            f"{escape(one.name)}</span>"
        )
