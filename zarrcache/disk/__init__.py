"""One cache directory: entry files, their index, limits, locks and durable writes."""

from __future__ import annotations

from zarrcache.disk._publish import (
    hidden_path,
    publish,
    published_name,
    remove_hidden,
    sweep_hidden,
    write_all,
)
from zarrcache.disk.checksums import crc32c
from zarrcache.disk.directory import CacheDir, open_entries
from zarrcache.disk.encoding import (
    expected_bytes,
    is_within,
    single_threaded_blosc,
    use_converter,
)
from zarrcache.disk.entry import (
    ARRAY,
    HEADER_BYTES,
    LISTING,
    OBJECT,
    SOUND,
    Entry,
    EntryHeader,
    EntryStream,
    Flaws,
    array_note,
    header_of,
    kind_of,
    map_entry,
    new_entry,
    parse_header,
    read_header,
    write_entry,
)
from zarrcache.disk.filesystems import display_name, file_system_of, is_network
from zarrcache.disk.index import CACHE_FAULTS, LENT, Index, Intent, Row, Stored
from zarrcache.disk.mmap import Place, is_mapped, map_place, open_regular, place_of
from zarrcache.disk.policy import (
    BLOCK_BYTES,
    Admission,
    EvictionPolicy,
    StoredEntries,
    choose_victims,
    disk_bytes,
    is_fresh,
    min_free_bytes,
)
from zarrcache.disk.single_flight import SingleFlight

__all__ = [
    "ARRAY",
    "BLOCK_BYTES",
    "CACHE_FAULTS",
    "HEADER_BYTES",
    "LENT",
    "LISTING",
    "OBJECT",
    "SOUND",
    "Admission",
    "CacheDir",
    "Entry",
    "EntryHeader",
    "EntryStream",
    "EvictionPolicy",
    "Flaws",
    "Index",
    "Intent",
    "Place",
    "Row",
    "SingleFlight",
    "Stored",
    "StoredEntries",
    "array_note",
    "choose_victims",
    "crc32c",
    "disk_bytes",
    "display_name",
    "expected_bytes",
    "file_system_of",
    "header_of",
    "hidden_path",
    "is_fresh",
    "is_mapped",
    "is_network",
    "is_within",
    "kind_of",
    "map_entry",
    "map_place",
    "min_free_bytes",
    "new_entry",
    "open_entries",
    "open_regular",
    "parse_header",
    "place_of",
    "publish",
    "published_name",
    "read_header",
    "remove_hidden",
    "single_threaded_blosc",
    "sweep_hidden",
    "use_converter",
    "write_all",
    "write_entry",
]
