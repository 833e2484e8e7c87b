"""Register data loaders by name; ``dataset_name`` of a training config selects one.

Register your own with a decorator::

    @register_data("my_data")
    def load_my_data(cfg):
        return train_sets, test_sets

Importing this module imports neither torch nor zarr; a built-in loader imports what it needs when
it is called.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, TypeVar

from zarrcache.config import DataConfig
from zarrcache.data import open_reader
from zarrcache.errors import ConfigError

__all__ = [
    "DATASET_REGISTRY",
    "get_data",
    "get_dataset",
    "load_chgcar_data",
    "load_data",
    "open_reader",
    "register_data",
]

Loader = Callable[[Any], Any]
_L = TypeVar("_L", bound=Loader)

_loaders: dict[str, Loader] = {}

#: The loaders by name, as ``register_data`` adds them; electrai's name for it.
DATASET_REGISTRY = _loaders


def _check_name(name: object) -> None:
    # @register_data without a name passes the function itself.
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(
            f'register_data({name!r}): a loader needs a name. Write @register_data("my_data").'
        )


def _is_same(one: Loader, other: Loader) -> bool:
    """Whether both are one function, or one definition that was executed again.

    A notebook cell that is run twice and a reloaded module define a function again.
    """
    return one is other or ("<locals>" not in _name_of(one) and _name_of(one) == _name_of(other))


def _name_of(loader: Loader) -> str:
    """``package.module.function``, or the ``repr`` of a callable object without a name."""
    name = getattr(loader, "__qualname__", None)
    return f"{loader.__module__}.{name}" if name else repr(loader)


def register_data(name: str) -> Callable[[_L], _L]:
    """Register a loader under ``name``, the ``dataset_name`` of a config.

    The loader is called with the config, whose keys are attributes, and returns ``(train_sets,
    test_sets)``. The decorator returns it unchanged, so it can be called directly and registered
    under several names.

    Raises
    ------
    ConfigError
        The name is taken by another loader, or is empty or not a string.
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
    """Call the loader that ``cfg`` selects.

    >>> cfg = yaml.safe_load(open("configs/s3_cached.yaml"))
    >>> train_sets, test_sets = get_dataset(cfg)

    Parameters
    ----------
    cfg : SimpleNamespace, mapping or DataConfig
        The training config. Loaders get a mapping as a namespace, other objects unchanged. The
        default of ``dataset_name`` is ``zarr_s3_data``.

    Returns
    -------
    (train_sets, test_sets)
        The loader's result. Built-in loaders return ``(data, label, gs_data, gs_label)`` for each,
        the first arguments of ``RhoData``.

    Raises
    ------
    ConfigError
        No loader has this name. The message suggests the nearest and lists all known names.
    """
    if isinstance(cfg, Mapping):
        cfg = SimpleNamespace(**{str(key): value for key, value in cfg.items()})
    default = DataConfig.model_fields["dataset_name"].default
    holder = cfg if hasattr(cfg, "dataset_name") else getattr(cfg, "data", cfg)  # Hydra's block
    name = (
        holder.get("dataset_name", default)
        if isinstance(holder, Mapping)
        else getattr(holder, "dataset_name", default)
    )
    loader = _loaders.get(name) if isinstance(name, str) else None
    if loader is None:
        near = difflib.get_close_matches(str(name), _loaders, n=1, cutoff=0.5)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"dataset_name is {name!r}; no loader has that name. {hint}Known: "
            f"{', '.join(sorted(_loaders))}. "
            'Register your own with @register_data("name"), in a module that is imported before.'
        )
    return loader(cfg)


#: electrai's name for `get_dataset`.
get_data = get_dataset


@register_data("mp_zarr_s3_data")
@register_data("zarr_s3_data")
def load_data(cfg: object) -> Any:
    """Load densities from Zarr stores with ``ZarrS3Reader.data_split()``.

    They are cached if ``cfg`` has a ``cache`` block.

    Raises
    ------
    ConfigError
        A key is missing or cannot be used.
    """
    return open_reader(cfg).data_split()


@register_data("chgcar_data")
def load_chgcar_data(cfg: object) -> Any:
    """Load densities from ``.json.gz`` and CHGCAR files with ``RhoRead.data_split()``.

    Raises
    ------
    ConfigError
        A key is missing or cannot be used.
    """
    from zarrcache.convert import RhoRead

    return RhoRead.from_config(cfg).data_split()
