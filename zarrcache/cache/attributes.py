"""Attributes of stores (structure, metadata), of the versions of the densities that are read.

The entry of a density also has the attributes of its store, compressed, so that both are of one
version and a warm node sends no request for them
(docs/explanation/decisions/026-attributes-in-entries.md).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from zarrcache._keys import ObjectInfo
from zarrcache.arrays import StoreAttributes, read_attributes
from zarrcache.cache.cache import Cache
from zarrcache.cache.read_through import ReadThrough
from zarrcache.errors import IncompleteArrayError

__all__ = ["AttributesThrough"]


class AttributesThrough:
    """Reads attributes of stores, of the versions of the densities that are read.

    Parameters
    ----------
    cache : Cache
    densities : sequence of ReadThrough
        Channels of one directory.
    """

    def __init__(self, cache: Cache, densities: Sequence[ReadThrough]) -> None:
        self._densities = densities
        self._origin = densities[0].origin
        self._revalidate = cache.config.revalidate if cache.config is not None else "never"

    def stored(self, store: str) -> StoreAttributes | None:
        """The stored attributes of a store; None unless they belong to its densities."""
        return self._stored(store, [density.source(store) for density in self._densities])

    def read(self, store: str) -> StoreAttributes:
        """The attributes of a store: those of its cached densities, or from the origin.

        Without the array tier they come from where the densities do.

        Raises
        ------
        IncompleteArrayError
            The store has changed since a density of it was read or cached.
        OriginError, SchemaError
        """
        wanted = [density.source(store) for density in self._densities]
        found = self._stored(store, wanted)
        if found is None:
            found = read_attributes([density.origin_array(store) for density in self._densities])
            self._check(store, wanted, found.sources)
        return found

    def sources_in(self, store: str, listed: Sequence[ObjectInfo]) -> list[str]:
        """Sources of the densities in a listing of their store."""
        return [density.source_in(store, listed) for density in self._densities]

    def check(self, store: str, sources: Collection[str], *read: str | None) -> None:
        """Refuse attributes that do not belong to the densities, or to one that was ``read``.

        Raises
        ------
        IncompleteArrayError
        """
        cached = [density.source(store) for density in self._densities]
        self._check(store, [*cached, *read], sources)

    def _stored(self, store: str, wanted: Sequence[str | None]) -> StoreAttributes | None:
        # Without a known source the next density may be of any version.
        if not any(wanted) or (None in wanted and self._revalidate != "never"):
            return None
        found: list[StoreAttributes | None] = [
            density.attributes(store, source)
            for density, source in zip(self._densities, wanted, strict=True)
            if source is not None
        ]
        first = found[0]
        if first is None or any(other is None or other[:2] != first[:2] for other in found):
            return None
        return first._replace(sources=tuple(filter(None, wanted)))

    def _check(self, store: str, wanted: Sequence[str | None], sources: Collection[str]) -> None:
        if not set(sources).issuperset(filter(None, wanted)):
            raise IncompleteArrayError(
                f"{self._origin.url_of(store)} has changed since its density was read or cached, "
                "so its attributes are of another version. Run `zarrcache warm --revalidate`, and "
                "open the store or read the density again."
            )
