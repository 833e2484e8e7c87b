"""Fetch and decode arrays, and check that they are charge densities."""

from __future__ import annotations

from zarrcache.arrays.decode import check_metadata, is_chunk_of_nothing, metadata_key
from zarrcache.arrays.read import (
    as_density,
    check_sizes,
    count_nonfinite,
    density_of_group,
    list_array,
    metadata_of,
    missing_chunks,
    per_point,
    read_array,
    stable_listing,
)
from zarrcache.arrays.zip import ZippedStore

__all__ = [
    "ZippedStore",
    "as_density",
    "check_metadata",
    "check_sizes",
    "count_nonfinite",
    "density_of_group",
    "is_chunk_of_nothing",
    "list_array",
    "metadata_key",
    "metadata_of",
    "missing_chunks",
    "per_point",
    "read_array",
    "stable_listing",
]
