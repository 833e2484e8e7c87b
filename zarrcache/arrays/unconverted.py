"""Decode densities outside of Zarr stores: files of VASP, the Materials Project and numpy.

A source is one file, or a directory per material with a CHGCAR or with numpy files in it.
"""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import Units, density_array, density_name
from zarrcache.arrays.density import UNITS_ATTRIBUTE, no_density
from zarrcache.arrays.density_file import DensityFile, read_density_file
from zarrcache.arrays.npy_files import members_of, read_npy_density
from zarrcache.arrays.spin import is_spin, other_kind_of_spin, other_spin
from zarrcache.errors import ArrayNotFoundError, SchemaError

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["decode_unconverted", "decoding_bytes", "members_in", "unconverted_attributes"]

logger = logging.getLogger(__name__)

_COMPRESSED = (".gz", ".bz2", ".xz", ".lzma")
_IN_DIRECTORY = ("CHGCAR", *(f"CHGCAR{suffix}" for suffix in _COMPRESSED))
#: Memory that decoding takes, as a multiple of a file's size: plain, compressed. Numbers of JSON
#: are Python objects for a while. Measured: 23 to 44 (json.gz), 8 (CHGCAR.gz).
_JSON_GROWTH, _TEXT_GROWTH, _NPY_GROWTH = (14, 45), (3, 9), (3, 3)


def members_in(names: Collection[str], url: str) -> list[str]:
    """The files of a material's directory that its density is read from.

    Raises
    ------
    SchemaError
        There is neither a CHGCAR nor ``rho_*.npy``.
    """
    text = next((name for name in _IN_DIRECTORY if name in names), None)
    return members_of(names, url) if text is None else [text]


def decoding_bytes(name: str, nbytes: int) -> int:
    """Most memory that decoding a file takes."""
    is_packed = name.endswith(_COMPRESSED)
    if name.endswith(".npy"):
        return nbytes * _NPY_GROWTH[is_packed]
    return nbytes * (_JSON_GROWTH if ".json" in name else _TEXT_GROWTH)[is_packed]


def decode_unconverted(
    files: Mapping[str, Buffer],
    url: str,
    array: str,
    units: Units | None,
    also: Collection[str] = (),
) -> tuple[NDArray[Any], dict[str, Any], dict[str, NDArray[Any]]]:
    """Decode one grid, and others of the same file.

    Parameters
    ----------
    files : mapping
        Content of each file of the source by its name.
    url : str
        Of the source, for messages.
    array : str
        ``charge_density_total``, for example.
    units : {"cell", "points", "volume"} or None
        In which the values are used. None: not at all.
    also : collection of str
        Names of other arrays.

    Returns
    -------
    values : ndarray, 3-D
        Of the file's precision, so that a conversion to ``units`` rounds once.
    attributes : dict
        Those of `unconverted_attributes`, and what `in_units` reads.
    others : dict
        Those of ``also`` that the file has and that nothing is wrong with.

    Raises
    ------
    ArrayNotFoundError
        The source has no such grid.
    SchemaError
        A file has other content.
    """
    if any(name.endswith(".npy") for name in files):
        values, attributes = _of_npy(files, url, array, units)
        _check_finite(values, url, array)
        return values, attributes, {}
    ((name, data),) = files.items()
    where = url if url.endswith(name) else f"{url}/{name}"
    found = read_density_file(io.BytesIO(data), name=where)
    values = _block(found, array)
    if found.notes:
        logger.warning("%s %s", where, " ".join(found.notes))
    if units == "volume":
        _ = found.lattice  # refuses one that is wrong; a file that is read per cell may have it
    others = {}
    for other in also:
        with contextlib.suppress(SchemaError):  # its own read raises it
            others[other] = _block(found, other)
    return values, {} if units is None else found.attributes(), others


def _check_finite(values: NDArray[Any], url: str, array: str) -> None:
    bad = values.size - int(np.count_nonzero(np.isfinite(values)))
    if bad:
        raise SchemaError(
            f"{url}: {bad} of {values.size} values of {density_name(array)} are NaN or infinite. "
            "Run the calculation again or get the file again."
        )


def unconverted_attributes(files: Mapping[str, Buffer], url: str) -> dict[str, Any]:
    """The known structure; see ``attributes`` of `DensityFile` and `NpyDensity`."""
    if any(name.endswith(".npy") for name in files):
        return read_npy_density(files, url).attributes()
    ((name, data),) = files.items()
    where = url if url.endswith(name) else f"{url}/{name}"
    return read_density_file(io.BytesIO(data), name=where).attributes()


def _block(found: DensityFile, array: str) -> NDArray[Any]:
    """A grid of a file of VASP or the Materials Project."""
    url, block = found.name, density_name(array)
    values = found.blocks.get(block)
    other = other_spin(array, map(density_array, found.blocks))
    if other is not None:
        raise other_kind_of_spin(url, array, other)
    if values is None and is_spin(array) and found.unnamed:
        raise SchemaError(
            f"{url} has {1 + found.unnamed} grids; VASP writes 1, 2 (spin) or 4 (non-collinear), "
            f"so it is unknown whether one is {block}. It may be cut: get the file again, leave "
            "the material out of the map, or set density_type to total."
        )
    if values is None:
        raise ArrayNotFoundError(
            f"{url} has no {block} density. It has: {', '.join(found.blocks)}. Leave the material "
            "out of the map, or set density_type to one that all files have."
        )
    if block == "total" and values.size and (why := no_density(float(values.mean()))):
        raise SchemaError(
            f"{url}: {why}. Put its CHGCAR there, or leave the material out of the map."
        )
    _check_finite(values, url, array)
    return values


def _of_npy(
    files: Mapping[str, Buffer], url: str, array: str, units: Units | None
) -> tuple[NDArray[Any], dict[str, Any]]:
    """The density of numpy files."""
    if array != density_array("total"):
        raise ArrayNotFoundError(
            f"{url} holds numpy files, which have a total density only. Set density_type to total."
        )
    found = read_npy_density(files, url)
    if units is None or units == "volume":
        return found.values, found.attributes() | {UNITS_ATTRIBUTE: "volume"}
    if found.volume is None:
        raise SchemaError(
            f"{url} does not say the volume of its box (box.npy, box.dat, or Lattice= in the .xyz "
            "file), so its number of electrons is unknown. Set normalize_data: volume, or add one."
        )
    # As a converted store has them, so that both give the same bits.
    return found.values * np.float64(found.volume), found.attributes()
