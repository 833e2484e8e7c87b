"""Check and scale a charge density, and read one from any zarr group."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zarrcache.arrays.decode import check_metadata
from zarrcache.errors import IncompleteArrayError, SchemaError, ZarrCacheError

if TYPE_CHECKING:
    import zarr

__all__ = ["as_density", "density_of_group", "metadata_of", "per_point"]

#: Largest number of points that float32 represents exactly.
_EXACT_IN_FLOAT32 = 2**24


def as_density(array: NDArray[Any], url: str, name: str) -> NDArray[np.float32]:
    """Check that an array is 3-D and cast it to float32, without a copy if it is float32.

    Raises
    ------
    SchemaError
    """
    if array.ndim != 3 or 0 in array.shape:
        raise SchemaError(
            f"{url} {name} has the shape {array.shape}; a charge density is 3-D. Convert the store "
            "again."
        )
    return array.astype(np.float32, copy=False)


def per_point(
    values: NDArray[np.float32], *, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Divide by the number of grid points, in ``out`` or a new array.

    Bit-equal to ``values /= np.prod(gridsize)`` of a float32 array.
    """
    if values.size <= _EXACT_IN_FLOAT32:
        # numpy divides float32 by int64 in float64 and rounds; float32 division gives the same
        # bits in a third of the time.
        return np.divide(values, np.float32(values.size), out=out)
    return np.divide(
        values,
        np.float64(values.size),
        out=np.empty_like(values) if out is None else out,
        dtype=np.float64,
        casting="same_kind",
    )


def density_of_group(group: zarr.Group, name: str, where: str) -> NDArray[np.float32]:
    """Read one array of an open group through zarr itself.

    Raises
    ------
    SchemaError
        The array is absent (those present are named), a group, not 3-D, or not of real numbers.
    IncompleteArrayError
        Zarr cannot decode it.
    """
    import zarr
    from zarr.buffer import default_buffer_prototype

    if name not in group:
        raise SchemaError(
            f"'{name}' not found in zarr store {where}. Available arrays: "
            f"{sorted(group.array_keys())}"
        )
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise SchemaError(f"{where}/{name} is a group; a charge density is an array.")
    documents = array.metadata.to_buffer_dict(default_buffer_prototype())
    check_metadata(
        json.loads(documents[".zarray" if ".zarray" in documents else "zarr.json"].to_bytes()),
        f"{where}/{name}",
    )
    try:
        values = np.asarray(array[...])
    except ZarrCacheError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError) as exc:
        # zarr has no class of its own for errors of codecs.
        raise IncompleteArrayError(
            f"{where}/{name} cannot be decoded by zarr ({type(exc).__name__}: {exc}). Convert the "
            "store again."
        ) from exc
    return as_density(values, where, name)


def metadata_of(group: zarr.Group) -> dict[str, Any]:
    """Merge the attributes ``metadata`` and ``structure`` of a group; either may be a JSON string.

    Raises
    ------
    SchemaError
        One is a string that is not JSON, or ``metadata`` is not a mapping.
    """
    attributes = group.attrs.asdict()
    metadata: dict[str, Any] = {}
    if "metadata" in attributes:
        decoded = _decoded(attributes["metadata"], f"{group.store_path} attribute 'metadata'")
        if not isinstance(decoded, dict):
            raise SchemaError(
                f"{group.store_path} attribute 'metadata' is {decoded!r}; it has to be a mapping. "
                "Convert the store again."
            )
        metadata.update(decoded)
    if "structure" in attributes:
        metadata["structure"] = _decoded(
            attributes["structure"], f"{group.store_path} attribute 'structure'"
        )
    return metadata


def _decoded(value: object, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as exc:
        raise SchemaError(f"{where} is not JSON ({exc}). Convert the store again.") from exc
