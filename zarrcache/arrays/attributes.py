"""Read the attributes of a store, which describe the material and its structure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from zarrcache._keys import source_digest
from zarrcache.arrays.decode import (
    FORMATS,
    attributes_in,
    attributes_key,
    check_attributes_size,
    metadata_key,
)
from zarrcache.arrays.density_file import HEAD, structure_of, structure_of_poscar
from zarrcache.arrays.listing import OriginArray, check_sizes, list_array, members_of_array
from zarrcache.arrays.npy_files import ATOMS
from zarrcache.arrays.read import fetch, unzipped
from zarrcache.arrays.sources import is_fetched_whole, is_unconverted
from zarrcache.arrays.unconverted import unconverted_attributes
from zarrcache.errors import OriginNotFoundError, SchemaError

if TYPE_CHECKING:
    import zarr

__all__ = ["StoreAttributes", "metadata_in", "metadata_of", "read_attributes"]


class StoreAttributes(NamedTuple):
    """The attributes of a store.

    Attributes
    ----------
    attributes : dict
    zarr_format : int
        2 or 3; 0 for a file of VASP or the Materials Project.
    sources : tuple of str
        Digests of the objects of each density that the attributes belong to.
    """

    attributes: dict[str, Any]
    zarr_format: int
    sources: tuple[str, ...] = ()


def read_attributes(arrays: Sequence[OriginArray]) -> StoreAttributes:
    """Read the attributes of the store of ``arrays``, which may be absent: one LIST and one GET.

    A zipped store and a file are fetched whole.

    Raises
    ------
    OriginError, IncompleteArrayError, SchemaError
    """
    first = arrays[0]
    origin, store, url = first.origin, first.store, first.store_url
    zipped = None
    if is_fetched_whole(store):
        objects = list_array(first)
        check_sizes([o.size_bytes for o in objects], url)
        sources: tuple[str, ...] = (source_digest(objects),)
        if is_unconverted(store):
            files = {o.key.rpartition("/")[2]: data for o, data in origin.fetch(objects)}
            return StoreAttributes(unconverted_attributes(files, url), 0, sources)
        zipped = unzipped(first, objects)
        objects = zipped.objects(store)
    else:
        objects = origin.list_objects(f"{store}/")
        if not objects:
            raise OriginNotFoundError(f"{url} does not exist or is empty.")
        of_arrays = [members_of_array(what, objects) for what in arrays]
        sources = tuple(source_digest(listed) for listed in of_arrays if listed)
    by_name = {obj.key.removeprefix(f"{store}/"): obj for obj in objects}
    of_array = next((key for one in arrays if (key := _described_by(one, by_name))), None)
    # As for a density: v3 hides documents of v2.
    name = attributes_key(of_array or metadata_key(by_name), by_name)
    if name not in by_name:
        return StoreAttributes({}, FORMATS[name], sources)
    check_attributes_size(by_name[name].size_bytes, name, url)
    ((_, document),) = fetch(first, [by_name[name]], zipped)
    return StoreAttributes(attributes_in(document, name, url), FORMATS[name], sources)


def _described_by(what: OriginArray, keys: Iterable[str]) -> str | None:
    prefix = f"{what.array}/"
    return metadata_key({key.removeprefix(prefix) for key in keys if key.startswith(prefix)})


def metadata_of(group: zarr.Group) -> dict[str, Any]:
    """`metadata_in` the attributes of a group."""
    return metadata_in(group.attrs.asdict(), f"{group.store_path}")


def metadata_in(attributes: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Merge the attributes ``metadata`` and ``structure``; either may be a JSON string.

    Files have other attributes; pymatgen makes their structure here.

    Raises
    ------
    SchemaError
        One is a string that is not JSON, or ``metadata`` is not a mapping.
    PymatgenMissingError
    """
    metadata: dict[str, Any] = {}
    if "metadata" in attributes:
        decoded = _decoded(attributes["metadata"], f"{where} attribute 'metadata'")
        if not isinstance(decoded, dict):
            raise SchemaError(
                f"{where} attribute 'metadata' is {decoded!r}; it has to be a mapping. "
                "Convert the store again."
            )
        metadata.update(decoded)
    if isinstance(head := attributes.get(HEAD), str):
        metadata["structure"] = structure_of_poscar(head, where)
    elif isinstance(atoms := attributes.get(ATOMS), dict):
        matrix = np.array(attributes["structure"]["lattice"]["matrix"])
        positions = np.array(atoms["positions"]).reshape(-1, 3)
        metadata["structure"] = structure_of(matrix, atoms["symbols"], positions).as_dict()
    elif "structure" in attributes:
        metadata["structure"] = _decoded(attributes["structure"], f"{where} attribute 'structure'")
    return metadata


def _decoded(value: object, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as exc:
        raise SchemaError(f"{where} is not JSON ({exc}). Convert the store again.") from exc
