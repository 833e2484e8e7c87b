"""Find absent channels of materials, and channels on different grids, before anything is read.

`Absences`: a cached channel exists. Other known answers are stored with the listings of a
directory. The rest is asked of the origin, many stores at once, and stored. `CachedGrids` reads the
headers of entries, without a request.
"""

from __future__ import annotations

import heapq
import itertools
import logging
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from zarrcache._keys import (
    ROLES,
    Channel,
    Role,
    density_array,
    density_name,
    is_density,
    source_digest,
)
from zarrcache.arrays import OriginArray, is_fetched_whole, list_array
from zarrcache.cache import CONTENTS
from zarrcache.data.pairs import Complete
from zarrcache.data.splits import Split, first_ids
from zarrcache.disk import CACHE_FAULTS
from zarrcache.errors import ArrayNotFoundError, ConfigError, SchemaError, ZarrCacheError
from zarrcache.stats import LogOnce

if TYPE_CHECKING:
    from zarrcache.data.reader import ZarrS3Reader

__all__ = ["Absences", "CachedGrids", "common_grid"]

logger = logging.getLogger(__name__)

#: Of a density; None if it is absent or not cached.
Shape = tuple[int, ...] | None

#: LISTs in flight.
_LISTERS = 32
#: Sources that have to be fetched whole, above which a warning names the better way.
_FEW_FETCHED = 50
#: Materials for which the headers of entries are read.
_COMPARED = 1000


class Absences:
    """Finds the channels that materials of ``reader`` lack, and remembers the answers."""

    def __init__(self, reader: ZarrS3Reader) -> None:
        self._reader = reader
        self._log_once = LogOnce()
        #: Whether a channel of a material is absent, by channel and task id.
        self._known: dict[Channel, dict[str, bool]] = defaultdict(dict)
        #: The version of a file or zipped store that was found to lack an array.
        self._lacking: dict[tuple[Channel, str], str] = {}

    def find(
        self, task_ids: Iterable[str], *, skip_unreadable: bool = False
    ) -> dict[str, list[Channel]]:
        """Return the channels that materials lack, by task id, for materials that lack any.

        Sends a LIST per store and array with an unknown answer if stored listings are used,
        otherwise for all. Zipped stores and files are fetched, into the cache if there is one.

        Parameters
        ----------
        task_ids : iterable of str
        skip_unreadable : bool
            Leave out materials that cannot be read, instead of raising.

        Raises
        ------
        OriginError, SchemaError, IncompleteArrayError
            A material cannot be read.
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
        """Ids that lack a channel, by channel, from the stored contents of the directories.

        Sends no request if these are stored.
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
        """Whether materials lack a channel. Answers of the origin are stored."""
        role, array = channel
        found = self._look_up(channel, ids) if self._reader.trusts_entries else {}
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

    def _look_up(self, channel: Channel, ids: Sequence[str]) -> dict[str, bool]:
        """Whether materials lack a channel, as far as they are cached or that is stored."""
        found = dict.fromkeys(self._cached_ids(channel, ids), False)
        known = self._contents(channel.role).get(channel.array, {})
        names = self._reader.store_names(channel.role)
        for id_ in ids:
            if id_ not in found and (name := names.get(id_)) in known:
                found[id_] = not known[name]
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
        """Known stores of a directory that have an array (1) or lack it (0)."""
        stored = self._reader.cache.stored_listing(self._reader.origin(role), CONTENTS)
        return dict(stored) if isinstance(stored, dict) else {}

    def decide(self, task_ids: Sequence[str]) -> Complete:
        """Decide which materials can be trained on, by ``missing`` of the reader.

        Raises
        ------
        ConfigError
            Some lack a channel, and they are neither to be filled nor dropped.
        SchemaError
            The channels of some are cached and on different grids.
        """
        lacking = self.find(task_ids)
        missing = self._reader.if_missing
        if lacking:
            found = self._check(lacking, len(task_ids))
            becomes = "These channels are zero"
            if missing == "drop":
                becomes = "They are left out of the split"
            self._log_once.warning(
                "lacking", logger, "%s. %s (missing: %s).", found, becomes, missing
            )
        dropped = lacking if missing == "drop" else {}
        kept = tuple(id_ for id_ in task_ids if id_ not in dropped)
        uneven = self._reader.grids.uneven(kept)
        if uneven:
            first, *others = uneven.values()
            more = f" {len(others)} more have such channels: {first_ids([*uneven][1:])}."
            raise SchemaError(first + (more if others else ""))
        return Complete(kept, tuple(dropped))

    def refusal(self) -> str:
        """Return the error that the split would raise because materials lack channels.

        Empty if there is none, or if the channels of too few materials are known. Sends no request
        if the directories were listed.
        """
        if not self._asked():
            return ""
        try:
            ids: Sequence[str] = self._reader.stored_ids
            if self._reader.split_file is not None:
                split = self._reader.split_of_file(self._reader.split_file, decided=False)
                ids = [*split.train, *split.validation, *split.test]
            known: dict[str, list[Channel]] = defaultdict(list)
            for channel in self._asked():
                found = self._look_up(self._reader.column(*channel), ids) | self._known[channel]
                for id_ in ids:
                    if found.get(id_):
                        known[id_].append(channel)
            if known:
                self._check({id_: known[id_] for id_ in ids if id_ in known}, len(ids))
        except ConfigError as exc:
            return str(exc)
        return ""

    def _check(self, lacking: Mapping[str, Sequence[Channel]], count: int) -> str:
        """Raise if materials that lack a channel cannot be trained on; otherwise describe them.

        It raises the same if ``lacking`` grows.

        Parameters
        ----------
        lacking : mapping
            The channels that each lacks, by task id; not empty.
        count : int
            Number of all materials.

        Raises
        ------
        ConfigError
        """
        reader = self._reader
        missing, arrays = reader.if_missing, reader.arrays
        names = ", ".join(
            dict.fromkeys(
                f"{density_name(channel.array)} ({channel.role})"
                for channels in lacking.values()
                for channel in channels
            )
        )
        found = f"{len(lacking)} of {count} materials lack {names}: {first_ids([*lacking])}"
        where = " or ".join(dict.fromkeys(reader.origin(role).url for role in ROLES))
        by_all = set.intersection(*map(set, lacking.values())) if len(lacking) == count else set()
        unknown = {array for _, array in by_all if not is_density(array)}
        unknown -= {
            array for role in arrays for array in arrays[role] if Channel(role, array) not in by_all
        }
        if unknown:  # a misspelt name, which would not be noticed if it were filled with zeros
            raise ConfigError(
                f"None of the stores in {where} has an array {min(unknown)!r}. Correct the name in "
                "density_type; loading one of them lists its arrays."
            )
        one_side = ""
        if len({channel.role for channel in by_all}) == 1:
            one_side = (
                " If only input or label has it, write density_type: {data: ..., label: ...}."
            )
        if missing == "drop" and len(lacking) == count:
            raise ConfigError(
                f"{found}. They are in {where}. missing: drop would leave no material.{one_side}"
            )
        if missing == "error":
            raise ConfigError(
                f"{found}. They are in {where}.{one_side} Set missing: zero, which fills the "
                "channel with zeros, or missing: drop, which leaves these materials out; or remove "
                "them from "
                f"{reader.map_dir}. If they were converted again (zarrcache convert --diff), run "
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
                "missing: zero has no grid to fill (that of the other side may differ): "
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
                f"{len(damaged)} of {count} materials have no total density, which cannot be "
                f"filled with zeros: {first_ids(damaged)}. They are in {where}. Convert them "
                f"again, set missing: drop, or remove them from {reader.map_dir}."
            )
        return found


class CachedGrids:
    """The grids of the densities of ``reader`` that are cached.

    At most 1,000 materials at a time are compared, those first whose entries differ most in size:
    equal arrays may differ by some blocks, with other attributes or on a disk that compresses.
    """

    def __init__(self, reader: ZarrS3Reader) -> None:
        self._reader = reader
        self._has_compared = False

    def unequal(self, candidates: Iterable[str]) -> list[str]:
        """Ids whose input and label have different shapes, among the first 1,000 candidates.

        Parameters
        ----------
        candidates : iterable of str
            Ids whose entries differ in size.
        """
        found = []
        for id_ in itertools.islice(candidates, _COMPARED):
            if len({*self._shapes(id_, self._first)} - {None}) > 1:
                found.append(id_)
        return found

    def warn_once(self, split: Split) -> None:
        """Log, once, which materials have input and label on different grids."""
        if self._has_compared:
            return
        self._has_compared = True
        sizes = self._sizes()
        unequal = self.unequal(_differing(self._reader.stored_ids, sizes, self._first))
        if unequal:
            logger.warning(
                "%d of %d materials have input and label on different grids: %s. If the network "
                "needs equal grids, leave them out of the map.",
                len(unequal),
                len(split.train) + len(split.validation) + len(split.test),
                first_ids(unequal),
            )

    def pairs(
        self, task_ids: Iterable[str]
    ) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """Ids whose input and label are cached, with both shapes, the smallest entries first."""
        sizes = self._sizes()
        data, label = (sizes.get(channel, {}) for channel in self._first)
        ids = [id_ for id_ in task_ids if id_ in data and id_ in label]
        unequal = _differing(ids, sizes, self._first)
        smallest = heapq.nsmallest(_COMPARED, ids, key=data.__getitem__)
        chosen = dict.fromkeys([*unequal[: _COMPARED // 2], *smallest])
        for id_ in itertools.islice(chosen, _COMPARED):
            shapes = self._shapes(id_, self._first)
            if shapes[0] is not None and shapes[1] is not None:
                yield id_, shapes[0], shapes[1]

    def uneven(self, task_ids: Iterable[str]) -> dict[str, str]:
        """Errors of materials whose channels are on different grids, by task id."""
        several = {role: arrays for role, arrays in self._reader.arrays.items() if arrays[1:]}
        sizes = self._sizes() if several else {}
        ids = list(task_ids)
        found: dict[str, str] = {}
        for role, arrays in several.items():
            channels = [Channel(role, array) for array in arrays]
            for id_ in itertools.islice(_differing(ids, sizes, channels), _COMPARED):
                url = self._reader.origin(role).url_of(self._reader.store_name(id_, role))
                try:
                    common_grid(url, arrays, self._shapes(id_, channels))
                except SchemaError as exc:
                    found[id_] = str(exc)
        return found

    @property
    def _first(self) -> list[Channel]:
        """The first channels of input and label."""
        return [Channel(role, self._reader.arrays[role][0]) for role in ROLES]

    def _sizes(self) -> Mapping[Channel, Mapping[str, int]]:
        """Bytes of the entries, by channel and task id; none if reads ask the origin first."""
        if not self._reader.trusts_entries:
            return {}
        try:
            return self._reader.stored()
        except CACHE_FAULTS:  # counted and logged by the first read
            return {}

    def _shapes(self, task_id: str, channels: Sequence[Channel]) -> list[Shape]:
        cache = self._reader.cache
        return [cache.stored_shape(self._reader.key(task_id, *channel)) for channel in channels]


def _differing(
    task_ids: Iterable[str],
    sizes: Mapping[Channel, Mapping[str, int]],
    channels: Sequence[Channel],
) -> list[str]:
    """Ids whose entries of some channels differ in size, the largest difference first."""
    of_channels = [sizes.get(channel, {}) for channel in channels]
    differences = {}
    for id_ in task_ids:
        found = [of[id_] for of in of_channels if id_ in of]
        if len(set(found)) > 1:
            differences[id_] = max(found) - min(found)
    return sorted(differences, key=differences.__getitem__, reverse=True)


def common_grid(url: str, arrays: Sequence[str], shapes: Sequence[Shape]) -> tuple[int, int, int]:
    """The grid that the channels of a material share.

    Parameters
    ----------
    url : str
        Of the store, for messages.
    arrays : sequence of str
    shapes : sequence
        Of the arrays; None for those that are absent.

    Raises
    ------
    SchemaError
        They are on different grids, or all are absent.
    """
    known = {
        density_name(array): shape
        for array, shape in zip(arrays, shapes, strict=True)
        if shape is not None
    }
    grids = set(known.values())
    if len(grids) > 1:
        named = ", ".join(f"{name} has {'x'.join(map(str, n))}" for name, n in known.items())
        raise SchemaError(
            f"{url}: the channels of a sample are on different grids: {named}. Convert the store "
            "again, leave the material out of the map, or set density_type to one of them."
        )
    if not grids:
        raise ArrayNotFoundError(
            f"{url} has none of {', '.join(map(density_name, arrays))}, so the grid that missing: "
            "zero would fill is unknown. Leave the material out."
        )
    nx, ny, nz = grids.pop()
    return nx, ny, nz
