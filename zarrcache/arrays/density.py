"""Check that an array is a charge density: its shape, its units, its number of electrons.

VASP's files, and most stores, hold electrons per volume times the volume of the cell, so the mean
over the grid points of ``charge_density_total`` is the number of electrons. A store may hold the
density itself instead; its attribute ``charge_density_units`` is ``volume`` then. The volume comes
from the lattice in its attribute ``structure``.

`zarrcache convert` writes the number of electrons to the attribute ``metadata`` of the store.
Values that were exchanged, cut, filled or scaled afterwards disagree with it, even if each object
is intact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import Units, density_array, is_density, safe_repr
from zarrcache.arrays.decode import parse_document
from zarrcache.errors import IncompleteArrayError, SchemaError

__all__ = [
    "UNITS_ATTRIBUTE",
    "as_density",
    "cell_volume",
    "check_electrons",
    "count_nonfinite",
    "disagreement",
    "electrons_differ",
    "electrons_in",
    "electrons_of",
    "has_electrons",
    "in_units",
    "lattice_volume",
    "no_density",
    "per_point",
    "stored_in",
]

#: Attribute of a store that says in which units its densities are. Not ``units``, which other
#: programs write with any meaning.
UNITS_ATTRIBUTE = "charge_density_units"

#: Largest number of points that float32 represents exactly.
_EXACT_IN_FLOAT32 = 2**24
#: A lattice of less than this share of the box with its edges is flat: rounding errors are 1e-16,
#: and the flattest real cells fill 1 % of it.
_FLAT = 1e-9
_TOTAL = density_array("total")
#: Of the stated number of electrons, and electrons.
_RELATIVE, _ABSOLUTE = 1e-3, 1e-6


def as_density(
    array: NDArray[Any],
    url: str,
    name: str,
    *,
    units: Units = "cell",
    attributes: Mapping[str, Any] | None = None,
) -> NDArray[np.float32]:
    """Check that an array is 3-D and cast it to float32, without a copy if it is float32.

    Parameters
    ----------
    array : ndarray
    url, name : str
        Of the store and of the array in it.
    units : {"cell", "points", "volume"}
    attributes : mapping, optional
        Of the store. Default: the array is in ``units`` already.

    Raises
    ------
    SchemaError
        As said, or the store's units or its cell are unknown (`in_units`).
    """
    if array.ndim != 3 or 0 in array.shape:
        raise SchemaError(
            f"{url} {name} has the shape {array.shape}; a charge density is 3-D. Convert the store "
            "again."
        )
    if attributes is None:
        return array.astype(np.float32, copy=False)
    return in_units(array, units, attributes, url, name)


def count_nonfinite(values: NDArray[Any]) -> int:
    """Number of values that are NaN or infinite. 0.1 ms for 5 MB."""
    is_finite = np.isfinite(values)
    return 0 if is_finite.all() else int(values.size - np.count_nonzero(is_finite))


# -- units
# --------------------------------------------------------------------------------------------------


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


# -- electrons
# --------------------------------------------------------------------------------------------------


def has_electrons(array: str) -> bool:
    """Whether the mean of this array is a number of electrons."""
    return array == _TOTAL


def electrons_in(attributes: Mapping[str, Any]) -> float | None:
    """The number of electrons in the attributes of a store; None if they state none.

    The attribute ``metadata`` is a mapping, or one as a JSON string.
    """
    metadata = _decoded(attributes.get("metadata"))
    stated = metadata.get("electrons") if isinstance(metadata, dict) else None
    if isinstance(stated, bool) or not isinstance(stated, (int, float)):
        return None
    try:
        return float(stated) if math.isfinite(stated) else None
    except OverflowError:
        return None


def electrons_of(
    values: NDArray[Any], units: Units = "cell", *, volume: float | None = None
) -> float | None:
    """The number of electrons of a density: the mean of its values per cell, in float64.

    0.3 ms for 5 MB.

    Parameters
    ----------
    values : ndarray
        With at least one value.
    units : {"cell", "points", "volume"}
    volume : float, optional
        Of the cell, in cubic angstrom; needed for values per volume.

    Returns
    -------
    float or None
        None: values per volume of an unknown cell.
    """
    if units == "volume" and volume is None:
        return None
    with np.errstate(all="ignore"):
        mean = values.mean(dtype=np.float64)
        scale = {"cell": 1, "points": values.size, "volume": volume}[units]
        return float(mean * scale)


def no_density(electrons: float | None) -> str:
    """Say why this cannot be a number of electrons; empty if it can. Zero can."""
    if electrons is None or not electrons < 0:
        return ""
    return (
        f"mean(total) is {electrons:.4f}, which cannot be a number of electrons: this looks like a "
        "potential (LOCPOT), not a density"
    )


def disagreement(electrons: float | None, stated: float | None, relative_error: float = 0.0) -> str:
    """Describe a difference of more than 0.1 % from the stated electrons; empty if there is none.

    NaN differs from every number. None means unknown, and differs from no number. A negative
    stated number is always wrong.

    Parameters
    ----------
    electrons, stated : float or None
    relative_error : float
        Of the values, if they were rounded. It is added to the 0.1 %.
    """
    if stated is not None and no_density(stated):  # converted by a version that let it pass
        return (
            f"the metadata of the store states {stated:.7g} electrons, which no density has: it "
            "looks like a potential (LOCPOT)"
        )
    if electrons is None or stated is None:
        return ""
    tolerance = _RELATIVE + relative_error
    if abs(electrons - stated) <= tolerance * abs(stated) + _ABSOLUTE:
        return ""
    return (
        f"its values hold {electrons:.7g} electrons (their mean), but the metadata of the store "
        f"states {stated:.7g}"
    )


def electrons_differ(values: NDArray[Any], attributes: Mapping[str, Any], url: str) -> str:
    """Describe how values differ from the electrons that their store states; empty if not.

    Raises
    ------
    SchemaError
        The store's units or its cell are unknown.
    """
    stated = electrons_in(attributes)
    if stated is None or not values.size:  # an array without values is refused as no density
        return ""
    units = stored_in(attributes, url)
    volume = cell_volume(attributes, url) if units == "volume" else None
    return disagreement(electrons_of(values, units, volume=volume), stated)


def check_electrons(
    values: NDArray[Any],
    attributes: Mapping[str, Any],
    url: str,
    array: str,
    missing_chunks: int = 0,
) -> None:
    """Refuse values that disagree with the electrons that their store states.

    Raises
    ------
    IncompleteArrayError
    """
    why = electrons_differ(values, attributes, url)
    if not why:
        return
    if missing_chunks:
        why += f"; {missing_chunks} of its chunks are absent"
    nonfinite = count_nonfinite(values)
    if nonfinite:
        why += f"; {nonfinite} of its values are NaN or infinite"
    raise IncompleteArrayError(
        f"{url}/{array}: {why}. One of the two is wrong: convert the store again. If the values "
        "are right, correct 'electrons' in the attribute 'metadata' of the store, or remove it."
    )


def _decoded(value: object) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return parse_document(value.encode())
    except (ValueError, RecursionError):
        return "not JSON"
