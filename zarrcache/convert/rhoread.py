"""``RhoRead``: read CHGCAR and Materials Project files directly, parsing a file at every access."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zarrcache._keys import Role
from zarrcache.arrays import per_point
from zarrcache.config import CacheConfig
from zarrcache.convert.density import read_density
from zarrcache.convert.formats import find_files, task_id_of
from zarrcache.data import Density, SplitSets, ids_of, read_map, split_ids, split_sets
from zarrcache.errors import ConfigError, OriginNotFoundError, SchemaError
from zarrcache.stats import LogOnce, Stats

__all__ = ["RhoRead"]

logger = logging.getLogger(__name__)


class RhoRead:
    """Read pairs of charge densities from CHGCAR and Materials Project files in two directories.

    >>> reader = RhoRead("chgcars/input", "chgcars/label", "map.json.gz", "GGA", True, 0.8)
    >>> (data, label, gs_data, gs_label), test_sets = reader.data_split()

    The values, the split and its order are those of ``ZarrS3Reader`` over the same files converted.
    A read takes 0.1 to several seconds where a converted and cached one takes a millisecond, so for
    more than one epoch convert first: ``zarrcache convert``.

    Parameters
    ----------
    data_dir, label_dir : str or Path
        Directories with one file per material: ``mp-1.json.gz``, ``mp-1.json``, ``mp-1.CHGCAR``,
        ``mp-1/CHGCAR``; each perhaps compressed.
    map_dir, functional, normalize, train_fraction, random_state, density_type
        As in ``ZarrS3Reader``.
    s3_kwargs, cache
        Accepted so that it can replace ``ZarrS3Reader``, and ignored: the files are local, and
        nothing is cached.

    Raises
    ------
    ConfigError
        A directory is on S3.
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
        s3_kwargs: Mapping[str, Any] | None = None,
        *,
        cache: CacheConfig | Mapping[str, Any] | None = None,
    ) -> None:
        self.data_dir = _directory(data_dir)
        self.label_dir = _directory(label_dir)
        self.map_dir = Path(map_dir)
        self.functional = functional
        self.normalize = normalize
        self.tf = train_fraction
        self.rs = random_state
        self.density_type = density_type
        self._files: dict[Role, dict[str, Path]] = {}
        self._present: tuple[list[str], tuple[str, ...]] | None = None
        self._log_once = LogOnce()
        if cache is not None:
            logger.warning(
                "cache is set, but json.gz and CHGCAR files are parsed at every read. Convert "
                "them: zarrcache convert %s DST",
                self.data_dir,
            )

    def __repr__(self) -> str:
        return (
            f"RhoRead({str(self.data_dir)!r}, {str(self.label_dir)!r}, {self.functional!r}, "
            f"{self.density_type!r})"
        )

    @property
    def task_ids(self) -> list[str]:
        """Ids of the functional that both directories have a file of, in the map's order.

        Raises
        ------
        ConfigError
            The map file cannot be read, the functional is not in it, a directory is not there, or
            has two files of one id.
        """
        return list(self._find()[0])

    @property
    def missing(self) -> tuple[str, ...]:
        """Ids of the functional without an input or a label file. Left out of the split."""
        return self._find()[1]

    @property
    def stats(self) -> Stats:
        """All 0, for scripts that print the statistics of ``ZarrS3Reader``."""
        return Stats()

    def split_task_ids(self) -> tuple[list[str], list[str]]:
        """Training and test ids, in the order of ``data_split()``."""
        return split_ids(self._find()[0], self.tf, self.rs)

    def data_split(self) -> tuple[SplitSets, SplitSets]:
        """Training and test sets, each ``(data, label, gs_data, gs_label)``.

        They are sequences that read a file when they are indexed.

        Raises
        ------
        ConfigError
            As ``task_ids``, or there are too few materials to split.
        """
        train, test = self.split_task_ids()
        return split_sets(self, train), split_sets(self, test)

    def load(self, task_id: str, role: Role) -> Density:
        """Read one charge density.

        Parameters
        ----------
        task_id : str
        role : {"data", "label"}

        Returns
        -------
        values : ndarray, shape (nx*ny*nz,), float32, C order
            As ``ZarrS3Reader.load``: density times cell volume, in electrons; with ``normalize``
            divided by the number of grid points.
        gridsize : (nx, ny, nz)

        Raises
        ------
        OriginNotFoundError
            There is no such file.
        SchemaError
            It is not a charge density, or lacks ``density_type``.
        """
        files = self._files_of(role)
        if task_id not in files:
            directory = self.data_dir if role == "data" else self.label_dir
            raise OriginNotFoundError(
                f"{directory} has no file of {task_id}. It would be {task_id}.json.gz or "
                f"{task_id}.CHGCAR, for example."
            )
        path = files[task_id]
        density = read_density(path, diff=self.density_type == "diff")
        values = {"total": density.total, "diff": density.diff}.get(self.density_type)
        if values is None:
            raise SchemaError(
                f"{path} has no {self.density_type} density. It has: {', '.join(density.blocks)}. "
                "Set density_type to total or diff."
            )
        if density.warnings:
            self._log_once.warning(path, logger, "%s %s", path, " ".join(density.warnings))
        nx, ny, nz = values.shape
        if self.normalize:
            values = per_point(values)
        return values.reshape(-1), (nx, ny, nz)

    def _find(self) -> tuple[list[str], tuple[str, ...]]:
        if self._present is None:
            wanted = ids_of(read_map(self.map_dir), self.functional)
            data, label = self._files_of("data"), self._files_of("label")
            present = [task_id for task_id in wanted if task_id in data and task_id in label]
            missing = tuple(
                task_id for task_id in wanted if task_id not in data or task_id not in label
            )
            if missing:
                first = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
                message = "%d of %d task ids of %s have no file in %s or %s and are left out: %s"
                logger.warning(
                    message,
                    len(missing),
                    len(wanted),
                    self.functional,
                    self.data_dir,
                    self.label_dir,
                    first,
                )
            self._present = present, missing
        return self._present

    def _files_of(self, role: Role) -> dict[str, Path]:
        if role not in self._files:
            files = {}
            for path in find_files(self.data_dir if role == "data" else self.label_dir):
                try:
                    files[task_id_of(path)] = path
                except ConfigError as exc:  # not a valid task id, so no map contains it
                    logger.debug("%s", exc)
            self._files[role] = files
        return self._files[role]


def _directory(value: str | os.PathLike[str]) -> Path:
    text = os.fspath(value)
    if "://" in text.removeprefix("file://"):
        raise ConfigError(
            f"{text} is not a directory of this machine. Convert the files to Zarr (zarrcache "
            "convert) and use zarr_s3_data, or copy them here."
        )
    return Path(text.removeprefix("file://")).expanduser()
