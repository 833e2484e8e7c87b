"""Loaders by name: ``dataset_name`` of a training config says which one makes the data.

A loader of your own is one line away::

    @register_data("my_data")
    def load_my_data(cfg):
        return train_sets, test_sets

Importing this module loads neither torch nor zarr; a built-in loader imports what it needs when it
is called.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, TypeVar

from zarrcache.config import DataConfig
from zarrcache.data import open_reader
from zarrcache.errors import ConfigError

__all__ = ["get_dataset", "load_chgcar_data", "load_data", "open_reader", "register_data"]

Loader = Callable[[Any], Any]
_L = TypeVar("_L", bound=Loader)

_loaders: dict[str, Loader] = {}


def _check_name(name: object) -> None:
    # @register_data without a name hands over the function itself.
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(
            f'register_data({name!r}): a loader needs a name. Write @register_data("my_data").'
        )


def _is_same(one: Loader, other: Loader) -> bool:
    """Whether both are one function, or one definition executed again: a notebook cell run twice, a
    reloaded module.
    """
    return one is other or ("<locals>" not in _name_of(one) and _name_of(one) == _name_of(other))


def _name_of(loader: Loader) -> str:
    """``package.module.function``; of a callable object, which has no such name, its ``repr``."""
    name = getattr(loader, "__qualname__", None)
    return f"{loader.__module__}.{name}" if name else repr(loader)


def register_data(name: str) -> Callable[[_L], _L]:
    """Register a loader under ``name``, the ``dataset_name`` of a config.

    The loader is called with the config, whose keys are attributes, and returns ``(train_sets,
    test_sets)``. It is given back unchanged, so that it can be called directly and registered under
    several names.

    Raises
    ------
    ConfigError
        The name is taken by another loader, or is not a name.
    """
    _check_name(name)

    def register(loader: _L) -> _L:
        taken = _loaders.get(name)
        if taken is not None and not _is_same(taken, loader):
            raise ConfigError(
                f"dataset_name {name!r} is taken by {_name_of(taken)}. Register {_name_of(loader)} "
                "under another name."
            )
        _loaders[name] = loader
        return loader

    return register


def get_dataset(cfg: object) -> Any:
    """Call the loader that ``cfg`` names.

    >>> train_sets, test_sets = get_dataset(SimpleNamespace(**yaml.safe_load(open("configs/s3_cached.yaml"))))

    Parameters
    ----------
    cfg : SimpleNamespace, mapping or DataConfig
        The training config. Loaders get a mapping as a namespace, anything else as it is. Without
        ``dataset_name`` it is ``zarr_s3_data``.

    Returns
    -------
    (train_sets, test_sets)
        What the loader returns. Each of the built-in ones' is ``(data, label, gs_data, gs_label)``:
        the first arguments of ``RhoData``.

    Raises
    ------
    ConfigError
        No loader has this name; the nearest and all the known ones are named.
    """
    if isinstance(cfg, Mapping):
        cfg = SimpleNamespace(**{str(key): value for key, value in cfg.items()})
    name = getattr(cfg, "dataset_name", DataConfig.model_fields["dataset_name"].default)
    loader = _loaders.get(name) if isinstance(name, str) else None
    if loader is None:
        near = difflib.get_close_matches(str(name), _loaders, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"dataset_name is {name!r}; no loader has that name. {hint}Known: "
            f"{', '.join(sorted(_loaders))}. "
            'Your own is registered by @register_data("name") in a module that is imported before.'
        )
    return loader(cfg)


@register_data("mp_zarr_s3_data")
@register_data("zarr_s3_data")
def load_data(cfg: object) -> Any:
    """Densities from Zarr stores, on S3 or in a directory, through the cache if ``cfg`` has a
    ``cache`` block: ``ZarrS3Reader.data_split()``.

    Raises
    ------
    ConfigError
        A key is missing or cannot be used.
    """
    return open_reader(cfg).data_split()


@register_data("chgcar_data")
def load_chgcar_data(cfg: object) -> Any:
    """Densities from Materials Project ``.json.gz`` and CHGCAR files that have not been converted:
    ``RhoRead.data_split()``.

    Raises
    ------
    ConfigError
        A key is missing or cannot be used.
    """
    from zarrcache.convert import RhoRead

    config = DataConfig.of(cfg)
    reader = RhoRead(
        data_dir=config.data_dir,
        label_dir=config.label_dir,
        map_dir=config.map_dir,
        functional=config.functional,
        normalize=config.normalize_data,
        train_fraction=config.train_fraction,
        random_state=config.random_state,
        density_type=config.density_type,
    )
    return reader.data_split()
