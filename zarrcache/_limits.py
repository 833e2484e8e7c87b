"""How large one array may be, and reading no more than that from a compressed file."""

from __future__ import annotations

import os
from typing import Any

__all__ = ["most_bytes", "read_bounded"]


def most_bytes() -> int:
    """What one array may have at the most: half of this machine's memory, and never more than 64
    GiB.

    The largest of 122,689 densities has 601 MiB. A store that claims more is broken or hostile, and
    is refused before anything is allocated.
    """
    return min(64 * 1024**3, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)


def read_bounded(file: Any, nbytes: int) -> bytes:
    """Everything that ``file`` has.

    Raises
    ------
    ValueError
        It is more than ``nbytes``.
    """
    data: bytes = file.read(nbytes + 1)
    if len(data) > nbytes:
        raise ValueError(f"it decompresses to more than {nbytes} bytes")
    return data
