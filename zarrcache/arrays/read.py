"""One array read whole: everything fetched at once, decoded while it arrives, checked against the
listing.

The densities of a training run take this way on a miss.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from zarrcache._keys import ObjectInfo, source_digest
from zarrcache._limits import most_bytes
from zarrcache.arrays._settled import REWRITE_WAITS_S, unsettled_s, wait_until
from zarrcache.arrays.decode import ArrayDecoder
from zarrcache.arrays.zip import unzip
from zarrcache.errors import IncompleteArrayError, OriginNotFoundError, SchemaError
from zarrcache.origin import Origin

__all__ = ["Decoded", "check_sizes", "list_array", "no_such_array", "read_array"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Decoded:
    """An array and the digest of the objects it was decoded from."""

    array: np.ndarray[Any, np.dtype[Any]]
    source: str


def list_array(origin: Origin, store: str, array: str) -> list[ObjectInfo]:
    """The objects that an array is decoded from, or the one object of a zipped store: one LIST.

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
    # Attributes of the array say nothing of its values: not worth a request, and no reason to fetch
    # the values again.
    listed = [o for o in origin.list_objects(prefix) if o.key != f"{prefix}.zattrs"]
    if not listed:
        everything = origin.list_objects(f"{store}/")
        if not everything:
            raise OriginNotFoundError(f"{origin.url_of(store)} does not exist or is empty.")
        raise no_such_array(
            origin.url_of(store), array, (o.key.removeprefix(f"{store}/") for o in everything)
        )
    return listed


def read_array(
    origin: Origin,
    store: str,
    array: str,
    *,
    listed: list[ObjectInfo] | None = None,
    reserve: Callable[[int], object] | None = None,
) -> Decoded:
    """Fetch and decode one whole array: 1 LIST and 1 GET an object.

    Never a mixture of two versions: each object has to be the version that was listed, and a store
    that was written a moment ago has to be listed the same until two seconds after its newest
    object (see ``settled``). Who reads right behind a writer waits that long.

    Parameters
    ----------
    origin : Origin
    store : str
        Name below the origin, for example ``mp-1.zarr`` or ``mp-1.zarr.zip``.
    array : str
    listed : list of ObjectInfo, optional
        From :func:`list_array`, if it was just called.
    reserve : callable, optional
        Called once with the array's bytes, before they are taken. It may wait.

    Raises
    ------
    OriginNotFoundError, SchemaError
        As :func:`list_array`; also for an array that does not hold real numbers.
    IncompleteArrayError
        A listed object is gone or damaged, or the store keeps changing.
    OriginError
        The origin cannot be reached.
    """
    for wait_s in (*REWRITE_WAITS_S, None):
        listed = listed if listed is not None else list_array(origin, store, array)
        source, pause_s = source_digest(listed), unsettled_s(listed)
        settled_s = time.monotonic() + pause_s
        try:
            values = _fetch_and_decode(origin, store, array, listed, reserve)
            if pause_s:
                wait_until(settled_s)
            if not pause_s or source_digest(list_array(origin, store, array)) == source:
                return Decoded(values, source)
        except IncompleteArrayError:
            # Gone or changed since the listing, or damaged? Only in the first case the listing is
            # another one now.
            if source_digest(list_array(origin, store, array)) == source:
                raise
        reserve = None  # what is read again takes the place of what was read
        if wait_s is None:
            break
        logger.info("%s is being written; listing it again in %.1f s", origin.url_of(store), wait_s)
        time.sleep(wait_s)
        listed = None
    raise IncompleteArrayError(
        f"{origin.url_of(store)} kept changing while it was read. Wait until its writer has "
        "finished."
    )


def _fetch_and_decode(
    origin: Origin,
    store: str,
    array: str,
    listed: list[ObjectInfo],
    reserve: Callable[[int], object] | None,
) -> np.ndarray[Any, np.dtype[Any]]:
    check_sizes(
        [o.size_bytes for o in listed],
        origin.url_of(store if store.endswith(".zip") else f"{store}/{array}"),
    )
    if store.endswith(".zip"):
        ((_, data),) = origin.fetch(listed)
        return _decode_members(
            origin.url_of(store), array, unzip(data, origin.url_of(store), f"{array}/"), reserve
        )
    prefix = f"{store}/{array}/"
    decoder = ArrayDecoder(
        [o.key.removeprefix(prefix) for o in listed],
        lambda key: origin.url_of(prefix + key),
        reserve,
    )
    for obj, data in origin.fetch(listed):
        decoder.add(obj.key.removeprefix(prefix), data)
    return decoder.finish()


def _decode_members(
    url: str, array: str, members: dict[str, bytes], reserve: Callable[[int], object] | None
) -> np.ndarray[Any, np.dtype[Any]]:
    prefix = f"{array}/"
    chosen = {
        name.removeprefix(prefix): data for name, data in members.items() if name.startswith(prefix)
    }
    if not chosen:
        raise no_such_array(url, array, members)
    decoder = ArrayDecoder(chosen, lambda key: f"{url}/{prefix}{key}", reserve)
    for name, data in chosen.items():
        decoder.add(name, data)
    return decoder.finish()


def check_sizes(sizes: Collection[int], url: str) -> None:
    """Refuse objects that together are larger than any array, before they are fetched.

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
    """The error for an array that a store with these keys does not have; it names those that it
    has.
    """
    present = sorted(
        {
            key.split("/")[0]
            for key in keys
            if key.count("/") == 1 and key.endswith(("/.zarray", "/zarr.json"))
        }
    )
    return SchemaError(f"'{array}' not found in zarr store {url}. Available arrays: {present}")
