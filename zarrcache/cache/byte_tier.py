"""The byte tier: objects, and blocks of large objects, exactly as the origin stores them. Made of
fsspec parts.

::

    ByteCache.read ─> fsspec simplecache ─ hit: the local file
                          └ miss ─> PublishingFileSystem.get_file ─> single flight ─> origin
                                      ─> checks ─> publish + index row

Under zarr v3 only simplecache caches at all (filecache fetches every time, blockcache stores
nothing and serves zeros for ever after one failed fetch), and it trusts any file that bears the
right name.  So what lies beneath it publishes: one fetcher, size and checksum against the listing,
then a rename.  A range of a large object is cached as *blocks* that take the same path, not by
blockcache. The version (ETag) is part of the name: a changed object is another entry.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from fsspec import AbstractFileSystem
from fsspec.implementations.cache_mapper import AbstractCacheMapper
from fsspec.implementations.cached import SimpleCacheFileSystem

from zarrcache._keys import BlockKey, ObjectInfo
from zarrcache.config import CacheConfig
from zarrcache.disk import (
    CACHE_FAULTS,
    OBJECT,
    Admission,
    Index,
    Intent,
    SingleFlight,
    crc32c,
    disk_bytes,
    publish,
    write_all,
)
from zarrcache.errors import OriginError
from zarrcache.origin import Origin
from zarrcache.stats import Counters

__all__ = ["ByteCache", "PublishingFileSystem"]

logger = logging.getLogger(__name__)


class _NotStored(Exception):
    """simplecache can only give what lies on disk; bytes that are not there come up through it as
    this. Never leaves the module.

    Its cause is the fault of the cache; without one they were not admitted.
    """

    def __init__(self, data: bytes) -> None:
        super().__init__(f"{len(data)} bytes were not stored")
        self.data = data


class _DigestMapper(AbstractCacheMapper):  # type: ignore[misc]
    """simplecache's file name for a path: two-letter directory and digest of the full identity."""

    def __init__(self, origin: str, url: str) -> None:
        self._origin, self._url = origin, url

    def __call__(self, path: str) -> str:
        digest = BlockKey.parse(self._origin, self._url, path).digest
        return f"{digest[:2]}/{digest}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _DigestMapper) and (self._origin, self._url) == (
            other._origin,
            other._url,
        )

    def __hash__(self) -> int:
        return hash((self._origin, self._url))


class PublishingFileSystem(AbstractFileSystem):  # type: ignore[misc]
    """What simplecache calls its target: names are :attr:`BlockKey.path`, and ``get_file``
    publishes or stores nothing.

    Parameters
    ----------
    origin : Origin
    index : Index
    flight : SingleFlight
    """

    protocol: ClassVar[str] = "zarrcache-publish"
    cachable = False

    def __init__(self, origin: Origin, index: Index, flight: SingleFlight) -> None:
        super().__init__()
        self._origin, self._index, self._flight = origin, index, flight

    def exists(self, path: str, **kwargs: Any) -> bool:
        """True: paths come from a listing, and the origin is asked when the object is fetched."""
        return True

    def get_file(self, rpath: str, lpath: str, **kwargs: Any) -> None:
        """Fetch one object or block and publish it as ``lpath``, the file simplecache looks for."""
        key = BlockKey.parse(self._origin.identity, self._origin.url, rpath)
        with self._flight.hold(key.digest):
            # somebody else published it while we waited; names carry the version, so it is the
            # right one
            if not os.path.exists(lpath):
                self._publish(key, lpath)

    def _publish(self, key: BlockKey, lpath: str) -> None:
        data = _from_origin(self._origin, key)
        root = self._index.dir.root
        filename = os.path.relpath(lpath, root)
        intent: Intent | None = None
        try:
            outcome = self._index.begin(filename, disk_bytes(len(data)))
            # the row of a file that somebody deleted
            if outcome is Admission.OVER_LIMIT and self._index.drop([key.digest]):
                outcome = self._index.begin(filename, disk_bytes(len(data)))
            if isinstance(outcome, Admission):
                raise _NotStored(data)
            intent = outcome
            path = root / filename
            self._index.dir.make(path.parent)
            publish(
                path,
                lambda file: write_all(file, memoryview(data)),
                expected_bytes=len(data),
                mode=self._index.dir.file_mode,
            )
            note = f"{crc32c(data)}\n{key.origin}\n{self._origin.url_of(key.object.key)}"
            self._index.commit(intent, key.digest, OBJECT, note)
            intent = None
        except CACHE_FAULTS as exc:
            raise _NotStored(data) from exc
        finally:
            # also after Ctrl-C: room that nobody will use must not stay reserved
            if intent is not None:
                # the next process that opens the index sweeps it
                with contextlib.suppress(*CACHE_FAULTS):
                    self._index.abort(intent)


def _from_origin(origin: Origin, key: BlockKey) -> bytes:
    """One object or block, as the origin has it."""
    if key.block is not None:
        start = key.block * key.block_size
        return origin.fetch_range(key.object, start, start + key.nbytes)
    ((_, data),) = origin.fetch([key.object])
    return bytes(data)


class ByteCache:
    """Reads of one origin's objects through the byte tier. Safe from any thread or process; pickles
    without its open parts.

    Parameters
    ----------
    origin : Origin
    config : CacheConfig
    counters : Counters
    index : Index
        Shared with the array tier: one limit for both.
    """

    def __init__(
        self, origin: Origin, config: CacheConfig, counters: Counters, index: Index
    ) -> None:
        self._origin, self._config, self._counters, self._index = origin, config, counters, index
        self._fs: SimpleCacheFileSystem | None = None
        self._verified: set[str] = set()
        self._flight = SingleFlight(
            index.dir.locks,
            timeout_s=2 * config.retry.timeout,
            mode=index.dir.written_mode,
            log_once=index.log_once,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self._origin, self._config, self._counters, self._index)

    def read(self, obj: ObjectInfo, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes ``start`` to ``stop`` of an object, from disk if they are there.

        Objects up to ``cache.bytes.block_size`` are cached whole, and so is what is read whole;
        ranges of larger ones as blocks.

        Raises
        ------
        IncompleteArrayError, OriginError
            The origin does not deliver what it lists. A fault of the cache is never raised.
        """
        stop = obj.size_bytes if stop is None else min(stop, obj.size_bytes)
        start = min(start, stop)
        block_size = self._config.bytes.block_size
        whole = BlockKey(self._origin.identity, self._origin.url, obj)
        if obj.size_bytes <= block_size or (start, stop) == (0, obj.size_bytes):
            return self._entry(whole)[start:stop]
        # somebody has read it whole: not once more in blocks
        if os.path.exists(self._index.dir.bytes / whole.digest[:2] / whole.digest):
            return self._entry(whole)[start:stop]
        return b"".join(self._blocks(obj, start, stop, block_size))

    def _blocks(self, obj: ObjectInfo, start: int, stop: int, block_size: int) -> Iterator[bytes]:
        for number in range(start // block_size, -(-stop // block_size)):
            base = number * block_size
            data = self._entry(
                BlockKey(self._origin.identity, self._origin.url, obj, number, block_size)
            )
            yield data[max(start - base, 0) : stop - base]

    def _entry(self, key: BlockKey) -> bytes:
        """One object or block, from disk or from the origin."""
        try:
            local = self._index.dir.bytes / key.digest[:2] / key.digest
            hit = local.exists()
            if not hit and not self._index.dir.bytes.is_dir():
                # deleted under us; simplecache would make it again, with permissions that are not
                # ours
                self._fs = None
                self._index.reopen()
            data = self._read_file(key)
            if hit and not self._is_intact(key, data):
                hit = not self._purge(key, local)
                data = self._read_file(key)
            self._counters.add(
                byte_hits=int(hit), byte_misses=int(not hit), served_bytes=len(data) if hit else 0
            )
            return data
        except OriginError:
            raise
        except _NotStored as exc:
            if exc.__cause__ is not None:
                self._fault("write", key, exc.__cause__)
            self._counters.add(byte_misses=1)
            return exc.data
        except FileNotFoundError:  # evicted between simplecache's look and its open
            self._counters.add(byte_misses=1)
        except CACHE_FAULTS as exc:
            self._counters.add(byte_misses=1)
            self._fault("read", key, exc)
        return _from_origin(self._origin, key)

    def _read_file(self, key: BlockKey) -> bytes:
        """The file, fetched if it is not there. FileNotFoundError: it was evicted meanwhile."""
        try:
            data: bytes = self._simplecache().cat_file(key.path)
        except TypeError as exc:
            # simplecache looks twice, and opens what the second look gave: None
            if "NoneType" not in str(exc):
                raise
            raise FileNotFoundError(key.path) from exc
        return data

    def _is_intact(self, key: BlockKey, data: bytes) -> bool:
        """Compare with the length, and with the checksum in the index. A file that no row knows is
        not trusted.
        """
        if len(data) != key.nbytes:
            return False
        if self._config.verify == "never" or (
            self._config.verify == "first" and key.digest in self._verified
        ):
            return True
        stored = self._index.lookup(key.digest)
        if stored is None or stored.note.partition("\n")[0] != str(crc32c(data)):
            return False
        self._verified.add(key.digest)
        return True

    def _purge(self, key: BlockKey, local: Path) -> bool:
        """Drop a bad entry. False if it was not bad: its publisher commits the row after the file,
        and holds the flight until then.
        """
        with self._flight.hold(key.digest):
            try:
                if self._is_intact(key, local.read_bytes()):
                    return False
            except FileNotFoundError:  # evicted meanwhile
                return True
            # its row is dropped, its file about to be
            is_evicted = self._index.lookup(key.digest) is None
            self._index.drop([key.digest])
            local.unlink(missing_ok=True)
        if is_evicted:
            return True
        self._counters.add(purges=1)
        logger.warning(
            "cache entry dropped, reading %s from the origin: it does not match its checksum",
            self._origin.url_of(key.object.key),
        )
        return True

    def _fault(self, verb: str, key: BlockKey, exc: BaseException) -> None:
        self._counters.add(cache_errors=1)
        self._index.reopen(exc)
        self._index.log_once.warning(
            type(exc).__name__,
            logger,
            "cache %s failed, serving %s from the origin: %s",
            verb,
            self._origin.url_of(key.object.key),
            exc,
        )

    def _simplecache(self) -> SimpleCacheFileSystem:
        if self._fs is None:
            self._index.open()
            self._fs = SimpleCacheFileSystem(
                fs=PublishingFileSystem(self._origin, self._index, self._flight),
                cache_storage=os.fspath(self._index.dir.bytes),
                cache_mapper=_DigestMapper(self._origin.identity, self._origin.url),
                skip_instance_cache=True,
            )
        return self._fs
