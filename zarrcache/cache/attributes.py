"""Attributes of stores (structure, metadata) for runs without the origin, some dozens per file.

A pack is an entry of the array tier like a stored listing: checked at every read, within the limit,
never evicted. It has up to `_ROWS` rows. A row goes to the first pack with room on the way from the
directory's one pack of level 0 to the one of `_FAN` ** level packs that the digest of its name
selects; a name that is not in a pack with room is in none below it. So a directory of 50 stores has
two to nine packs, one of 100,000 some thousand, and a row is added by writing one pack.
docs/explanation/decisions/026-attributes-in-packs.md has what was rejected.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from zarrcache._keys import ArrayKey
from zarrcache._units import most_bytes
from zarrcache.cache.tiers import ArrayCache
from zarrcache.disk import BLOCK_BYTES, disk_bytes
from zarrcache.origin import Origin

__all__ = ["PACK", "AttributePacks", "StoredAttributes"]

_ROWS, _FAN, _LEVELS = 64, 4, 10
_LENGTH_BYTES = 4
#: A row of which nothing is known, and what its name takes.
_TYPICAL_BYTES, _NAME_BYTES = 2048, 32
#: The row of a store whose attributes were stored and are not known any more. It keeps its place: a
#: pack that had room again would end the search for rows below it.
_NOTHING = b""
#: Begins the name of a pack below its directory.
PACK = ".attributes-"


class StoredAttributes(NamedTuple):
    """The attributes of a store.

    Attributes
    ----------
    attributes : dict
    zarr_format : int
        2 or 3; 0 of a file that is no Zarr store.
    """

    attributes: dict[str, Any]
    zarr_format: int


class AttributePacks:
    """Attributes by the name of their store below a directory. Safe from any thread or process.

    A cache fault is a miss, or a row that is not stored.

    Parameters
    ----------
    entries : ArrayCache
        Which verifies always.
    """

    def __init__(self, entries: ArrayCache) -> None:
        self._entries = entries

    def get(self, origin: Origin, store: str) -> StoredAttributes | None:
        """The attributes of ``store``; None if they are not stored."""
        row = self._row(origin, store)
        return None if row is None else _unpacked(row)

    def renew(self, origin: Origin, store: str, found: StoredAttributes) -> None:
        """Replace a row, if there is one. Without attributes nothing is known of the store then."""
        row = self._row(origin, store)
        if row is not None and (found.attributes or row != _NOTHING):
            self.put(origin, store, found)

    def put(self, origin: Origin, store: str, found: StoredAttributes) -> bool:
        """Store a row, or replace it; one without attributes as not known.

        Returns whether it is stored.
        """
        row = _packed(found) if found.attributes else _NOTHING
        for key in _path(origin, store):
            rows = self._rows(key)
            if rows.get(store) == row:
                return True
            if len(rows) < _ROWS or store in rows:
                with self._entries.flight.hold(key.digest):
                    rows = self._rows(key)  # another process may have added some
                    if len(rows) < _ROWS or store in rows:
                        return self._write(key, {**rows, store: row})
        return False

    def needed_bytes(self, origin: Origin, stores: Collection[str]) -> int:
        """Bytes on disk that the rows of ``stores`` need beyond those that are stored: an estimate.

        Rows that are stored give the size of the others; without any it is taken to be 2 KiB.
        """
        absent, rows_bytes, n_rows = set(stores), 0, 0
        packs = list(self._all(origin, 0, 0))
        for rows in packs:
            absent -= rows.keys()
            rows_bytes += sum(map(len, rows.values()))
            n_rows += len(rows)
        if not absent:
            return 0
        row_bytes = rows_bytes // n_rows if n_rows else _TYPICAL_BYTES
        added = len(absent) * (row_bytes + _NAME_BYTES)
        # Packs of the last level may be nearly empty, but there are at most as many as rows.
        n_packs = min(len(absent), 1 + _FAN * len(absent) // _ROWS)
        if packs and n_rows + len(absent) <= _ROWS:
            return disk_bytes(added)
        return (2 * n_packs - 1) * BLOCK_BYTES + disk_bytes(added)

    def _all(self, origin: Origin, level: int, number: int) -> Iterator[dict[str, bytes]]:
        """Rows of the pack of this level and number, and of all packs below it."""
        rows = self._rows(_key(origin, level, number))
        if rows:
            yield rows
        if len(rows) >= _ROWS and level + 1 < _LEVELS:
            for part in range(_FAN):
                yield from self._all(origin, level + 1, number + part * _FAN**level)

    def _row(self, origin: Origin, store: str) -> bytes | None:
        for key in _path(origin, store):
            rows = self._rows(key)
            if store in rows or len(rows) < _ROWS:
                return rows.get(store)
        return None

    def _rows(self, key: ArrayKey) -> dict[str, bytes]:
        entry = self._entries.get(key)
        if entry is None:
            return {}
        raw = entry.array.tobytes()
        length = int.from_bytes(raw[:_LENGTH_BYTES], "little")
        start = _LENGTH_BYTES + length
        rows = {}
        for name, nbytes in json.loads(raw[_LENGTH_BYTES:start]):
            rows[name] = raw[start : start + nbytes]
            start += nbytes
        return rows

    def _write(self, key: ArrayKey, rows: Mapping[str, bytes]) -> bool:
        head = json.dumps([(name, len(row)) for name, row in rows.items()]).encode()
        raw = b"".join([len(head).to_bytes(_LENGTH_BYTES, "little"), head, *rows.values()])
        array = np.frombuffer(raw, np.uint8)
        return self._entries.put(key, array, source="attributes") is not None


def _path(origin: Origin, store: str) -> Iterator[ArrayKey]:
    """Keys of the packs that may hold the row of a store, in the order of the search."""
    name = zlib.crc32(store.encode("utf-8", "surrogateescape"))
    for level in range(_LEVELS):
        yield _key(origin, level, name % _FAN**level)


def _key(origin: Origin, level: int, number: int) -> ArrayKey:
    # No store has such a name, and no array has none: the kind of a stored listing.
    return ArrayKey(origin.identity, origin.url_of(f"{PACK}{level}-{number}"), "")


def _packed(found: StoredAttributes) -> bytes:
    text = json.dumps([found.zarr_format, found.attributes], separators=(",", ":"))
    return zlib.compress(text.encode("utf-8", "surrogatepass"), 1)


def _unpacked(row: bytes) -> StoredAttributes | None:
    if row == _NOTHING:
        return None
    decoder = zlib.decompressobj()
    zarr_format, attributes = json.loads(decoder.decompress(row, most_bytes()))
    return StoredAttributes(attributes, zarr_format)
