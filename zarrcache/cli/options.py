"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from zarrcache._keys import check_task_ids
from zarrcache._units import parse_bytes, parse_seconds
from zarrcache.cli.app import say
from zarrcache.errors import ConfigError
from zarrcache.parallel import node_name

if TYPE_CHECKING:
    from zarrcache.config import CacheConfig, DataConfig
    from zarrcache.parallel import Engine

N = TypeVar("N", int, float)

__all__ = [
    "PAGE",
    "Anonymous",
    "Config",
    "Dask",
    "Directory",
    "DryRun",
    "EndpointUrl",
    "Ids",
    "Json",
    "OptionalConfig",
    "Profile",
    "S3Config",
    "S3Kwargs",
    "cache_source",
    "check_output",
    "chunk_sizes",
    "data_config",
    "nbytes",
    "number",
    "open_engine",
    "output_file",
    "read_ids",
    "s3_options",
    "seconds",
    "string",
    "whole",
]

#: The kind of file of `check_output`, and how it begins.
PAGE = "an HTML page", b"<!doctype html>"


def _parser(parse: Callable[[str], N]) -> Callable[[str], N]:
    def of_option(text: str) -> N:
        try:
            return parse(text)
        except ValueError as exc:
            raise typer.BadParameter(str(exc)) from exc

    return of_option


#: ``50 GiB`` in bytes, and ``30d`` in seconds.
size, seconds = _parser(parse_bytes), _parser(parse_seconds)


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """A parser of whole numbers within bounds."""

    def parse(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if number < least or (most is not None and number > most):
            bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
            raise typer.BadParameter(f"{text!r} is not a whole number {bounds}.")
        return number

    return parse


def string(metavar: str, help: str) -> Any:
    """An option for text."""
    return typer.Option(metavar=metavar, help=help)


def number(least: int, help: str, most: int | None = None) -> Any:
    """An option for a whole number."""
    return typer.Option(metavar="N", parser=whole(least, most), help=help)


def output_file(help: str, metavar: str = "FILE") -> Any:
    """The option for the file that a command writes."""
    return typer.Option("--output", "-o", metavar=metavar, help=help)


def nbytes(help: str) -> Any:
    """An option for a size such as ``50 GiB``."""
    return typer.Option(metavar="SIZE", parser=size, help=help)


Config = Annotated[
    Path,
    typer.Argument(
        metavar="CONFIG",
        help="training config (YAML) with a cache block, as `zarrcache init` writes it",
    ),
]
OptionalConfig = Annotated[
    Path | None,
    typer.Argument(metavar="CONFIG", help="training config (YAML), as `zarrcache init` writes it"),
]
Directory = Annotated[
    Path | None,
    typer.Option(
        "--dir",
        metavar="DIR",
        help="cache directory to use instead of CONFIG's [default without CONFIG: ZARRCACHE_DIR]",
    ),
]
Ids = Annotated[
    Path | None,
    typer.Option(
        "--ids",
        metavar="FILE",
        help="only these task ids: a file with one per line, or a JSON list [default: all of "
        "CONFIG]",
    ),
]
EndpointUrl = Annotated[
    str | None,
    typer.Option(
        "--endpoint-url",
        metavar="URL",
        help="S3 endpoint [default: Amazon S3]",
    ),
]
Profile = Annotated[str | None, string("NAME", "profile of ~/.aws/config to use")]
Anonymous = Annotated[
    bool, typer.Option("--anon", help="access S3 without credentials, for public buckets")
]
S3Kwargs = Annotated[
    str | None,
    typer.Option(
        "--s3-kwargs",
        metavar="@FILE|JSON",
        help="arguments of s3fs.S3FileSystem: a JSON or YAML file after @, or a JSON object. "
        "Put secrets in a file: other users can see a command line",
    ),
]
S3Config = Annotated[
    Path | None,
    typer.Option("--config", metavar="CONFIG", help="take s3_kwargs from this training config"),
]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of text")]
Dask = Annotated[
    str | None,
    typer.Option(
        "--dask",
        metavar="SCHEDULER",
        help="run on a Dask cluster: address (tcp://host:8786) or file of its scheduler, or "
        "`local` [default: processes of this machine]",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print what would be done; do nothing")]


def data_config(path: Path, *, needs_cache: bool = True) -> DataConfig:
    """Read a training config."""
    from zarrcache.config import DataConfig

    config = DataConfig.from_yaml(path)
    if needs_cache and config.cache is None:
        raise ConfigError(
            f"{path} has no cache block. Add one (`zarrcache init` writes an example): "
            f"cache: {{dir: /local/disk/zarrcache, limit: 200 GiB}}."
        )
    return config


def cache_source(
    config: Path | None, directory: Path | None, *, needs_cache: bool = True
) -> DataConfig | CacheConfig:
    """The training config or cache that CONFIG or --dir names."""
    from zarrcache.ops import cache_at

    if config is not None and directory is not None:
        raise ConfigError("CONFIG and --dir exclude each other. Give one of them.")
    if config is not None:
        return data_config(config, needs_cache=needs_cache)
    found = directory or os.environ.get("ZARRCACHE_DIR")
    if not found:
        raise ConfigError("No cache given. Pass CONFIG or --dir DIR.")
    return cache_at(Path(found))


def check_output(path: Path, what: str, begins: bytes) -> None:
    """Refuse, before minutes of work, a file that cannot be written or that is of another kind.

    A command replaces only a file like those that it writes, which begin with ``begins``: not a
    density or a config.
    """
    try:
        is_new = not path.exists()
        with path.open("ab"):
            pass
        if is_new:
            path.unlink()
        if not path.is_file():
            return
        with path.open("rb") as file:
            head = file.read(1000)
    except OSError as exc:
        raise ConfigError(
            f"{path} cannot be written ({exc.strerror}). Give a file in a directory that exists, "
            "and that you may write to."
        ) from exc
    if path.suffix == ".gz":
        with suppress(zlib.error):
            head = zlib.decompressobj(wbits=31).decompress(head)
    if head and not head.startswith(begins):
        raise ConfigError(f"{path} exists and is not {what}. Give another file, or remove it.")


def read_ids(path: Path | None) -> list[str] | None:
    """Read task ids from a JSON list, or from lines; blank lines and ``#`` comments are skipped."""
    if path is None:
        return None
    try:
        text = path.read_text(encoding="utf-8")
        if text.lstrip().startswith("["):
            found = json.loads(text)
        else:
            found = [line.partition("#")[0].strip() for line in text.splitlines()]
    except (OSError, ValueError) as exc:
        why = (isinstance(exc, OSError) and exc.strerror) or exc
        raise ConfigError(
            f"--ids {path} cannot be read ({why}). It must hold one task id per line, or a JSON "
            "list of them."
        ) from exc
    ids = [task_id for task_id in found if task_id]
    if not ids:
        raise ConfigError(f"--ids {path} holds no task id.")
    try:
        return check_task_ids(ids)
    except ConfigError as exc:
        raise ConfigError(f"--ids {path}: {exc}") from None


def chunk_sizes(text: str) -> int | list[int]:
    """Parse ``64`` or ``64,64,32``."""
    try:
        sizes = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"--chunks {text!r} is not one or three numbers of grid points: 64, or 64,64,32."
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
    """``s3_kwargs`` of a config, overridden by the options of the command line.

    ``text`` is a JSON object, or ``@`` and the path of a JSON or YAML file with one.
    """
    merged: dict[str, Any] = {}
    if config is not None:
        merged |= data_config(config, needs_cache=False).s3_kwargs or {}
    if text is not None:
        merged |= _s3_kwargs_of(text)
    options = {"endpoint_url": endpoint_url, "profile": profile, "anon": anon or None}
    return merged | {name: value for name, value in options.items() if value is not None}


def _s3_kwargs_of(text: str) -> dict[str, Any]:
    import yaml

    from zarrcache.config import YamlLoader
    from zarrcache.origin import secret_names

    is_file = text.startswith("@")
    where = f"--s3-kwargs {text}" if is_file else "--s3-kwargs"
    try:
        if is_file:
            text = Path(text[1:]).expanduser().read_text(encoding="utf-8")
            given = yaml.load(text, YamlLoader)
        else:
            given = json.loads(text)
    except OSError as exc:
        raise ConfigError(
            f"{where} cannot be read ({exc.strerror}). It is a JSON or YAML file with arguments of "
            "s3fs.S3FileSystem."
        ) from exc
    except (ValueError, yaml.YAMLError):  # whose words may quote a secret
        given = None
    if not isinstance(given, dict):
        raise ConfigError(
            f"{where} is not a {'JSON or YAML' if is_file else 'JSON'} object. Write for example "
            '\'{"profile": "me"}\', or @FILE.'
        )
    if not is_file and (names := secret_names(given)):
        say(
            f"warning: --s3-kwargs holds {' and '.join(names)}, and every user of this machine can "
            "see a command line. Write it into a file of yours and pass --s3-kwargs @FILE."
        )
    return given


@contextmanager
def open_engine(
    dask: str | None, workers: int | None, *, only_here: bool = False
) -> Iterator[Engine | None]:
    """The engine of ``--dask``; None without it.

    With ``only_here`` a cluster with workers on other nodes is refused, because they would fill the
    caches of those nodes.
    """
    if dask is None:
        yield None
        return
    from zarrcache.parallel import open_cluster

    with open_cluster(dask, workers=workers) as cluster:
        others = [node for node in cluster.nodes() if node != node_name()]
        if only_here and others:
            raise ConfigError(
                f"Workers of {dask} run on {', '.join(others[:3])}"
                f"{' and others' if others[3:] else ''}, and each node has its own cache; this "
                f"node is {node_name()}. Add --each-node to fill the caches of all nodes."
            )
        yield cluster.spread
