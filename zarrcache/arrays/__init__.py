"""Fetch and decode arrays, and check that they are charge densities."""

from __future__ import annotations

from zarrcache.arrays.decode import check_metadata, is_chunk_of_nothing, metadata_key
from zarrcache.arrays.density_file import (
    DensityFile,
    PymatgenMissingError,
    read_density_file,
    read_mp_json,
    read_vasp_text,
    require_pymatgen,
)
from zarrcache.arrays.electrons import disagreement, electrons_of, has_electrons
from zarrcache.arrays.read import (
    Examined,
    as_density,
    check_sizes,
    count_gets,
    count_nonfinite,
    density_of_group,
    examine_array,
    list_array,
    metadata_of,
    per_point,
    read_array,
    stable_listing,
)
from zarrcache.arrays.zip import ZippedStore

__all__ = [
    "DensityFile",
    "Examined",
    "PymatgenMissingError",
    "ZippedStore",
    "as_density",
    "check_metadata",
    "check_sizes",
    "count_gets",
    "count_nonfinite",
    "density_of_group",
    "disagreement",
    "electrons_of",
    "examine_array",
    "has_electrons",
    "is_chunk_of_nothing",
    "list_array",
    "metadata_key",
    "metadata_of",
    "per_point",
    "read_array",
    "read_density_file",
    "read_mp_json",
    "read_vasp_text",
    "require_pymatgen",
    "stable_listing",
]
