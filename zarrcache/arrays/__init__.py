"""Fetch and decode arrays, and check that they are charge densities."""

from __future__ import annotations

from zarrcache.arrays.attributes import (
    StoreAttributes,
    metadata_in,
    metadata_of,
    read_attributes,
)
from zarrcache.arrays.decode import (
    MAX_DOCUMENT_BYTES,
    is_chunk_of_nothing,
)
from zarrcache.arrays.density import (
    UNITS_ATTRIBUTE,
    as_density,
    cell_volume,
    count_nonfinite,
    disagreement,
    electrons_in,
    electrons_of,
    has_electrons,
    lattice_volume,
    no_density,
    per_point,
)
from zarrcache.arrays.density_file import (
    DensityFile,
    PymatgenMissingError,
    read_mp_json,
    read_vasp_text,
    require_pymatgen,
    structure_of,
)
from zarrcache.arrays.listing import (
    OriginArray,
    check_sizes,
    list_array,
    objects_of,
    stable_listing,
)
from zarrcache.arrays.npy_files import members_of, read_npy_density
from zarrcache.arrays.read import (
    Decoded,
    density_of_group,
    examine_array,
    read_array,
)
from zarrcache.arrays.sources import (
    KINDS,
    Kind,
    choose,
    ends_of,
    is_fetched_whole,
    is_file,
    is_object,
    is_unconverted,
    kind_of,
    kinds_of,
    names_of,
    several_sources,
    sources_of,
    stem_of,
)
from zarrcache.arrays.zip import ZippedStore

__all__ = [
    "KINDS",
    "MAX_DOCUMENT_BYTES",
    "UNITS_ATTRIBUTE",
    "Decoded",
    "DensityFile",
    "Kind",
    "OriginArray",
    "PymatgenMissingError",
    "StoreAttributes",
    "ZippedStore",
    "as_density",
    "cell_volume",
    "check_sizes",
    "choose",
    "count_nonfinite",
    "density_of_group",
    "disagreement",
    "electrons_in",
    "electrons_of",
    "ends_of",
    "examine_array",
    "has_electrons",
    "is_chunk_of_nothing",
    "is_fetched_whole",
    "is_file",
    "is_object",
    "is_unconverted",
    "kind_of",
    "kinds_of",
    "lattice_volume",
    "list_array",
    "members_of",
    "metadata_in",
    "metadata_of",
    "names_of",
    "no_density",
    "objects_of",
    "per_point",
    "read_array",
    "read_attributes",
    "read_mp_json",
    "read_npy_density",
    "read_vasp_text",
    "require_pymatgen",
    "several_sources",
    "sources_of",
    "stable_listing",
    "stem_of",
    "structure_of",
]
