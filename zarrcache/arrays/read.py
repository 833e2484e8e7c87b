"""Read one density: 1 LIST, concurrent GETs, decoded as they arrive, checked against the listing.

Every density that the array tier does not have is read here, and those of open zarr groups.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import operator
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import ObjectInfo, Units, source_digest
from zarrcache.arrays.decode import (
    FORMATS,
    MAX_DOCUMENT_BYTES,
    ArrayDecoder,
    absent_chunks,
    attributes_in,
    attributes_key,
    check_chunk_count,
    check_metadata,
    check_unpacked,
    count_missing,
    metadata_key,
    parse_document,
)
from zarrcache.arrays.density import (
    as_density,
    check_electrons,
    electrons_differ,
    electrons_in,
    has_electrons,
)
from zarrcache.arrays.listing import (
    RELIST_WAITS_S,
    OriginArray,
    check_sizes,
    kept_changing,
    list_array,
    members_of_array,
    no_such_array,
    unstable_s,
    wait_until,
)
from zarrcache.arrays.sources import is_object, is_unconverted
from zarrcache.arrays.unconverted import decode_unconverted, decoding_bytes
from zarrcache.arrays.zip import ZippedStore
from zarrcache.errors import ArrayNotFoundError, IncompleteArrayError, SchemaError, ZarrCacheError
from zarrcache.origin import report_progress

if TYPE_CHECKING:
    import zarr
    from typing_extensions import Buffer

__all__ = [
    "Decoded",
    "Examined",
    "density_of_group",
    "examine_array",
    "fetch",
    "read_array",
    "unzipped",
]

logger = logging.getLogger(__name__)

#: A larger object may be silent for longer while it arrives: seconds per byte of 8 MiB/s.
_SLOW_S_PER_BYTE = 1 / (8 * 2**20)
#: Decoding a file is silent for this many seconds per byte, at 5 MB/s; json.gz takes 25 MB/s.
_DECODING_S_PER_BYTE = 1 / 5e6


@dataclass(frozen=True, slots=True)
class Decoded:
    """An array, and the findings about its objects.

    Attributes
    ----------
    array : ndarray
    missing_chunks : int
        Chunks of the grid that the origin does not have.
    attributes : mapping
        Of the store, or what a file says of its structure; empty if they were not read.
    zarr_format : int
        2 or 3; 0 of a file.
    others : mapping
        Other arrays of `OriginArray.also`, by name.
    source : str
        Digest of the objects it was decoded from.
    """

    array: np.ndarray[Any, np.dtype[Any]]
    missing_chunks: int
    attributes: dict[str, Any]
    zarr_format: int
    others: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    source: str = ""


class Examined(NamedTuple):
    """The description of an array by the documents of its store, without its chunks.

    Attributes
    ----------
    missing_chunks, chunks : int
        Chunks of the grid that the origin does not have, and all of the grid.
    attributes : mapping
        Of the store, if the array is a density.
    shape : tuple of int
        Of the array; empty if that is not known before it is decoded.
    """

    missing_chunks: int
    chunks: int
    attributes: Mapping[str, Any]
    shape: tuple[int, ...] = ()

    def electrons(self, array: str) -> float | None:
        """The number of electrons that the store states for the array of this name."""
        return electrons_in(self.attributes) if has_electrons(array) else None


def read_array(
    what: OriginArray,
    *,
    listed: list[ObjectInfo] | None = None,
    reserve: Callable[[int], object] | None = None,
) -> Decoded:
    """Fetch and decode one whole array: 1 LIST and 1 GET per object.

    The attributes of the store, which say the units of a density, are one of its objects. If they
    state a number of electrons, the mean of ``charge_density_total`` must agree.

    The result is never a mixture of two versions: each object must be the listed version, and the
    listing of a recently written store must stay the same until it is two seconds old. A reader
    that follows a writer waits that long.

    Parameters
    ----------
    what : OriginArray
    listed : list of ObjectInfo, optional
        The result of :func:`list_array`, if it was called just now.
    reserve : callable, optional
        Called once with the array's size in bytes before that memory is allocated. It may wait.

    Raises
    ------
    OriginNotFoundError, SchemaError
        As :func:`list_array`; ``SchemaError`` also for an array that is not of real numbers.
    IncompleteArrayError
        A listed object is gone or damaged, the store keeps changing, a chunk is absent, or the
        values disagree with the stated number of electrons.
    OriginError
        The origin cannot be reached.
    """
    for wait_s in (*RELIST_WAITS_S, None):
        listed = listed if listed is not None else list_array(what)
        source, pause_s = source_digest(listed), unstable_s(listed)
        stable_at_s = time.monotonic() + pause_s
        try:
            decoded = _fetch_and_decode(what, listed, reserve)
            if pause_s:
                wait_until(stable_at_s)
            if not pause_s or source_digest(list_array(what)) == source:
                return dataclasses.replace(_checked(what, decoded), source=source)
        except (IncompleteArrayError, SchemaError) as exc:
            if isinstance(exc, SchemaError) and not (pause_s and is_unconverted(what.store)):
                raise  # a file that is being copied reads as one that is cut short
            # Changed since it was listed, incomplete, or damaged? A new listing shows a change,
            # once the writer has had the time to go on.
            wait_until(stable_at_s)
            if source_digest(list_array(what)) == source:
                raise
        reserve = None  # the memory of the next try replaces that of this one
        if wait_s is None:
            break
        logger.info("%s is being written; listing it again in %.1f s", what.store_url, wait_s)
        time.sleep(wait_s)
        listed = None
    raise kept_changing(what.store_url)


def _fetch_and_decode(
    what: OriginArray, listed: list[ObjectInfo], reserve: Callable[[int], object] | None
) -> Decoded:
    """Fetch the listed objects of an array and decode them."""
    sizes = [o.size_bytes for o in listed]
    check_sizes(sizes, what.store_url)
    report_progress(max(sizes, default=0) * _SLOW_S_PER_BYTE)
    if is_unconverted(what.store):
        return _read_unconverted(what, listed, reserve)
    return (_read_zipped if is_object(what.store) else _read_store)(what, listed, reserve)


def _read_unconverted(
    what: OriginArray, listed: list[ObjectInfo], reserve: Callable[[int], object] | None
) -> Decoded:
    """Fetch and decode a source that is not a Zarr store."""
    if reserve is not None:
        reserve(sum(decoding_bytes(obj.key, obj.size_bytes) for obj in listed))
    files = {obj.key.rpartition("/")[2]: data for obj, data in what.origin.fetch(listed)}
    report_progress(_DECODING_S_PER_BYTE * sum(obj.size_bytes for obj in listed))
    units = what.units if what.uses_values else None
    values, attributes, others = decode_unconverted(
        files, what.store_url, what.array, units, what.also
    )
    return Decoded(values, 0, attributes, 0, others)


def _read_zipped(
    what: OriginArray, listed: list[ObjectInfo], reserve: Callable[[int], object] | None
) -> Decoded:
    """Fetch a zipped store and decode arrays of it."""
    zipped = unzipped(what, listed)
    decoded = _read_store(what, _members(what, zipped), reserve, zipped)
    others = {}
    for other in what.also:
        one = dataclasses.replace(what, array=other, fills=False, uses_values=False)
        with contextlib.suppress(SchemaError, IncompleteArrayError):  # its own read raises it
            others[other] = _read_store(one, _members(one, zipped), None, zipped).array
    return dataclasses.replace(decoded, others=others)


def unzipped(what: OriginArray, listed: Collection[ObjectInfo]) -> ZippedStore:
    """Fetch a zipped store."""
    ((_, data),) = what.origin.fetch(list(listed))
    return ZippedStore(data, what.store_url)


def fetch(
    what: OriginArray,
    objects: list[ObjectInfo],
    zipped: ZippedStore | None,
    most: Callable[[str], int | None] = lambda _: MAX_DOCUMENT_BYTES,
) -> Iterator[tuple[ObjectInfo, Buffer]]:
    """Fetch objects of a store from its origin, or unpack members of a zipped one.

    ``most``: see `ZippedStore.fetch`. Other objects are as large as listed.
    """
    if zipped is None:
        return what.origin.fetch(objects)
    return zipped.fetch(what.store, objects, most)


def _members(what: OriginArray, zipped: ZippedStore) -> list[ObjectInfo]:
    """The objects of an array of a zipped store."""
    found = members_of_array(what, zipped.objects(what.store))
    if not found:
        raise no_such_array(what.store_url, what.array, zipped.sizes)
    return found


def _read_store(
    what: OriginArray,
    listed: list[ObjectInfo],
    reserve: Callable[[int], object] | None,
    zipped: ZippedStore | None = None,
) -> Decoded:
    """Fetch the objects of an array, among them the attributes of its store, and decode them."""
    prefix = what.prefix
    keys = [o.key.removeprefix(prefix) for o in listed if o.key.startswith(prefix)]
    decoder = ArrayDecoder(keys, f"{what.store_url}/{what.array}", reserve, fills=what.fills)
    # The one object that is not of the array; see `list_array`.
    root = [o.key.removeprefix(f"{what.store}/") for o in listed if not o.key.startswith(prefix)]
    name = attributes_key(metadata_key(keys), root)
    attributes: dict[str, Any] = {}

    def most(key: str) -> int | None:
        is_of_array = key.startswith(prefix)
        return (
            decoder.most_bytes_of(key.removeprefix(prefix)) if is_of_array else MAX_DOCUMENT_BYTES
        )

    for obj, data in fetch(what, listed, zipped, most):
        if obj.key.startswith(prefix):
            decoder.add(obj.key.removeprefix(prefix), data)
        else:
            attributes = attributes_in(data, name, what.store_url)
    return Decoded(decoder.finish(), decoder.missing_chunks, attributes, FORMATS[name])


def _checked(what: OriginArray, decoded: Decoded) -> Decoded:
    """Refuse values that disagree with the electrons that their store states, and drop others."""
    url, values, attributes = what.store_url, decoded.array, decoded.attributes
    if has_electrons(what.array):
        check_electrons(values, attributes, url, what.array, decoded.missing_chunks)

    def is_sound(other: NDArray[Any]) -> bool:
        try:
            return not electrons_differ(other, attributes, url)
        except SchemaError:  # its units or its cell are unknown: its own read raises that
            return False

    others = {
        name: other
        for name, other in decoded.others.items()
        if not has_electrons(name) or is_sound(other)
    }
    return dataclasses.replace(decoded, others=others)


def examine_array(what: OriginArray, listed: Collection[ObjectInfo]) -> Examined:
    """Count the absent chunks of an array, and read the electrons that its store states.

    One GET of the array's metadata and one of the store's attributes; a zipped store is fetched
    whole.

    Parameters
    ----------
    what : OriginArray
    listed : collection of ObjectInfo
        The result of `list_array`.

    Raises
    ------
    OriginError, SchemaError, IncompleteArrayError
        The metadata cannot be read.
    """
    if is_unconverted(what.store):
        return Examined(0, 1, {})  # it is read as a whole or not at all
    zipped = unzipped(what, listed) if is_object(what.store) else None
    if zipped is not None:
        listed = _members(what, zipped)
    prefix, url = what.prefix, f"{what.store_url}/{what.array}"
    keys = [o.key.removeprefix(prefix) for o in listed if o.key.startswith(prefix)]
    name = metadata_key(keys)
    if name is None:
        raise SchemaError(f"{url} holds neither .zarray nor zarr.json; it is not a Zarr array.")
    documents = [o for o in listed if o.key == prefix + name or not o.key.startswith(prefix)]
    raw, attributes = b"", {}
    for obj, data in fetch(what, documents, zipped):
        if obj.key == prefix + name:
            raw = bytes(data)
        else:
            attributes = attributes_in(data, obj.key.removeprefix(f"{what.store}/"), what.store_url)
    try:
        document = parse_document(raw)
    except (ValueError, RecursionError) as exc:
        raise SchemaError(f"{url}/{name} is not JSON ({exc}); convert the store again.") from exc
    check_metadata(document, f"{url}/{name}")
    return Examined(*count_missing(document, keys), attributes, tuple(document["shape"]))


def density_of_group(
    group: zarr.Group, name: str, where: str, *, fills: bool = False, units: Units = "cell"
) -> NDArray[np.float32]:
    """Read one array of an open group through zarr itself, in ``units``.

    Absent chunks are counted if the group's store can be listed and the chunks are of equal size;
    zarr reads others as the fill value.

    Parameters
    ----------
    group : zarr.Group
    name : str
    where : str
        URL of the group, for messages.
    fills : bool
        Absent chunks have the fill value. False: they are an error.
    units : {"cell", "points", "volume"}

    Raises
    ------
    SchemaError
        The array is absent (those present are named), a group, not 3-D, or not of real numbers; or
        the store's units or its cell are unknown.
    IncompleteArrayError
        Zarr cannot decode it, chunks are absent and ``fills`` is False, or the mean disagrees with
        the number of electrons in the group's attributes.
    """
    import zarr
    from zarr.buffer import default_buffer_prototype

    if name not in group:
        raise ArrayNotFoundError(
            f"'{name}' not found in zarr store {where}. Available arrays: "
            f"{sorted(group.array_keys())}"
        )
    array = group[name]
    if not isinstance(array, zarr.Array):
        raise SchemaError(f"{where}/{name} is a group; a charge density is an array.")
    documents = array.metadata.to_buffer_dict(default_buffer_prototype())
    document = json.loads(
        documents[".zarray" if ".zarray" in documents else "zarr.json"].to_bytes()
    )
    check_metadata(document, f"{where}/{name}")
    check_unpacked(array.attrs.asdict(), f"{where}/{name}")
    check_chunk_count(document, f"{where}/{name}")
    try:
        missing, chunks = _missing_in(array, document)
        if missing and not fills:
            raise absent_chunks(f"{where}/{name}", missing, chunks)
        values = np.asarray(array[...])
    except (ZarrCacheError, MemoryError):
        raise
    except Exception as exc:  # zarr has no class of its own for errors of codecs
        raise IncompleteArrayError(
            f"{where}/{name} cannot be decoded by zarr ({type(exc).__name__}: {exc}). Convert the "
            "store again."
        ) from exc
    attributes = group.attrs.asdict()
    if has_electrons(name):
        check_electrons(values, attributes, where, name, missing)
    return as_density(values, where, name, units=units, attributes=attributes)


def _missing_in(array: zarr.Array[Any], document: Mapping[str, Any]) -> tuple[int, int]:
    """Count the absent chunks (or shards) of an open array, and all of its grid; one listing."""
    _, chunks = count_missing(document, ())
    try:
        found = array.nchunks_initialized if chunks else 0
    except NotImplementedError:  # a store that cannot be listed
        return 0, chunks
    if array.shards is not None:
        # All chunks of a shard count, also those outside of the array.
        found //= math.prod(map(operator.floordiv, array.shards, array.chunks))
    return chunks - found, chunks
