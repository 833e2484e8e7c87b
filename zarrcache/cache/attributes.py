"""Attributes of stores (structure, metadata) for runs without the origin, up to 64 per file.

A pack is an entry of the array tier like a stored listing: checked at every read, within the limit,
never evicted. A directory has one pack of level 0, and up to `_FAN` ** n of level n. The checksum
of a store's name selects one pack of each level, and its row is in the first of these that had room
(`_ROWS` rows). So the search for a row ends at the first pack that has room, and a row is added by
writing one pack. A directory of 50 stores has one pack, one of 100,000 about 4,900.

A row names the sources of the densities that its attributes belong to. One that has outlived its
density is not removed; it belongs to no other.
docs/explanation/decisions/026-attributes-in-packs.md has what was rejected.
"""

from __future__ import annotations

import contextlib
import json
import zlib
from collections.abc import Iterator, Mapping

import numpy as np

from zarrcache._keys import ArrayKey
from zarrcache._units import most_bytes
from zarrcache.arrays import StoreAttributes
from zarrcache.cache.tiers import ArrayCache
from zarrcache.disk import CACHE_FAULTS
from zarrcache.origin import Origin

__all__ = ["PACK", "AttributePacks"]

_ROWS, _FAN, _LEVELS = 64, 4, 10
_LENGTH_BYTES = 4
#: Most sources in a row: those of a store's channels, and of versions before.
_SOURCES = 16
#: Begins the name of a pack below its directory.
PACK = ".attributes-"


class AttributePacks:
    """Attributes by the name of their store below a directory. Safe from any thread or process.

    A cache fault is a miss, or a row that is not stored.

    Parameters
    ----------
    entries : ArrayCache
        With ``verify: always``.
    """

    def __init__(self, entries: ArrayCache) -> None:
        self._entries = entries

    def get(self, origin: Origin, store: str) -> StoreAttributes | None:
        """The attributes of ``store``; None if they are not stored."""
        for key in _path(origin, store):
            rows = self._rows(key)
            if store in rows or len(rows) < _ROWS:
                return _unpacked(rows.get(store, b""))
        return None

    def put(self, origin: Origin, store: str, found: StoreAttributes) -> bool:
        """Store a row, or replace it. Returns whether it is stored.

        A row of the same attributes keeps its sources.
        """
        for key in _path(origin, store):
            rows = self._rows(key)
            if store in rows or len(rows) < _ROWS:
                if rows.get(store) == _packed(_merged(rows, store, found)):
                    return True
                with self._entries.flight.hold(key.digest):
                    rows = self._rows(key)  # another process may have added some
                    if len(rows) < _ROWS or store in rows:
                        row = _packed(_merged(rows, store, found))
                        return self._write(key, {**rows, store: row})
        return False

    def _rows(self, key: ArrayKey) -> dict[str, bytes]:
        entry = self._entries.get(key)
        if entry is None:
            return {}
        rows = _parsed(entry.array.tobytes())
        if rows is None:
            with contextlib.suppress(*CACHE_FAULTS):
                self._entries.drop(key)
            return {}
        return rows

    def _write(self, key: ArrayKey, rows: Mapping[str, bytes]) -> bool:
        head = json.dumps([(name, len(row)) for name, row in rows.items()]).encode()
        raw = b"".join([len(head).to_bytes(_LENGTH_BYTES, "little"), head, *rows.values()])
        array = np.frombuffer(raw, np.uint8)
        return self._entries.put(key, array, source="attributes") is not None


def _parsed(raw: bytes) -> dict[str, bytes] | None:
    """The rows of a pack; None if this package did not write it, although its checksum holds."""
    start = _LENGTH_BYTES + int.from_bytes(raw[:_LENGTH_BYTES], "little")
    try:
        sizes = {str(name): int(nbytes) for name, nbytes in json.loads(raw[_LENGTH_BYTES:start])}
    except (ValueError, TypeError, RecursionError):
        return None
    if min(sizes.values(), default=0) < 0 or start + sum(sizes.values()) != len(raw):
        return None
    rows = {}
    for name, nbytes in sizes.items():
        rows[name] = raw[start : start + nbytes]
        start += nbytes
    return rows


def _path(origin: Origin, store: str) -> Iterator[ArrayKey]:
    """Keys of the packs that may hold the row of a store, in the order of the search."""
    name = zlib.crc32(store.encode("utf-8", "surrogateescape"))
    for level in range(_LEVELS):
        yield _key(origin, level, name % _FAN**level)


def _key(origin: Origin, level: int, number: int) -> ArrayKey:
    # Not the name of a store. The empty array name is that of a stored listing.
    return ArrayKey(origin.identity, origin.url_of(f"{PACK}{level}-{number}"), "")


def _merged(rows: Mapping[str, bytes], store: str, found: StoreAttributes) -> StoreAttributes:
    """``found``, with the sources of the row that it replaces if that has the same attributes."""
    old = _unpacked(rows.get(store, b""))
    if old is None or old[:2] != found[:2]:
        return found
    sources = dict.fromkeys([*old.sources, *found.sources])
    return found._replace(sources=tuple(sources)[-_SOURCES:])


def _packed(found: StoreAttributes) -> bytes:
    text = json.dumps(found, separators=(",", ":"))
    return zlib.compress(text.encode("utf-8", "surrogatepass"), 1)


def _unpacked(row: bytes) -> StoreAttributes | None:
    try:
        raw = zlib.decompressobj().decompress(row, most_bytes())
        attributes, zarr_format, sources = json.loads(raw)
    except (zlib.error, ValueError, TypeError, RecursionError):
        return None  # there is no row, or a pack that this package did not write
    if not (isinstance(attributes, dict) and isinstance(sources, list)):
        return None
    if zarr_format not in (0, 2, 3) or not all(isinstance(source, str) for source in sources):
        return None
    return StoreAttributes(attributes, zarr_format, tuple(sources))
