"""Refuse spin densities of the other kind (collinear or not) than the one that is read.

Otherwise a material with spin would count as a material without spin, and be filled with zeros.
"""

from __future__ import annotations

from collections.abc import Iterable

from zarrcache._keys import density_array, density_name
from zarrcache.errors import SchemaError

__all__ = ["is_spin", "other_kind_of_spin", "other_spin"]

_COLLINEAR = density_array("diff")
_NON_COLLINEAR = tuple(density_array(f"diff_{axis}") for axis in "xyz")


def is_spin(array: str) -> bool:
    """Whether an array is a spin density, of either kind."""
    return array == _COLLINEAR or array in _NON_COLLINEAR


def other_spin(array: str, present: Iterable[str]) -> str | None:
    """A spin density of the other kind among ``present``; None if there is none.

    Files have pymatgen's ``diff`` of a non-collinear one beside it, which is not its spin density.
    """
    arrays = {*present}
    if array == _COLLINEAR:
        return next((name for name in _NON_COLLINEAR if name in arrays), None)
    if array in _NON_COLLINEAR and array not in arrays and _COLLINEAR in arrays:
        return _COLLINEAR
    return None


def other_kind_of_spin(url: str, array: str, other: str) -> SchemaError:
    """The error for a source with the spin density ``other`` where ``array`` is read."""
    if array == _COLLINEAR:
        return SchemaError(
            f"{url} has the spin density of a non-collinear calculation: diff_x, diff_y and "
            "diff_z, not diff. Leave the material out of the map, or set density_type to total, "
            "diff_x, diff_y or diff_z."
        )
    return SchemaError(
        f"{url} has the spin density of a collinear calculation: {density_name(other)}, not "
        f"{density_name(array)}. Leave the material out of the map, or set density_type to total "
        "or diff."
    )
