"""How large one array may be, and reading no more than that from a compressed file."""

from __future__ import annotations

import functools
import os
from typing import Any

__all__ = ["most_bytes", "read_bounded"]


@functools.cache
def most_bytes() -> int:
    """Bytes that one array may have: half of this machine's memory, 64 GiB at most.

    The largest of 122,689 densities has 601 MiB. A store that claims more is broken or hostile, and
    is refused before anything is allocated.
    """
    return min(64 * 1024**3, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)


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
