"""``ZarrS3Reader`` finds the store of a task id; `ReadThrough` reads it.

zarr is imported only when it is needed: it takes 0.1 s of the 0.45 s in which the look-ahead
process starts.
"""

from __future__ import annotations

import heapq
import itertools
import logging
import math
import os
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from zarrcache import _pages
from zarrcache._keys import (
    FLOAT32,
    ROLES,
    ArrayKey,
    Channel,
    ObjectInfo,
    Role,
    cached_property,
    check_task_id,
    density_array,
    density_name,
    safe_repr,
    units_of,
)
from zarrcache._units import format_bytes
from zarrcache.arrays import (
    StoreAttributes,
    cell_volume,
    choose,
    electrons_in,
    ends_of,
    metadata_in,
    metadata_of,
    several_sources,
    sources_of,
)
from zarrcache.cache import AttributesThrough, Cache, OnFlaws, Outcome, ReadThrough
from zarrcache.config import CacheConfig, DataConfig
from zarrcache.data.absences import Absences
from zarrcache.data.observers import Read, ReadObserver
from zarrcache.data.pairs import PairReader, only_our_errors
from zarrcache.data.sequences import Density
from zarrcache.data.splits import Split, first_ids
from zarrcache.disk import CACHE_FAULTS, LazyGrid, LazyStack
from zarrcache.errors import (
    ArrayNotFoundError,
    ConfigError,
    OriginNotFoundError,
    SchemaError,
)
from zarrcache.origin import Origin, make_s3fs
from zarrcache.stats import Counters, SharedSet, Stats, html_table

if TYPE_CHECKING:
    import s3fs
    import zarr

__all__ = ["ZarrS3Reader", "distinct_directories", "open_reader"]

logger = logging.getLogger(__name__)

_GRIDS_COMPARED = 1000
_Grid = TypeVar("_Grid", NDArray[np.float32], LazyGrid)
_OUTCOMES: tuple[Outcome, ...] = ("hit", "miss", "bypass")


class ZarrS3Reader(PairReader):
    """Pairs of charge densities (input and label) from Zarr stores or unconverted files.

    >>> cache = {"dir": "/scratch/me"}
    >>> reader = ZarrS3Reader(
    ...     "s3://b/input", "s3://b/label", "map.json.gz", "GGA", True, 0.8, cache=cache
    ... )
    >>> (data, label, gs_data, gs_label), test_sets = reader.data_split()

    The source of a density is ``{data_dir}/{task_id}.zarr`` or ``.zarr.zip``; a file as the
    Materials Project or VASP wrote it, ``.json.gz`` or ``.CHGCAR``, each perhaps compressed by
    gzip, bzip2 or xz; or a directory of numpy files as electrai keeps QM9. Files are decoded into
    the array tier once, and give the same bits as converted ones. Creating a reader sends no
    request. A reader can be pickled, and works on both sides of a fork.

    Parameters
    ----------
    data_dir, label_dir : str or Path
        Each a directory or ``s3://bucket/prefix``; one may be local and the other on S3.
    map_dir : str or Path
        JSON or JSON.gz file ``{functional: [task_id, ...]}``.
    functional : str
    normalize : bool, "points" or "volume"
        ``True`` and ``"points"`` divide by the number of grid points; the values then sum up to
        the number of electrons. ``"volume"`` divides by the volume of the cell, from the attribute
        ``structure`` of the store: electrons per cubic angstrom, computed in float64 and rounded
        once.
    train_fraction : float
        0 to 1, or a number of materials: ``train_size`` of scikit-learn's ``train_test_split``;
        1.0 leaves no test set.
    random_state : int
    density_type : str, sequence of str, or mapping
        ``total`` or ``diff``, the arrays ``charge_density_total`` and ``charge_density_diff`` of a
        store, or the name of another array, for example of the ELF. Several, ``["total", "diff"]``,
        are the channels of a sample, in this order. ``{"data": "total", "label": ["total",
        "diff"]}`` where input and label differ.
    s3_kwargs : dict, optional
        As ``s3fs.S3FileSystem`` takes them.
    cache : CacheConfig or mapping, optional
        None: everything comes from the origin each time.
    source : str or sequence of str
        Kinds of sources that are read, the preferred ones first: ``zarr``, ``zarr.zip``,
        ``json.gz``, ``CHGCAR``, ``directory`` (one per material, with ``CHGCAR`` or ``rho_22.npy``
        in it). ``auto`` is all of them, in this order, and of directories those of QM9.
    split_file : path, optional
        JSON of task ids or of positions in the map: ``{"train": [...], "validation": [...],
        "test": [...]}``. Replaces ``train_fraction`` and ``random_state``.
    missing : {"error", "zero", "drop"}
        What becomes of materials that lack a channel, decided before they are split: an error that
        names them; zeros in that channel; or they are left out of the split.

    Raises
    ------
    ConfigError
        ``density_type`` or ``missing`` has another value; ``cache`` (also its token file or lower
        layer) or ``s3_kwargs`` cannot be used.

    Attributes
    ----------
    s3fs : s3fs.S3FileSystem
        Created from ``s3_kwargs`` if a directory is on S3.
    """

    _unit = "store"

    @staticmethod
    def _location(value: str | os.PathLike[str]) -> str | Path:
        text = os.fspath(value)
        if "://" in text and not text.startswith("file://"):
            return text
        return Path(text.removeprefix("file://"))

    def _prepare(self, cache: CacheConfig | None) -> None:
        directories = self.data_dir, self.label_dir
        self.use_s3 = any(str(directory).startswith("s3://") for directory in directories)
        self._counters = Counters(shared=True, directory=None if cache is None else cache.dir)
        self._cache = Cache(cache, self._counters)
        self._origins: dict[Role, Origin] = {
            "data": self._cache.origin(str(self.data_dir), self.s3_kwargs),
            "label": self._cache.origin(str(self.label_dir), self.s3_kwargs),
        }
        self._roles = ROLES[: len(distinct_directories(self._origins))]
        self._checked = SharedSet()
        self._store_names: dict[Role, dict[str, str]] = {}
        self._observers: tuple[ReadObserver, ...] = ()
        self._has_compared_grids = False
        if self._cache.remote is not None:
            self._cache.remote.check()
        if self.use_s3:
            # Like the original reader: wrong arguments are reported here, without a request.
            _ = self.s3fs

    def _forget_channels(self) -> None:
        super()._forget_channels()
        self._read_throughs: dict[tuple[Role, object], list[ReadThrough]] = {}
        self._absences = Absences(self)

    @cached_property
    def s3fs(self) -> s3fs.S3FileSystem:
        """The filesystem of ``s3_kwargs``, for the user's own work.

        The reader does not use it: its clients are opened in each process.
        """
        return make_s3fs(self.s3_kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "s3fs"}

    def __repr__(self) -> str:
        config = self._cache.config
        cache = f", cache={str(config.dir)!r})" if config is not None else ")"
        return super().__repr__().removesuffix(")") + cache

    def _repr_html_(self) -> str:
        """As a table, in notebooks. Sends no request."""
        config = self._cache.config
        rows: dict[str, object] = {
            "input": self._urls()[0],
            "label": self._urls()[1],
            "map": self.map_dir,
            "functional": self.functional,
            "density_type": self.density_type,
        }
        if self._known_ids:
            rows["materials"] = f"{len(self.stored_ids):,}, {len(self.missing):,} missing"
        rows["cache"] = "none" if config is None else config.dir
        if config is not None:
            rows["limit"] = format_bytes(config.limit)
        return html_table(type(self).__name__, rows) + self.stats._repr_html_()

    # -- materials

    def store_names(self, role: Role) -> Mapping[str, str]:
        """Name of the source of each task id in one directory, as listed last.

        ``mp-1.zarr``, for example, or ``mp-1.json.gz``. The first call sends one LIST per 1,000
        names; with ``revalidate: never`` it uses the stored listing if there is
        one.

        Raises
        ------
        OriginError
            The directory cannot be listed.
        """
        if role not in self._store_names:
            stored = self._stored_names(role) if self.trusts_entries else None
            self._store_names[role] = self._list(role) if stored is None else stored
        return self._store_names[role]

    def split(self, *, decided: bool = True) -> Split:
        """As in the base class.

        A warning names pairs that are cached and have input and label on different grids. Once
        per reader, from pairs whose entries differ in size.
        """
        split = super().split(decided=decided)
        if self.trusts_entries and not self._has_compared_grids:
            self._has_compared_grids = True
            try:
                sizes = self.stored()
            except CACHE_FAULTS:  # counted and logged by the first read
                return split
            data, label = (sizes[channel] for channel in self._first_channels)
            both = data.keys() & label.keys()
            unequal = self.unequal_grids(
                id_ for id_ in self.stored_ids if id_ in both and data[id_] != label[id_]
            )
            if unequal:
                logger.warning(
                    "%d of %d materials have input and label on different grids: %s. If the "
                    "network needs equal grids, leave them out of the map.",
                    len(unequal),
                    len(split.train) + len(split.validation) + len(split.test),
                    first_ids(unequal),
                )
        return split

    def unequal_grids(self, candidates: Iterable[str]) -> list[str]:
        """Ids whose cached input and label have different shapes.

        Parameters
        ----------
        candidates : iterable of str
            Ids whose entries differ in size. The headers of the first 1,000 are read: equal arrays
            may take different room on a disk that compresses.
        """
        found = []
        for id_ in itertools.islice(candidates, _GRIDS_COMPARED):
            shapes = {self._cache.stored_shape(self.key(id_, *one)) for one in self._first_channels}
            if len(shapes - {None}) > 1:
                found.append(id_)
        return found

    def cached_shapes(
        self, task_ids: Iterable[str]
    ) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """Ids whose input and label are cached, with both shapes, the smallest entries first.

        Sends no request. Reads the headers of 1,000 materials, those of grids that may differ
        before the others.
        """
        if not self.trusts_entries:
            return
        try:
            sizes = self.stored()
        except CACHE_FAULTS:  # counted and logged by the first read
            return
        data, label = (sizes[channel] for channel in self._first_channels)
        ids = [id_ for id_ in task_ids if id_ in data and id_ in label]
        unequal = [id_ for id_ in ids if data[id_] != label[id_]]
        smallest = heapq.nsmallest(_GRIDS_COMPARED, ids, key=data.__getitem__)
        chosen = dict.fromkeys([*unequal[: _GRIDS_COMPARED // 2], *smallest])
        for id_ in itertools.islice(chosen, _GRIDS_COMPARED):
            shapes = [self._cache.stored_shape(self.key(id_, *one)) for one in self._first_channels]
            if shapes[0] is not None and shapes[1] is not None:
                yield id_, shapes[0], shapes[1]

    def relist(self) -> None:
        """List both directories at the origin now, and store the listings for offline runs."""
        self._forget_ids()
        self._store_names = {role: self._list(role) for role in ROLES}

    def relist_unless_known(self, task_ids: Iterable[str]) -> None:
        """Like ``relist``, but use stored listings if they have a store for all ``task_ids``."""
        wanted = set(task_ids)
        known: dict[Role, dict[str, str]] = {}
        for role in ROLES:
            names = self._stored_names(role)
            if names is None or not names.keys() >= wanted:
                self.relist()
                return
            known[role] = names
        self._forget_ids()
        self._store_names = known

    def _forget_ids(self) -> None:
        self._known_ids.clear()
        self._complete.clear()
        self._absences = Absences(self)

    @property
    def roles(self) -> tuple[Role, ...]:
        """``("data", "label")``, or ``("data",)`` if both are the same directory."""
        return self._roles

    @property
    def channels(self) -> tuple[Channel, ...]:
        """What a sample is made of; each array once if both directories are the same."""
        places = {self.column(role, array): None for role, array in self.reads}
        return tuple(places)

    def column(self, role: Role, array: str) -> Channel:
        """The channel of the same entries: input and label of one directory share them."""
        return Channel(role if len(self.roles) > 1 else "data", array)

    def is_optional(self, role: Role, array: str) -> bool:
        """Whether materials may lack a channel: not the total density alone, as ever, nor where
        it would be zero.
        """
        total = (density_array("total"),)
        if self._fills and array in total:
            return False
        return any(
            array in arrays and arrays != total and self.column(of, array).role == role
            for of, arrays in self._arrays.items()
        )

    @property
    def absences(self) -> Absences:
        """Which channels the materials lack."""
        return self._absences

    def lacks(self, task_id: str, role: Role, array: str) -> bool:
        """As in the base class, found out if it is not known."""
        if not self._fills or array == density_array("total"):  # which is zero in no material
            return False
        return self._absences.lacks(task_id, Channel(role, array))

    def find_lacking(self, task_ids: Iterable[str]) -> dict[str, list[Channel]]:
        """As in the base class; see `Absences.find`."""
        return self._absences.find(task_ids)

    def known_lacking(self) -> dict[str, list[Channel]]:
        """As in the base class; see `Absences.known`."""
        return self._absences.known()

    @property
    def _first_channels(self) -> tuple[Channel, Channel]:
        data, label = (Channel(role, self._arrays[role][0]) for role in ROLES)
        return data, label

    def uneven_channels(self, task_ids: Iterable[str]) -> dict[str, str]:
        """Errors of materials whose channels are cached and on different grids, by task id.

        Sends no request. Reads the headers of up to 1,000 materials whose entries differ in size.
        """
        several = [role for role in ROLES if len(self._arrays[role]) > 1]
        if not several or not self.trusts_entries:
            return {}
        try:
            stored = self.stored()
        except CACHE_FAULTS:  # counted and logged by the first read
            return {}
        ids = list(task_ids)
        found: dict[str, str] = {}
        for role in several:
            sizes = [stored[Channel(role, array)] for array in self._arrays[role]]
            candidates = (id_ for id_ in ids if len({of.get(id_) for of in sizes} - {None}) > 1)
            for id_ in itertools.islice(candidates, _GRIDS_COMPARED):
                shapes = [
                    self._cache.stored_shape(self.key(id_, role, array))
                    for array in self._arrays[role]
                ]
                try:
                    self._one_shape(self.store_name(id_, role), role, shapes)
                except SchemaError as exc:
                    found[id_] = str(exc)
        return found

    @property
    def trusts_entries(self) -> bool:
        """Whether entries and stored listings are used without asking the origin."""
        config = self._cache.config
        return config is not None and config.revalidate == "never"

    def _stored_names(self, role: Role) -> dict[str, str] | None:
        stored = self._cache.stored_listing(self._origins[role], "")
        return self._chosen(role, stored) if isinstance(stored, dict) else None

    def _list(self, role: Role) -> dict[str, str]:
        origin = self._origins[role]
        # All kinds are stored: other configs may read others.
        found = sources_of(origin.list_names())
        self._cache.store_listing(origin, "", found)
        return self._chosen(role, found)

    def _chosen(self, role: Role, found: Mapping[str, str | list[str]]) -> dict[str, str]:
        """The sources that are read. Which they are where an id has several is said once."""
        url = self._origins[role].url
        if several := several_sources(url, found, self._kinds):
            self._log_once.warning(("sources", url), logger, "%s", several)
        return choose(found, self._kinds)

    def _urls(self) -> tuple[str, str]:
        return self._origins["data"].url, self._origins["label"].url

    @property
    def lock_settings(self) -> dict[str, Any]:
        """The settings that decide about samples and their values, as in a lock file."""
        config = self._cache.config
        encoding = FLOAT32 if config is None else config.arrays.encoding
        return {**super().lock_settings, "encoding": encoding}

    # -- one density

    def _load(self, task_id: str, role: Role) -> Density:
        if self._observers:
            return self._load_observed(task_id, role)
        channels = self._densities(role)
        if len(channels) == 1:  # as in `_read`, with fewer calls: this is the path of a warm hit
            values, _ = channels[0].read(self.store_name(task_id, role))
            nx, ny, nz = values.shape
            return values.reshape(-1), (nx, ny, nz)
        return self._read(task_id, role)[0]

    def _read(self, task_id: str, role: Role) -> tuple[Density, Outcome]:
        """All channels of one role."""
        channels = self._densities(role)
        if len(channels) == 1:
            values, outcome = channels[0].read(self.store_name(task_id, role))
            return _flat(values), outcome
        grids, shape, outcome = self._each(task_id, role, ReadThrough.read)
        values = _pages.empty((len(grids), *shape), np.float32)
        for channel, values_of in zip(values, grids, strict=True):
            channel[...] = 0 if values_of is None else values_of
        return (values.reshape(len(grids), -1), shape), outcome

    def _each(
        self,
        task_id: str,
        role: Role,
        read: Callable[[ReadThrough, str], tuple[_Grid, Outcome]],
    ) -> tuple[list[_Grid | None], tuple[int, int, int], Outcome]:
        """What ``read`` gives for each channel, None for those that are filled with zeros; the grid
        that they share; and the outcome that cost most.
        """
        store = self.store_name(task_id, role)
        grids: list[_Grid | None] = []
        outcomes = []
        for array, densities in zip(self._arrays[role], self._densities(role), strict=True):
            if self.lacks(task_id, role, array):
                grids.append(None)
                continue
            grid, outcome = read(densities, store)
            grids.append(grid)
            outcomes.append(outcome)
        shape = self._one_shape(store, role, [None if g is None else g.shape for g in grids])
        return grids, shape, max(outcomes, key=_OUTCOMES.index)

    def _one_shape(
        self, store: str, role: Role, shapes: Sequence[tuple[int, ...] | None]
    ) -> tuple[int, int, int]:
        """The grid that the channels of a material share.

        Raises
        ------
        SchemaError
            They are on different grids, or all are absent.
        """
        known = {
            density_name(array): shape
            for array, shape in zip(self._arrays[role], shapes, strict=True)
            if shape is not None
        }
        grids = set(known.values())
        url = self._origins[role].url_of(store)
        if len(grids) > 1:
            named = ", ".join(f"{name} has {'x'.join(map(str, n))}" for name, n in known.items())
            raise SchemaError(
                f"{url}: the channels of a sample are on different grids: {named}. Convert the "
                "store again, leave the material out of the map, or set density_type to one of "
                "them."
            )
        if not grids:
            raise ArrayNotFoundError(
                f"{url} has none of {', '.join(map(density_name, self._arrays[role]))}, so the "
                "grid that missing: zero would fill is unknown. Leave the material out."
            )
        nx, ny, nz = grids.pop()
        return nx, ny, nz

    def _open(self, task_id: str, role: Role) -> LazyGrid | LazyStack:
        if not self._observers:
            return self._opened(task_id, role)[0]
        start_s = time.perf_counter()
        for observer in self._observers:
            observer.read_started(task_id, role)
        grid, outcome = self._opened(task_id, role)
        nbytes = 4 * math.prod(grid.shape)
        read = Read(task_id, role, outcome, nbytes, time.perf_counter() - start_s)
        for observer in self._observers:
            observer.read_finished(read)
        return grid

    def _opened(self, task_id: str, role: Role) -> tuple[LazyGrid | LazyStack, Outcome]:
        channels = self._densities(role)
        if len(channels) == 1:
            return channels[0].open(self.store_name(task_id, role))
        grids, shape, outcome = self._each(task_id, role, ReadThrough.open)
        zeros = LazyGrid(np.broadcast_to(np.float32(0), shape))
        stack = LazyStack(tuple(zeros if grid is None else grid for grid in grids))
        return stack, outcome

    def _densities(self, role: Role) -> list[ReadThrough]:
        """The read paths of the channels. Created once per setting of the attributes."""
        key = role, self.normalize
        found = self._read_throughs.get(key)
        if found is None:
            found = self._read_throughs[key] = [
                ReadThrough(
                    self._cache,
                    self._checked,
                    self._origins[role],
                    array,
                    units=units_of(self.normalize),
                    siblings=self._siblings(role, array),
                )
                for array in self._arrays[role]
            ]
        return found

    def _siblings(self, role: Role, array: str) -> tuple[str, ...]:
        """The other arrays that are read from the same stores."""
        own = self.column(role, array)
        return tuple(one.array for one in self.channels if one.role == own.role and one != own)

    def _density(self, role: Role, array: str | None = None) -> ReadThrough:
        """The read path of one channel. Default: the first one."""
        if array is None:
            return self._densities(role)[0]
        for of in (role, *ROLES):  # one directory may be that of both
            if array in self._arrays[of]:
                return self._densities(of)[self._arrays[of].index(array)].at(self._origins[role])
        raise ConfigError(
            f"{safe_repr(array)} is not among the arrays of this reader: {self._arrays}."
        )

    def load_channel(self, task_id: str, role: Role, array: str) -> Density | None:
        """One channel of a density, as `load` returns those of one channel; None if it is absent
        and filled with zeros.

        Raises
        ------
        As `load`.
        """
        with only_our_errors(f"{task_id} ({role})"):
            if self.lacks(task_id, role, array):
                return None
            values, _ = self._density(role, array).read(self.store_name(task_id, role))
            if self._lock is not None:
                self._lock.check_values(task_id, self.locked_as(role, array), values)
            return _flat(values)

    def _load_observed(self, task_id: str, role: Role) -> Density:
        start_s = time.perf_counter()
        for observer in self._observers:
            observer.read_started(task_id, role)
        (values, gridsize), outcome = self._read(task_id, role)
        read = Read(task_id, role, outcome, values.nbytes, time.perf_counter() - start_s)
        for observer in self._observers:
            observer.read_finished(read)
        return values, gridsize

    def observe(self, observer: ReadObserver) -> None:
        """Call ``observer`` for each density that is read or opened from now on.

        DataLoader workers get the observers that the reader has when they start.
        """
        self._observers = (*self._observers, observer)

    def unobserve(self, observer: ReadObserver) -> None:
        """Stop calling ``observer``."""
        self._observers = tuple(one for one in self._observers if one is not observer)

    def ensure(
        self,
        task_id: str,
        role: Role,
        array: str | None = None,
        *,
        reserve: Callable[[int], object] | None = None,
        on_flaws: OnFlaws | None = None,
        keeps_attributes: bool = False,
    ) -> tuple[Outcome, int]:
        """Bring one density in the array tier up to date with the origin.

        ``zarrcache warm`` does this for each density.

        Parameters
        ----------
        task_id : str
        role : {"data", "label"}
        array : str, optional
            Of a channel. Default: that of the first one.
        reserve : callable, optional
            Called before memory is allocated, with the bytes of the objects, then with those of the
            array. It may wait.
        on_flaws : callable, optional
            Called if the density has absent chunks, or values that are NaN or infinite.
        keeps_attributes : bool
            Also keep the attributes of its store. If the density is here already, or comes from
            another node, and they are not, they are one or two more GETs.

        Returns
        -------
        outcome : {"hit", "miss", "bypass"}
            It was fresh; it was fetched and stored; or it was fetched and not admitted.
        nbytes : int
            Size of the decoded density.

        Raises
        ------
        As ``load``.
        """
        with only_our_errors(f"{task_id} ({role})"):
            store = self.store_name(task_id, role)
            found: list[StoreAttributes] = []
            density = self._density(role, array)
            values, outcome = density.read(
                store,
                revalidate=True,
                reserve=reserve,
                on_flaws=on_flaws,
                on_attributes=found.append,
            )
            if keeps_attributes and outcome != "bypass":
                AttributesThrough(self._cache, [density]).keep(store, *found)
            channel = self.column(role, array or self._arrays[role][0])
            if self._lock is not None:
                for one in self.reads:
                    if self.column(*one) == channel:
                        self._lock.check_values(task_id, self.locked_as(*one), values)
        if outcome != "hit" and self._cache.arrays is not None:
            # Metadata and crops have to be of the same version, so list the store again.
            self._cache.forget_listing(self._origins[role], store)
        return outcome, values.nbytes

    def key(self, task_id: str, role: Role, array: str | None = None) -> ArrayKey:
        """Identity of a density's entry in the array tier. Default: of the first channel."""
        return self._density(role, array).key(self.store_name(task_id, role))

    def origin(self, role: Role) -> Origin:
        """The directory of one role."""
        return self._origins[role]

    def stored(
        self, array: str | None = None, *, in_float32: bool = False
    ) -> dict[Channel, dict[str, int]]:
        """Bytes on disk of the densities in the array tier, by channel and task id, as last listed.

        Parameters
        ----------
        array : str, optional
            Only the channels of this array.
        in_float32 : bool
            Those in float32, which the next read encodes if ``cache.arrays.encoding`` is another.
        """
        found: dict[Channel, dict[str, int]] = {}
        arrays = [channel.array for channel in self.reads] if array is None else [array]
        for name in dict.fromkeys(arrays):
            found |= self._stored_of(name, in_float32=in_float32)
        return found

    def _stored_of(self, name: str, *, in_float32: bool = False) -> dict[Channel, dict[str, int]]:
        """`stored` of one array."""
        roles = [role for role in ROLES if name in self._arrays[role]]
        listings = {role: (self._origins[role], self.store_names(role)) for role in roles}
        array = self._density(roles[0], name).stored_as
        if in_float32 and (exact := ArrayKey("", "", array).exact) is not None:
            array = exact.array
        of_roles = self._cache.stored_densities(array, listings)
        found = {Channel(role, name): sizes for role, sizes in of_roles.items()}
        if len(self.roles) == 1:  # `channels` has it under the first role
            found[Channel("data", name)] = of_roles[roles[0]]
        return found

    def listing(self, task_id: str, role: Role, array: str | None = None) -> list[ObjectInfo]:
        """List one density at the origin now: keys, sizes, ETags. One LIST.

        Default: of the first channel.
        """
        return self._density(role, array).listing(self.store_name(task_id, role))

    @property
    def stats(self) -> Stats:
        """Counters of all reads so far, in this process and in its DataLoader workers."""
        return self._counters.total()

    @property
    def cache(self) -> Cache:
        """The tiers of the cache."""
        return self._cache

    @property
    def cache_config(self) -> CacheConfig | None:
        """The ``cache`` block; None without a cache."""
        return self._cache.config

    def store_name(self, task_id: str, role: Role) -> str:
        """Name of a source below its directory: ``mp-1.zarr``, or ``mp-1.json.gz``.

        Raises
        ------
        OriginNotFoundError
            There is no such store.
        """
        names = self.store_names(role)
        try:
            name = names.get(task_id)
        except TypeError:  # not hashable: refused below
            name = None
        if name is not None:  # a listed name, so it is not a path
            return name
        url = self._origins[role].url_of(check_task_id(task_id))
        others = ends_of(self._kinds[1:])
        other = f", nor does another source of it ({others})" if others else ""
        raise OriginNotFoundError(
            f"{url}.{self._kinds[0]} does not exist{other}. If it is new, run `zarrcache warm` to "
            "list the origin again."
        )

    # -- the users' methods on groups

    def read_zarr_store(self, zarr_path: str | os.PathLike[str]) -> zarr.Group:
        """Open a store, read-only, through the byte tier. Only its metadata is loaded.

        Raises
        ------
        OriginNotFoundError
            There is no such store (a ``FileNotFoundError``).
        SchemaError
            zarr cannot open it.
        """
        from zarrcache.cache import group_of, store_at

        store = store_at(zarr_path, self._cache, self.s3_kwargs)
        stored = self._attributes_at(store.origin).stored(store.name)
        if stored is not None and stored.zarr_format:
            store.know_attributes(stored)
        return group_of(store)

    def read_charge_density(self, zarr_store: zarr.Group) -> Density:
        """The density of an open store, as ``load``; the first channel of the input.

        Parameters
        ----------
        zarr_store : zarr.Group
            From ``read_zarr_store``, or any other Zarr group.

        Raises
        ------
        SchemaError
            A ``ValueError``: the array is absent (those present are named), not 3-D, or not of real
            numbers.
        IncompleteArrayError
            An object is damaged, a chunk is absent (unless ``cache.missing_chunks`` is ``fill``),
            or the mean disagrees with the number of electrons in the store's metadata.
        """
        from zarrcache.cache import CachedStore

        _check_group(zarr_store, "read_charge_density", "load(task_id, 'data')")
        store, densities = zarr_store.store, self._density("data")
        where = store.url if isinstance(store, CachedStore) else str(zarr_store.store_path)
        with only_our_errors(where):
            if isinstance(store, CachedStore) and not zarr_store.path:
                through = densities.at(store.origin)
                values, _ = through.read(store.name)
                store.density_source = through.last_source(store.name)
                if store.attribute_sources is not None:
                    attributes = AttributesThrough(self._cache, [through])
                    attributes.check(store.name, store.attribute_sources, store.density_source)
                return _flat(values)
            return _flat(densities.of_group(zarr_store, where))

    def get_metadata(self, zarr_store: zarr.Group) -> dict[str, Any]:
        """Attribute ``metadata`` of a store, merged with ``structure``.

        Both may be JSON strings or JSON itself.

        Raises
        ------
        IncompleteArrayError
            The density of the store is cached in another version, or was read from
            ``zarr_store`` in another one.
        """
        from zarrcache.cache import CachedStore, group_of

        _check_group(zarr_store, "get_metadata", "metadata(task_id)")
        store = zarr_store.store
        with only_our_errors(f"metadata of {zarr_store.store_path}"):
            if isinstance(store, CachedStore) and not zarr_store.path:
                attributes = self._attributes_at(store.origin)
                if store.known is not None:
                    sources: Collection[str] = store.known.sources
                else:
                    if store.listed is None:  # it was pickled, and is listed again
                        zarr_store = group_of(store)
                    sources = attributes.sources_in(store.name, store.listed or ())
                attributes.check(store.name, sources, store.density_source)
                store.attribute_sources = sources
            return metadata_of(zarr_store)

    # -- attributes

    def metadata(self, task_id: str, role: Role = "data") -> dict[str, Any]:
        """Attribute ``metadata`` of a material, merged with ``structure``, as ``get_metadata``.

        If the density is cached, and its attributes were read before or stored by ``zarrcache
        warm``, this sends no request; otherwise one or two LISTs and a GET.

        Raises
        ------
        SchemaError
            They are not JSON, or ``metadata`` is not a mapping.
        IncompleteArrayError
            The store has changed since its density was read or cached.
        PymatgenMissingError
            The source is a CHGCAR file, and pymatgen is not installed.
        OriginError
        """
        with only_our_errors(f"metadata of {task_id} ({role})"):
            origin, store = self._origins[role], self.store_name(task_id, role)
            return metadata_in(self._attributes(role, store), origin.url_of(store))

    def structure(self, task_id: str, role: Role = "data") -> dict[str, Any]:
        """The structure of a material: ``pymatgen.core.Structure.as_dict()``.

        Requests as for ``metadata``.

        Raises
        ------
        SchemaError
            The source has no structure.
        """
        found = self.metadata(task_id, role).get("structure")
        if not isinstance(found, dict):
            url = self._origins[role].url_of(self.store_name(task_id, role))
            raise SchemaError(
                f"{url} has no structure among its attributes. Convert it again, or train without "
                "structures."
            )
        return found

    def volume(self, task_id: str, role: Role = "data") -> float:
        """Volume of the cell of a material, in cubic angstrom. Requests as for ``metadata``.

        Raises
        ------
        SchemaError
            There is no structure, it has no lattice, or the lattice has no volume.
        """
        with only_our_errors(f"volume of {task_id} ({role})"):
            origin, store = self._origins[role], self.store_name(task_id, role)
            return cell_volume(self._attributes(role, store), origin.url_of(store))

    def electrons(self, task_id: str, role: Role = "data") -> float | None:
        """Number of electrons that the metadata of a material states; None if it states none.

        Requests as for ``metadata``.
        """
        with only_our_errors(f"electrons of {task_id} ({role})"):
            return electrons_in(self._attributes(role, self.store_name(task_id, role)))

    def _attributes(self, role: Role, store: str) -> dict[str, Any]:
        own = self.column(role, self._arrays[role][0]).role
        arrays = [one.array for one in self.channels if one.role == own]
        densities = [self._density(role, array) for array in arrays]
        return AttributesThrough(self._cache, densities).read(store).attributes

    def _attributes_at(self, origin: Origin) -> AttributesThrough:
        """Attributes of stores of any directory."""
        densities = [self._density(*channel).at(origin) for channel in self.channels]
        return AttributesThrough(self._cache, densities)

    def _get_zarr_path(self, base_dir: str, task_id: str) -> str:
        return f"{base_dir}/{task_id}.zarr"


def _check_group(group: Any, method: str, instead: str) -> None:
    """Refuse a task id or path in place of an open store.

    Raises
    ------
    ConfigError
    """
    if not hasattr(group, "store_path"):
        raise ConfigError(
            f"{method} takes an open store, read_zarr_store(path), not {safe_repr(group)}. For a "
            f"task id: reader.{instead}."
        )


def _flat(values: NDArray[np.float32]) -> Density:
    nx, ny, nz = values.shape
    return values.reshape(-1), (nx, ny, nz)


def distinct_directories(origins: Mapping[Role, Origin]) -> dict[tuple[str, str], Origin]:
    """The directories of both roles by endpoint and URL; one if they are the same."""
    return {(origin.identity, origin.url_of("")): origin for origin in origins.values()}


def open_reader(cfg: object) -> ZarrS3Reader:
    """Create the reader that a training config describes. Sends no request.

    Raises
    ------
    ConfigError
        A key is missing or cannot be used.
    """
    config = DataConfig.of(cfg)
    config.check_stores()
    return ZarrS3Reader.from_config(config)
