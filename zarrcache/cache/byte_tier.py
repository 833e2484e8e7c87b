"""The byte tier: objects, and blocks of large ones, as the origin stores them.

An object appears under its name only when it is complete and its row, which holds its checksum, is
in the index. The version (ETag) is part of the key, so a changed object is another entry.
docs/explanation/decisions/002-byte-tier.md explains why fsspec's simplecache and blockcache are not
used.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator, Sequence
from io import FileIO
from typing import TYPE_CHECKING, Any

from zarrcache._keys import BlockKey, ObjectInfo
from zarrcache.arrays import check_sizes
from zarrcache.cache.tiers import Tier, file_id_of
from zarrcache.config import CacheConfig
from zarrcache.disk import (
    CACHE_FAULTS,
    OBJECT,
    Index,
    crc32c,
    open_regular,
    write_all,
    written_stamp,
)
from zarrcache.errors import CorruptEntryError
from zarrcache.origin import Origin, RangeIgnoredError
from zarrcache.stats import Counters, SharedSet

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["ByteCache", "read_range"]

logger = logging.getLogger(__name__)


class ByteCache(Tier):
    """Reads one origin's objects through the byte tier. Safe from any thread or process.

    Open files are not pickled.

    Parameters
    ----------
    origin : Origin
    config, counters, index, verified
        As in `Tier`.
    """

    def __init__(
        self,
        origin: Origin,
        config: CacheConfig,
        counters: Counters,
        index: Index,
        verified: SharedSet | None = None,
    ) -> None:
        super().__init__(config, counters, index=index, verified=verified)
        self._origin = origin

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (
            self._origin,
            self._config,
            self._counters,
            self.index,
            self._verified,
        )

    def read(self, obj: ObjectInfo, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes ``start`` to ``stop`` of an object, from disk if they are there.

        Objects up to ``cache.bytes.block_size``, and larger ones that are read whole, are cached
        whole; ranges of larger objects are cached in blocks.

        Raises
        ------
        IncompleteArrayError, OriginError
            The origin does not deliver what it lists. A cache fault is never raised.
        """
        stop = obj.size_bytes if stop is None else min(stop, obj.size_bytes)
        start = min(start, stop)
        if start == stop and obj.size_bytes:
            return b""
        block_size = self._config.bytes.block_size
        whole = self._key(obj)
        if (
            obj.size_bytes <= block_size
            or (start, stop) == (0, obj.size_bytes)
            # It was read whole before, so do not store it again in blocks.
            or os.path.exists(self._path(whole))
        ):
            ((_, data),) = self._entries([whole])
            return bytes(data if stop - start == obj.size_bytes else memoryview(data)[start:stop])
        parts = []
        try:
            for number in range(start // block_size, -(-stop // block_size)):
                base = number * block_size
                ((_, data),) = self._entries([self._key(obj, number, block_size)])
                parts.append(memoryview(data)[max(start - base, 0) : stop - base])
        except RangeIgnoredError:
            check_sizes([obj.size_bytes], self._url(whole))
            ((_, data),) = self._entries([whole])
            return bytes(memoryview(data)[start:stop])
        return b"".join(parts)

    def fetch(self, objects: Sequence[ObjectInfo]) -> Iterator[tuple[ObjectInfo, Buffer]]:
        """Contents of listed objects, each as soon as it has arrived, in any order.

        Objects that are not on disk are fetched from the origin in one pass.

        Raises
        ------
        IncompleteArrayError, OriginError
            As :meth:`read`.
        """
        for key, data in self._entries([self._key(obj) for obj in objects]):
            yield key.object, data

    def purge(self, obj: ObjectInfo, start: int, stop: int, why: str) -> None:
        """Drop the entries that hold bytes ``start`` to ``stop`` of an object, because they are
        bad although they match their own checksums.
        """
        size = self._config.bytes.block_size
        blocks = range(start // size, -(-stop // size))
        for key in (self._key(obj), *(self._key(obj, number, size) for number in blocks)):
            if os.path.exists(self._path(key)):
                self._purge(key.digest, _filename(key), self._url(key), why)

    def _key(self, obj: ObjectInfo, block: int | None = None, block_size: int = 0) -> BlockKey:
        return BlockKey(self._origin.identity, self._origin.url, obj, block, block_size)

    def _entries(self, keys: Sequence[BlockKey]) -> Iterator[tuple[BlockKey, Buffer]]:
        """Objects or blocks, from disk or from the origin, with single flight."""
        hits, misses, served_bytes = 0, 0, 0
        missing = []
        try:
            for key in keys:
                data = self._from_disk(key)
                if data is None:
                    missing.append(key)
                    continue
                hits, served_bytes = hits + 1, served_bytes + len(data)
                yield key, data
            if not missing:
                return
            self._open()
            # One lock for all: readers of the same keys wait for each other. A reader of one of
            # them alone has another lock, and may fetch it a second time.
            with self.flight.hold(keys[0].digest):
                wanted = {}
                for key in missing:  # another process may have fetched some meanwhile
                    data = self._from_disk(key, is_alone=True)
                    if data is None:
                        wanted[key.object] = key
                        continue
                    hits, served_bytes = hits + 1, served_bytes + len(data)
                    yield key, data
                for obj, fetched in self._from_origin(wanted):
                    misses += 1
                    self._put(wanted[obj], fetched)
                    yield wanted[obj], fetched
        finally:
            self._counters.add(byte_hits=hits, byte_misses=misses, served_bytes=served_bytes)

    def _open(self) -> None:
        """Create the cache directory, which holds the locks, also after it was deleted."""
        if not os.path.isdir(f"{self._root}/bytes"):
            self.index.reopen()
        with contextlib.suppress(*CACHE_FAULTS):  # storing hits the same fault and reports it
            self.index.open()

    def _from_origin(
        self, wanted: dict[ObjectInfo, BlockKey]
    ) -> Iterator[tuple[ObjectInfo, Buffer]]:
        """Fetch whole objects in one pass, or one block."""
        for obj, key in wanted.items():
            if key.block is not None:
                start = key.block * key.block_size
                yield obj, self._origin.fetch_range(obj, start, start + key.nbytes)
                return
        if wanted:
            yield from self._origin.fetch(list(wanted))

    def _from_disk(self, key: BlockKey, *, is_alone: bool = False) -> bytes | None:
        """An object or block from disk, if it is stored and complete.

        Parameters
        ----------
        is_alone : bool
            The caller holds the key's lock, so a file that does not match is bad and is dropped.
            Without the lock it may be a file that another process has not committed yet.
        """
        digest = key.digest
        try:
            fd, found = open_regular(self._path(key))
            with FileIO(fd, "rb") as file:
                file_id = file_id_of(digest, "", written_stamp(found))
                is_verified = self._is_verified(file_id)
                stored = None if is_verified else self.index.lookup(digest)
                if stored is None and not is_verified:
                    return None
                if found.st_size != key.nbytes:
                    raise CorruptEntryError(f"{found.st_size} bytes long, {key.nbytes} expected")
                data = file.readall()
            if stored is not None:
                if stored.note.partition("\n")[0] != str(crc32c(data)):
                    raise CorruptEntryError("its checksum does not match")
                self._verified.add(file_id)
        except (CorruptEntryError, *CACHE_FAULTS) as exc:
            if is_alone or not isinstance(exc, CorruptEntryError):
                self._read_failed(exc, digest, _filename(key), self._url(key))
            return None
        return data

    def _put(self, key: BlockKey, data: Buffer) -> None:
        view = memoryview(data)
        self._store(
            key.digest,
            _filename(key),
            view.nbytes,
            lambda file: write_all(file, view),
            kind=OBJECT,
            note=f"{crc32c(view)}\n{key.origin}\n{self._url(key)}",
            url=self._url(key),
        )

    def _path(self, key: BlockKey) -> str:
        return f"{self._root}/{_filename(key)}"

    def _url(self, key: BlockKey) -> str:
        return self._origin.url_of(key.object.key)


def _filename(key: BlockKey) -> str:
    return f"bytes/{key.digest[:2]}/{key.digest}"


def read_range(origin: Origin, obj: ObjectInfo, start: int, stop: int) -> bytes:
    """Bytes of a listed object, past the cache. Raises as `ByteCache.read`."""
    try:
        return origin.fetch_range(obj, start, stop)
    except RangeIgnoredError:
        check_sizes([obj.size_bytes], origin.url_of(obj.key))
        ((_, data),) = origin.fetch([obj])
        return bytes(memoryview(data)[start:stop])
