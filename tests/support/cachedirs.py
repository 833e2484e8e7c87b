"""Cache directories for tests: small settings, numbered keys, and the bytes on disk, counted
without the package.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import ArrayKey
from zarrcache.config import CacheConfig

__all__ = ["array_of", "array_on_disk", "key_of", "on_disk_bytes", "payload_files", "settings"]

BLOCK = 4096


def settings(directory: Path, **block: Any) -> CacheConfig:
    """A ``cache:`` block without ``min_free``: the tests' disk may be nearly full."""
    return CacheConfig(**{"dir": directory / "cache", "min_free": 0, **block})


def key_of(number: int | str) -> ArrayKey:
    """The key of an array that does not exist."""
    return ArrayKey("file", f"/data/mp-{number}.zarr", "charge_density_total")


def array_of(number: int, nbytes: int = 1000) -> NDArray[Any]:
    """Random bytes with the number as seed."""
    return np.random.default_rng(number).integers(0, 256, nbytes, np.uint8)


def array_on_disk(nbytes: int) -> int:
    """Bytes on disk of an entry whose header fits one page."""
    return BLOCK + -(-nbytes // BLOCK) * BLOCK


def payload_files(directory: Path) -> list[Path]:
    """Every file of both tiers, partial ones included."""
    root = directory / "cache" / "zarrcache-v1"
    return sorted(
        p for tier in ("entries", "bytes") for p in (root / tier).rglob("*") if p.is_file()
    )


def on_disk_bytes(directory: Path) -> int:
    """Bytes of the files of both tiers. A file that vanishes during the walk counts nothing."""
    total = 0
    for path in payload_files(directory):
        try:
            total += -(-os.stat(path).st_size // BLOCK) * BLOCK
        except FileNotFoundError:
            continue
    return total
