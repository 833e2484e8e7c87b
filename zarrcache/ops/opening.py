"""The cache that a command is about: its settings, and its opened index."""

from __future__ import annotations

from pathlib import Path

from zarrcache.config import CacheConfig, DataConfig
from zarrcache.disk import CACHE_FAULTS, CacheDir, Index
from zarrcache.errors import ConfigError

__all__ = ["cache_at", "cache_of", "open_if_present", "open_index"]


def cache_of(config: DataConfig | CacheConfig) -> CacheConfig:
    """The cache block of a config.

    Raises
    ------
    ConfigError
        There is none, or the config reads files that are not cached.
    """
    if isinstance(config, CacheConfig):
        return config
    if config.dataset_name == "chgcar_data":
        raise ConfigError(
            "dataset_name is chgcar_data, and unconverted files are not cached. Run `zarrcache "
            "convert`, then set dataset_name: zarr_s3_data and data_dir, label_dir to the "
            "directories of the stores."
        )
    if config.cache is None:
        raise ConfigError("The config has no cache block. Add one, as in configs/s3_cached.yaml.")
    return config.cache


def cache_at(directory: Path) -> CacheConfig:
    """Settings to maintain the cache in ``directory``, whose own settings are unknown."""
    directory = Path(directory).expanduser().absolute()
    root = CacheDir(directory).root
    try:
        # A shared directory has to be opened as one, or the other users' files are refused.
        shared = bool(root.stat().st_mode & 0o020)
    except OSError:
        shared = False
    # dir by model_copy: it was given explicitly, so ZARRCACHE_DIR must not override it.
    # allow_network_fs: a cache on a network file system may be looked at and emptied.
    config = CacheConfig(dir=directory, shared=shared, allow_network_fs=True)
    return config.model_copy(update={"dir": directory})


def open_index(index: Index) -> Index:
    """Open an index now; create its directory if it is absent.

    Raises
    ------
    ConfigError
        The directory cannot be used. Training would continue without a cache; a command whose
        purpose is the cache must not.
    """
    try:
        index.open()
    except ConfigError:
        raise
    except CACHE_FAULTS as exc:
        why = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise ConfigError(
            f"cache.dir {index.dir.parent} cannot be used ({why}). Choose a directory on a local "
            "disk of this node that you may write to."
        ) from exc
    return index


def open_if_present(index: Index) -> bool:
    """As :func:`open_index` where there is a cache; otherwise False, and nothing is created."""
    is_present = index.dir.root.is_dir()
    if is_present:
        open_index(index)
    return is_present
