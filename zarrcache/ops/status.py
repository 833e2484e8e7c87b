"""Report the state of a cache, and how much of a config is warm, offline (``zarrcache status``)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from zarrcache._keys import ArrayKey, Units
from zarrcache.arrays import stem_of
from zarrcache.config import CacheConfig, DataConfig, cache_of
from zarrcache.disk import ARRAY, LISTING, OBJECT, min_free_bytes
from zarrcache.ops.selection import Selection, open_if_present, select

__all__ = ["Coverage", "Status", "Tier", "Unused", "read_status"]


@dataclass(frozen=True, slots=True)
class Tier:
    """Entries of one tier and their bytes on disk."""

    entries: int = 0
    nbytes: int = 0


@dataclass(frozen=True, slots=True)
class Unused:
    """Number of cached densities of a config's materials that it does not read, of one kind."""

    array: str
    units: Units
    encoding: str
    densities: int


@dataclass(frozen=True, slots=True)
class Coverage:
    """The part of a config that is in the array tier. Numbers are of task ids."""

    functional: str
    #: Of the functional in the map.
    ids: int
    #: Those among them that the origin did not have when it was last listed; 0 if never listed.
    missing: int
    #: With all densities cached, and with some of them. With ``missing: zero`` a channel that the
    #: origin lacks counts as cached.
    warm: int
    half: int
    #: Bytes on disk of these densities.
    nbytes: int
    #: Listings of both directories are stored, so that training starts without the origin.
    is_listed: bool
    #: Warm, with an entry that is still in float32 although ``cache.arrays.encoding`` is another.
    #: The next read, or ``zarrcache warm``, encodes it without a request.
    to_encode: int = 0
    #: Left out by the split, because they are known to lack a channel (``missing: drop``).
    dropped: int = 0
    #: Densities of these ids in other units or encodings, or of other channels.
    unused: tuple[Unused, ...] = ()
    #: A sentence on each directory in which ids have several sources, if ``source`` is ``auto``.
    several_sources: tuple[str, ...] = ()

    @property
    def is_complete(self) -> bool:
        """Whether training with this config sends no request."""
        return self.is_listed and self.warm == self.present

    @property
    def warm_ratio(self) -> float:
        """Warm ids over `present`, 0 to 1."""
        return self.warm / self.present if self.present else 0.0

    @property
    def present(self) -> int:
        """Ids that the origin has and that the split does not leave out."""
        return self.ids - self.missing - self.dropped


@dataclass(frozen=True, slots=True)
class Status:
    """State of a cache."""

    directory: Path
    exists: bool
    array_tier: Tier
    byte_tier: Tier
    #: Entries of the array tier that are stored listings; the others are densities.
    listings: int
    #: Of both tiers, including files that are being written or deleted.
    volume_bytes: int
    #: As configured; None if only the directory is known.
    limit_bytes: int | None
    min_free_bytes: int | None
    #: Of the file system: free, and all.
    free_bytes: int
    disk_bytes: int
    #: None without a training config.
    coverage: Coverage | None


def read_status(config: DataConfig | CacheConfig, *, has_settings: bool = True) -> Status:
    """Read the state of a cache. Sends no request and creates no directory.

    Without ``has_settings`` only the directory is known, and the limits in ``config`` are mere
    defaults.
    """
    cache = cache_of(config)
    selection, index = select(config)
    exists = open_if_present(index)
    usage = shutil.disk_usage(_nearest(cache.dir))
    totals = index.totals() if exists else {}
    return Status(
        directory=cache.dir,
        exists=exists,
        array_tier=_sum(totals, ARRAY, LISTING),
        byte_tier=_sum(totals, OBJECT),
        listings=_sum(totals, LISTING).entries,
        volume_bytes=index.volume_bytes() if exists else 0,
        limit_bytes=cache.limit if has_settings else None,
        min_free_bytes=min_free_bytes(cache.min_free, usage.total) if has_settings else None,
        free_bytes=usage.free,
        disk_bytes=usage.total,
        coverage=_coverage(config.functional, selection, totals.get(ARRAY, (0, 0))[0], exists)
        if isinstance(config, DataConfig) and selection is not None
        else None,
    )


def _sum(totals: Mapping[str, tuple[int, int]], *kinds: str) -> Tier:
    found = [totals.get(kind, (0, 0)) for kind in kinds]
    return Tier(sum(entries for entries, _ in found), sum(nbytes for _, nbytes in found))


def _coverage(functional: str, selection: Selection, entries: int, exists: bool) -> Coverage:
    if not exists:
        return Coverage(functional, len(selection.ids), 0, 0, 0, 0, is_listed=False)
    channels = selection.channels
    arrays = dict.fromkeys(array for one in channels for array in selection.stored_as(one))
    with ThreadPoolExecutor(1) as pool:
        # SQLite works without the GIL while this thread parses the listings.
        pending = {array: pool.submit(selection.stored_names, array) for array in arrays}
        listings = {role: selection.listing(role) for role in selection.roles}
        stored = {array: future.result() for array, future in pending.items()}
    listed = [names for names in listings.values() if names is not None]
    ids = selection.ids
    present = ids
    for names in listed:
        present = list(filter(names.__contains__, present))
    lacking = {channel: selection.lacking(channel) for channel in channels}
    missing = len(ids) - len(present)
    if selection.if_missing == "drop":
        for channel, names_lacking in lacking.items():
            of_role = listings[channel.role]
            if names_lacking and of_role is not None:
                present = [id_ for id_ in present if of_role[id_] not in names_lacking]
    nbytes, own, cached = 0, [], []
    for channel in channels:
        role, of_role = channel.role, listings[channel.role]
        has: list[list[bool]] = []
        for array in selection.stored_as(channel):
            found, size_bytes = stored[array][role]
            if of_role is None:
                found = {stem for name in found if (stem := stem_of(name)) is not None}
            of_ids: Iterable[str] = (
                present if of_role is None else map(of_role.__getitem__, present)
            )
            has.append(list(map(found.__contains__, of_ids)))
            if sum(has[-1]) != len(found):  # there are entries of other stores
                sizes = selection.stored({role: of_role}, array)[role]
                size_bytes = sum(sizes[task_id] for task_id in sizes.keys() & set(present))
            nbytes += size_bytes
        if lacking[channel] and of_role is not None:
            is_zero = [of_role[id_] in lacking[channel] for id_ in present]
            has = [[any(pair) for pair in zip(one, is_zero, strict=True)] for one in has]
        own.append(has[0])
        cached.append(has[0] if len(has) == 1 else [any(one) for one in zip(*has, strict=True)])
    warm = sum(map(all, zip(*cached, strict=True)))
    unused = []
    own_entries = sum(len(names) for of_roles in stored.values() for names, _ in of_roles.values())
    if entries > own_entries:  # two passes over the table
        for array, densities in selection.unused().most_common():
            key = ArrayKey("", "", array)
            unused.append(Unused(key.source_array, key.units, key.encoding, densities))
    return Coverage(
        functional=functional,
        ids=len(ids),
        missing=missing,
        dropped=len(ids) - missing - len(present),
        warm=warm,
        half=sum(map(any, zip(*cached, strict=True))) - warm,
        nbytes=nbytes,
        is_listed=len(listed) == len(listings),
        to_encode=warm - sum(map(all, zip(*own, strict=True))),
        unused=tuple(unused),
        several_sources=tuple(selection.several_sources()),
    )


def _nearest(path: Path) -> Path:
    """The path itself or its nearest ancestor that is an existing directory."""
    while not os.path.isdir(path):
        path = path.parent
    return path
