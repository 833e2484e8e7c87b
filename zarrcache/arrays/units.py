"""Convert a density between units: per cell, per grid point, per cubic angstrom.

VASP's files, and most stores, hold the density times the volume of the cell. The volume comes from
the lattice in the store's attribute ``structure``. A store may hold the density itself instead; its
attribute ``charge_density_units`` is ``volume`` then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import Units, is_density, safe_repr
from zarrcache.arrays.decode import parse_document
from zarrcache.errors import SchemaError

__all__ = ["UNITS_ATTRIBUTE", "cell_volume", "in_units", "lattice_volume", "per_point", "stored_in"]

#: Attribute of a store that says in which units its densities are. Not ``units``, which other
#: programs write with any meaning.
UNITS_ATTRIBUTE = "charge_density_units"

#: Largest number of points that float32 represents exactly.
_EXACT_IN_FLOAT32 = 2**24
#: A lattice of less than this share of the box with its edges is flat: rounding errors are 1e-16,
#: and the flattest real cells fill 1 % of it.
_FLAT = 1e-9


def stored_in(attributes: Mapping[str, Any], url: str) -> Units:
    """The units of the densities in a store: ``cell`` unless its attributes say ``volume``.

    Raises
    ------
    SchemaError
        The attribute has another value.
    """
    stated = attributes.get(UNITS_ATTRIBUTE, "cell")
    if stated == "cell" or stated == "volume":
        return "volume" if stated == "volume" else "cell"
    raise SchemaError(
        f"{url} has the attribute {UNITS_ATTRIBUTE}: {safe_repr(stated)}; known are 'cell' "
        "(density times cell volume) and 'volume' (electrons per cubic angstrom). Convert the "
        "store again."
    )


def cell_volume(attributes: Mapping[str, Any], url: str) -> float:
    """Volume of the cell of a store, in cubic angstrom.

    Parameters
    ----------
    attributes : mapping
        With ``structure``, or ``structure`` within ``metadata``; each may be a JSON string.
    url : str

    Raises
    ------
    SchemaError
        There is no structure, it has no lattice, or the lattice has no volume.
    """
    structure = _decoded(attributes.get("structure"))
    if structure is None:
        metadata = _decoded(attributes.get("metadata"))
        structure = _decoded(metadata.get("structure")) if isinstance(metadata, dict) else None
    try:
        return lattice_volume(structure)
    except ValueError as exc:
        raise SchemaError(
            f"{url}: {exc}, so its density per volume is unknown. Convert the store again, or set "
            "normalize_data to true (per grid point) or false (per cell)."
        ) from exc


def lattice_volume(structure: object) -> float:
    """Volume of the lattice of a pymatgen dict, in cubic angstrom.

    Bit-equal to ``Structure.from_dict(structure).lattice.volume``, which computes it from the
    matrix alone.

    Raises
    ------
    ValueError
        There is no such lattice.
    """
    if structure is None:
        raise ValueError("it has no attribute 'structure'")
    lattice = structure.get("lattice") if isinstance(structure, Mapping) else None
    if not isinstance(lattice, Mapping):
        raise ValueError("its structure has no lattice")
    try:
        matrix = np.array(lattice.get("matrix"), dtype=np.float64)
    except (TypeError, ValueError):
        matrix = np.empty(0)
    if matrix.shape != (3, 3) or not np.isfinite(matrix).all():
        raise ValueError("the lattice of its structure has no matrix of three finite vectors")
    with np.errstate(all="ignore"):
        volume = float(abs(np.dot(np.cross(matrix[0], matrix[1]), matrix[2])))
        box = math.prod(float(np.linalg.norm(vector)) for vector in matrix)
    if not math.isfinite(volume) or not math.isfinite(box) or volume <= _FLAT * box:
        raise ValueError(f"the lattice of its structure has the volume {volume:g} cubic angstrom")
    return volume


def in_units(
    array: NDArray[Any], units: Units, attributes: Mapping[str, Any], url: str, name: str
) -> NDArray[np.float32]:
    """Convert an array of a store to ``units`` and float32.

    A division by the volume, or a multiplication, is computed in float64 and rounded once. Values
    per point are those of the users' reader, which divides float32. In place if the array is
    writable and float32: then no other code uses it, and a second array of its size would cost as
    much as the division.

    Raises
    ------
    SchemaError
        The store's units or its cell are unknown.
    """
    stored: Units = stored_in(attributes, url) if is_density(name) else units
    if stored == units or (stored == "cell" and units == "points"):
        values = array.astype(np.float32, copy=False)
        if stored == units:
            return values
        return per_point(values, out=values if values.flags.writeable else None)
    volume = cell_volume(attributes, url)
    reusable = array.dtype == np.float32 and array.flags.writeable
    out = array if reusable else np.empty(array.shape, np.float32)
    if units == "volume":
        np.divide(array, volume, out=out, dtype=np.float64, casting="same_kind")
    else:
        scale = volume if units == "cell" else volume / array.size
        np.multiply(array, scale, out=out, dtype=np.float64, casting="same_kind")
    return out


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


def _decoded(value: object) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_document(value.encode())
    except (ValueError, RecursionError):
        return "not JSON"
