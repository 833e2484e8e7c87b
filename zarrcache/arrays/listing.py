"""List the objects of one array, and wait until the listing of a recent store is stable.

S3 has no snapshots. The objects are guaranteed to be the listed versions, but a listing during an
overwrite mixes new and old objects, and one during a first upload is incomplete. The listing of a
recently written store must therefore stay the same until its newest object is two seconds old (S3
dates are in whole seconds, so the real margin may be one second). A writer that pauses longer than
that between two objects cannot be distinguished from one that has finished.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from zarrcache._keys import ObjectInfo, Units, cached_property, density_array, source_digest
from zarrcache._units import most_bytes
from zarrcache.arrays.decode import (
    FORMATS,
    attributes_key,
    check_attributes_size,
    is_array_key,
    metadata_key,
)
from zarrcache.arrays.sources import is_object, kind_of
from zarrcache.arrays.spin import other_kind_of_spin, other_spin
from zarrcache.arrays.unconverted import members_in
from zarrcache.errors import (
    ArrayNotFoundError,
    IncompleteArrayError,
    OriginNotFoundError,
    SchemaError,
)
from zarrcache.origin import Origin

__all__ = [
    "RELIST_WAITS_S",
    "OriginArray",
    "check_sizes",
    "kept_changing",
    "list_array",
    "members_of_array",
    "no_such_array",
    "objects_of",
    "stable_listing",
    "unstable_s",
    "wait_until",
]

logger = logging.getLogger(__name__)

#: A store whose newest object is older than this counts as written.
_STABLE_S = 2.0
#: Objects whose ages differ by more than _SPREAD_S, the newest younger than _RECENT_S, look like a
#: store that is being overwritten, even if the server's clock is not ours.
_SPREAD_S = 5.0
_RECENT_S = 60.0
#: Pauses before a store that changed while it was read is listed again.
RELIST_WAITS_S = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class OriginArray:
    """One array of a store at its origin, and how it is read.

    Attributes
    ----------
    origin : Origin
    store : str
        Name below the origin, for example ``mp-1.zarr`` or ``mp-1.zarr.zip``.
    array : str
        Name of the array in the store.
    units : {"cell", "points", "volume"}
        In which the values will be used; the array is not converted.
    fills : bool
        Chunks of the grid that the origin does not have hold the fill value. False: they are an
        error (``cache.missing_chunks``).
    also : collection of str
        Names of arrays to decode too if they are fetched anyway, with a zipped store or a file. One
        that is absent, damaged or has absent chunks is left out of ``others``.
    uses_values : bool
        The store's attributes say the units of a density, its number of electrons and its cell, so
        they are listed and read with each array: other attributes are another density. That takes a
        LIST of the whole store. False: only the array's own objects matter.
    """

    origin: Origin
    store: str
    array: str
    units: Units = "cell"
    fills: bool = False
    also: Collection[str] = ()
    uses_values: bool = True

    @cached_property
    def store_url(self) -> str:
        """URL of the store."""
        return self.origin.url_of(self.store)

    @cached_property
    def prefix(self) -> str:
        """Prefix of the keys of a store of many objects."""
        return f"{self.store}/{self.array}/"


def list_array(what: OriginArray) -> list[ObjectInfo]:
    """List the objects of an array, or the one object of a zipped store or a file: one LIST.

    With ``uses_values`` they include the document with the attributes of its store, if there is
    one.

    Raises
    ------
    OriginNotFoundError
        There is no such store.
    ArrayNotFoundError
        The store has no such array; the message names those it has.
    IncompleteArrayError
        A store without such an array keeps changing.
    SchemaError
        The attributes are too large to be read.
    """
    origin, store, prefix = what.origin, what.store, what.prefix
    if is_object(store):
        listed = origin.list_objects(store)
        if not listed:
            raise OriginNotFoundError(f"{what.store_url} does not exist.")
        return listed
    if kind_of(store) == "directory":
        return _list_directory(origin, store)
    everything = origin.list_objects(f"{store}/" if what.uses_values else prefix)
    listed = members_of_array(what, everything)
    if not listed:
        # A store that is being written may get it next: only a stable listing shows absence.
        everything = stable_listing(lambda: origin.list_objects(f"{store}/"), what.store_url)
        if not everything:
            raise OriginNotFoundError(f"{what.store_url} does not exist or is empty.")
        listed = members_of_array(what, everything)
    if not listed:
        keys = (o.key.removeprefix(f"{store}/") for o in everything)
        raise no_such_array(what.store_url, what.array, keys)
    return listed


def objects_of(what: OriginArray, objects: Iterable[ObjectInfo]) -> list[ObjectInfo]:
    """Select the objects of an array, as in `list_array`, from those of its store or zip file.

    The array's own attributes, and files of editors or macOS beside the chunks, do not affect
    the values. They are left out, so they cost no request and cause no refetch.
    """
    return list(objects) if is_object(what.store) else members_of_array(what, objects)


def members_of_array(what: OriginArray, objects: Iterable[ObjectInfo]) -> list[ObjectInfo]:
    """`objects_of` a directory store, or of the members of a zipped one as if in a directory.

    The metadata is the first: it says how to decode the others.
    """
    by_key = {obj.key: obj for obj in objects}
    keys = [key.removeprefix(what.prefix) for key in by_key if key.startswith(what.prefix)]
    found = list(filter(is_array_key, keys))
    described_by = metadata_key(found)
    found.sort(key=lambda key: key != described_by)
    listed = [by_key[what.prefix + key] for key in found]
    if found and what.uses_values:
        root = [name for name in FORMATS if f"{what.store}/{name}" in by_key]
        name = attributes_key(described_by, root)
        attributes = by_key.get(f"{what.store}/{name}")
        if attributes is not None:
            check_attributes_size(attributes.size_bytes, name, what.store_url)
            listed.append(attributes)
    return listed


def _list_directory(origin: Origin, store: str) -> list[ObjectInfo]:
    """List the files of a material's directory that its density is read from."""
    prefix = f"{store}/"
    by_name = {obj.key.removeprefix(prefix): obj for obj in origin.list_objects(prefix)}
    if not by_name:
        raise OriginNotFoundError(f"{origin.url_of(store)} does not exist or is empty.")
    return [by_name[name] for name in members_in(by_name.keys(), origin.url_of(store))]


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
    """The error for a store with these keys but without ``array``; it names the arrays present.

    `ArrayNotFoundError`, unless the store has a spin density of another kind.
    """
    present = sorted(
        {
            key.split("/")[0]
            for key in keys
            if key.count("/") == 1 and key.endswith(("/.zarray", "/zarr.json"))
        }
    )
    other = other_spin(array, present)
    if other is not None:
        return other_kind_of_spin(url, array, other)
    spin = (
        " `zarrcache convert --diff` writes it for spin-polarized calculations."
        if array == density_array("diff")
        else ""
    )
    return ArrayNotFoundError(
        f"'{array}' not found in zarr store {url}. Available arrays: {present}{'.' if spin else ''}"
        f"{spin}"
    )


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
    raise kept_changing(url)


def unstable_s(listed: Collection[ObjectInfo]) -> float:
    """Seconds for which a listing must stay the same before it is trusted; 0.0 if it is now."""
    now_s = time.time()  # of a file; the clock of a server may be another one
    ages = [(o.listed_s or now_s) - o.modified_s for o in listed if o.modified_s]
    if not ages:
        return 0.0
    if min(ages) < _STABLE_S:
        # Ages are negative if the clock was set back.
        return min(_STABLE_S, _STABLE_S - min(ages))
    return _STABLE_S if min(ages) < _RECENT_S and max(ages) - min(ages) > _SPREAD_S else 0.0


def wait_until(end_s: float) -> None:
    """Sleep until ``time.monotonic()`` is ``end_s``."""
    time.sleep(max(0.0, end_s - time.monotonic()))


def kept_changing(url: str) -> IncompleteArrayError:
    """The error for a store that is written for longer than a reader waits."""
    return IncompleteArrayError(
        f"{url} kept changing while it was read. Wait until its writer has finished."
    )
