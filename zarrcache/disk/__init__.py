"""One cache directory: entry files, their index, limits, locks and durable writes."""

from __future__ import annotations

from zarrcache.disk._database import array_note
from zarrcache.disk._entry_files import open_entries
from zarrcache.disk._incoming import EntryStream
from zarrcache.disk._owner import is_dead, owner_id
from zarrcache.disk._publish import publish, write_all
from zarrcache.disk.checksums import crc32c
from zarrcache.disk.directory import CacheDir
from zarrcache.disk.entry import (
    Entry,
    EntryHeader,
    header_of,
    map_entry,
    parse_header,
    read_header,
    write_entry,
)
from zarrcache.disk.filesystems import display_name, file_system_of, is_network
from zarrcache.disk.index import CACHE_FAULTS, LENT, Index, Intent, Row, Stored
from zarrcache.disk.mmap import Place, is_mapped, map_place, place_of
from zarrcache.disk.policy import (
    BLOCK_BYTES,
    Admission,
    EvictionPolicy,
    choose_victims,
    disk_bytes,
    is_fresh,
    min_free_bytes,
)
from zarrcache.disk.single_flight import SingleFlight

__all__ = [
    "BLOCK_BYTES",
    "CACHE_FAULTS",
    "LENT",
    "Admission",
    "CacheDir",
    "Entry",
    "EntryHeader",
    "EntryStream",
    "EvictionPolicy",
    "Index",
    "Intent",
    "Place",
    "Row",
    "SingleFlight",
    "Stored",
    "array_note",
    "choose_victims",
    "crc32c",
    "disk_bytes",
    "display_name",
    "file_system_of",
    "header_of",
    "is_dead",
    "is_fresh",
    "is_mapped",
    "is_network",
    "map_entry",
    "map_place",
    "min_free_bytes",
    "open_entries",
    "owner_id",
    "parse_header",
    "place_of",
    "publish",
    "read_header",
    "write_all",
    "write_entry",
]
