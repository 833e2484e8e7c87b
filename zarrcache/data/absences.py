"""Which channels the materials of a reader lack, before anything is read of them, and whether they
can be trained on.

What is cached is there. What else is known is stored with the listings of a directory. The rest is
asked of the origin, many stores at once, and stored.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from zarrcache._keys import (
    Channel,
    Missing,
    Role,
    density_array,
    density_name,
    is_density,
    source_digest,
)
from zarrcache.arrays import OriginArray, is_fetched_whole, list_array
from zarrcache.cache import CONTENTS
from zarrcache.data.splits import first_ids
from zarrcache.disk import CACHE_FAULTS
from zarrcache.errors import ArrayNotFoundError, ConfigError, ZarrCacheError

if TYPE_CHECKING:
    from zarrcache.data.reader import ZarrS3Reader

__all__ = ["Absences", "check_lacking"]

logger = logging.getLogger(__name__)

#: LISTs in flight.
_LISTERS = 32
#: Sources that have to be fetched whole, above which a warning names the better way.
_FEW_FETCHED = 50


class Absences:
    """Which channels the materials of ``reader`` lack. Remembers what it has found out."""

    def __init__(self, reader: ZarrS3Reader) -> None:
        self._reader = reader
        #: Whether a channel of a material is absent, by channel and task id.
        self._known: dict[Channel, dict[str, bool]] = defaultdict(dict)
        #: The version of a file or zipped store that was found to lack an array.
        self._lacking: dict[tuple[Channel, str], str] = {}

    def find(
        self, task_ids: Iterable[str], *, skip_unreadable: bool = False
    ) -> dict[str, list[Channel]]:
        """Which channels the materials lack, by task id; those that lack none are left out.

        Sends a LIST per store and array of which nothing is known, if stored listings are used, or
        of all. Zipped stores and files are fetched, into the cache if there is one.

        Parameters
        ----------
        task_ids : iterable of str
        skip_unreadable : bool
            Leave out the materials of which it cannot be found out, instead of raising.

        Raises
        ------
        OriginError, SchemaError, IncompleteArrayError
            It cannot be found out.
        """
        ids = list(task_ids)
        lacking: dict[str, list[Channel]] = defaultdict(list)
        for channel in self._asked():
            of_channel = self._known[channel]
            unknown = [id_ for id_ in ids if id_ not in of_channel]
            if unknown:
                column = self._reader.column(*channel)
                of_channel.update(self._find_absent(column, unknown, skip_unreadable))
            for id_ in ids:
                if of_channel.get(id_):
                    lacking[id_].append(channel)
        return {id_: lacking[id_] for id_ in ids if id_ in lacking}

    def known(self) -> dict[str, list[Channel]]:
        """As `find` for all materials, as far as it was found out or is stored.

        Sends no request if the directories were listed.
        """
        stored = self.stored()
        lacking: dict[str, list[Channel]] = defaultdict(list)
        for channel in self._asked():
            of_channel = self._known[channel]
            column = self._reader.column(*channel)
            ids = stored.get(column, set()) - of_channel.keys()
            if ids:
                ids = ids.difference(self._cached_ids(column, list(ids)))
            ids |= {id_ for id_, is_absent in of_channel.items() if is_absent}
            for id_ in sorted(ids):
                lacking[id_].append(channel)
        return dict(lacking)

    def _asked(self) -> list[Channel]:
        """The channels that materials may lack without being damaged."""
        total = (density_array("total"),)
        return [one for one in self._reader.reads if self._reader.arrays[one.role] != total]

    def lacks(self, task_id: str, channel: Channel) -> bool:
        """Whether a material lacks a channel.

        If each read is compared with the origin, a channel that was absent is looked up again,
        because it may have been added since.
        """
        of_channel = self._known[channel]
        if task_id not in of_channel:
            self.find([task_id])
        elif of_channel[task_id] and self._asks_each_time:
            of_channel.update(self._ask(self._reader.column(*channel), [task_id], False))
        return of_channel.get(task_id, False)

    @property
    def _asks_each_time(self) -> bool:
        config = self._reader.cache_config
        return config is None or config.revalidate == "epoch"

    def stored(self) -> dict[Channel, set[str]]:
        """Ids that lack a channel, by channel, as far as the stored contents of the directories
        say. Sends no request if these are stored.
        """
        found = {}
        for channel in self._reader.channels:
            if self._reader.is_optional(*channel):
                known = self._contents(channel.role).get(channel.array, {})
                names = self._reader.store_names(channel.role)
                found[channel] = {id_ for id_, name in names.items() if known.get(name) == 0}
        return found

    def note(self, found: Mapping[Channel, Mapping[str, bool]]) -> None:
        """Store which channels materials lack (True) or have, for runs without the origin."""
        for channel in self._asked():
            self._known[channel].update(found.get(self._reader.column(*channel), {}))
        for role in self._reader.roles:
            of_role = {array: ids for (of, array), ids in found.items() if of == role and ids}
            if not of_role:
                continue
            contents, names = self._contents(role), self._reader.store_names(role)
            for array, ids in of_role.items():
                known = {names[id_]: int(not lacks) for id_, lacks in ids.items() if id_ in names}
                contents[array] = {**contents.get(array, {}), **known}
            self._reader.cache.store_listing(self._reader.origin(role), CONTENTS, contents)

    def _find_absent(
        self, channel: Channel, ids: Sequence[str], skip_unreadable: bool
    ) -> dict[str, bool]:
        """Whether materials lack a channel; what only the origin knows is stored."""
        role, array = channel
        found: dict[str, bool] = {}
        if self._reader.trusts_entries:
            found = dict.fromkeys(self._cached_ids(channel, ids), False)
            known = self._contents(role).get(array, {})
            names = self._reader.store_names(role)
            for id_ in ids:
                if id_ not in found and (name := names.get(id_)) in known:
                    found[id_] = not known[name]
        unknown = [id_ for id_ in ids if id_ not in found]
        if unknown:
            fetched = sum(is_fetched_whole(self._reader.store_name(id_, role)) for id_ in unknown)
            if fetched > _FEW_FETCHED:
                logger.warning(
                    "reading %d files and zipped stores of %s to find out which have %s; "
                    "`zarrcache warm` does that in several processes and keeps the result",
                    fetched,
                    self._reader.origin(role).url,
                    density_name(array),
                )
            asked = self._ask(channel, unknown, skip_unreadable)
            self.note({channel: asked})
            found |= asked
        return found

    def _cached_ids(self, channel: Channel, ids: Sequence[str]) -> Collection[str]:
        """Those of ``ids`` whose density is in the array tier."""
        try:
            if len(ids) == 1:
                key = self._reader.key(ids[0], *channel)
                return ids if self._reader.cache.lookup(key.digest) is not None else ()
            return self._reader.stored(channel.array)[channel].keys() & ids
        except CACHE_FAULTS:  # counted and logged by the first read
            return ()

    def _ask(self, channel: Channel, ids: Sequence[str], skip_unreadable: bool) -> dict[str, bool]:
        """Ask the origin whether materials lack a channel, many at once."""
        role, array = channel
        origin = self._reader.origin(role)

        def is_absent(id_: str) -> bool | None:
            store, source = self._reader.store_name(id_, role), ""
            what = OriginArray(origin, store, array, uses_values=False)
            try:
                if not is_fetched_whole(store):
                    list_array(what)
                    return False
                if self._asks_each_time:  # fetched again only in another version
                    source = source_digest(list_array(what))
                    if self._lacking.get((channel, store)) == source:
                        return True
                self._reader.ensure(id_, role, array)
            except ArrayNotFoundError:
                if source:
                    self._lacking[channel, store] = source
                return True
            except ZarrCacheError:
                if not skip_unreadable:
                    raise
                return None
            return False

        with ThreadPoolExecutor(_LISTERS) as pool:
            try:
                asked = zip(ids, pool.map(is_absent, ids), strict=True)
                return {id_: absent for id_, absent in asked if absent is not None}
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _contents(self, role: Role) -> dict[str, dict[str, int]]:
        """Which stores of a directory have an array (1) or lack it (0), where that is known."""
        stored = self._reader.cache.stored_listing(self._reader.origin(role), CONTENTS)
        return dict(stored) if isinstance(stored, dict) else {}


def check_lacking(
    lacking: Mapping[str, Sequence[Channel]],
    count: int,
    missing: Missing,
    arrays: Mapping[Role, Sequence[str]],
    directories: Iterable[str],
    map_file: str | os.PathLike[str],
) -> str:
    """Raise if materials that lack a channel cannot be trained on; else name them.

    Of more materials than ``lacking`` has, it would raise the same.

    Parameters
    ----------
    lacking : mapping
        The channels that each lacks, by task id.
    count : int
        Materials in all.
    missing : {"error", "zero", "drop"}
    arrays : mapping
        Those of each role.
    directories, map_file
        For messages.

    Raises
    ------
    ConfigError
    """
    if not lacking:
        return ""
    names = ", ".join(
        dict.fromkeys(
            f"{density_name(channel.array)} ({channel.role})"
            for channels in lacking.values()
            for channel in channels
        )
    )
    found = f"{len(lacking)} of {count} materials lack {names}: {first_ids([*lacking])}"
    where = " or ".join(dict.fromkeys(directories))
    by_all = set.intersection(*map(set, lacking.values())) if len(lacking) == count else set()
    unknown = {array for _, array in by_all if not is_density(array)}
    unknown -= {
        array for role in arrays for array in arrays[role] if Channel(role, array) not in by_all
    }
    if unknown:  # misspelt, which as zeros would not be noticed
        raise ConfigError(
            f"no material has an array {min(unknown)!r}. They are in {where}. Correct the name "
            "in density_type; reading one of them names the arrays that it has."
        )
    one_side = ""
    if len({channel.role for channel in by_all}) == 1:
        one_side = " Where only input or label has it, write density_type: {data: ..., label: ...}."
    if missing == "drop" and len(lacking) == count:
        raise ConfigError(
            f"{found}. They are in {where}. missing: drop would leave no material.{one_side}"
        )
    if missing == "error":
        raise ConfigError(
            f"{found}. They are in {where}.{one_side} Set missing: zero, which fills the "
            "channel with zeros, or missing: drop, which leaves these materials out; or remove "
            "them from "
            f"{map_file}. If they were converted again (zarrcache convert --diff), run "
            "`zarrcache warm`."
        )
    if missing == "drop":
        return found
    empty = [
        id_
        for id_, channels in lacking.items()
        if any(
            {channel.array for channel in channels if channel.role == role} >= {*of_role}
            for role, of_role in arrays.items()
        )
    ]
    if empty:
        raise ConfigError(
            f"{len(empty)} of {count} materials have no channel at all of input or label, so "
            "the grid that missing: zero would fill is unknown (the other side's may differ): "
            f"{first_ids(empty)}. They are in {where}. Set missing: drop, or add total to "
            "density_type of that side."
        )
    total = density_array("total")
    damaged = [
        id_
        for id_, channels in lacking.items()
        if any(channel.array == total for channel in channels)
    ]
    if damaged:
        raise ConfigError(
            f"{len(damaged)} of {count} materials have no total density, which is zero in no "
            f"material: {first_ids(damaged)}. They are in {where}. Convert them again, set "
            f"missing: drop, or remove them from {map_file}."
        )
    return found
