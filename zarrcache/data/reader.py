"""``ZarrS3Reader``: the users' reader. From a task id it is one step to a store, and from there
``ReadThrough`` goes on.

What reads densities does not import zarr until a layout needs it: that is 0.1 s of the 0.45 in
which the process of look-ahead starts.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import ROLES, ArrayKey, ObjectInfo, Role, check_task_id, stored_array
from zarrcache._shared_memory import SharedSet
from zarrcache.arrays import density_of_group, list_array, metadata_of
from zarrcache.cache import Cache, Outcome, ReadThrough
from zarrcache.config import CacheConfig, DataConfig
from zarrcache.data.catalog import Catalog, Present
from zarrcache.data.observers import Read, ReadObserver
from zarrcache.data.sequences import Density, SplitSets, split_sets
from zarrcache.data.splits import split_ids
from zarrcache.errors import OriginNotFoundError
from zarrcache.origin import Origin, make_s3fs
from zarrcache.stats import Counters, Stats

if TYPE_CHECKING:
    import s3fs
    import zarr

__all__ = ["ZarrS3Reader", "open_reader"]


class ZarrS3Reader:
    """Pairs of charge densities (input and label) from Zarr stores, ``{data_dir}/{task_id}.zarr``
    or ``.zarr.zip``.

    >>> reader = ZarrS3Reader("s3://b/input", "s3://b/label", "map.json.gz", "GGA", True, 0.8, cache={"dir": "/scratch/me"})
    >>> (data, label, gs_data, gs_label), test_sets = reader.data_split()

    Making one costs no request. It pickles, and works on both sides of a fork.

    Parameters
    ----------
    data_dir, label_dir : str or Path
        Directories, or ``s3://bucket/prefix``; each of its own kind.
    map_dir : str or Path
        JSON or JSON.gz file ``{functional: [task_id, ...]}``.
    functional : str
    normalize : bool
        Divide by the number of grid points; the values then sum up to the number of electrons.
    train_fraction : float
        0 to 1, or a number of materials: ``train_size`` of scikit-learn's ``train_test_split``.
    random_state : int
    density_type : str
        ``total`` or ``diff``: which array, ``charge_density_{density_type}``.
    s3_kwargs : dict, optional
        As ``s3fs.S3FileSystem`` takes them.
    cache : CacheConfig or mapping, optional
        None: everything comes from the origin each time.

    Raises
    ------
    ConfigError
        ``cache`` (its token file and its lower layer too) or ``s3_kwargs`` cannot be used.

    Attributes
    ----------
    s3fs : s3fs.S3FileSystem
        Made from ``s3_kwargs``, where a directory is on S3.
    """

    def __init__(
        self,
        data_dir: str | os.PathLike[str],
        label_dir: str | os.PathLike[str],
        map_dir: str | os.PathLike[str],
        functional: str,
        normalize: bool,
        train_fraction: float,
        random_state: int = 42,
        density_type: str = "total",
        s3_kwargs: dict[str, Any] | None = None,
        *,
        cache: CacheConfig | Mapping[str, Any] | None = None,
    ) -> None:
        self.data_dir = _url_or_path(data_dir)
        self.label_dir = _url_or_path(label_dir)
        self.map_dir = Path(map_dir)
        self.functional = functional
        self.normalize = normalize
        self.tf = train_fraction
        self.rs = random_state
        self.density_type = density_type
        self.s3_kwargs = s3_kwargs or {}
        self.use_s3 = any(
            str(directory).startswith("s3://") for directory in (self.data_dir, self.label_dir)
        )
        self._counters = Counters(shared=True)
        self._cache = Cache(CacheConfig.of(cache) if cache is not None else None, self._counters)
        self._origins: dict[Role, Origin] = {
            "data": self._cache.origin(str(self.data_dir), self.s3_kwargs),
            "label": self._cache.origin(str(self.label_dir), self.s3_kwargs),
        }
        self._catalog = Catalog(self._origins, self._cache)
        self._checked = SharedSet()
        if self._cache.arrays is not None:
            self._cache.remote.check()
        self._observers: tuple[ReadObserver, ...] = ()
        if self.use_s3:
            # at once, as the users' reader does: wrong arguments show here, and no request is made
            _ = self.s3fs

    @functools.cached_property
    def s3fs(self) -> s3fs.S3FileSystem:
        """The filesystem of ``s3_kwargs``, for work of your own; zarrcache itself opens its clients
        in each process anew.
        """
        return make_s3fs(self.s3_kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "s3fs"}

    def __repr__(self) -> str:
        cache = f", cache={str(self._cache.config.dir)!r}" if self._cache.config else ""
        return f"ZarrS3Reader({str(self.data_dir)!r}, {str(self.label_dir)!r}, {self.functional!r}, {self.density_type!r}{cache})"

    # -- which materials
    # ---------------------------------------------------------------------------------------------------------

    @property
    def task_ids(self) -> list[str]:
        """Ids of the functional that both directories have, in the map's order.

        One LIST per directory and 1,000 stores, the first time; with ``revalidate: never`` the
        listing that is stored with the entries.

        Raises
        ------
        ConfigError
            The map file cannot be read, or the functional is not in it.
        OriginError
            A directory cannot be listed.
        """
        return list(self._present().ids)

    @property
    def missing(self) -> tuple[str, ...]:
        """Ids of the functional whose input or label the origin does not have. They are left out of
        the split.
        """
        return self._present().missing

    def split_task_ids(self) -> tuple[list[str], list[str]]:
        """Training and test ids, in the order of ``data_split()``."""
        return split_ids(self._present().ids, self.tf, self.rs)

    def data_split(self) -> tuple[SplitSets, SplitSets]:
        """Split into training and test sets; nothing is loaded yet.

        Returns
        -------
        (train, test)
            Each ``(data, label, gs_data, gs_label)``: sequences that load on indexing, flat float32
            arrays and grid sizes.

        Raises
        ------
        ConfigError
            A ``ValueError``: unknown functional, too few materials.
        OriginError
            A directory cannot be listed.
        """
        train, test = self.split_task_ids()
        return split_sets(self, train), split_sets(self, test)

    def relist(self) -> None:
        """List both directories at the origin now, and keep the listing for runs without the
        origin.
        """
        self._catalog.relist()

    def relist_unless_known(self, task_ids: Iterable[str]) -> None:
        """As ``relist``, unless the listings stored with the entries name all of ``task_ids``."""
        self._catalog.relist_unless_known(task_ids)

    def _present(self) -> Present:
        return self._catalog.present(self.map_dir, self.functional)

    # -- one density
    # -------------------------------------------------------------------------------------------------------------

    def load(self, task_id: str, role: Role) -> Density:
        """Load one charge density, from the array tier if it is there.

        Parameters
        ----------
        task_id : str
        role : {"data", "label"}

        Returns
        -------
        values : ndarray, shape (nx*ny*nz,), float32, C order
            Writable and the caller's own. CHGCAR convention: density times cell volume, in
            electrons, so ``values.mean()`` is the number of valence electrons; with ``normalize``
            it is ``values.sum()`` (VASP wiki, CHGCAR).
        gridsize : (nx, ny, nz)

        Raises
        ------
        SchemaError
            ``charge_density_{density_type}`` is absent, not 3-D or not of real numbers.
        IncompleteArrayError
            A chunk that the origin lists cannot be read; nothing is cached.
        OriginError
            There is no such store, or the origin cannot be reached.
        """
        if not self._observers:
            values, _ = self._path.read(self._origins[role], self.store_name(task_id, role))
            return _flat(values)
        start_s = time.perf_counter()
        for observer in self._observers:
            observer.read_started(task_id, role)
        values, outcome = self._path.read(self._origins[role], self.store_name(task_id, role))
        read = Read(task_id, role, outcome, values.nbytes, time.perf_counter() - start_s)
        for observer in self._observers:
            observer.read_finished(read)
        return _flat(values)

    def observe(self, observer: ReadObserver) -> None:
        """Tell ``observer`` of every density that ``load`` reads from now on.

        Call it before DataLoader workers start: they get the observers that the reader has then.
        """
        self._observers = (*self._observers, observer)

    def unobserve(self, observer: ReadObserver) -> None:
        """Tell ``observer`` no more."""
        self._observers = tuple(one for one in self._observers if one is not observer)

    def ensure(
        self, task_id: str, role: Role, *, reserve: Callable[[int], object] | None = None
    ) -> tuple[Outcome, int]:
        """Have the origin's present version of one density in the array tier; what ``zarrcache
        warm`` does for each.

        Parameters
        ----------
        task_id : str
        role : {"data", "label"}
        reserve : callable, optional
            Called with bytes before they are taken: those of the objects, then those of the array.
            It may wait.

        Returns
        -------
        outcome : {"hit", "miss", "bypass"}
            It was there and fresh, was fetched, or was fetched and not admitted.
        nbytes : int
            Size of the decoded density.

        Raises
        ------
        As ``load``.
        """
        origin, store = self._origins[role], self.store_name(task_id, role)
        values, outcome = self._path.read(origin, store, revalidate=True, reserve=reserve)
        if outcome != "hit" and self._cache.arrays is not None:
            # metadata and crops are to be of the same version
            self._cache.forget_listing(origin, store)
        return outcome, values.nbytes

    def key(self, task_id: str, role: Role) -> ArrayKey:
        """Identity of a density's entry in the array tier."""
        return self._path.key(self._origins[role], self.store_name(task_id, role))

    def origin(self, role: Role) -> Origin:
        """The directory of one role."""
        return self._origins[role]

    @property
    def roles(self) -> tuple[Role, ...]:
        """``("data", "label")``, or ``("data",)`` where both are the same directory."""
        data, label = (self._origins[role] for role in ROLES)
        same = (data.identity, data.url_of("")) == (label.identity, label.url_of(""))
        return ROLES[:1] if same else ROLES

    def store_names(self, role: Role) -> Mapping[str, str]:
        """File name of each store of one directory by its task id, as listed last."""
        return self._catalog.names(role)

    def stored(self) -> dict[Role, dict[str, int]]:
        """Bytes on disk of the densities that are in the array tier, by role and task id. Their
        stores are those that were listed last.
        """
        listings = {
            role: (origin, self._catalog.names(role)) for role, origin in self._origins.items()
        }
        return self._cache.stored_densities(
            stored_array(self.array, is_per_point=self.normalize), listings
        )

    def listing(self, task_id: str, role: Role) -> list[ObjectInfo]:
        """What the origin lists now of one density: keys, sizes, ETags. One LIST."""
        return list_array(self._origins[role], self.store_name(task_id, role), self.array)

    @property
    def stats(self) -> Stats:
        """What was read so far, in this process and in its DataLoader workers."""
        return self._counters.total()

    @property
    def cache(self) -> Cache:
        """The tiers beneath."""
        return self._cache

    @property
    def array(self) -> str:
        """Name of the array that is read of each store."""
        return f"charge_density_{self.density_type}"

    @property
    def _path(self) -> ReadThrough:
        return ReadThrough(self._cache, self._checked, self.array, self.normalize)

    def store_name(self, task_id: str, role: Role) -> str:
        """File name of a store below its directory: ``mp-1.zarr``, or ``mp-1.zarr.zip``.

        Raises
        ------
        OriginNotFoundError
            There is none.
        """
        check_task_id(task_id)
        try:
            return self._catalog.names(role)[task_id]
        except KeyError:
            url = self._origins[role].url_of(f"{task_id}.zarr")
            raise OriginNotFoundError(
                f"{url} does not exist, nor does {url}.zip. If it is new, run `zarrcache warm` to "
                "list the origin again."
            ) from None

    # -- the users' methods on groups
    # --------------------------------------------------------------------------------------------

    def read_zarr_store(self, zarr_path: str | os.PathLike[str]) -> zarr.Group:
        """Open a store, read-only, through the byte tier. Nothing but its metadata is loaded.

        Raises
        ------
        OriginNotFoundError
            There is no such store (a ``FileNotFoundError``).
        """
        from zarrcache.cache import group_of, store_at

        return group_of(store_at(zarr_path, self._cache, self.s3_kwargs))

    def read_charge_density(self, zarr_store: zarr.Group) -> Density:
        """The density of an open store; as ``load``, for a group of ``read_zarr_store`` or any
        other group of zarr.

        Raises
        ------
        SchemaError
            A ``ValueError``: the array is absent (those present are named), not 3-D, or not of real
            numbers.
        """
        from zarrcache.cache import CachedStore

        store = zarr_store.store
        if isinstance(store, CachedStore) and not zarr_store.path:
            return _flat(self._path.read(store.origin, store.name)[0])
        where = store.url if isinstance(store, CachedStore) else str(zarr_store.store_path)
        return _flat(self._path.as_asked(density_of_group(zarr_store, self.array, where), where))

    def get_metadata(self, zarr_store: zarr.Group) -> dict[str, Any]:
        """What the store says of itself: attribute ``metadata``, merged with ``structure``; both
        may be JSON strings or JSON itself.
        """
        return metadata_of(zarr_store)

    def _get_zarr_path(self, base_dir: str, task_id: str) -> str:
        return f"{base_dir}/{task_id}.zarr"


def _flat(values: NDArray[np.float32]) -> Density:
    nx, ny, nz = values.shape
    return values.reshape(-1), (nx, ny, nz)


def _url_or_path(value: str | os.PathLike[str]) -> str | Path:
    text = os.fspath(value)
    return (
        text
        if "://" in text and not text.startswith("file://")
        else Path(text.removeprefix("file://"))
    )


def open_reader(cfg: object) -> ZarrS3Reader:
    """The reader that a training config describes. No request is made.

    Raises
    ------
    ConfigError
        A key is missing or cannot be used.
    """
    config = DataConfig.of(cfg)
    return ZarrS3Reader(
        data_dir=config.data_dir,
        label_dir=config.label_dir,
        map_dir=config.map_dir,
        functional=config.functional,
        normalize=config.normalize_data,
        train_fraction=config.train_fraction,
        random_state=config.random_state,
        density_type=config.density_type,
        s3_kwargs=config.s3_kwargs,
        cache=config.cache,
    )
