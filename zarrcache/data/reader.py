"""`ZarrS3Reader`: finds the source of each density in two directories, and reads it."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
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
    safe_repr,
    units_of,
)
from zarrcache._units import format_bytes
from zarrcache.arrays import choose, ends_of, several_sources, sources_of
from zarrcache.cache import Cache, OnFlaws, Outcome, ReadThrough
from zarrcache.config import CacheConfig, DataConfig
from zarrcache.data.channels import Absences, CachedGrids, common_grid
from zarrcache.data.observers import Read, ReadObserver
from zarrcache.data.pairs import Complete, only_our_errors
from zarrcache.data.sequences import Density
from zarrcache.data.splits import Split
from zarrcache.data.stores import StoreReader, flat
from zarrcache.disk import LazyGrid, LazyStack
from zarrcache.errors import ConfigError, OriginNotFoundError
from zarrcache.origin import Origin, make_s3fs
from zarrcache.stats import Counters, SharedSet, Stats, html_table

if TYPE_CHECKING:
    import s3fs

__all__ = ["ZarrS3Reader", "distinct_directories", "open_reader"]

_T = TypeVar("_T")
_Grid = TypeVar("_Grid", NDArray[np.float32], LazyGrid)
logger = logging.getLogger(__name__)

_OUTCOMES: tuple[Outcome, ...] = ("hit", "miss", "bypass")


class ZarrS3Reader(StoreReader):
    """Pairs of charge densities (input and label) from Zarr stores or unconverted files.

    >>> cache = {"dir": "/scratch/me"}
    >>> reader = ZarrS3Reader(
    ...     "s3://b/input", "s3://b/label", "map.json.gz", "GGA", True, 0.8, cache=cache
    ... )
    >>> (data, label, gs_data, gs_label), test_sets = reader.data_split()

    The source of a density is ``{data_dir}/{task_id}.zarr`` or ``.zarr.zip``; a file as the
    Materials Project or VASP wrote it, ``.json.gz`` or ``.CHGCAR``, each perhaps compressed by
    gzip, bzip2 or xz; or a directory of numpy files as electrai keeps QM9. Files are decoded into
    the array tier once, and give the same bits as converted stores. Creating a reader sends no
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
        None: every read goes to the origin.
    source : str or sequence of str
        Kinds of sources to read, in order of preference: ``zarr``, ``zarr.zip``,
        ``json.gz``, ``CHGCAR``, ``directory`` (one per material, with ``CHGCAR`` or ``rho_22.npy``
        in it). ``auto`` is all of them, in this order, and of directories those of QM9.
    split_file : path, optional
        JSON of task ids or of positions in the map: ``{"train": [...], "validation": [...],
        "test": [...]}``. Replaces ``train_fraction`` and ``random_state``.
    missing : {"error", "zero", "drop"}
        How materials that lack a channel are handled, before the split: an error that lists them,
        zeros in that channel, or they are left out of the split.

    Raises
    ------
    ConfigError
        ``density_type`` or ``missing`` has another value; ``cache`` (also its token file or lower
        layer) or ``s3_kwargs`` cannot be used.

    Attributes
    ----------
    s3fs : s3fs.S3FileSystem
        Created from ``s3_kwargs`` if a directory is on S3.
    roles : tuple
        ``("data", "label")``, or ``("data",)`` if both are the same directory.
    channels : tuple of Channel
        The channels of a sample; each array once if both directories are the same.
    absences : Absences
        The channels that materials lack.
    grids : CachedGrids
        The grids of cached densities, to find those that do not fit each other.
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
        self.roles = ROLES[: len(distinct_directories(self._origins))]
        self.channels = tuple(dict.fromkeys(self.column(*channel) for channel in self.reads))
        self._checked = SharedSet()
        self._store_names: dict[Role, dict[str, str]] = {}
        self._observers: tuple[ReadObserver, ...] = ()
        self._read_throughs: dict[tuple[Role, object], list[ReadThrough]] = {}
        self._fills = self._has_optional and self.if_missing == "zero"
        self.absences, self.grids = Absences(self), CachedGrids(self)
        if self._cache.remote is not None:
            self._cache.remote.check()
        if self.use_s3:
            # Like the original reader: wrong arguments are reported here, without a request.
            _ = self.s3fs

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
        """Show a table in notebooks. Sends no request."""
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
        """As in the base class. Once, a warning names pairs that are cached on different grids."""
        split = super().split(decided=decided)
        self.grids.warn_once(split)
        return split

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
        self.absences = Absences(self)

    def column(self, role: Role, array: str) -> Channel:
        """The channel of the same entries: input and label of one directory share them."""
        return Channel(role if len(self.roles) > 1 else "data", array)

    def is_optional(self, role: Role, array: str) -> bool:
        """Whether materials may lack a channel.

        False if the total density is the only channel, or if zeros would replace it.
        """
        total = (density_array("total"),)
        if self._fills and array in total:
            return False
        return any(
            array in arrays and arrays != total and self.column(of, array).role == role
            for of, arrays in self._arrays.items()
        )

    def lacks(self, task_id: str, role: Role, array: str) -> bool:
        """As in the base class. Asks the origin if it is not known."""
        if not self._fills or array == density_array("total"):  # never filled with zeros
            return False
        return self.absences.lacks(task_id, Channel(role, array))

    def decide(self, task_ids: Sequence[str]) -> Complete:
        """As in the base class. Finds out the channels before the reads if they are not known."""
        return self.absences.decide(task_ids)

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
        """The sources that are read. Warns once if an id has several sources."""
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
            return self._observed(self._read, task_id, role)
        return self._read(task_id, role)[0]

    def _open(self, task_id: str, role: Role) -> LazyGrid | LazyStack:
        if self._observers:
            return self._observed(self._opened, task_id, role)
        return self._opened(task_id, role)[0]

    def _observed(
        self, read: Callable[[str, Role], tuple[_T, Outcome]], task_id: str, role: Role
    ) -> _T:
        start_s = time.perf_counter()
        for observer in self._observers:
            observer.read_started(task_id, role)
        found, outcome = read(task_id, role)
        grid: Any = found[0] if isinstance(found, tuple) else found
        nbytes = 4 * math.prod(grid.shape)
        done = Read(task_id, role, outcome, nbytes, time.perf_counter() - start_s)
        for observer in self._observers:
            observer.read_finished(done)
        return found

    def _read(self, task_id: str, role: Role) -> tuple[Density, Outcome]:
        """All channels of one role."""
        channels = self._densities(role)
        if len(channels) == 1:
            values, outcome = channels[0].read(self.store_name(task_id, role))
            nx, ny, nz = values.shape
            return (values.reshape(-1), (nx, ny, nz)), outcome
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
        """Call ``read`` for each channel of a material that is not filled with zeros.

        Returns the results, with None for channels of zeros; the grid that the channels share; and
        the outcome that cost most.
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
        url = self._origins[role].url_of(store)
        shapes = [None if grid is None else grid.shape for grid in grids]
        shape = common_grid(url, self._arrays[role], shapes)
        return grids, shape, max(outcomes, key=_OUTCOMES.index)

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
            return flat(values)

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
            values, outcome = self._density(role, array).read(
                store, revalidate=True, reserve=reserve, on_flaws=on_flaws
            )
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
            roles = [role for role in ROLES if name in self._arrays[role]]
            listings = {role: (self._origins[role], self.store_names(role)) for role in roles}
            stored_as = self._density(roles[0], name).stored_as
            if in_float32 and (exact := ArrayKey("", "", stored_as).exact) is not None:
                stored_as = exact.array
            of_roles = self._cache.stored_densities(stored_as, listings)
            found |= {Channel(role, name): sizes for role, sizes in of_roles.items()}
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
        other = f", and there is no other source ({others})" if others else ""
        raise OriginNotFoundError(
            f"{url}.{self._kinds[0]} does not exist{other}. If it is new, run `zarrcache warm` to "
            "list the origin again."
        )


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
