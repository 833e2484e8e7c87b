"""Both tiers of one cache directory, over one index: what a reader, a store and the command line
share.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from zarrcache._keys import ArrayKey, Role, stem_of
from zarrcache._shared_memory import SharedSet
from zarrcache.cache.array_tier import ArrayCache
from zarrcache.cache.byte_tier import ByteCache
from zarrcache.cache.remote import RemoteSources
from zarrcache.config import CacheConfig, FetchConfig, RetryConfig
from zarrcache.disk import CACHE_FAULTS, EvictionPolicy, Index, SingleFlight, array_note
from zarrcache.origin import Origin, open_origin
from zarrcache.stats import Counters

__all__ = ["Cache"]


class Cache:
    """Both tiers of one cache directory over one index: what a reader, a store and the command line
    share. Pickles without open parts.

    Parameters
    ----------
    config : CacheConfig or None
        None: no cache; arrays and bytes come from the origin each time.
    counters : Counters
    verified : SharedSet, optional
        See `ArrayCache`.
    eviction_policy : EvictionPolicy, optional
        See :meth:`set_eviction_policy`.
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
        self.index = Index(config) if config else None
        self._verified = verified or SharedSet()
        # Listings are kept even where arrays are not: without them no run starts offline.
        self.listings = (
            ArrayCache(config, counters, index=self.index, verified=self._verified)
            if config
            else None
        )
        self.arrays = self.listings if config and config.arrays.enabled else None
        self._origins: dict[tuple[str, str], Origin] = {}
        self.set_eviction_policy(eviction_policy)

    def __reduce__(
        self,
    ) -> tuple[type[Cache], tuple[CacheConfig | None, Counters, SharedSet, EvictionPolicy | None]]:
        return type(self), (
            self.config,
            self.counters,
            self._verified,
            self.index.eviction_policy if self.index is not None else None,
        )

    def set_eviction_policy(self, eviction_policy: EvictionPolicy | None) -> None:
        """Let victims be chosen by one who knows what is read next; here, and in processes that are
        started after this.
        """
        if self.index is not None:
            self.index.set_eviction_policy(eviction_policy)

    def origin(self, url: str, s3_kwargs: Mapping[str, Any] | None = None) -> Origin:
        """The origin at ``url``, with this cache's fetch and retry settings. The same arguments
        give the same object: it has connections.
        """
        key = (url, repr(s3_kwargs))
        if key not in self._origins:
            fetch, retry = (
                (self.config.fetch, self.config.retry)
                if self.config
                else (FetchConfig(), RetryConfig())
            )
            locks = self.index.dir.locks if self.index else None
            self._origins[key] = open_origin(
                url,
                s3_kwargs=s3_kwargs,
                fetch=fetch,
                retry=retry,
                counters=self.counters,
                node_dir=locks,
            )
        return self._origins[key]

    @functools.cached_property
    def remote(self) -> RemoteSources:
        """Where else in the cluster entries of the array tier may be had. Only with an array tier."""
        assert self.config is not None
        assert self.arrays is not None
        return RemoteSources(self.config, self.arrays, self.counters)

    def single_flight(self) -> SingleFlight:
        """The locks of the cache directory. Only with a cache."""
        assert self.config is not None
        assert self.index is not None
        return SingleFlight(
            self.index.dir.locks,
            timeout_s=2 * self.config.retry.timeout,
            mode=self.index.dir.written_mode,
            log_once=self.index.log_once,
        )

    def bytes(self, origin: Origin) -> ByteCache | None:
        """The byte tier over ``origin``."""
        if self.config is None or self.index is None or not self.config.bytes.enabled:
            return None
        return ByteCache(origin, self.config, self.counters, self.index)

    def stored_listing(self, origin: Origin, name: str) -> Any | None:
        """What :meth:`store_listing` stored, or None. A listing is an entry like any other:
        checked, counted, evicted.
        """
        entry = self.listings.get(_listing_key(origin, name)) if self.listings else None
        return None if entry is None else json.loads(entry.array.tobytes())

    def store_listing(self, origin: Origin, name: str, listing: Any) -> None:
        """Keep a listing for runs without the origin."""
        if self.listings is not None:
            raw = np.frombuffer(json.dumps(listing, separators=(",", ":")).encode(), np.uint8)
            self.listings.put(_listing_key(origin, name), raw, source="listing")

    def stored_densities(
        self, array: str, listings: Mapping[Role, tuple[Origin, Mapping[str, str] | None]]
    ) -> dict[Role, dict[str, int]]:
        """Bytes on disk of one array of each store, as far as the array tier has it, by role and
        task id.

        Parameters
        ----------
        array : str
            As in `ArrayKey`.
        listings : mapping
            The directory of each role and what it lists: which of ``mp-1.zarr`` and
            ``mp-1.zarr.zip`` is read. None: it was never listed, either may be.
        """
        if self.index is None:
            return {role: {} for role in listings}
        roots = [array_note(_listing_key(origin, ""))[:-1] for origin, _ in listings.values()]
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

    def forget_listing(self, origin: Origin, name: str) -> None:
        """Drop a listing that turned out to be old."""
        if self.listings is not None:
            key = _listing_key(origin, name)
            with contextlib.suppress(*CACHE_FAULTS):  # the error that told us is the one to hear of
                if self.listings.index.lookup(key.digest) is not None:
                    self.listings.drop(key)


def _listing_key(origin: Origin, name: str) -> ArrayKey:
    return ArrayKey(origin.identity, origin.url_of(name), "")
