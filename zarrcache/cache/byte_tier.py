"""The byte tier: objects, and blocks of large objects, exactly as the origin stores them.

A file appears under its name only when it is whole and its row is in the index; the row holds its
checksum. The version (ETag) is part of the key: a changed object is another entry. Why these are
not fsspec's simplecache and blockcache: docs/explanation/decisions/002-byte-tier.md.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from io import FileIO
from typing import TYPE_CHECKING, Any

from zarrcache._keys import BlockKey, ObjectInfo
from zarrcache.cache._tier import Tier
from zarrcache.config import CacheConfig
from zarrcache.disk import CACHE_FAULTS, OBJECT, Index, crc32c, open_regular, write_all
from zarrcache.errors import CorruptEntryError
from zarrcache.origin import Origin
from zarrcache.stats import Counters, SharedSet

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["ByteCache"]


class ByteCache(Tier):
    """Reads of one origin's objects through the byte tier. Safe from any thread or process.

    Pickles without its open parts.

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

        Objects up to ``cache.bytes.block_size`` are cached whole, as is what is read whole; ranges
        of larger ones are cached in blocks.

        Raises
        ------
        IncompleteArrayError, OriginError
            The origin does not deliver what it lists. A fault of the cache is never raised.
        """
        stop = obj.size_bytes if stop is None else min(stop, obj.size_bytes)
        start = min(start, stop)
        block_size = self._config.bytes.block_size
        whole = self._key(obj)
        if (
            obj.size_bytes <= block_size
            or (start, stop) == (0, obj.size_bytes)
            # read whole before: not once more in blocks
            or os.path.exists(self._path(whole))
        ):
            ((_, data),) = self._entries([whole])
            return bytes(data if stop - start == obj.size_bytes else memoryview(data)[start:stop])
        parts = []
        for number in range(start // block_size, -(-stop // block_size)):
            base = number * block_size
            ((_, data),) = self._entries([self._key(obj, number, block_size)])
            parts.append(memoryview(data)[max(start - base, 0) : stop - base])
        return b"".join(parts)

    def fetch(self, objects: Sequence[ObjectInfo]) -> Iterator[tuple[ObjectInfo, Buffer]]:
        """Contents of listed objects, each as soon as it has come, in any order.

        What is not on disk comes from the origin in one pass.

        Raises
        ------
        IncompleteArrayError, OriginError
            As :meth:`read`.
        """
        for key, data in self._entries([self._key(obj) for obj in objects]):
            yield key.object, data

    def _key(self, obj: ObjectInfo, block: int | None = None, block_size: int = 0) -> BlockKey:
        return BlockKey(self._origin.identity, self._origin.url, obj, block, block_size)

    def _entries(self, keys: Sequence[BlockKey]) -> Iterator[tuple[BlockKey, Buffer]]:
        """Objects or blocks, from disk or from the origin; of several fetchers one fetches."""
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
            # Every reader of these keys takes the lock of the first one.
            with self.flight.hold(keys[0].digest):
                wanted = {}
                for key in missing:  # another process may have fetched it meanwhile
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
        """Have the cache directory, in which the locks lie: also after it was deleted."""
        if not os.path.isdir(f"{self._root}/bytes"):
            self.index.reopen()
        with contextlib.suppress(*CACHE_FAULTS):  # storing meets the same fault and reports it
            self.index.open()

    def _from_origin(
        self, wanted: dict[ObjectInfo, BlockKey]
    ) -> Iterator[tuple[ObjectInfo, Buffer]]:
        """Whole objects in one pass, or one block."""
        for obj, key in wanted.items():
            if key.block is not None:
                start = key.block * key.block_size
                yield obj, self._origin.fetch_range(obj, start, start + key.nbytes)
                return
        if wanted:
            yield from self._origin.fetch(list(wanted))

    def _from_disk(self, key: BlockKey, *, is_alone: bool = False) -> bytes | None:
        """An object or block if it is there and whole.

        Parameters
        ----------
        is_alone : bool
            The caller holds the key's lock, so a bad file is bad and is dropped. Without the lock
            it may be a file that another process has not committed yet.
        """
        digest = key.digest
        try:
            fd, found = open_regular(self._path(key))
            with FileIO(fd, "rb") as file:
                is_verified = self._is_verified(digest)
                stored = None if is_verified else self.index.lookup(digest)
                if stored is None and not is_verified:
                    return None
                if found.st_size != key.nbytes:
                    raise CorruptEntryError(f"{found.st_size} bytes long, {key.nbytes} expected")
                data = file.readall()
            if stored is not None:
                if stored.note.partition("\n")[0] != str(crc32c(data)):
                    raise CorruptEntryError("its checksum does not match")
                self._verified.add(digest)
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
