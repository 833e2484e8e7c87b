"""Parse, format and bound sizes, durations, shares and counts: ``200 GiB``, ``5 min``, ``5 %``."""

from __future__ import annotations

import functools
import math
import operator
import os
import re
from fractions import Fraction
from threading import TIMEOUT_MAX
from typing import Any

from zarrcache.errors import ConfigError

__all__ = [
    "Percent",
    "bytes_or_percent",
    "counted",
    "format_bytes",
    "format_money",
    "format_seconds",
    "most_bytes",
    "parse_bytes",
    "parse_seconds",
    "read_bounded",
    "whole_number",
]

_SIZE_UNITS = {"": 1, "b": 1}
for _i, _letter in enumerate("kmgtp", start=1):
    _SIZE_UNITS[_letter + "b"] = 1000**_i
    _SIZE_UNITS[_letter] = _SIZE_UNITS[_letter + "ib"] = 1024**_i
_TIME_UNITS = {"": 1.0, "ms": 1e-3, "s": 1.0, "min": 60.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_QUANTITY = re.compile(r"\s*([0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})\s*([A-Za-z%]*)\s*")


class Percent(float):
    """A share of the file system, 0 to 100, written ``5 %``."""


def parse_bytes(value: object) -> int:
    """Bytes of ``200 GiB``, ``1.5 GB``, ``4MiB`` or a plain number; K, M, G, T alone are binary.

    Raises
    ------
    ValueError
        Not a size; the message shows the value and the accepted forms.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if match is None or match[2].lower() not in _SIZE_UNITS:
        raise ValueError(
            f"{value!r} is not a size. Write for example '200 GiB', '500 MB' or a number of bytes."
        )
    return int(Fraction(match[1]) * _SIZE_UNITS[match[2].lower()])


def parse_seconds(value: object) -> float:
    """Seconds of ``60 s``, ``5 min``, ``12 h``, ``30 d`` or a plain number.

    Raises
    ------
    ValueError
        Not a duration, or one of more than 292 years, for which no call can wait; the message shows
        the value and the accepted forms.
    """
    seconds: Any = value
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if match is not None and match[2].lower() in _TIME_UNITS:
        seconds = float(match[1]) * _TIME_UNITS[match[2].lower()]
    is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if is_number and 0 <= seconds <= TIMEOUT_MAX:
        return float(seconds)
    raise ValueError(
        f"{value!r} is not a duration. Write for example '60 s', '5 min', '30 d' or a number of "
        "seconds."
    )


def format_bytes(n: int) -> str:
    """Format bytes as ``73.1 GiB``; exact below one KiB."""
    if abs(n) < 1024:
        return f"{n} B"
    size = float(n)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        size /= 1024
        if abs(size) < 1023.95:
            return f"{size:.1f} {unit}"
    return f"{size / 1024:.1f} PiB"


def format_money(amount: float) -> str:
    """Two decimals; none from 1,000 on, two significant digits below 0.1."""
    if amount == 0:
        return "0"
    if amount >= 1000:
        return f"{amount:,.0f}"
    if amount >= 0.1:
        return f"{amount:,.2f}"
    decimals = min(9, 1 - math.floor(math.log10(amount)))
    return f"{amount:.{decimals}f}"


def format_seconds(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``6 min 12 s``, ``3 h 05 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def bytes_or_percent(value: object) -> int | Percent:
    """Parse a size, or a share of the file system such as ``5 %``."""
    if isinstance(value, Percent):
        return value
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if match is not None and match[2] == "%":
        share = float(match[1])
        if share >= 100:
            raise ValueError(
                f"{value!r} would leave no room for the cache. Write for example '5 %'."
            )
        return Percent(share)
    return parse_bytes(value)


def whole_number(name: str, value: Any, *, least: int = 0, most: int | None = None) -> int:
    """Return an integer argument within bounds.

    Raises
    ------
    ConfigError
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    # In Python bool is an int; here it is a mistake.
    if isinstance(value, bool) or number < least or (most is not None and number > most):
        raise ConfigError(
            f"{name} is {value!r}; it has to be a whole number from "
            f"{least}{'' if most is None else f' to {most}'}."
        )
    return number


def one_of(name: str, value: object, *allowed: str) -> None:
    """Check a setting that is one of several words.

    Raises
    ------
    ConfigError
        It is another; the message names them.
    """
    if value not in allowed:
        *others, last = map(repr, allowed)
        raise ConfigError(f"{name} is {value!r}; it has to be {', '.join(others)} or {last}.")


@functools.cache
def most_bytes() -> int:
    """Largest size of one array in bytes: half of this machine's memory, at most 64 GiB.

    The largest of 122,689 densities has 601 MiB. A store that claims more than the limit is broken
    or hostile, and is refused before anything is allocated.
    """
    return min(64 * 1024**3, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)


def counted(number: int, noun: str, more: str | None = None) -> str:
    """``1 entry``, ``98,302 entries``."""
    return f"{number:,} {noun if number == 1 else more or noun + 's'}"


def read_bounded(file: Any, nbytes: int) -> bytes:
    """Read a file to its end.

    Raises
    ------
    ValueError
        It has more than ``nbytes``.
    """
    data: bytes = file.read(nbytes + 1)
    if len(data) > nbytes:
        raise ValueError(f"it decompresses to more than {nbytes} bytes")
    return data
