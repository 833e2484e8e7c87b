"""Fetch and decode arrays, and check that they are charge densities."""

from __future__ import annotations

from zarrcache.arrays.decode import check_metadata, metadata_key
from zarrcache.arrays.read import (
    as_density,
    check_sizes,
    density_of_group,
    list_array,
    metadata_of,
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
    "density_of_group",
    "list_array",
    "metadata_key",
    "metadata_of",
    "per_point",
    "read_array",
    "stable_listing",
]
