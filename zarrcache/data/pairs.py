"""`PairReader`: the materials of a map in two directories, their split, and what a read checks.

Base class of the reader of stores and of the reader of CHGCAR files.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self, get_args

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import (
    ROLES,
    Channel,
    DensityType,
    Missing,
    Role,
    arrays_of,
    check_density_type,
    density_array,
    density_name,
    units_of,
)
from zarrcache._units import counted, one_of
from zarrcache.arrays import kinds_of
from zarrcache.config import CacheConfig, DataConfig
from zarrcache.data.lock import DataLockFile
from zarrcache.data.sequences import Density, SplitSets, split_sets
from zarrcache.data.splits import (
    Split,
    first_ids,
    full_path,
    is_file_list,
    listed_ids,
    mapped_ids,
    read_split,
    split_ids,
)
from zarrcache.disk import LazyGrid, LazyStack
from zarrcache.errors import ConfigError, ZarrCacheError
from zarrcache.stats import LogOnce

__all__ = ["Complete", "Normalize", "PairReader", "as_lazy", "as_our_error", "only_our_errors"]

logger = logging.getLogger(__name__)

#: What the values of a density are divided by: see ``ZarrS3Reader``.
Normalize = bool | Literal["points", "volume"]


class _Present(NamedTuple):
    """Ids of a functional with both input and label, in the map's order, and the other ids."""

    ids: tuple[str, ...]
    missing: tuple[str, ...]


class Complete(NamedTuple):
    """Ids that can be trained on, and those left out because they lack a channel."""

    ids: tuple[str, ...]
    dropped: tuple[str, ...]


class PairReader(ABC):
    """Pairs of charge densities (input and label), one per material, in two directories.

    The parameters are those of ``ZarrS3Reader``.
    """

    #: What holds a density, for messages.
    _unit: ClassVar[str]

    def __init__(
        self,
        data_dir: str | os.PathLike[str],
        label_dir: str | os.PathLike[str],
        map_dir: str | os.PathLike[str],
        functional: str,
        normalize: Normalize,
        train_fraction: float,
        random_state: int = 42,
        density_type: DensityType = "total",
        s3_kwargs: dict[str, Any] | None = None,
        *,
        cache: CacheConfig | Mapping[str, Any] | None = None,
        source: str | Sequence[str] = "auto",
        split_file: str | os.PathLike[str] | None = None,
        missing: Missing = "error",
    ) -> None:
        self.source = source
        self.split_file = split_file
        self._kinds = kinds_of(source)
        self.data_dir = self._location(data_dir)
        self.label_dir = self._location(label_dir)
        self.map_dir = Path(map_dir)
        self.functional = functional
        units_of(normalize)  # refuses what is neither a bool nor a unit
        self.normalize = normalize
        self.tf = train_fraction
        self.rs = random_state
        one_of("missing", missing, *get_args(Missing))
        self.if_missing = missing
        self._log_once = LogOnce()
        try:
            self._density_type = check_density_type(density_type)
        except ValueError as exc:
            raise ConfigError(f"density_type: {exc}.") from None
        self._arrays = arrays_of(self._density_type)
        names = {name for arrays in self._arrays.values() for name in arrays}
        #: Whether materials may lack a channel.
        self._has_optional = names != {density_array("total")}
        self._drops = self._has_optional and missing == "drop"
        self.s3_kwargs = s3_kwargs or {}
        self._known_ids: dict[tuple[Path, str], _Present] = {}
        self._complete: dict[tuple[Path, str], Complete] = {}
        self._mapped: dict[tuple[Path, str], list[str]] = {}
        config = None if cache is None else CacheConfig.of(cache)
        self._lock = None if config is None or config.lock is None else DataLockFile(config.lock)
        self._prepare(config)

    @staticmethod
    @abstractmethod
    def _location(value: str | os.PathLike[str]) -> str | Path:
        """A directory as given by the user, as an attribute of the reader."""

    @abstractmethod
    def _prepare(self, cache: CacheConfig | None) -> None:
        """Create what reading needs, at the end of the constructor."""

    @classmethod
    def from_config(cls, cfg: object) -> Self:
        """Create the reader that a training config describes. Sends no request.

        Parameters
        ----------
        cfg : DataConfig, mapping or namespace

        Raises
        ------
        ConfigError
            A key is missing or cannot be used.
        """
        config = DataConfig.of(cfg)
        return cls(
            config.data_dir,
            config.label_dir,
            config.map_dir,
            config.functional,
            config.normalize_data,
            config.train_fraction,
            config.random_state,
            config.density_type,
            config.s3_kwargs,
            cache=config.cache,
            source=config.source,
            split_file=config.split_file,
            missing=config.missing,
        )

    @property
    def density_type(self) -> Any:
        """A name, a tuple of names for several channels, or a dict from the roles to these."""
        return self._density_type

    @abstractmethod
    def store_names(self, role: Role) -> Mapping[str, Any]:
        """Name or path of each store or file of one directory, by task id."""

    def load(self, task_id: str, role: Role) -> Density:
        """Load one charge density.

        Parameters
        ----------
        task_id : str
        role : {"data", "label"}

        Returns
        -------
        values : ndarray, shape (nx*ny*nz,), float32, C order
            With several channels of shape (channels, nx*ny*nz). Writable and the caller's own.
            CHGCAR convention: density times cell volume, in
            electrons, so ``values.mean()`` is the number of valence electrons; with ``normalize``
            it is ``values.sum()`` (VASP wiki, CHGCAR). With ``normalize="volume"`` the density
            itself, in electrons per cubic angstrom.
        gridsize : (nx, ny, nz)

        Raises
        ------
        SchemaError
            The density is absent, not 3-D or not of real numbers; or it is to be per volume and the
            structure with the lattice is absent or has no volume.
        IncompleteArrayError
            A chunk that the origin lists cannot be read, or is absent (unless
            ``cache.missing_chunks`` is ``fill``); nothing is cached.
        OriginError
            There is no such store or file, or the origin cannot be reached.
        ZarrCacheError
            Any other fault: no exception of a library leaves this method.
        """
        try:  # costs nothing while nothing is raised; this is the path of a warm hit
            values, gridsize = self._load(task_id, role)
            if self._lock is not None:
                self._check_values(task_id, role, values.reshape(-1, *gridsize))
            return values, gridsize
        except ZarrCacheError:
            raise
        except Exception as exc:
            one_of("role", role, *ROLES)
            raise as_our_error(exc, f"{task_id} ({role})") from exc

    def _check_values(self, task_id: str, role: Role, grids: NDArray[np.float32]) -> None:
        """Compare the channels of one role with the lock."""
        assert self._lock is not None
        for array, values in zip(self._arrays[role], grids, strict=True):
            is_absent = self.lacks(task_id, role, array)
            self._lock.check_values(
                task_id, self.locked_as(role, array), None if is_absent else values
            )

    def locked_as(self, role: Role, array: str) -> str:
        """Name of a channel in a lock file: the role, if it has one channel."""
        return role if len(self._arrays[role]) == 1 else f"{role} {density_name(array)}"

    def open_grid(self, task_id: str, role: Role) -> LazyGrid | LazyStack:
        """Open one charge density. Only the values that are used are read.

        ``grid[index]`` with any index of numpy is an array of the values that ``load`` has there.
        On a warm node only their pages of the entry are read, once its checksum is verified
        (``cache.verify``), and only they are decoded from float16 or bfloat16; ``bits:N`` is
        decoded whole. With ``cache.lock`` all values are read, to compare them with the lock.
        With several channels its shape is (channels, nx, ny, nz).

        Raises
        ------
        As ``load``.
        """
        try:
            if self._lock is None:
                return self._open(task_id, role)
        except ZarrCacheError:
            raise
        except Exception as exc:
            raise as_our_error(exc, f"{task_id} ({role})") from exc
        return as_lazy(*self.load(task_id, role))

    def _open(self, task_id: str, role: Role) -> LazyGrid | LazyStack:
        """Like `open_grid` without a lock; it may raise exceptions of libraries."""
        return as_lazy(*self._load(task_id, role))

    @abstractmethod
    def _load(self, task_id: str, role: Role) -> Density:
        """Like `load`; it may raise exceptions of libraries."""

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({str(self.data_dir)!r}, {str(self.label_dir)!r}, "
            f"{self.functional!r}, {self.density_type!r})"
        )

    @property
    def arrays(self) -> dict[Role, tuple[str, ...]]:
        """Names of the arrays of each role, in the order of the channels."""
        return self._arrays

    @property
    def reads(self) -> tuple[Channel, ...]:
        """The reads of a sample, in their order: the channels of its input, then of its label."""
        return tuple(Channel(role, array) for role in ROLES for array in self._arrays[role])

    @property
    def lock_settings(self) -> dict[str, Any]:
        """The settings that decide about samples and their values, as in a lock file."""
        channels = {"missing": self.if_missing} if self._has_optional else {}
        return {
            "functional": self.functional,
            "density_type": json.loads(json.dumps(self.density_type)),  # as a lock file has it
            "normalize_data": units_of(self.normalize),
            "train_fraction": self.tf,
            "random_state": self.rs,
            **channels,
        }

    @property
    def task_ids(self) -> list[str]:
        """Ids of the functional that both directories have, in the map's order.

        With ``missing="drop"`` without those that lack a channel.

        Raises
        ------
        ConfigError
            The map file cannot be read, or the functional is not in it; or some ids lack a channel,
            with ``missing="error"``.
        OriginError
            A directory cannot be listed.
        """
        return list(self._completed().ids)

    @property
    def stored_ids(self) -> list[str]:
        """Like `task_ids`, with and without all channels."""
        return list(self._present().ids)

    @property
    def dropped(self) -> tuple[str, ...]:
        """Ids that are left out of the split because they lack a channel (``missing="drop"``)."""
        return self._completed().dropped

    @property
    def missing(self) -> tuple[str, ...]:
        """Ids of the functional without input or label. They are left out of the split."""
        return self._present().missing

    def split(self, *, decided: bool = True) -> Split:
        """Ids for training, validation (of a split file only) and testing.

        Parameters
        ----------
        decided : bool
            False: before ``missing`` decides about materials that lack a channel. This needs no
            request for the channels.

        Raises
        ------
        ConfigError
            A ``ValueError``: unknown functional, too few materials, or as `split_of_file`.
        OriginError
            A directory cannot be listed.
        """
        if self.split_file is not None:
            return self.split_of_file(self.split_file, decided=decided)
        if self._lock is not None:
            self._lock.check_split(None)
        ids = self._completed().ids if decided else self._present().ids
        if not ids:
            data, label = self._urls()
            why = " and every channel" if self._present().ids else ""
            raise ConfigError(
                f"Nothing to split: of {counted(len(self.mapped_ids()), 'task id')} of "
                f"{self.functional} in {full_path(self.map_dir)}, none has both input ({data}) and "
                f"label ({label}){why}. Check functional, map_dir, data_dir and label_dir."
            )
        train, test = split_ids(ids, self.tf, self.rs)
        return Split(tuple(train), (), tuple(test))

    def split_task_ids(self, *, decided: bool = True) -> tuple[list[str], list[str]]:
        """The ids of `split`: for training followed by validation, and for testing."""
        split = self.split(decided=decided)
        return [*split.train, *split.validation], [*split.test]

    def all_ids(self) -> list[str]:
        """All ids of the map or file list, which have to have input and label, to be split.

        With ``missing="drop"`` without those that lack a channel.

        Raises
        ------
        ConfigError
            Some do not; the message lists them, with their lines in a file list.
        OriginError
            A directory cannot be listed.
        """
        if self._lock is not None:
            self._lock.check_split(None)
        missing = self._present().missing
        if missing:
            lost = [*missing]
            if is_file_list(self.map_dir):
                line_of = {id_: line for line, id_ in enumerate(self.mapped_ids(), 1)}
                lost = [f"{id_} (line {line_of[id_]})" for id_ in missing]
            data, label = self._urls()
            raise ConfigError(
                f"{full_path(self.map_dir)}: {len(missing)} of "
                f"{len(missing) + len(self._present().ids)} materials have no {self._unit} in "
                f"{data} or {label}: {first_ids(lost)}. Put them there or remove the lines. If "
                "they are new, run `zarrcache warm` to list the origin again."
            )
        return self.task_ids

    def split_of_file(self, path: str | os.PathLike[str], *, decided: bool = True) -> Split:
        """The split of a split file: lists of task ids, or of positions in the map.

        With ``missing="drop"`` without those that lack a channel, unless ``decided`` is False.

        Raises
        ------
        ConfigError
            The file does not fit the map, or names a material that has no input or label; or one
            that lacks a channel, with ``missing="error"``.
        OriginError
            A directory cannot be listed.
        """
        where = f"{full_path(self.map_dir)} ({self.functional})"
        split = read_split(
            path, listed_ids(self.map_dir, self.functional), set(self._present().ids), where
        )
        if self._lock is not None:
            self._lock.check_split(split)
        if not decided:
            return split
        parts = split.train, split.validation, split.test
        kept = frozenset(self.decide([id_ for part in parts for id_ in part]).ids)
        return Split(*(tuple(id_ for id_ in part if id_ in kept) for part in parts))

    def data_split(self) -> tuple[SplitSets, SplitSets]:
        """Split into training and test sets; nothing is loaded yet.

        Returns
        -------
        (train, test)
            Each ``(data, label, gs_data, gs_label)``: sequences that load on indexing, flat float32
            arrays and grid sizes. Materials that a split file has for validation are in neither.

        Raises
        ------
        ConfigError
            A ``ValueError``: unknown functional, too few materials.
        OriginError
            A directory cannot be listed.
        """
        split = self.split()
        if split.validation:
            self._log_once.warning(
                "validation",
                logger,
                "The split file has %s for validation, which data_split() does not return. "
                "ZarrDataset(reader, 'validation') reads them.",
                counted(len(split.validation), "material"),
            )
        return split_sets(self, split.train), split_sets(self, split.test)

    def mapped_ids(self) -> list[str]:
        """Ids of the functional in the map, or of the file list, with or without stores.

        Raises
        ------
        ConfigError
            The map or list cannot be read, or the functional is not in the map.
        """
        key = self.map_dir, self.functional
        if key not in self._mapped:
            self._mapped[key] = mapped_ids(self.map_dir, self.functional)
        return self._mapped[key]

    def _present(self) -> _Present:
        """Ids in the map and both directories; recomputed when an attribute changes."""
        key = self.map_dir, self.functional
        if key not in self._known_ids:
            wanted = self.mapped_ids()
            self._mapped.clear()  # not needed any more
            data, label = self.store_names("data"), self.store_names("label")
            missing = tuple(id_ for id_ in wanted if id_ not in data or id_ not in label)
            if missing:
                logger.warning(
                    "%d of %d task ids of %s have no %s in %s or %s and are left out: %s",
                    len(missing),
                    len(wanted),
                    self.functional,
                    self._unit,
                    *self._urls(),
                    first_ids(missing),
                )
            ids = tuple(id_ for id_ in wanted if id_ in data and id_ in label)
            if self._lock is not None and not self._drops:
                self._lock.check(self.lock_settings, ids)
            self._known_ids[key] = _Present(ids, missing)
        return self._known_ids[key]

    def _completed(self) -> Complete:
        """Ids that are split: ids that are present, after ``missing`` decided about channels.

        Raises
        ------
        ConfigError
            Some lack one, and they are neither to be filled nor dropped.
        """
        key = self.map_dir, self.functional
        if key not in self._complete:
            complete = self.decide(self._present().ids)
            if self._lock is not None and self._drops:
                self._lock.check(self.lock_settings, complete.ids)
            self._complete[key] = complete
        return self._complete[key]

    def decide(self, task_ids: Sequence[str]) -> Complete:
        """Return the materials that can be trained on; ``missing`` decides if they lack a channel.

        Here these are all materials: the channels of a file are known when it is read.

        Raises
        ------
        ConfigError
            Some lack a channel, and they are neither to be filled nor dropped.
        """
        return Complete(tuple(task_ids), ())

    def lacks(self, task_id: str, role: Role, array: str) -> bool:
        """Whether a channel of a material is filled with zeros, because the origin lacks it."""
        return False

    def _urls(self) -> tuple[str, str]:
        """URLs of input and label, for messages."""
        return str(self.data_dir), str(self.label_dir)


def as_our_error(exc: Exception, what: str) -> ZarrCacheError:
    """The error to raise in place of an exception of a library when ``what`` was read."""
    if isinstance(exc, MemoryError):
        return ZarrCacheError(
            f"{what} could not be read, because this process gets no more memory (MemoryError"
            f"{f': {exc}' if str(exc) else ''}). Use fewer workers, give the job more memory, or "
            "raise the limit of the process (ulimit -v). If it is always this material, its store "
            "may be damaged: convert it again."
        )
    if isinstance(exc, ImportError):
        return ZarrCacheError(
            f"{what} could not be read, because a library cannot be loaded ({exc}). If it is "
            "installed, this process gets no more memory: give the job more, or raise the limit of "
            "the process (ulimit -v)."
        )
    return ZarrCacheError(
        f"{what} could not be read ({type(exc).__name__}: {exc}). If the store is sound, please "
        "report this with the traceback."
    )


@contextlib.contextmanager
def only_our_errors(what: str) -> Iterator[None]:
    """Convert exceptions of libraries in this block to ours; ``what`` was read."""
    try:
        yield
    except ZarrCacheError:
        raise
    except Exception as exc:
        raise as_our_error(exc, what) from exc


def as_lazy(values: NDArray[np.float32], gridsize: tuple[int, int, int]) -> LazyGrid | LazyStack:
    """A density in memory as `PairReader.open_grid` returns it."""
    if values.ndim == 1:
        return LazyGrid(values.reshape(gridsize))
    return LazyStack(tuple(LazyGrid(channel.reshape(gridsize)) for channel in values))
