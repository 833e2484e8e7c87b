"""The read path of a density: array tier, single flight, other nodes, origin."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import (
    FLOAT32,
    ArrayKey,
    ObjectInfo,
    Units,
    source_digest,
    stored_array,
)
from zarrcache._units import counted, most_bytes
from zarrcache.arrays import (
    Decoded,
    OriginArray,
    StoreAttributes,
    as_density,
    count_nonfinite,
    density_of_group,
    is_fetched_whole,
    list_array,
    objects_of,
    read_array,
)
from zarrcache.cache.cache import Cache
from zarrcache.cache.cached_origin import CachedOrigin
from zarrcache.cache.tiers import ArrayCache
from zarrcache.disk import MAX_ATTRIBUTES_BYTES, SOUND, Entry, Flaws, LazyGrid, new_entry
from zarrcache.errors import IncompleteArrayError, SchemaError
from zarrcache.origin import Origin
from zarrcache.stats import LogOnce, SharedSet

if TYPE_CHECKING:
    import zarr

__all__ = ["OnFlaws", "Outcome", "ReadThrough"]

logger = logging.getLogger(__name__)

#: Read from the array tier; fetched and stored; or fetched and not admitted.
Outcome = Literal["hit", "miss", "bypass"]
#: Called with what is wrong with a density that was read.
OnFlaws = Callable[[Flaws], object]

#: Stores whose version is remembered, per channel and process.
_SOURCES = 10_000
#: Largest attributes that are remembered of a density that no entry has: those of 100 atoms.
_REMEMBERED_BYTES = 8 * 1024
#: A slow disk, in seconds per byte, while an entry is stored: 64 MiB/s.
_STORE_S_PER_BYTE = 1 / (64 * 2**20)


class _Sought(NamedTuple):
    """A density that the array tier does not have.

    If the origin was asked, ``listed`` is its present listing, and ``source`` the digest of that.
    """

    key: ArrayKey
    what: OriginArray
    listed: list[ObjectInfo] | None
    source: str | None


class _Found(NamedTuple):
    """A density that was read, and the attributes of its store, packed, if no entry has them."""

    values: NDArray[np.float32]
    outcome: Outcome
    flaws: Flaws
    source: str
    attributes: bytes | None = None


class ReadThrough:
    """Reads densities of one directory through the cache. Safe from any thread or process.

    Parameters
    ----------
    cache : Cache
    checked : SharedSet
        Digests of the entries that this run has compared with the origin.
    origin : Origin
        The directory of the stores.
    array : str
        Name of the array in a store.
    units : {"cell", "points", "volume"}
        Of the values that are stored and returned.
    siblings : sequence of str
        Other arrays of the store that will be read. If a zipped store or a file is fetched for one
        of them, all are decoded and stored.

    Attributes
    ----------
    origin : Origin
    stored_as : str
        Name of the array in the keys of its entries (`ArrayKey.array`).
    fills : bool
        Absent chunks have the fill value (``cache.missing_chunks``).
    """

    def __init__(
        self,
        cache: Cache,
        checked: SharedSet,
        origin: Origin,
        array: str,
        *,
        units: Units,
        siblings: Sequence[str] = (),
    ) -> None:
        self._cache, self._checked, self.origin = cache, checked, origin
        self._arrays, self._counters = cache.arrays, cache.counters
        self._array, self._units, self._siblings = array, units, tuple(siblings)
        config = cache.config
        self._encoding = config.arrays.encoding if config is not None else FLOAT32
        self.stored_as = stored_array(array, units, encoding=self._encoding)
        self._identity, self._root = origin.identity, origin.url_of("")
        self._revalidate = config.revalidate if config is not None else "never"
        self.fills = config is not None and config.missing_chunks == "fill"
        self._log_once = LogOnce()
        #: Source of the density that the last read of a store gave, and the attributes of the store
        #: if no entry has them.
        self._last: dict[str, tuple[str, bytes | None]] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        make = functools.partial(ReadThrough, units=self._units, siblings=self._siblings)
        return make, (self._cache, self._checked, self.origin, self._array)

    def at(self, origin: Origin) -> ReadThrough:
        """The same for another directory."""
        if origin is self.origin:
            return self
        return ReadThrough(
            self._cache,
            self._checked,
            origin,
            self._array,
            units=self._units,
            siblings=self._siblings,
        )

    def key(self, store: str) -> ArrayKey:
        """Identity of a density's entry in the array tier."""
        return ArrayKey(self._identity, self._root + store, self.stored_as)

    def listing(self, store: str) -> list[ObjectInfo]:
        """List a density at the origin now: keys, sizes, ETags. One LIST."""
        return list_array(self._of(store))

    def _of(self, store: str) -> OriginArray:
        return OriginArray(self.origin, store, self._array, self._units, self.fills, self._siblings)

    def origin_array(self, store: str) -> OriginArray:
        """The array as reads see it now: without the array tier, through the byte tier."""
        what = self._of(store)
        if self._arrays is not None:
            return what
        below = self._below(relist=not self._is_trusted(self.key(store)))
        return dataclasses.replace(what, origin=below)

    def read(
        self,
        store: str,
        *,
        revalidate: bool = False,
        reserve: Callable[[int], object] | None = None,
        on_flaws: OnFlaws | None = None,
    ) -> tuple[NDArray[np.float32], Outcome]:
        """Read one density, shape (nx, ny, nz), and return it with its outcome.

        Errors and ``reserve`` as in ``ZarrS3Reader.load`` and ``ensure``.

        Parameters
        ----------
        store : str
            Name of the store below the directory.
        revalidate : bool
            Compare with the origin, regardless of ``cache.revalidate``.
        on_flaws : callable, optional
            Called if the density has flaws. They are also logged, once per density.
        """
        key, listed, source = self.key(store), None, None
        is_due = revalidate or not self._is_trusted(key)
        if self._arrays is None:
            found = self._past_the_array_tier(store, relist=is_due)
            values, outcome, flaws, source, attributes = found
        else:
            if is_due:
                listed = self.listing(store)
                source = source_digest(listed)
            entry = self._arrays.get(key, source=source)
            if entry is not None:
                values, outcome = entry.array, "hit"
                flaws, source, attributes = (
                    entry.header.flaws,
                    entry.header.source,
                    entry.attributes,
                )
            else:
                sought = _Sought(key, self._of(store), listed, source)
                found = self._missed(self._arrays, sought, reserve)
                values, outcome, flaws, source, attributes = found
        self._remember(store, source, attributes)
        if is_due:
            self._checked.add(key.digest)
        if flaws is not SOUND:
            self._report(key, flaws, on_flaws)
        if outcome == "hit":
            self._counters.add(hits=1, served_bytes=values.nbytes)
            # Only a planted entry can differ: arrays are checked before they are stored.
            if values.ndim != 3 or values.dtype != np.float32:
                values = as_density(values, key.url, self._array)
        else:
            self._counters.add(misses=1, bypasses=int(outcome == "bypass"))
        return values, outcome

    def open(self, store: str) -> tuple[LazyGrid, Outcome]:
        """Like `read`, for readers of a few values: only the values that are used are decoded.

        ``served_bytes`` counts the values that are used.
        """
        arrays, key = self._arrays, self.key(store)
        is_trusted = self._is_trusted(key)
        entry = arrays.get(key, lazily=True) if arrays is not None and is_trusted else None
        # Only a planted entry is not of float32 and 3-D.
        if entry is None or entry.header.dtype != "<f4" or len(entry.header.shape) != 3:
            values, outcome = self.read(store)
            return LazyGrid(values), outcome
        if entry.header.flaws is not SOUND:
            self._report(key, entry.header.flaws, None)
        self._counters.add(hits=1)
        self._remember(store, entry.header.source, entry.attributes)
        grid = entry.grid
        return LazyGrid(grid.stored, grid.stored_as, self._served), "hit"

    def _remember(self, store: str, source: str, attributes: bytes | None) -> None:
        if attributes is not None and len(attributes) > _REMEMBERED_BYTES:
            attributes = None  # read from the origin, and compared with the source
        self._last.pop(store, None)
        if len(self._last) >= _SOURCES:
            with contextlib.suppress(RuntimeError):  # another thread adds one at this moment
                self._last.pop(next(iter(self._last)), None)  # the oldest
        self._last[store] = source, attributes

    def _is_trusted(self, key: ArrayKey) -> bool:
        """Whether the next read takes an entry without comparing it with the origin."""
        return self._revalidate == "never" or (
            self._revalidate == "run" and key.digest in self._checked
        )

    def _served(self, nbytes: int) -> None:
        self._counters.add(served_bytes=nbytes)

    def _missed(
        self, arrays: ArrayCache, sought: _Sought, reserve: Callable[[int], object] | None
    ) -> _Found:
        """Read a density that this node does not have, once for all of its processes."""
        key, what, listed, source = sought
        if listed is None and self._revalidate != "never" and self._cache.remote is not None:
            # The evicted entry was known to be fresh; other nodes may have a stale one.
            listed = list_array(what)
            source = source_digest(listed)
            sought = _Sought(key, what, listed, source)
        if reserve is not None and listed is not None:
            # Before the lock: other readers must not wait while this process waits for memory.
            reserve(sum(obj.size_bytes for obj in listed))
        # Take the node's lock before the cluster's lease: the holder of a lease then waits only
        # for the origin.
        with arrays.flight.hold(self._flight_of(key, what.store)):
            # Another process may have fetched it meanwhile.
            entry = arrays.get(key, source=source)
            if entry is not None:
                return _found(entry, entry.array, "hit")
            if key.exact is not None:
                encoded = self._encoded(arrays, sought, key.exact)
                if encoded is not None:
                    return encoded
            return self._fetch(arrays, sought, reserve)

    def _fetch(
        self, arrays: ArrayCache, sought: _Sought, reserve: Callable[[int], object] | None
    ) -> _Found:
        """Fetch a density from another node or the origin."""
        key, what, listed, source = sought
        remote = self._cache.remote
        with remote.lookup(key, source) if remote else contextlib.nullcontext() as lookup:
            taken = lookup.take() if lookup is not None else None
            if taken is not None:
                values = as_density(taken.entry.array, key.url, self._array)
                return _found(taken.entry, values, "miss" if taken.is_stored else "bypass")
            decoded = read_array(what, listed=listed, reserve=reserve)
            values, flaws = self._as_density(decoded, key.url)
            if lookup is not None:
                lookup.report_progress(values.nbytes * _STORE_S_PER_BYTE)
            attributes = _packed(decoded.attributes, decoded.zarr_format)
            made = new_entry(key, values, decoded.source, flaws, attributes)
            entry, is_stored = self._stored(arrays, made)
            if lookup is not None:
                lookup.is_stored = is_stored
            for name, other in decoded.others.items():
                self._store_other(arrays, key.url, name, other, decoded, attributes)
        return _found(entry, entry.array, "miss" if is_stored else "bypass")

    def _stored(
        self, arrays: ArrayCache, entry: Entry, replaces: ArrayKey | None = None
    ) -> tuple[Entry, bool]:
        """Store a density in the encoding of its key, and return what every later hit returns.

        If it is not admitted, the values are the same: a training must not depend on free bytes.
        """
        if self._encoding != FLOAT32 and entry.header.stored_as is None:
            key = entry.header.key
            self._counters.add(unencoded=1)
            self._log_once.warning(
                "unencoded",
                logger,
                "%s %s is stored as float32, because %s cannot hold its values within the error "
                "bound (further ones are counted as `unencoded`, not named)",
                key.url,
                self._array,
                key.encoding,
            )
        mapped = arrays.store(entry, replaces=replaces)
        return mapped or entry, mapped is not None

    def _flight_of(self, key: ArrayKey, store: str) -> str:
        """The lock that a fetch holds: one for all arrays of a source that is fetched whole."""
        if not self._siblings or not is_fetched_whole(store):
            return key.digest
        first = min(self._array, *self._siblings)
        name = stored_array(first, self._units, encoding=self._encoding)
        return ArrayKey(self._identity, key.url, name).digest

    def _store_other(
        self,
        arrays: ArrayCache,
        url: str,
        name: str,
        other: NDArray[Any],
        decoded: Decoded,
        attributes: bytes,
    ) -> None:
        """Store an array that was decoded with the one that is read, unless it is stored."""
        key = ArrayKey(
            self._identity, url, stored_array(name, self._units, encoding=self._encoding)
        )
        if self._cache.stored_source(key) == decoded.source:
            return
        try:
            values = as_density(other, url, name, units=self._units, attributes=decoded.attributes)
        except SchemaError:  # its own read raises it
            return
        nonfinite = count_nonfinite(values)
        flaws = Flaws(0, nonfinite) if nonfinite else SOUND
        arrays.store(new_entry(key, values, decoded.source, flaws, attributes))

    def _encoded(self, arrays: ArrayCache, sought: _Sought, exact: ArrayKey) -> _Found | None:
        """Encode the density from its entry in float32, if there is one, and replace that."""
        key, _, _, source = sought
        remote = self._cache.remote
        own = arrays.get(exact, source=source)
        entry = remote.lower(exact, source) if own is None and remote is not None else own
        if entry is None:
            return None
        header, values = entry.header, as_density(entry.array, key.url, self._array)
        attributes = entry.attributes
        if attributes is None:
            attributes = self._cache.stored_attributes(exact, header.source)
            if attributes is None:  # damaged, or the entry was replaced just now
                return None
        encoded, is_stored = self._stored(
            arrays,
            new_entry(key, values, header.source, header.flaws, attributes),
            exact if own is not None else None,
        )
        outcome: Outcome = "hit" if own is not None else "miss" if is_stored else "bypass"
        return _found(encoded, encoded.array, outcome)

    def _report(self, key: ArrayKey, flaws: Flaws, on_flaws: OnFlaws | None) -> None:
        """Report the flaws of a density, or raise if the settings do not allow them.

        Raises
        ------
        IncompleteArrayError
        """
        if flaws.missing_chunks and not self.fills:
            # Stored with other settings, or by another node with other settings.
            raise IncompleteArrayError(
                f"{key.url} {self._array} is cached with {counted(flaws.missing_chunks, 'chunk')} "
                "that the origin did not have. Convert the store again and run `zarrcache warm "
                "--revalidate`, or set cache.missing_chunks: fill."
            )
        if flaws.nonfinite:
            self._log_once.warning(key.digest, logger, "%s %s: %s", key.url, self._array, flaws)
        else:  # the settings allow it, and every spin density may have them
            self._log_once.warning(
                "missing_chunks",
                logger,
                "%s %s: %s. Others like it are not named; `zarrcache warm` and `zarrcache verify` "
                "count them.",
                key.url,
                self._array,
                flaws,
            )
        if on_flaws is not None:
            on_flaws(flaws)

    def source(self, store: str) -> str | None:
        """Digest of the objects of the density that was read last, or that the next read returns.

        None: it is not cached, or the next read compares it with the origin.
        """
        key = self.key(store)
        if self._cache.config is None or not self._is_trusted(key):
            return None
        # Of the last read first: the entry may have been replaced or evicted since, and a lent one
        # or one that was not admitted was never there.
        source = self.last_source(store)
        if source is None and self._arrays is not None:
            source = self._cache.stored_source(key)
            if source is None and key.exact is not None:
                source = self._cache.stored_source(key.exact)
        return source

    def last_source(self, store: str) -> str | None:
        """`source` of the last read, if it is remembered."""
        source, _ = self._last.get(store, (None, None))
        return source

    def attributes(self, store: str, source: str) -> StoreAttributes | None:
        """The attributes of a store that came with its density of this ``source``.

        None: the density is not cached in this version, or was cached without attributes.
        """
        last, raw = self._last.get(store, (None, None))
        if last != source or raw is None:
            key = self.key(store)
            raw = self._cache.stored_attributes(key, source)
            if raw is None and key.exact is not None:
                raw = self._cache.stored_attributes(key.exact, source)
        return _unpacked(raw) if raw else None

    def source_in(self, store: str, listed: Sequence[ObjectInfo]) -> str:
        """The same digest, from a listing of the store."""
        return source_digest(objects_of(self._of(store), listed))

    def of_group(self, group: zarr.Group, where: str) -> NDArray[np.float32]:
        """Read the density of an open group, past the cache."""
        return density_of_group(group, self._array, where, fills=self.fills, units=self._units)

    def _as_density(self, decoded: Decoded, url: str) -> tuple[NDArray[np.float32], Flaws]:
        values = as_density(
            decoded.array, url, self._array, units=self._units, attributes=decoded.attributes
        )
        found = decoded.missing_chunks, count_nonfinite(values)
        return values, Flaws(*found) if any(found) else SOUND

    def _below(self, *, relist: bool) -> Origin:
        """The source below the array tier: the byte tier over the origin, or the origin."""
        config = self._cache.config
        if config is None or not config.bytes.enabled:
            return self.origin
        return CachedOrigin(self.origin, self._cache, relist=relist)

    def _past_the_array_tier(self, store: str, *, relist: bool) -> _Found:
        """Read without the array tier (``cache.arrays.enabled: false``, or no cache)."""
        what = dataclasses.replace(self._of(store), also=())

        def decoded_from(origin: Origin) -> Decoded:
            return read_array(dataclasses.replace(what, origin=origin))

        try:
            decoded = decoded_from(self._below(relist=relist))
        except IncompleteArrayError:
            if relist or self._cache.config is None or not self._cache.config.bytes.enabled:
                raise
            # The stored listing may be older than the store.
            decoded = decoded_from(self._below(relist=True))
        values, flaws = self._as_density(decoded, what.store_url)
        return _Found(values, "bypass", flaws, decoded.source)


def _found(entry: Entry, values: NDArray[np.float32], outcome: Outcome) -> _Found:
    header = entry.header
    return _Found(values, outcome, header.flaws, header.source, entry.attributes)


def _packed(attributes: Mapping[str, Any], zarr_format: int) -> bytes:
    """The attributes of a store as its entries have them; b"" if there are none."""
    if not attributes:
        return b""
    text = json.dumps([attributes, zarr_format], separators=(",", ":"))
    raw = zlib.compress(text.encode("utf-8", "surrogatepass"), 1)
    return raw if len(raw) <= MAX_ATTRIBUTES_BYTES else b""


def _unpacked(raw: bytes) -> StoreAttributes | None:
    """The attributes that `_packed` made; None for anything else, whose checksum may be right."""
    try:
        attributes, zarr_format = json.loads(zlib.decompressobj().decompress(raw, most_bytes()))
    except (zlib.error, ValueError, TypeError, RecursionError):
        return None
    if not isinstance(attributes, dict) or zarr_format not in (0, 2, 3):
        return None
    return StoreAttributes(attributes, zarr_format)
