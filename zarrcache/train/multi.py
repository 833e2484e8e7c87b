"""Combine several training configs: their readers, splits, and one dataset over all of them."""

from __future__ import annotations

import bisect
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch.utils.data import ConcatDataset

from zarrcache._units import whole_number
from zarrcache.config import DataConfig
from zarrcache.data import Split, ZarrS3Reader, hold_out, open_reader
from zarrcache.errors import ConfigError
from zarrcache.train.datasets import ZarrDataset

__all__ = ["CombinedDataset", "Config", "Side", "Sources"]

Config = str | os.PathLike[str] | DataConfig | Mapping[str, Any]
Side = Literal["train", "validation", "test"]


class Sources:
    """The readers and splits of one or more training configs, each with a name.

    Creating it sends no request.

    Parameters
    ----------
    config : path, mapping, list or mapping of these
        A training config as a YAML file or its keys. The names are ``"0"``, ``"1"``, ... in a list,
        and the keys in a mapping.
    split_file : path or mapping, optional
        Task ids or positions in the map, see `read_split`. For several configs, one file per name.
    val_frac : float
        Without ``split_file``: see `hold_out`.
    random_seed : int

    Raises
    ------
    ConfigError
        A config cannot be used, or ``split_file`` does not fit.

    Attributes
    ----------
    readers : dict of str to ZarrS3Reader
    """

    def __init__(
        self, config: Any, *, split_file: Any = None, val_frac: float = 0.0, random_seed: int = 42
    ) -> None:
        configs = _configs(config)
        self._split_files = _split_files(split_file, tuple(configs))
        self._val_frac = val_frac
        # the range of numpy's legacy generator, which draws the split
        self._random_seed = whole_number("random_seed", random_seed, most=2**32 - 1)
        self._cached = [name for name, one in configs.items() if one.cache is not None]
        self.readers: dict[str, ZarrS3Reader] = {
            name: open_reader(one) for name, one in configs.items()
        }

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the order of the configs."""
        return tuple(self.readers)

    def list_into_cache(self) -> None:
        """List the origins of cached configs, so that other processes find the stored listing."""
        for name in self._cached:
            _ = self.readers[name].task_ids

    @cached_property
    def splits(self) -> dict[str, Split]:
        """The split of each config, by name.

        Raises
        ------
        ConfigError
            Too few samples, or a split file that does not match the samples.
        OriginError
            A directory cannot be listed.
        """
        return {
            name: self._split(reader, self._split_files[name])
            for name, reader in self.readers.items()
        }

    def _split(self, reader: ZarrS3Reader, path: str | os.PathLike[str] | None) -> Split:
        if path is not None:
            return reader.split_of_file(path)
        return hold_out(*reader.split_task_ids(), self._val_frac, self._random_seed)

    def dataset(self, side: Side, **options: Any) -> ZarrDataset | CombinedDataset:
        """One side of the split of all configs. ``options`` are those of ``ZarrDataset``."""
        parts = {
            name: ZarrDataset(reader, getattr(self.splits[name], side), **options)
            for name, reader in self.readers.items()
        }
        return CombinedDataset(parts) if len(parts) > 1 else next(iter(parts.values()))


class CombinedDataset(ConcatDataset[Any]):
    """Several datasets as one; each sample has the number of its dataset."""

    def __init__(self, parts: Mapping[str, ZarrDataset]) -> None:
        super().__init__(parts.values())
        # With the dataset's name, because two datasets may contain the same material.
        self.task_ids = tuple(
            f"{name}/{task_id}" for name, part in parts.items() for task_id in part.task_ids
        )

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample: dict[str, Any] = super().__getitem__(index)  # type: ignore[no-untyped-call]
        return {**sample, "dataset": bisect.bisect_right(self.cumulative_sizes, index % len(self))}


def _configs(config: Any) -> dict[str, DataConfig]:
    """Configs by the name of their dataset."""
    if isinstance(config, Mapping) and not config.keys() & DataConfig.model_fields.keys():
        named = {str(name): one for name, one in config.items()}
    elif isinstance(config, Sequence) and not isinstance(config, str):
        named = {str(number): one for number, one in enumerate(config)}
    else:
        named = {"0": config}
    if not named or config is None:
        raise ConfigError(
            "config is empty. Give the path of a training config (`zarrcache init` "
            "writes an example), or several."
        )
    return {name: _config(one) for name, one in named.items()}


def _config(one: Any) -> DataConfig:
    if isinstance(one, (str, os.PathLike)):
        return DataConfig.from_yaml(Path(one).expanduser())
    return DataConfig.of(_plain(one))


def _plain(value: Any) -> Any:
    """Convert the containers of configuration libraries (OmegaConf) to dicts and lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_plain(inner) for inner in value]
    return value


def _split_files(
    split_file: Any, names: tuple[str, ...]
) -> dict[str, str | os.PathLike[str] | None]:
    if split_file is None:
        return dict.fromkeys(names)
    if isinstance(split_file, Mapping):
        files = {str(name): path for name, path in split_file.items()}
        if files.keys() != set(names):
            raise ConfigError(
                f"split_file names the datasets {sorted(files)}, but config has {sorted(names)}. "
                "Give one file per dataset, by name."
            )
        return files
    if len(names) > 1:
        raise ConfigError(
            f"split_file is {str(split_file)!r}, but there are {len(names)} datasets. Give one "
            f"file per dataset: {{{names[0]!r}: ..., ...}}."
        )
    return {names[0]: split_file}
