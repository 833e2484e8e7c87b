"""The one cached path from a store to its density: array tier, single flight, what other places of
the cluster have, origin.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import ArrayKey, source_digest, stored_array
from zarrcache._shared_memory import SharedSet
from zarrcache.arrays import as_density, density_of_objects, list_array, per_point, read_array
from zarrcache.cache.cache import Cache
from zarrcache.errors import IncompleteArrayError, OriginNotFoundError
from zarrcache.origin import Origin

__all__ = ["Outcome", "ReadThrough"]

#: How a density was had: from the array tier, from elsewhere and stored, from elsewhere and not
#: admitted.
Outcome = Literal["hit", "miss", "bypass"]


@dataclass(frozen=True, slots=True)
class ReadThrough:
    """How densities of one kind are read. Cheap to make; safe from any thread or process.

    Parameters
    ----------
    cache : Cache
    checked : SharedSet
        Digests of the entries that were compared with the origin in this run.
    array : str
        The array's name in a store.
    is_per_point : bool
        Divide by the number of grid points.
    """

    cache: Cache
    checked: SharedSet
    array: str
    is_per_point: bool

    def key(self, origin: Origin, store: str) -> ArrayKey:
        """Identity of a density's entry in the array tier."""
        return ArrayKey(
            origin.identity,
            origin.url_of(store),
            stored_array(self.array, is_per_point=self.is_per_point),
        )

    def read(
        self,
        origin: Origin,
        store: str,
        *,
        revalidate: bool = False,
        reserve: Callable[[int], object] | None = None,
    ) -> tuple[NDArray[np.float32], Outcome]:
        """One density, shape (nx, ny, nz), and how it was had. Errors and ``reserve`` as in
        ``ZarrS3Reader.load`` and ``ensure``.

        Parameters
        ----------
        origin : Origin
        store : str
            Its name below the origin.
        revalidate : bool
            Ask the origin whether it is fresh, whatever ``cache.revalidate`` says.
        """
        arrays = self.cache.arrays
        if arrays is None:
            return self._past_the_array_tier(origin, store, revalidate=revalidate), "bypass"
        key = self.key(origin, store)
        listed, source = None, None
        if revalidate or self._is_due(key):
            listed = list_array(origin, store, self.array)
            source = source_digest(listed)
        entry = arrays.get(key, source=source)
        if entry is None:
            if (
                source is None
                and self.cache.remote
                and self.cache.config is not None
                and self.cache.config.revalidate != "never"
            ):
                # it was compared with the origin, and evicted: others may have an older one
                listed = list_array(origin, store, self.array)
                source = source_digest(listed)
            if reserve is not None and listed is not None:
                # here, not under the lock: nobody else is to wait for our memory
                reserve(sum(o.size_bytes for o in listed))
            # The lock of the node first, the lease of the cluster after it: whoever has a lease
            # waits for nobody but the origin.
            with (
                self.cache.single_flight().hold(key.digest),
                self.cache.remote.lookup(key, source) as lookup,
            ):
                # somebody else may have fetched it while we waited
                entry = arrays.get(key, source=source)
                if entry is None:
                    taken = lookup.take()
                    if taken is None:
                        decoded = read_array(
                            origin, store, self.array, listed=listed, reserve=reserve
                        )
                        values = self.as_asked(decoded.array, key.url)
                        lookup.is_stored = arrays.put(key, values, source=decoded.source)
                        # Mapped, if it is there: memory that the kernel may take back, and that a
                        # worker hands over without a copy.
                        stored = (
                            arrays.get(key, source=decoded.source) if lookup.is_stored else None
                        )
                        values = stored.array if stored else values
                    else:
                        values = as_density(taken.array, key.url, self.array)
                    self.checked.add(key.digest)
                    self.cache.counters.add(misses=1, bypasses=int(not lookup.is_stored))
                    return values, "miss" if lookup.is_stored else "bypass"
        if source is not None:
            self.checked.add(key.digest)
        self.cache.counters.add(hits=1, served_bytes=entry.array.nbytes)
        return as_density(entry.array, key.url, self.array), "hit"

    def as_asked(self, array: NDArray[Any], url: str) -> NDArray[np.float32]:
        """What is handed out, and what is stored, of an array as the origin has it."""
        values = as_density(array, url, self.array)
        # In place: these are fresh from the origin, and another array of their size is as much work
        # again, for the pages it takes.
        return (
            per_point(values, out=values if values.flags.writeable else None)
            if self.is_per_point
            else values
        )

    def _past_the_array_tier(
        self, origin: Origin, store: str, *, revalidate: bool
    ) -> NDArray[np.float32]:
        self.cache.counters.add(misses=1, bypasses=1)
        config = self.cache.config
        if config is None or not config.bytes.enabled:
            return self.as_asked(read_array(origin, store, self.array).array, origin.url_of(store))
        key = self.key(origin, store)
        relist = revalidate or self._is_due(key)
        try:
            values = self._through_the_byte_tier(origin, store, relist=relist)
        except IncompleteArrayError:
            if relist:
                raise
            # the stored listing may be older than the store
            values = self._through_the_byte_tier(origin, store, relist=True)
        self.checked.add(key.digest)
        return values

    def _through_the_byte_tier(
        self, origin: Origin, store: str, *, relist: bool
    ) -> NDArray[np.float32]:
        from zarrcache.cache.zarr_store import CachedStore

        objects = CachedStore(origin, store, self.cache, relist=relist)
        if not objects.sizes():
            raise OriginNotFoundError(f"{objects.url} does not exist or is empty.")
        return self.as_asked(
            density_of_objects(objects.sizes(), objects.read, objects.url, self.array), objects.url
        )

    def _is_due(self, key: ArrayKey) -> bool:
        """Whether the origin has to be asked if an entry is still fresh."""
        revalidate = self.cache.config.revalidate if self.cache.config else "never"
        return revalidate == "epoch" or (revalidate == "run" and key.digest not in self.checked)
