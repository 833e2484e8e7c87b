"""How full a cache is, and how much of a training config is warm, without asking the origin: what
``zarrcache status`` shows.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from zarrcache._keys import ROLES
from zarrcache.config import CacheConfig, DataConfig
from zarrcache.disk import min_free_bytes
from zarrcache.ops.selection import Scope, cache_of, existing_index

__all__ = ["Coverage", "Status", "Tier", "look"]


@dataclass(frozen=True, slots=True)
class Tier:
    """Entries of one tier and their bytes on disk."""

    entries: int = 0
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Coverage:
    """How much of a config is in the array tier.

    Attributes
    ----------
    functional : str
    ids : int
        Task ids that the map has for the functional.
    missing : int
        Ids among them that the origin did not have when it was last listed; 0 if it never was.
    warm, half : int
        Ids of which both densities are there, and of which one is.
    nbytes : int
        Bytes on disk of these densities.
    is_listed : bool
        The origin's directories were listed before, so that a run can start without it.
    """

    functional: str
    ids: int
    missing: int
    warm: int
    half: int
    nbytes: int
    is_listed: bool

    @property
    def is_complete(self) -> bool:
        """A run of the config needs nothing from the origin."""
        return self.is_listed and self.warm == self.ids - self.missing

    @property
    def warm_ratio(self) -> float:
        """Warm ids over ids that the origin has, 0 to 1."""
        present = self.ids - self.missing
        return self.warm / present if present else 0.0


@dataclass(frozen=True, slots=True)
class Status:
    """State of a cache.

    Attributes
    ----------
    directory : Path
    exists : bool
    array_tier, byte_tier : Tier
    volume_bytes : int
        Of both tiers, with what is being written or deleted right now.
    limit_bytes, min_free_bytes : int or None
        As configured; None if only the directory was given.
    free_bytes, disk_bytes : int
        Of the file system.
    coverage : Coverage or None
        None without a training config.
    """

    directory: Path
    exists: bool
    array_tier: Tier
    byte_tier: Tier
    volume_bytes: int
    limit_bytes: int | None
    min_free_bytes: int | None
    free_bytes: int
    disk_bytes: int
    coverage: Coverage | None


def look(config: DataConfig | CacheConfig, *, has_settings: bool = True) -> Status:
    """Look at a cache. Makes no request and, where there is no cache, no directory.

    Parameters
    ----------
    config : DataConfig or CacheConfig
    has_settings : bool
        False if only the directory is known and limits are defaults that say nothing.

    Raises
    ------
    ConfigError
        No cache block, a cache directory that cannot be used, a map file that cannot be read.
    """
    cache = cache_of(config)
    index = existing_index(cache)
    usage = shutil.disk_usage(_nearest(cache.dir))
    totals = index.totals() if index is not None else {}
    return Status(
        directory=cache.dir,
        exists=index is not None,
        array_tier=Tier(*totals.get("array", (0, 0))),
        byte_tier=Tier(*totals.get("object", (0, 0))),
        volume_bytes=index.volume_bytes() if index is not None else 0,
        limit_bytes=cache.limit if has_settings else None,
        min_free_bytes=min_free_bytes(cache.min_free, usage.total) if has_settings else None,
        free_bytes=usage.free,
        disk_bytes=usage.total,
        coverage=_coverage(config, is_there=index is not None)
        if isinstance(config, DataConfig)
        else None,
    )


def _coverage(config: DataConfig, *, is_there: bool) -> Coverage:
    scope = Scope(config)
    if not is_there:
        return Coverage(config.functional, len(scope.ids), 0, 0, 0, 0, is_listed=False)
    listings = {role: scope.listing(role) for role in ROLES}
    present = scope.known.intersection(*(names for names in listings.values() if names is not None))
    stored = scope.stored(listings)
    # What is there and is not listed is rare, and without it no name of 200,000 has to be looked up
    # for its size.
    there = {
        role: sizes
        if sizes.keys() <= present
        else {name: sizes[name] for name in sizes.keys() & present}
        for role, sizes in stored.items()
    }
    data, label = (there[role].keys() for role in ROLES)
    return Coverage(
        functional=config.functional,
        ids=len(scope.ids),
        missing=len(scope.ids) - len(present),
        warm=len(data & label),
        half=len(data ^ label),
        nbytes=sum(there["data"].values())
        + (0 if scope.is_one_directory else sum(there["label"].values())),
        is_listed=None not in listings.values(),
    )


def _nearest(path: Path) -> Path:
    """The first directory upwards that exists."""
    while not os.path.isdir(path):
        path = path.parent
    return path
