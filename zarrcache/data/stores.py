"""The stores behind the densities of a reader: open groups, and the attributes of materials.

zarr is imported only when it is needed: it takes 0.1 s of the 0.45 s in which the look-ahead
process starts.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import Channel, Role, safe_repr
from zarrcache.arrays import cell_volume, electrons_in, metadata_in, metadata_of
from zarrcache.cache import AttributesThrough, Cache, ReadThrough
from zarrcache.data.pairs import PairReader, only_our_errors
from zarrcache.data.sequences import Density
from zarrcache.errors import ConfigError, SchemaError
from zarrcache.origin import Origin

if TYPE_CHECKING:
    import zarr

__all__ = ["StoreReader", "flat"]


class StoreReader(PairReader):
    """Opens stores, and reads the attributes of materials, through the cache."""

    _cache: Cache
    _origins: dict[Role, Origin]
    channels: tuple[Channel, ...]

    @abstractmethod
    def store_name(self, task_id: str, role: Role) -> str:
        """Name of a source below its directory: ``mp-1.zarr``, or ``mp-1.json.gz``."""

    @abstractmethod
    def column(self, role: Role, array: str) -> Channel:
        """The channel of the same entries: input and label of one directory share them."""

    @abstractmethod
    def _density(self, role: Role, array: str | None = None) -> ReadThrough:
        """The read path of one channel. Default: the first one."""

    # -- the users' methods on groups

    def read_zarr_store(self, zarr_path: str | os.PathLike[str]) -> zarr.Group:
        """Open a store, read-only, through the byte tier. Only its metadata is loaded.

        Raises
        ------
        OriginNotFoundError
            There is no such store (a ``FileNotFoundError``).
        SchemaError
            zarr cannot open it.
        """
        from zarrcache.cache import group_of, store_at

        store = store_at(zarr_path, self._cache, self.s3_kwargs)
        stored = self._attributes_at(store.origin).stored(store.name)
        if stored is not None and stored.zarr_format:
            store.know_attributes(stored)
        return group_of(store)

    def read_charge_density(self, zarr_store: zarr.Group) -> Density:
        """The density of an open store, as ``load``; the first channel of the input.

        Parameters
        ----------
        zarr_store : zarr.Group
            From ``read_zarr_store``, or any other Zarr group.

        Raises
        ------
        SchemaError
            A ``ValueError``: the array is absent (those present are named), not 3-D, or not of real
            numbers.
        IncompleteArrayError
            An object is damaged, a chunk is absent (unless ``cache.missing_chunks`` is ``fill``),
            or the mean disagrees with the number of electrons in the store's metadata.
        """
        from zarrcache.cache import CachedStore

        _check_group(zarr_store, "read_charge_density", "load(task_id, 'data')")
        store, densities = zarr_store.store, self._density("data")
        where = store.url if isinstance(store, CachedStore) else str(zarr_store.store_path)
        with only_our_errors(where):
            if isinstance(store, CachedStore) and not zarr_store.path:
                through = densities.at(store.origin)
                values, _ = through.read(store.name)
                store.density_source = through.last_source(store.name)
                if store.attribute_sources is not None:
                    attributes = AttributesThrough(self._cache, [through])
                    attributes.check(store.name, store.attribute_sources, store.density_source)
                return flat(values)
            return flat(densities.of_group(zarr_store, where))

    def get_metadata(self, zarr_store: zarr.Group) -> dict[str, Any]:
        """Attribute ``metadata`` of a store, merged with ``structure``.

        Both may be JSON strings or JSON itself.

        Raises
        ------
        IncompleteArrayError
            The density of the store is cached in another version, or was read from
            ``zarr_store`` in another one.
        """
        from zarrcache.cache import CachedStore, group_of

        _check_group(zarr_store, "get_metadata", "metadata(task_id)")
        store = zarr_store.store
        with only_our_errors(f"metadata of {zarr_store.store_path}"):
            if isinstance(store, CachedStore) and not zarr_store.path:
                attributes = self._attributes_at(store.origin)
                if store.known is not None:
                    sources: Collection[str] = store.known.sources
                else:
                    if store.listed is None:  # it was pickled, and is listed again
                        zarr_store = group_of(store)
                    sources = attributes.sources_in(store.name, store.listed or ())
                attributes.check(store.name, sources, store.density_source)
                store.attribute_sources = sources
            return metadata_of(zarr_store)

    # -- attributes

    def metadata(self, task_id: str, role: Role = "data") -> dict[str, Any]:
        """Attribute ``metadata`` of a material, merged with ``structure``, as ``get_metadata``.

        If the density is cached with its attributes, this sends no request; otherwise one or two
        LISTs and a GET.

        Raises
        ------
        SchemaError
            They are not JSON, or ``metadata`` is not a mapping.
        IncompleteArrayError
            The store has changed since its density was read or cached.
        PymatgenMissingError
            The source is a CHGCAR file, and pymatgen is not installed.
        OriginError
        """
        with only_our_errors(f"metadata of {task_id} ({role})"):
            origin, store = self._origins[role], self.store_name(task_id, role)
            return metadata_in(self._attributes(role, store), origin.url_of(store))

    def structure(self, task_id: str, role: Role = "data") -> dict[str, Any]:
        """The structure of a material: ``pymatgen.core.Structure.as_dict()``.

        Requests as for ``metadata``.

        Raises
        ------
        SchemaError
            The source has no structure.
        """
        found = self.metadata(task_id, role).get("structure")
        if not isinstance(found, dict):
            url = self._origins[role].url_of(self.store_name(task_id, role))
            raise SchemaError(
                f"{url} has no structure among its attributes. Convert it again, or train without "
                "structures."
            )
        return found

    def volume(self, task_id: str, role: Role = "data") -> float:
        """Volume of the cell of a material, in cubic angstrom. Requests as for ``metadata``.

        Raises
        ------
        SchemaError
            There is no structure, it has no lattice, or the lattice has no volume.
        """
        with only_our_errors(f"volume of {task_id} ({role})"):
            origin, store = self._origins[role], self.store_name(task_id, role)
            return cell_volume(self._attributes(role, store), origin.url_of(store))

    def electrons(self, task_id: str, role: Role = "data") -> float | None:
        """Number of electrons that the metadata of a material states; None if it states none.

        Requests as for ``metadata``.
        """
        with only_our_errors(f"electrons of {task_id} ({role})"):
            return electrons_in(self._attributes(role, self.store_name(task_id, role)))

    def _attributes(self, role: Role, store: str) -> dict[str, Any]:
        own = self.column(role, self._arrays[role][0]).role
        arrays = [one.array for one in self.channels if one.role == own]
        densities = [self._density(role, array) for array in arrays]
        return AttributesThrough(self._cache, densities).read(store).attributes

    def _attributes_at(self, origin: Origin) -> AttributesThrough:
        """Attributes of stores of any directory."""
        densities = [self._density(*channel).at(origin) for channel in self.channels]
        return AttributesThrough(self._cache, densities)

    def _get_zarr_path(self, base_dir: str, task_id: str) -> str:
        return f"{base_dir}/{task_id}.zarr"


def _check_group(group: Any, method: str, instead: str) -> None:
    """Refuse a task id or path in place of an open store.

    Raises
    ------
    ConfigError
    """
    if not hasattr(group, "store_path"):
        raise ConfigError(
            f"{method} takes an open store, read_zarr_store(path), not {safe_repr(group)}. For a "
            f"task id: reader.{instead}."
        )


def flat(values: NDArray[np.float32]) -> Density:
    """A grid as `PairReader.load` returns it."""
    nx, ny, nz = values.shape
    return values.reshape(-1), (nx, ny, nz)
