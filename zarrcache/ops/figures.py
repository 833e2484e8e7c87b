"""Pictures of a pair of densities: three planes of input, label and difference.

Colours are assigned by numpy; Pillow (extra ``plot``) writes captions and the PNG file.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zarrcache.errors import ConfigError

__all__ = ["Panel", "as_png", "draw_pair", "shrunk"]

#: Points of the colour maps viridis and RdBu of matplotlib, reversed for RdBu: low to high.
_VIRIDIS = (
    (68, 1, 84),
    (72, 40, 120),
    (62, 74, 137),
    (49, 104, 142),
    (38, 130, 142),
    (31, 158, 137),
    (53, 183, 121),
    (109, 205, 89),
    (180, 222, 44),
    (253, 231, 37),
)
_BLUE_TO_RED = ((5, 48, 97), (67, 147, 195), (247, 247, 247), (214, 96, 77), (103, 0, 31))
#: Grey of values that are NaN or infinite.
_NOT_FINITE = (128, 128, 128)
_AXES = ("yz", "xz", "xy")
_SIDE, _GAP, _CAPTION = 240, 12, 36  # pixels


@dataclass(frozen=True)
class Panel:
    """A plane of a grid as colours, with a caption."""

    caption: str
    #: (rows, columns, 3); rows are the first of the plane's two axes.
    colours: NDArray[np.uint8]


def draw_pair(
    data: NDArray[Any], label: NDArray[Any], at: Sequence[float] = (0.5, 0.5, 0.5)
) -> list[list[Panel]]:
    """Draw the planes yz, xz and xy of a pair of grids (nx, ny, nz), in a row per plane.

    Input and label share a scale, from the lowest to the highest value of both planes; colours
    follow the square root of the value, or the dark regions between atoms would show nothing. The
    difference, label minus input, has a scale of its own that is symmetric around zero; grids of
    different shapes have none. ``at`` is where each axis is cut, as a share of its length; the
    captions give the index of the plane, from 0, and the number of planes: ``input yz, x=12/24``.
    """
    rows = []
    for axis in range(3):
        planes, names = [], []
        for name, grid in (("input", data), ("label", label)):
            length = grid.shape[axis]
            place = min(length - 1, int(at[axis] * length))
            planes.append(np.take(grid, place, axis=axis).astype(np.float64))
            names.append(f"{name} {_AXES[axis]}, {'xyz'[axis]}={place}/{length}")
        low, high = _range(*planes)
        row = [
            Panel(f"{name}\n{_span(plane)}", _sequential(plane, low, high))
            for name, plane in zip(names, planes, strict=True)
        ]
        if data.shape == label.shape:
            difference = planes[1] - planes[0]
            row.append(Panel(f"label - {names[0]}\n{_span(difference)}", _diverging(difference)))
        rows.append(row)
    return rows


def as_png(rows: Sequence[Sequence[Panel]], title: str = "") -> bytes:
    """A PNG file of panels with their captions, below a title of up to two lines."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as exc:
        raise ConfigError(
            f"Pictures need Pillow ({exc}). Install it: pip install 'zarrcache[plot]'"
        ) from exc
    columns = max(map(len, rows))
    heights = [max(_size(panel)[1] for panel in row) + _CAPTION + _GAP for row in rows]
    top = _CAPTION + _GAP if title else 0
    sheet = Image.new("RGB", (_GAP + columns * (_SIDE + _GAP), top + sum(heights)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    draw.text((_GAP, 2), title, fill="black", font=font)
    for down, row in enumerate(rows):
        for along, panel in enumerate(row):
            x, y = _GAP + along * (_SIDE + _GAP), top + sum(heights[:down])
            draw.text((x, y + 2), panel.caption, fill="black", font=font)
            image = Image.fromarray(panel.colours).resize(_size(panel), Image.Resampling.NEAREST)
            sheet.paste(image, (x, y + _CAPTION))
    file = io.BytesIO()
    sheet.save(file, "PNG", optimize=True)
    return file.getvalue()


def _size(panel: Panel) -> tuple[int, int]:
    """Width and height of a panel in pixels."""
    tall, wide = panel.colours.shape[:2]
    share = _SIDE / max(tall, wide)
    return max(1, round(wide * share)), max(1, round(tall * share))


def _range(*planes: NDArray[np.float64]) -> tuple[float, float]:
    finite = np.concatenate([plane[np.isfinite(plane)] for plane in planes])
    return (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)


def _span(plane: NDArray[np.float64]) -> str:
    low, high = _range(plane)
    return f"{low:.4g} to {high:.4g}"


def _sequential(plane: NDArray[np.float64], low: float, high: float) -> NDArray[np.uint8]:
    with np.errstate(invalid="ignore"):
        return _coloured(np.sqrt((plane - low) / ((high - low) or 1.0)), _VIRIDIS)


def _diverging(plane: NDArray[np.float64]) -> NDArray[np.uint8]:
    low, high = _range(plane)
    largest = max(-low, high) or 1.0
    with np.errstate(invalid="ignore"):
        return _coloured(0.5 + 0.5 * plane / largest, _BLUE_TO_RED)


def _coloured(
    shares: NDArray[np.float64], points: Sequence[tuple[int, int, int]]
) -> NDArray[np.uint8]:
    """Interpolate a colour map at values between 0 and 1."""
    places = np.linspace(0, 1, len(points))
    is_finite = np.isfinite(shares)
    filled = np.where(is_finite, shares, 0.0)
    channels = [np.interp(filled, places, [point[c] for point in points]) for c in range(3)]
    colours = np.stack(channels, axis=-1).round().astype(np.uint8)
    colours[~is_finite] = _NOT_FINITE
    return colours


def shrunk(colours: NDArray[np.uint8], columns: int) -> NDArray[np.uint8]:
    """Colours of a plane as ``columns`` x ``columns`` points or fewer, its proportions kept."""
    tall, wide = colours.shape[:2]
    share = columns / max(tall, wide)
    rows, columns = max(1, round(tall * share)), max(1, round(wide * share))
    down = ((np.arange(rows) + 0.5) * tall / rows).astype(int)
    along = ((np.arange(columns) + 0.5) * wide / columns).astype(int)
    return colours[np.ix_(down, along)]
