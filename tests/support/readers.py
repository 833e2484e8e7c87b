"""Readers as a training run makes them, over real stores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zarrcache import ZarrS3Reader
from zarrcache.config import CacheConfig

__all__ = ["make_reader"]


def make_reader(
    directory: Path,
    url: object = None,
    *,
    cache: Mapping[str, Any] | CacheConfig | None = None,
    **changes: Any,
) -> ZarrS3Reader:
    """A reader of ``data`` and ``label`` at ``url`` (default: ``directory``).

    Parameters
    ----------
    directory : Path
        Holds ``map.json``, whose functional ``GGA`` is read, and the cache.
    cache : mapping, CacheConfig or None
        What differs from a cache in ``directory/cache`` that leaves no space free for others (the
        tests' disk may be nearly full); ``{}`` for that cache itself, None for no cache.
    **changes
        Replace arguments of ``ZarrS3Reader``. The defaults are not normalized, half of the
        materials for training.
    """
    root = directory if url is None else url
    if isinstance(cache, Mapping):
        cache = {"dir": directory / "cache", "min_free": 0, **cache}
    arguments = {
        "data_dir": f"{root}/data",
        "label_dir": f"{root}/label",
        "map_dir": directory / "map.json",
        "functional": "GGA",
        "normalize": False,
        "train_fraction": 0.5,
    }
    return ZarrS3Reader(**{**arguments, **changes}, cache=cache)
