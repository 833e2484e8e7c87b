"""Numbers, nouns and durations as the commands print them."""

from __future__ import annotations

__all__ = ["count", "duration", "plural"]


def count(n: int) -> str:
    """``98 302``."""
    return f"{n:,}".replace(",", " ")


def plural(n: int, noun: str, more: str | None = None) -> str:
    """``1 entry``, ``37 entries``."""
    return f"{count(n)} {noun if n == 1 else more or noun + 's'}"


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``6 min 12 s``, ``3 h 05 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
