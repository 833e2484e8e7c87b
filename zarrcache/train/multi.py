"""Combine several training configs: their readers, splits, and one dataset over all of them."""

from __future__ import annotations

import bisect
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch.utils.data import ConcatDataset

from zarrcache._keys import cached_property
from zarrcache._units import whole_number
from zarrcache.config import DataConfig, LoaderConfig, datasets_of_configs, naming
from zarrcache.data import Split, ZarrS3Reader, hold_out, open_reader, share_of
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
        A training config as a YAML file or its keys; also a Hydra config, see
        `zarrcache.config`. The names are ``"0"``, ``"1"``, ... in a list, and the keys in a
        mapping.
    split_file : path or mapping, optional
        Task ids or positions in the map, see `read_split`. For several configs, one file per
        name. Default: ``split_file`` of each config.
    val_frac : float, optional
        Without ``split_file``: see `hold_out`. Default: ``val_frac`` of each config, or 0.005.
    random_seed : int, optional
        Default: ``random_seed`` of each config, or 42.
    is_permuted : bool
        Without ``split_file``: divide all ids as electrai does, see `permuted_split`.

    Raises
    ------
    ConfigError
        A config cannot be used, or ``split_file`` does not fit.

    Attributes
    ----------
    readers : dict of str to ZarrS3Reader
    loaders : dict of str to LoaderConfig
        The keys of each config that describe loaders.
    """

    def __init__(
        self,
        config: Any,
        *,
        split_file: Any = None,
        val_frac: float | None = None,
        random_seed: int | None = None,
        is_permuted: bool = False,
    ) -> None:
        self._is_permuted = is_permuted
        pairs = _configs(config)
        configs = {name: one for name, (one, _) in pairs.items()}
        self.loaders = {name: loader for name, (_, loader) in pairs.items()}
        self._split_files = self._files(split_file)
        self._val_fracs = self._own("val_frac", val_frac, 0.005)
        # the range of numpy's legacy generator, which draws the split
        self._random_seeds = {
            name: whole_number("random_seed", seed, most=2**32 - 1)
            for name, seed in self._own("random_seed", random_seed, 42).items()
        }
        self.readers: dict[str, ZarrS3Reader] = {
            name: open_reader(one) for name, one in configs.items()
        }

    @property
    def random_seed(self) -> int:
        """The seed of what concerns all datasets: that of the first."""
        return next(iter(self._random_seeds.values()))

    def setting(self, name: str, given: Any, default: Any) -> Any:
        """Return a setting that all datasets share: the argument, or the value of the configs.

        Raises
        ------
        ConfigError
            It is not given, and the configs differ.
        """
        if given is not None:
            return given
        found = {
            dataset: value
            for dataset, loader in self.loaders.items()
            if (value := getattr(loader, name)) is not None
        }
        if len(set(found.values())) > 1:
            words = ", ".join(f"{value!r} in {dataset!r}" for dataset, value in found.items())
            raise ConfigError(
                f"The configs disagree on {name}: {words}. Give {name}=... to the data module."
            )
        return next(iter(found.values()), default)

    def _own(self, name: str, given: Any, default: Any) -> dict[str, Any]:
        """A setting that each dataset has for itself."""
        return {
            dataset: next(
                value for value in (given, getattr(loader, name), default) if value is not None
            )
            for dataset, loader in self.loaders.items()
        }

    def _files(self, split_file: Any) -> dict[str, str | os.PathLike[str] | None]:
        """The split file of each dataset: of ``split_file``, or of its own config."""
        if split_file is None:
            return {name: loader.split_file for name, loader in self.loaders.items()}
        return _split_files(split_file, tuple(self.loaders))

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the order of the configs."""
        return tuple(self.readers)

    def list_into_cache(self) -> None:
        """List the origins of cached configs, so that other processes find the stored listing."""
        for name, reader in self.readers.items():
            if reader.cache_config is not None:
                _ = reader.stored_ids
                _ = self.splits[name]  # finds out which materials lack a channel, too

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
            name: self._split(name, reader, self._split_files[name])
            for name, reader in self.readers.items()
        }

    def _split(self, name: str, reader: ZarrS3Reader, path: str | os.PathLike[str] | None) -> Split:
        if path is not None:
            return reader.split_of_file(path)
        if self._is_permuted:
            ids = reader.all_ids()
            return permuted_split(ids, self._val_fracs[name], self._random_seeds[name])
        return hold_out(*reader.split_task_ids(), self._val_fracs[name], self._random_seeds[name])

    def dataset(
        self, side: Side, *, key: str | None = None, **options: Any
    ) -> ZarrDataset | CombinedDataset:
        """One side of the split of all configs.

        ``options`` are those of ``ZarrDataset``. With ``key``, samples have the number that is the
        name of their dataset, also those of a single dataset.
        """
        parts = {
            name: ZarrDataset(reader, getattr(self.splits[name], side), **options)
            for name, reader in self.readers.items()
        }
        if key is not None:
            return CombinedDataset(parts, key=key, numbers=[int(name) for name in parts])
        return CombinedDataset(parts) if len(parts) > 1 else next(iter(parts.values()))


def permuted_split(ids: Sequence[str], val_frac: float, random_seed: int) -> Split:
    """Split as electrai's ``RhoRead`` does: the first ``int(n * val_frac)`` of a permutation.

    Parameters
    ----------
    ids : sequence of str
    val_frac : float
        Rounded down: 0.005 of 199 ids is no validation.
    random_seed : int

    Raises
    ------
    ConfigError
        ``val_frac`` is not a share.
    """
    held = int(len(ids) * share_of(val_frac))
    generator = torch.Generator().manual_seed(random_seed)
    order = [ids[place] for place in torch.randperm(len(ids), generator=generator).tolist()]
    return Split(tuple(order[held:]), tuple(order[:held]))


class CombinedDataset(ConcatDataset[Any]):
    """Several datasets as one; each sample has the number of its dataset.

    Parameters
    ----------
    parts : mapping of str to ZarrDataset
    key : str
        The sample's key for the number.
    numbers : sequence of int, optional
        One per dataset. Default: from 0.
    """

    def __init__(
        self,
        parts: Mapping[str, ZarrDataset],
        *,
        key: str = "dataset",
        numbers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(parts.values())
        self.key = key
        self.numbers = range(len(parts)) if numbers is None else tuple(numbers)
        # With the dataset's name, because two datasets may contain the same material.
        self.task_ids = tuple(
            f"{name}/{task_id}" for name, part in parts.items() for task_id in part.task_ids
        )

    def augment(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """See :meth:`ZarrDataset.augment`: the parts differ in their samples only."""
        part: Any = self.datasets[0]
        result: dict[str, Any] = part.augment(batch)
        return result

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample: dict[str, Any] = super().__getitem__(index)  # type: ignore[no-untyped-call]
        part = bisect.bisect_right(self.cumulative_sizes, index % len(self))
        return {**sample, self.key: self.numbers[part]}


def _configs(config: Any) -> dict[str, tuple[DataConfig, LoaderConfig]]:
    """Configs by the name of their dataset."""
    if isinstance(config, DataConfig):
        config = [config]
    if isinstance(config, Sequence) and any(isinstance(one, DataConfig) for one in config):
        config = {str(number): one for number, one in enumerate(config)}
    if isinstance(config, Mapping) and any(isinstance(one, DataConfig) for one in config.values()):
        return {
            str(name): (one, LoaderConfig())
            if isinstance(one, DataConfig)
            else next(iter(_configs(one).values()))
            for name, one in config.items()
        }
    is_path = isinstance(config, (str, os.PathLike))
    named = datasets_of_configs(config)
    with naming(f"config file {os.fspath(config)}") if is_path else nullcontext():
        return {name: (DataConfig(**keys), LoaderConfig(**keys)) for name, keys in named.items()}


def _split_files(
    split_file: Any, names: tuple[str, ...]
) -> dict[str, str | os.PathLike[str] | None]:
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
