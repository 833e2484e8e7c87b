"""`Cache`: both tiers of one cache directory, shared by readers, stores and commands."""

from __future__ import annotations

import builtins
import contextlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from zarrcache._keys import ArrayKey, Role, cached_property
from zarrcache.arrays import stem_of
from zarrcache.cache.byte_tier import ByteCache
from zarrcache.cache.loans import Loans
from zarrcache.cache.remote import RemoteSources
from zarrcache.cache.tiers import ArrayCache
from zarrcache.config import CacheConfig, FetchConfig, RetryConfig
from zarrcache.disk import (
    CACHE_FAULTS,
    EntryHeader,
    EvictionPolicy,
    Index,
    Stored,
    array_note,
    read_attributes_of,
    read_header,
)
from zarrcache.errors import CorruptEntryError
from zarrcache.origin import Origin, open_origin
from zarrcache.stats import Counters, SharedSet

__all__ = ["CONTENTS", "Cache"]

#: Name, below its directory, of the stored listing that says which arrays stores have. No store has
#: such a name.
CONTENTS = ".contents"

#: Each holds connections and their file descriptors; URLs may name any number of buckets.
_MAX_ORIGINS = 32


class Cache:
    """Both tiers of one cache directory over one index. Open files are not pickled.

    Parameters
    ----------
    config : CacheConfig or None
        None: no cache; arrays and bytes come from the origin each time.
    counters : Counters
    verified : SharedSet, optional
        See `Tier`.
    eviction_policy : EvictionPolicy, optional
        See :meth:`set_eviction_policy`.

    Attributes
    ----------
    index : Index or None
    arrays : ArrayCache or None
        None: no cache, or ``cache.arrays.enabled`` is false.
    """

    def __init__(
        self,
        config: CacheConfig | None,
        counters: Counters,
        verified: SharedSet | None = None,
        eviction_policy: EvictionPolicy | None = None,
    ) -> None:
        self.config = config
        self.counters = counters
        self._verified = verified or SharedSet()
        self._origins: dict[tuple[str, str], Origin] = {}
        self.index = Index(config) if config is not None else None
        self.arrays: ArrayCache | None = None
        # Listings are stored even if arrays are not: without them no run starts offline.
        self._listings: ArrayCache | None = None
        self._parsed: tuple[bytes, Any] | None = None
        if config is not None:
            index, verified = self.index, self._verified
            # Listings decide which materials exist and are read once per run: verify each time.
            checked = config.model_copy(update={"verify": "always"})
            self._listings = ArrayCache(checked, counters, index=index)
            if config.arrays.enabled:
                self.arrays = ArrayCache(config, counters, index=index, verified=verified)
        if eviction_policy is not None:
            self.set_eviction_policy(eviction_policy)

    def __reduce__(
        self,
    ) -> tuple[type[Cache], tuple[CacheConfig | None, Counters, SharedSet, EvictionPolicy | None]]:
        policy = self.index.eviction_policy if self.index is not None else None
        return type(self), (self.config, self.counters, self._verified, policy)

    def set_eviction_policy(self, eviction_policy: EvictionPolicy | None) -> None:
        """Use ``eviction_policy`` to make room, here and in processes started later."""
        if self.index is not None:
            self.index.set_eviction_policy(eviction_policy)

    def origin(self, url: str, s3_kwargs: Mapping[str, Any] | None = None) -> Origin:
        """The origin at ``url``, with this cache's fetch and retry settings.

        The same arguments return the same object, so that connections are shared. The last
        32 are kept.
        """
        key = (url, repr(s3_kwargs))
        origin = self._origins.get(key)
        if origin is None:
            config = self.config
            if len(self._origins) >= _MAX_ORIGINS:
                self._origins.pop(next(iter(self._origins)), None)
            origin = self._origins[key] = open_origin(
                url,
                s3_kwargs=s3_kwargs,
                fetch=config.fetch if config is not None else FetchConfig(),
                retry=config.retry if config is not None else RetryConfig(),
                counters=self.counters,
                node_dir=self.index.dir.locks if self.index is not None else None,
            )
        return origin

    @cached_property
    def remote(self) -> RemoteSources | None:
        """The lower layer and the peers that may have an entry; None if none is configured."""
        config = self.config
        if config is None or self.arrays is None or not (config.lower or config.peers):
            return None
        return RemoteSources(config, self.arrays, self.counters) or None

    def bytes(self, origin: Origin) -> ByteCache | None:
        """The byte tier over ``origin``; None if it is switched off."""
        if self.config is None or self.index is None or not self.config.bytes.enabled:
            return None
        return ByteCache(origin, self.config, self.counters, self.index, self._verified)

    # -- entries of the array tier

    def lookup(self, digest: str) -> Stored | None:
        """An entry's file and bytes on disk, from the index. Raises `CACHE_FAULTS`."""
        return self.index.lookup(digest) if self.index is not None else None

    def stored_shape(self, key: ArrayKey) -> tuple[int, ...] | None:
        """Shape of an entry, from its header; None if it is absent or cannot be read."""
        header = self._header(key)
        return None if header is None else header.shape

    def stored_source(self, key: ArrayKey) -> str | None:
        """Digest of the objects that an entry was made of; None as for `stored_shape`."""
        header = self._header(key)
        return None if header is None else header.source

    def stored_attributes(self, key: ArrayKey, source: str) -> builtins.bytes | None:
        """Attributes in an entry, packed; None if it is absent, of another source, or damaged."""
        try:
            stored = self.lookup(key.digest)
            if stored is None or self.index is None:
                return None
            header, attributes = read_attributes_of(self.index.path_of(stored))
        except (*CACHE_FAULTS, CorruptEntryError):
            return None
        return attributes if (header.key, header.source) == (key, source) else None

    def _header(self, key: ArrayKey) -> EntryHeader | None:
        try:
            stored = self.lookup(key.digest)
            if stored is None or self.index is None:
                return None
            return read_header(self.index.path_of(stored))
        except (*CACHE_FAULTS, CorruptEntryError):
            return None

    def reopen(self, after: BaseException) -> None:
        """Open the index again at its next use, if that can heal the error ``after``."""
        if self.index is not None:
            self.index.reopen(after)

    def lend(self, budget_bytes: int) -> Loans:
        """Keep entries that are not admitted as loans, in ``budget_bytes`` on disk (prefetcher)."""
        assert self.arrays is not None
        self.arrays.loans = Loans(self.arrays.index, budget_bytes)
        return self.arrays.loans

    def stored_densities(
        self, array: str, listings: Mapping[Role, tuple[Origin, Mapping[str, str] | None]]
    ) -> dict[Role, dict[str, int]]:
        """Bytes on disk of one array of each store in the array tier, by role and task id.

        Parameters
        ----------
        array : str
            As in `ArrayKey`.
        listings : mapping
            The directory of each role and its listing, which decides which source of a task id is
            read. None: never listed, so any is accepted.
        """
        if self.index is None:
            return {role: {} for role in listings}
        roots = [_root_note(origin) for origin, _ in listings.values()]
        stored = {}
        for (role, (_, names)), sizes in zip(
            listings.items(), self.index.entry_sizes(roots, f"\n{array}"), strict=True
        ):
            if names is None:
                stored[role] = {
                    stem: size
                    for name, size in sizes.items()
                    if (stem := stem_of(name)) is not None
                }
            else:
                stored[role] = {
                    task_id: size
                    for task_id, name in names.items()
                    if (size := sizes.get(name)) is not None
                }
        return stored

    def stored_names(self, array: str, origins: Sequence[Origin]) -> list[tuple[set[str], int]]:
        """Names of the stores of some directories that have one array in the array tier, and the
        sum of the entries' bytes on disk.
        """
        if self.index is None:
            return [(set(), 0) for _ in origins]
        return self.index.entry_names([_root_note(origin) for origin in origins], f"\n{array}")

    def stored_arrays(self, origin: Origin) -> set[str]:
        """Arrays, as in `ArrayKey`, that stores of a directory have in the array tier."""
        return set() if self.index is None else self.index.array_names(_root_note(origin))

    # -- stored listings

    def stored_listing(self, origin: Origin, name: str) -> Any | None:
        """The listing from :meth:`store_listing`, or None. Verified and counted like any entry."""
        if self._listings is None:
            return None
        entry = self._listings.get(_listing_key(origin, name))
        if entry is None:
            return None
        raw = entry.array.tobytes()
        # Input and label usually have the same stores, and 200,000 names take 0.1 s.
        parsed = self._parsed  # once: another thread may parse another listing meanwhile
        if parsed is None or parsed[0] != raw:
            try:
                parsed = self._parsed = raw, json.loads(raw)
            except (ValueError, RecursionError):  # not written by this package
                self.forget_listing(origin, name)
                return None
        return parsed[1]

    def store_listing(self, origin: Origin, name: str, listing: Any) -> None:
        """Keep a listing for runs without the origin."""
        if self._listings is not None:
            raw = np.frombuffer(json.dumps(listing, separators=(",", ":")).encode(), np.uint8)
            self._listings.put(_listing_key(origin, name), raw, source="listing")

    def forget_listing(self, origin: Origin, name: str) -> None:
        """Drop a listing that turned out to be stale."""
        if self._listings is not None:
            key = _listing_key(origin, name)
            # The caller is about to raise an error; a cache fault must not hide it.
            with contextlib.suppress(*CACHE_FAULTS):
                if self._listings.index.lookup(key.digest) is not None:
                    self._listings.drop(key)


def _listing_key(origin: Origin, name: str) -> ArrayKey:
    """Key of a stored listing: that of an array without a name."""
    return ArrayKey(origin.identity, origin.url_of(name), "")


def _root_note(origin: Origin) -> str:
    """The beginning of the note of every entry below a directory."""
    return array_note(_listing_key(origin, ""))[:-1]
