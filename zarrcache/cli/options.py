"""What commands of the command line have in common: their options, and what files and values given
there mean.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zarrcache.errors import ConfigError

if TYPE_CHECKING:
    from zarrcache.config import CacheConfig, DataConfig

__all__ = [
    "Config",
    "Dask",
    "Directory",
    "DryRun",
    "Ids",
    "Json",
    "MaybeConfig",
    "chunk_sizes",
    "data_config",
    "read_ids",
    "s3_options",
    "seconds",
    "size",
    "where",
]


def size(text: str) -> int:
    """A size such as ``50 GiB``, in bytes."""
    from zarrcache._units import parse_bytes

    try:
        return parse_bytes(text)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc


def seconds(text: str) -> float:
    """A time such as ``30d``, in seconds."""
    from zarrcache._units import parse_seconds

    try:
        return parse_seconds(text)
    except ValueError as exc:
        raise typer.BadParameter(str(exc)) from exc


Config = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="training config (YAML) with a cache block, as configs/s3_cached.yaml",
    ),
]
MaybeConfig = Annotated[
    Path | None,
    typer.Argument(metavar="[CONFIG]", help="training config (YAML), as configs/s3_cached.yaml"),
]
Directory = Annotated[
    Path | None,
    typer.Option(
        "--dir",
        metavar="DIR",
        help="the cache in this directory (a cache.dir), instead of CONFIG's",
    ),
]
Ids = Annotated[
    Path | None,
    typer.Option(
        "--ids",
        metavar="FILE",
        help="only these task ids: one a line, or a JSON list [default: all of CONFIG]",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of words")]
Dask = Annotated[
    str | None,
    typer.Option(
        "--dask",
        metavar="SCHEDULER",
        help="have a Dask cluster do it: address (tcp://host:8786) or file of its scheduler, or "
        "`local` [default: processes of this machine]",
        show_default=False,
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="only print what would be done")]


def data_config(path: Path, *, needs_cache: bool = True) -> DataConfig:
    """The training config in a file."""
    from zarrcache.config import DataConfig

    config = DataConfig.from_yaml(path)
    if needs_cache and config.cache is None:
        raise ConfigError(
            f"{path} has no cache block. Add one, as in configs/s3_cached.yaml: cache: {{dir: "
            f"/local/disk/zarrcache, limit: 200 GiB}}."
        )
    return config


def where(
    config: Path | None, directory: Path | None, *, needs_cache: bool = True
) -> DataConfig | CacheConfig:
    """The cache that a command is about."""
    from zarrcache.ops import cache_at

    if config is not None and directory is not None:
        raise ConfigError("CONFIG and --dir exclude each other. Give one of them.")
    if config is not None:
        return data_config(config, needs_cache=needs_cache)
    found = directory or os.environ.get("ZARRCACHE_DIR")
    if not found:
        raise ConfigError(
            "which cache? Give a training config, or --dir with the directory of a cache."
        )
    return cache_at(Path(found))


def read_ids(path: Path | None) -> list[str] | None:
    """Task ids of a file: a JSON list, or one a line; empty lines and what follows a # do not
    count.
    """
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
        found = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [line.partition("#")[0].strip() for line in text.splitlines()]
        )
    except (OSError, ValueError) as exc:
        raise ConfigError(
            f"--ids {path} cannot be read ({exc}). It has to hold one task id a line, or a JSON "
            "list of them."
        ) from exc
    ids = [task_id for task_id in found if task_id]
    if not ids:
        raise ConfigError(f"--ids {path} holds no task id.")
    return ids


def chunk_sizes(text: str) -> int | list[int]:
    """``16`` or ``16,16,8``."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--chunks {text!r} is not a number of grid points, or three: 16, or 16,16,8."
        ) from None
    return sizes[0] if len(sizes) == 1 else sizes


def s3_options(
    config: Path | None,
    text: str | None,
    *,
    endpoint_url: str | None,
    profile: str | None,
    anon: bool,
) -> dict[str, Any]:
    """``s3_kwargs`` of a config, overridden by those of the command line."""
    merged: dict[str, Any] = (
        dict(data_config(config, needs_cache=False).s3_kwargs or {}) if config is not None else {}
    )
    if text is not None:
        try:
            given = json.loads(text)
        except ValueError as exc:
            raise ConfigError(
                f'--s3-kwargs is not JSON ({exc}). Write for example \'{{"profile": "me"}}\'.'
            ) from exc
        if not isinstance(given, dict):
            raise ConfigError(
                '--s3-kwargs is not a JSON object. Write for example \'{"profile": "me"}\'.'
            )
        merged |= given
    options = {"endpoint_url": endpoint_url, "profile": profile, "anon": anon or None}
    return merged | {name: value for name, value in options.items() if value is not None}
