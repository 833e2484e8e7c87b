"""Lock files: which materials a training reads, and digests of their decoded values.

``zarrcache lock`` writes one; with ``cache.lock`` a reader refuses all other data.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import cached_property, safe_repr
from zarrcache.data.splits import Split
from zarrcache.disk import crc32c, write_file
from zarrcache.errors import ConfigError, IncompleteArrayError

__all__ = ["DataLock", "DataLockFile", "LockedDensity", "crc_of", "differences", "digest_of"]

_FORMAT = 1
_SPLIT_FILE = "split_file"


@dataclass(frozen=True, slots=True)
class LockedDensity:
    """One density of a lock.

    Attributes
    ----------
    shape : tuple of int
    crc32c : str
        Of the values, little-endian float32 in C order, 8 hex digits; compared at each read.
    sha256 : str
        Of the same bytes; compared by ``zarrcache diff``.
    source : str
        Digest of keys, sizes and ETags of the objects at the origin; empty if unknown. Other copies
        of the same data have other sources.
    """

    shape: tuple[int, ...]
    crc32c: str
    sha256: str
    source: str = ""


@dataclass(frozen=True)
class DataLock:
    """The materials of a training, in order, with digests of their values.

    Attributes
    ----------
    settings : dict
        Keys of the config that decide about samples and values: ``functional``, ``density_type``,
        ``normalize_data``, ``train_fraction``, ``random_state``, ``encoding``. With other densities
        than the total one also ``missing``, with a split file also ``split_file``, the digest of
        its split (`digest_of`).
    densities : dict
        ``{task_id: {name: LockedDensity}}``, in the order of ``task_ids``. The names are ``data``
        and ``label``; with several channels ``label total`` and so on, without those that are
        filled with zeros.
    """

    settings: dict[str, Any]
    densities: dict[str, dict[str, LockedDensity]] = field(repr=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a JSON file, a material per line; compressed if the name ends with ``.gz``.

        Raises
        ------
        ConfigError
            The file cannot be written. A file that was there stays whole.
        """
        lines = [
            f"{json.dumps(task_id)}: "
            + json.dumps({name: asdict(found) for name, found in pair.items()})
            for task_id, pair in self.densities.items()
        ]
        head = json.dumps({"zarrcache_lock": _FORMAT, "settings": self.settings})[:-1]
        text = head + ', "densities": {\n' + ",\n".join(lines) + "\n}}\n"
        content = text.encode()
        if os.fspath(path).endswith(".gz"):
            content = gzip.compress(content, mtime=0)  # the same data gives the same file
        write_file(Path(path), content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DataLock:
        """Read a lock file.

        Raises
        ------
        ConfigError
            The file cannot be read, or is not a lock of this format.
        """
        where = f"lock file {os.fspath(path)}"
        try:
            content = Path(path).read_bytes()
            if os.fspath(path).endswith(".gz"):
                content = gzip.decompress(content)
            document = json.loads(content)
        except OSError as exc:
            reason = exc.strerror or str(exc)
            raise ConfigError(
                f"{where} cannot be read ({reason}). `zarrcache lock` writes one."
            ) from exc
        except (ValueError, EOFError, zlib.error) as exc:
            raise ConfigError(
                f"{where} is not complete JSON ({exc}). If it was a lock file, write it again with "
                "`zarrcache lock`."
            ) from exc
        version = document.get("zarrcache_lock") if isinstance(document, dict) else None
        if version is None:
            raise ConfigError(f"{where} is not a lock file. `zarrcache lock` writes one.")
        if version != _FORMAT:
            raise ConfigError(
                f"{where} has format {safe_repr(version)}; this version reads {_FORMAT}. Use the "
                "version of zarrcache that wrote it, or write it again."
            )
        try:
            return cls(
                dict(document["settings"]),
                {
                    task_id: {
                        name: LockedDensity(
                            tuple(one["shape"]),
                            str(one["crc32c"]),
                            str(one["sha256"]),
                            str(one["source"]),
                        )
                        for name, one in pair.items()
                    }
                    for task_id, pair in document["densities"].items()
                },
            )
        except (KeyError, TypeError, AttributeError) as exc:
            raise ConfigError(
                f"{where} lacks {safe_repr(exc.args[0] if exc.args else exc)}. Write it again with "
                "`zarrcache lock`."
            ) from exc


class DataLockFile:
    """Compares the data of a training with a lock file, which is read once per process.

    Parameters
    ----------
    path : Path
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[type[DataLockFile], tuple[Path]]:
        return DataLockFile, (self.path,)  # a worker process reads it instead of unpickling it

    @cached_property
    def lock(self) -> DataLock:
        """Its content.

        Raises
        ------
        ConfigError
        """
        return DataLock.load(self.path)

    def check(self, settings: Mapping[str, Any], task_ids: Sequence[str]) -> None:
        """Raise if a config, the materials or their order differ from the lock.

        Raises
        ------
        ConfigError
            Names the first difference.
        """
        for key, locked in self.lock.settings.items():
            if key != _SPLIT_FILE and settings.get(key) != locked:
                given, wanted = (
                    # As configs say it; locks name the unit.
                    False if key == "normalize_data" and value == "cell" else value
                    for value in (settings.get(key), locked)
                )
                raise ConfigError(
                    f"{key} is {safe_repr(given)}, but {self.path} is for {safe_repr(wanted)}. "
                    "Change the config, or write a lock for it with `zarrcache lock`."
                )
        for problem in _id_differences(list(self.lock.densities), list(task_ids)):
            raise ConfigError(
                f"the data differs from {self.path}: {problem}. Restore the data, or write "
                "another lock with `zarrcache lock`."
            )

    def check_split(self, split: Split | None) -> None:
        """Raise if the lock is for another split file.

        Parameters
        ----------
        split : Split or None
            None: the training uses none.

        Raises
        ------
        ConfigError
        """
        locked = self.lock.settings.get(_SPLIT_FILE)
        if locked is not None and (split is None or digest_of(split) != locked):
            raise ConfigError(
                f"{self.path} is for another split file, so a training could use test materials. "
                "Restore split_file, or write another lock with `zarrcache lock`."
            )

    def check_values(self, task_id: str, name: str, values: NDArray[np.float32] | None) -> None:
        """Raise if a density differs from the lock.

        Parameters
        ----------
        name : str
            As in `DataLock.densities`: a role, or a role and a channel.
        values : (nx, ny, nz) array of float32, or None
            None: the material lacks this channel, and it is filled with zeros.

        Raises
        ------
        IncompleteArrayError
            Names the density.
        """
        of_material = self.lock.densities.get(task_id)
        if of_material is None:
            raise IncompleteArrayError(
                f"{task_id} is not in {self.path}. Write another lock with `zarrcache lock`."
            )
        locked = of_material.get(name)
        if locked is None:
            if values is None:
                return
            raise IncompleteArrayError(
                f"{task_id} has no {name} in {self.path}. Write another lock with `zarrcache lock`."
            )
        if values is None or values.shape != locked.shape or crc_of(values) != locked.crc32c:
            raise IncompleteArrayError(
                f"{task_id} ({name}) has other values than in {self.path}. `zarrcache diff` lists "
                "all differences; restore the data, or write another lock with `zarrcache lock`."
            )


def differences(first: DataLock, second: DataLock) -> Iterator[str]:
    """List the differences of two locks, one per line: settings, ids, densities."""
    for key in sorted(first.settings.keys() | second.settings.keys()):
        one, other = first.settings.get(key), second.settings.get(key)
        if one != other:
            yield f"{key}: {safe_repr(one)}, then {safe_repr(other)}"
    yield from _id_differences(list(first.densities), list(second.densities))
    for task_id, pair in first.densities.items():
        others = second.densities.get(task_id)
        if others is None:
            continue
        for name in dict.fromkeys([*pair, *others]):
            one, other = pair.get(name), others.get(name)
            if one is None or other is None:
                yield f"{task_id} ({name}): only in the {'second' if one is None else 'first'}"
            elif one.shape != other.shape:
                grids = " and ".join("x".join(map(str, found.shape)) for found in (one, other))
                yield f"{task_id} ({name}): grids {grids}"
            elif one.sha256 != other.sha256:
                yield f"{task_id} ({name}): other values on the same grid"


def _id_differences(first: list[str], second: list[str]) -> Iterator[str]:
    if first == second:
        return
    one, other = set(first), set(second)
    yield from (f"{task_id} is missing" for task_id in first if task_id not in other)
    yield from (f"{task_id} is new" for task_id in second if task_id not in one)
    if one == other:
        place = next(
            n for n, pair in enumerate(zip(first, second, strict=True)) if len(set(pair)) > 1
        )
        yield f"the order differs from place {place + 1} on: {first[place]}, then {second[place]}"


def digest_of(split: Split) -> str:
    """Digest of the ids of each set, in order."""
    sets = json.dumps([split.train, split.validation, split.test]).encode()
    return hashlib.blake2b(sets, digest_size=8).hexdigest()


def crc_of(values: NDArray[np.float32]) -> str:
    """CRC-32C of values as they are stored, 8 hex digits."""
    return f"{crc32c(np.ascontiguousarray(values, '<f4').reshape(-1).view(np.uint8).data):08x}"
