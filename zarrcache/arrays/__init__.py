"""Fetch and decode arrays, and check that they are charge densities."""

from __future__ import annotations

from zarrcache.arrays.decode import (
    MAX_DOCUMENT_BYTES,
    check_metadata,
    is_chunk_of_nothing,
    metadata_key,
)
from zarrcache.arrays.density_file import (
    DensityFile,
    PymatgenMissingError,
    read_density_file,
    read_mp_json,
    read_vasp_text,
    require_pymatgen,
    structure_of,
)
from zarrcache.arrays.electrons import disagreement, electrons_in, electrons_of, has_electrons
from zarrcache.arrays.npy_files import NpyDensity, members_of, read_npy_density
from zarrcache.arrays.read import (
    Decoded,
    Examined,
    as_density,
    check_sizes,
    count_gets,
    count_nonfinite,
    density_of_group,
    examine_array,
    list_array,
    metadata_in,
    metadata_of,
    read_array,
    read_attributes,
    stable_listing,
)
from zarrcache.arrays.units import (
    UNITS_ATTRIBUTE,
    cell_volume,
    lattice_volume,
    per_point,
)
from zarrcache.arrays.zip import ZippedStore

__all__ = [
    "MAX_DOCUMENT_BYTES",
    "UNITS_ATTRIBUTE",
    "Decoded",
    "DensityFile",
    "Examined",
    "NpyDensity",
    "PymatgenMissingError",
    "ZippedStore",
    "as_density",
    "cell_volume",
    "check_metadata",
    "check_sizes",
    "count_gets",
    "count_nonfinite",
    "density_of_group",
    "disagreement",
    "electrons_in",
    "electrons_of",
    "examine_array",
    "has_electrons",
    "is_chunk_of_nothing",
    "lattice_volume",
    "list_array",
    "members_of",
    "metadata_in",
    "metadata_key",
    "metadata_of",
    "per_point",
    "read_array",
    "read_attributes",
    "read_density_file",
    "read_mp_json",
    "read_npy_density",
    "read_vasp_text",
    "require_pymatgen",
    "stable_listing",
    "structure_of",
]
