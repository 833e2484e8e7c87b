"""Load densities by task id: readers, the materials of a pair of directories, and splits."""

from __future__ import annotations

from zarrcache.data.lock import DataLock, LockedDensity, crc_of, differences, digest_of
from zarrcache.data.observers import Read, ReadObserver
from zarrcache.data.pairs import PairReader
from zarrcache.data.reader import ZarrS3Reader, distinct_directories, open_reader
from zarrcache.data.sequences import Density, SplitSets, split_sets
from zarrcache.data.splits import (
    Split,
    first_ids,
    hold_out,
    mapped_ids,
    read_map,
    share_of,
    split_ids,
    training_count,
)

__all__ = [
    "DataLock",
    "Density",
    "LockedDensity",
    "PairReader",
    "Read",
    "ReadObserver",
    "Split",
    "SplitSets",
    "ZarrS3Reader",
    "crc_of",
    "differences",
    "digest_of",
    "distinct_directories",
    "first_ids",
    "hold_out",
    "mapped_ids",
    "open_reader",
    "read_map",
    "share_of",
    "split_ids",
    "split_sets",
    "training_count",
]
