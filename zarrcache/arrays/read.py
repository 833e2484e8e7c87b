"""Read one density: 1 LIST, concurrent GETs, decoded as they arrive, checked against the listing.

Every density that the array tier does not have is read here, and those of open zarr groups.

S3 has no snapshots. The objects are guaranteed to be the listed versions, but a listing during an
overwrite mixes new and old objects, and one during a first upload is incomplete. The listing of a
recently written store must therefore stay the same until its newest object is two seconds old (S3
dates are in whole seconds, so the real margin may be one second). A writer that pauses longer than
that between two objects cannot be distinguished from one that has finished.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import ObjectInfo, source_digest
from zarrcache._units import most_bytes
from zarrcache.arrays.decode import (
    MAX_DOCUMENT_BYTES,
    ArrayDecoder,
    check_chunk_count,
    check_metadata,
    count_missing,
    is_array_key,
    metadata_key,
)
from zarrcache.arrays.zip import ZippedStore
from zarrcache.errors import (
    IncompleteArrayError,
    OriginNotFoundError,
    SchemaError,
    ZarrCacheError,
)
from zarrcache.origin import Origin, report_progress

if TYPE_CHECKING:
    import zarr

__all__ = [
    "Decoded",
    "as_density",
    "check_sizes",
    "count_nonfinite",
    "density_of_group",
    "list_array",
    "metadata_of",
    "missing_chunks",
    "no_such_array",
    "per_point",
    "read_array",
    "stable_listing",
]

logger = logging.getLogger(__name__)

#: Largest number of points that float32 represents exactly.
_EXACT_IN_FLOAT32 = 2**24

#: A store whose newest object is older than this counts as written.
_STABLE_S = 2.0
#: Objects whose ages differ by more than _SPREAD_S, the newest younger than _RECENT_S, look like a
#: store that is being overwritten, even if the server's clock is not ours.
_SPREAD_S = 5.0
_RECENT_S = 60.0
#: A larger object may be silent for longer while it arrives: seconds per byte of 8 MiB/s.
_SLOW_S_PER_BYTE = 1 / (8 * 2**20)
#: Pauses before a store that changed while it was read is listed again.
RELIST_WAITS_S = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True, slots=True)
class Decoded:
    """An array, and what its objects say about it.

    Attributes
    ----------
    array : ndarray
    source : str
        Digest of the objects it was decoded from.
    missing_chunks : int
        Chunks of the grid that the origin does not have.
    """

    array: np.ndarray[Any, np.dtype[Any]]
    source: str
    missing_chunks: int


def list_array(origin: Origin, store: str, array: str) -> list[ObjectInfo]:
    """List the objects of an array, or the one object of a zipped store: one LIST.

    Raises
    ------
    OriginNotFoundError
        There is no such store.
    SchemaError
        The store has no such array; the message names those it has.
    """
    if store.endswith(".zip"):
        listed = origin.list_objects(store)
        if not listed:
            raise OriginNotFoundError(f"{origin.url_of(store)} does not exist.")
        return listed
    prefix = f"{store}/{array}/"
    # Neither the attributes nor what an editor or macOS leaves beside the chunks affects the values:
    # not worth a request, nor a reason to refetch.
    listed = [o for o in origin.list_objects(prefix) if is_array_key(o.key.removeprefix(prefix))]
    if not listed:
        everything = origin.list_objects(f"{store}/")
        if not everything:
            raise OriginNotFoundError(f"{origin.url_of(store)} does not exist or is empty.")
        keys = (o.key.removeprefix(f"{store}/") for o in everything)
        raise no_such_array(origin.url_of(store), array, keys)
    return listed


def read_array(
    origin: Origin,
    store: str,
    array: str,
    *,
    listed: list[ObjectInfo] | None = None,
    source: str | None = None,
    reserve: Callable[[int], object] | None = None,
    fills: bool = False,
) -> Decoded:
    """Fetch and decode one whole array: 1 LIST and 1 GET per object.

    The result is never a mixture of two versions: each object must be the listed version, and the
    listing of a recently written store must stay the same until it is two seconds old. A reader
    that follows a writer waits that long.

    Parameters
    ----------
    origin : Origin
    store : str
        Name below the origin, for example ``mp-1.zarr`` or ``mp-1.zarr.zip``.
    array : str
    listed : list of ObjectInfo, optional
        The result of :func:`list_array`, if it was called just now.
    source : str, optional
        The digest of ``listed``, if it is known.
    reserve : callable, optional
        Called once with the array's size in bytes before that memory is allocated. It may wait.
    fills : bool
        Chunks of the grid that the origin does not have hold the fill value. False: they are an
        error (``cache.missing_chunks``).

    Raises
    ------
    OriginNotFoundError, SchemaError
        As :func:`list_array`; ``SchemaError`` also for an array that is not of real numbers.
    IncompleteArrayError
        A listed object is gone or damaged, the store keeps changing, or a chunk is absent.
    OriginError
        The origin cannot be reached.
    """
    for wait_s in (*RELIST_WAITS_S, None):
        listed = listed if listed is not None else list_array(origin, store, array)
        if source is None:
            source = source_digest(listed)
        pause_s = unstable_s(listed)
        stable_at_s = time.monotonic() + pause_s
        try:
            decoder = _fetch_and_decode(origin, store, array, listed, reserve, fills)
            values = decoder.finish()
            if pause_s:
                wait_until(stable_at_s)
            if not pause_s or source_digest(list_array(origin, store, array)) == source:
                return Decoded(values, source, decoder.missing_chunks)
        except IncompleteArrayError:
            # Changed since it was listed, incomplete, or damaged? Only a change shows in a new listing.
            if source_digest(list_array(origin, store, array)) == source:
                raise
        reserve = None  # the memory of the next try replaces that of this one
        if wait_s is None:
            break
        logger.info("%s is being written; listing it again in %.1f s", origin.url_of(store), wait_s)
        time.sleep(wait_s)
        listed = source = None
    raise _kept_changing(origin.url_of(store))


def stable_listing(list_store: Callable[[], list[ObjectInfo]], url: str) -> list[ObjectInfo]:
    """Call ``list_store`` until its result is stable, and return that.

    Raises
    ------
    IncompleteArrayError
        The store keeps changing for longer than about ten seconds.
    """
    listed = list_store()
    for _ in range(len(RELIST_WAITS_S) + 1):
        pause_s = unstable_s(listed)
        if not pause_s:
            return listed
        wait_until(time.monotonic() + pause_s)
        before, listed = listed, list_store()
        if source_digest(listed) == source_digest(before):
            return listed
        logger.info("%s is being written; waiting", url)
    raise _kept_changing(url)


def unstable_s(listed: Collection[ObjectInfo]) -> float:
    """Seconds for which a listing must stay the same before it is trusted; 0.0 if it is now."""
    now_s = time.time()
    ages = [now_s - o.modified_s for o in listed if o.modified_s]
    if not ages:
        return 0.0
    if min(ages) < _STABLE_S:
        # Ages are negative if the server's clock is ahead.
        return min(_STABLE_S, _STABLE_S - min(ages))
    return _STABLE_S if min(ages) < _RECENT_S and max(ages) - min(ages) > _SPREAD_S else 0.0


def wait_until(end_s: float) -> None:
    """Sleep until ``time.monotonic()`` is ``end_s``."""
    time.sleep(max(0.0, end_s - time.monotonic()))


def _kept_changing(url: str) -> IncompleteArrayError:
    return IncompleteArrayError(
        f"{url} kept changing while it was read. Wait until its writer has finished."
    )


def _fetch_and_decode(
    origin: Origin,
    store: str,
    array: str,
    listed: list[ObjectInfo],
    reserve: Callable[[int], object] | None,
    fills: bool,
) -> ArrayDecoder:
    """A decoder to which every object of the array was added."""
    if store.endswith(".zip"):
        url = origin.url_of(store)
        check_sizes([o.size_bytes for o in listed], url)
        _report_sizes(listed)
        ((_, data),) = origin.fetch(listed)
        return _decode_zipped(ZippedStore(data, url), array, url, reserve, fills)
    prefix, url = f"{store}/{array}/", origin.url_of(f"{store}/{array}")
    check_sizes([o.size_bytes for o in listed], url)
    _report_sizes(listed)
    keys = [o.key.removeprefix(prefix) for o in listed]
    decoder = ArrayDecoder(keys, url, reserve, fills=fills)
    for obj, data in origin.fetch(listed):
        decoder.add(obj.key.removeprefix(prefix), data)
    return decoder


def _report_sizes(listed: list[ObjectInfo]) -> None:
    report_progress(max((o.size_bytes for o in listed), default=0) * _SLOW_S_PER_BYTE)


def _decode_zipped(
    store: ZippedStore,
    array: str,
    url: str,
    reserve: Callable[[int], object] | None,
    fills: bool,
) -> ArrayDecoder:
    """Decode the members of one array, unpacked one at a time."""
    prefix = f"{array}/"
    keys = [name.removeprefix(prefix) for name in store.sizes if name.startswith(prefix)]
    if not keys:
        raise no_such_array(url, array, store.sizes)
    decoder = ArrayDecoder(keys, f"{url}/{array}", reserve, fills=fills)
    described_by = metadata_key(keys)
    if described_by is not None:
        decoder.add(described_by, store.read(prefix + described_by, MAX_DOCUMENT_BYTES))
        for key in keys:
            most = decoder.most_bytes_of(key)
            if key != described_by and most != 0:
                decoder.add(key, store.read(prefix + key, most))
    return decoder


def check_sizes(sizes: Collection[int], url: str) -> None:
    """Refuse objects that together exceed any array, before they are fetched.

    Raises
    ------
    SchemaError
    """
    if sum(sizes) > most_bytes():
        raise SchemaError(
            f"{url} lists objects of {sum(sizes)} bytes, the largest of {max(sizes)}; more than "
            f"{most_bytes()} are refused."
        )


def no_such_array(url: str, array: str, keys: Iterable[str]) -> SchemaError:
    """The error for a store with these keys but without ``array``; it names the arrays present."""
    present = sorted(
        {
            key.split("/")[0]
            for key in keys
            if key.count("/") == 1 and key.endswith(("/.zarray", "/zarr.json"))
        }
    )
    return SchemaError(f"'{array}' not found in zarr store {url}. Available arrays: {present}")


def missing_chunks(
    origin: Origin, store: str, array: str, listed: Collection[ObjectInfo]
) -> tuple[int, int]:
    """Count the chunks of an array that the origin does not have, and all of its grid.

    One GET of the array's metadata; a zipped store is fetched whole.

    Parameters
    ----------
    origin, store, array
        As in `read_array`.
    listed : collection of ObjectInfo
        The result of `list_array`.

    Raises
    ------
    OriginError, SchemaError, IncompleteArrayError
        The metadata cannot be read.
    """
    prefix, url = f"{store}/{array}/", origin.url_of(f"{store}/{array}")
    if store.endswith(".zip"):
        ((_, data),) = origin.fetch(list(listed))
        prefix = f"{array}/"
        zipped = ZippedStore(data, origin.url_of(store))
        keys = [name.removeprefix(prefix) for name in zipped.sizes if name.startswith(prefix)]
    else:
        by_key = {obj.key.removeprefix(prefix): obj for obj in listed}
        keys = list(by_key)
    name = metadata_key(keys)
    if name is None:
        raise SchemaError(f"{url} holds neither .zarray nor zarr.json; it is not a Zarr array.")
    if store.endswith(".zip"):
        raw = zipped.read(prefix + name, MAX_DOCUMENT_BYTES)
    else:
        ((_, data),) = origin.fetch([by_key[name]])
        raw = bytes(data)
    try:
        document = json.loads(raw)
    except ValueError as exc:
        raise SchemaError(f"{url}/{name} is not JSON ({exc}); convert the store again.") from exc
    check_metadata(document, f"{url}/{name}")
    return count_missing(document, keys)


def as_density(
    array: NDArray[Any], url: str, name: str, *, is_per_point: object = False
) -> NDArray[np.float32]:
    """Check that an array is 3-D and cast it to float32, without a copy if it is float32.

    With ``is_per_point`` also divide it by its number of points, in place if it is writable: then
    no other code uses it, and a second array of its size would cost as much as the division.

    Raises
    ------
    SchemaError
    """
    if array.ndim != 3 or 0 in array.shape:
        raise SchemaError(
            f"{url} {name} has the shape {array.shape}; a charge density is 3-D. Convert the store "
            "again."
        )
    values = array.astype(np.float32, copy=False)
    if not is_per_point:
        return values
    return per_point(values, out=values if values.flags.writeable else None)


def count_nonfinite(values: NDArray[Any]) -> int:
    """Number of values that are NaN or infinite. 0.1 ms for 5 MB."""
    is_finite = np.isfinite(values)
    return 0 if is_finite.all() else int(values.size - np.count_nonzero(is_finite))


def per_point(
    values: NDArray[np.float32], *, out: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Divide by the number of grid points, in ``out`` or a new array.

    Bit-equal to ``values /= np.prod(gridsize)`` of a float32 array.
    """
    if values.size <= _EXACT_IN_FLOAT32:
        # numpy divides float32 by int64 in float64 and rounds; float32 division gives the same
        # bits in a third of the time.
        return np.divide(values, np.float32(values.size), out=out)
    return np.divide(
        values,
        np.float64(values.size),
        out=np.empty_like(values) if out is None else out,
        dtype=np.float64,
        casting="same_kind",
    )


def density_of_group(group: zarr.Group, name: str, where: str) -> NDArray[np.float32]:
    """Read one array of an open group through zarr itself.

    Raises
    ------
    SchemaError
        The array is absent (those present are named), a group, not 3-D, or not of real numbers.
    IncompleteArrayError
        Zarr cannot decode it.
    """
    import zarr
    from zarr.buffer import default_buffer_prototype

    if name not in group:
        raise SchemaError(
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
    check_chunk_count(document, f"{where}/{name}")
    try:
        values = np.asarray(array[...])
    except ZarrCacheError:
        raise
    except Exception as exc:  # zarr has no class of its own for errors of codecs
        raise IncompleteArrayError(
            f"{where}/{name} cannot be decoded by zarr ({type(exc).__name__}: {exc}). Convert the "
            "store again."
        ) from exc
    return as_density(values, where, name)


def metadata_of(group: zarr.Group) -> dict[str, Any]:
    """Merge the attributes ``metadata`` and ``structure`` of a group; either may be a JSON string.

    Raises
    ------
    SchemaError
        One is a string that is not JSON, or ``metadata`` is not a mapping.
    """
    attributes = group.attrs.asdict()
    metadata: dict[str, Any] = {}
    if "metadata" in attributes:
        decoded = _decoded(attributes["metadata"], f"{group.store_path} attribute 'metadata'")
        if not isinstance(decoded, dict):
            raise SchemaError(
                f"{group.store_path} attribute 'metadata' is {decoded!r}; it has to be a mapping. "
                "Convert the store again."
            )
        metadata.update(decoded)
    if "structure" in attributes:
        metadata["structure"] = _decoded(
            attributes["structure"], f"{group.store_path} attribute 'structure'"
        )
    return metadata


def _decoded(value: object, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as exc:
        raise SchemaError(f"{where} is not JSON ({exc}). Convert the store again.") from exc
