"""``zarrcache lock`` and ``zarrcache diff``: pin the data of a training, and compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zarrcache._units import counted
from zarrcache.cli.app import command, say, show, show_json, show_some
from zarrcache.cli.options import Config, Json, check_output, data_config, output_file
from zarrcache.errors import ConfigError

if TYPE_CHECKING:
    from zarrcache.data import DataLock

__all__ = ["diff", "lock"]

_MOST = 20  # differences printed


@command(resumable=False)
def lock(
    config: Config,
    output: Annotated[Path, output_file("lock file to write; .gz compresses")] = Path("data.lock"),
) -> int:
    """Write a lock: ids and digests of all values of CONFIG.

    Reads every density through the cache. With `cache.lock: FILE` in a config, trainings refuse
    other data. Does not replace a lock of other settings.
    """
    check_output(output, "a lock file", b'{"zarrcache_lock"')
    made = _of_config(config, output)
    made.save(output)
    say(f"wrote {output}: {counted(len(made.densities), 'material')}")
    return 0


@command(resumable=False)
def diff(
    first: Annotated[Path, typer.Argument(metavar="LOCK", help="lock file")],
    second: Annotated[
        Path, typer.Argument(metavar="LOCK|CONFIG", help="another lock file, or a training config")
    ],
    as_json: Json = False,
) -> int:
    """Compare a lock with another lock, or with CONFIG's data.

    Exit code 0 if they are equal, 1 if not.
    """
    from zarrcache.data import DataLock, differences

    if _is_config(first):
        raise ConfigError(f"{first} is a config. The lock file goes first: LOCK CONFIG.")
    one = DataLock.load(first)
    other = _of_config(second) if _is_config(second) else DataLock.load(second)
    found = list(differences(one, other))
    if as_json:
        show_json({"materials": len(one.densities), "differences": found})
        return int(bool(found))
    show_some(found, _MOST)
    if not found:
        show(f"No difference in {counted(len(one.densities), 'material')}.")
    return int(bool(found))


def _is_config(path: Path) -> bool:
    return path.suffix.lower() in (".yaml", ".yml")


def _of_config(path: Path, output: Path | None = None) -> DataLock:
    from zarrcache.cli.progress import Meter
    from zarrcache.ops import make_lock

    config = data_config(path, needs_cache=False)
    with Meter("Reading", "densities", 0) as meter:
        return make_lock(config, output, progress=meter.reach)
