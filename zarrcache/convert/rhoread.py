"""``RhoRead``: read CHGCAR and Materials Project files directly, parsing them at every access."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path

from zarrcache._keys import Role, units_of
from zarrcache.arrays import per_point
from zarrcache.config import CacheConfig
from zarrcache.convert.density import read_density
from zarrcache.convert.formats import find_files
from zarrcache.data import Density, PairReader
from zarrcache.errors import ConfigError, OriginNotFoundError, SchemaError
from zarrcache.stats import Stats

__all__ = ["RhoRead"]

logger = logging.getLogger(__name__)


class RhoRead(PairReader):
    """Reads pairs of charge densities from CHGCAR and Materials Project files in two directories.

    >>> reader = RhoRead("chgcars/input", "chgcars/label", "map.json.gz", "GGA", True, 0.8)
    >>> (data, label, gs_data, gs_label), test_sets = reader.data_split()

    The values, the split and its order are those of ``ZarrS3Reader``, which reads such files from
    one directory through the cache. This reader has no cache, so each read takes 0.02 to several
    seconds; use it for deeper trees and for formats of `register_format`.

    Parameters
    ----------
    data_dir, label_dir : str or Path
        Directories with one file per material, at any depth: ``mp-1.json.gz``, ``mp-1.json``,
        ``mp-1.CHGCAR``, ``mp-1/CHGCAR``; each perhaps compressed.
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

    _unit = "file"

    @staticmethod
    def _location(value: str | os.PathLike[str]) -> Path:
        text = os.fspath(value)
        if "://" in text.removeprefix("file://"):
            raise ConfigError(
                f"{text} is not a directory of this machine. Set dataset_name: zarr_s3_data, which "
                "reads json.gz and CHGCAR files on S3 too, or convert them (zarrcache convert)."
            )
        return Path(text.removeprefix("file://")).expanduser()

    def _prepare(self, cache: CacheConfig | None) -> None:
        if self.density_type not in ("total", "diff"):
            raise ConfigError(
                f"density_type is {self.density_type}, but chgcar_data reads total or diff, one of "
                "them. Set dataset_name: zarr_s3_data for several channels and other arrays."
            )
        self._files: dict[Role, dict[str, Path]] = {}
        if cache is not None:
            logger.warning(
                "cache is set, but chgcar_data has no cache: files are parsed at every read. "
                "zarr_s3_data reads the files of %s through the cache.",
                self.data_dir,
            )

    @property
    def stats(self) -> Stats:
        """All zero, for scripts that print the statistics of ``ZarrS3Reader``."""
        return Stats()

    def _load(self, task_id: str, role: Role) -> Density:
        files = self.store_names(role)
        if task_id not in files:
            directory = self.data_dir if role == "data" else self.label_dir
            raise OriginNotFoundError(
                f"{directory} has no file of {task_id}. It would be {task_id}.json.gz or "
                f"{task_id}.CHGCAR, for example."
            )
        path = files[task_id]
        units = units_of(self.normalize)
        density = read_density(
            path,
            diff=self.density_type == "diff",
            units="volume" if units == "volume" else "cell",
        )
        values = {"total": density.total, "diff": density.diff}.get(self.density_type)
        if values is None:
            raise SchemaError(
                f"{path} has no {self.density_type} density. It has: {', '.join(density.blocks)}. "
                "Leave the material out of the map, or set density_type to one that all files have."
            )
        if density.warnings:
            self._log_once.warning(path, logger, "%s %s", path, " ".join(density.warnings))
        nx, ny, nz = values.shape
        if units == "points":
            values = per_point(values)
        return values.reshape(-1), (nx, ny, nz)

    def store_names(self, role: Role) -> Mapping[str, Path]:
        """Path of the file of each task id in one directory.

        Raises
        ------
        ConfigError
            The directory does not exist or cannot be read, or has two files of one id.
        """
        if role not in self._files:
            found = find_files(Path(self.data_dir if role == "data" else self.label_dir))
            if found.unreadable:
                item = found.unreadable[0]
                raise ConfigError(f"{item.path} {item.reason}. Make it readable (chmod u+rx).")
            # No map contains those that give no task id.
            self._files[role] = {task_id: path for path, task_id in found.files.items()}
        return self._files[role]
