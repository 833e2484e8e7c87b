"""``zarrcache lock`` and ``zarrcache diff``: pin the data of a training, and compare."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zarrcache.cli.app import command, say, show, show_json
from zarrcache.cli.format import plural
from zarrcache.cli.options import Config, Json, check_output, data_config, output_file

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

    Reads every density through the cache. `cache.lock: FILE` then refuses to train on other data.
    """
    check_output(output, config)
    made = _of_config(config)
    made.save(output)
    say(f"wrote {output}: {plural(len(made.densities), 'material')}")
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

    Exit code 0: the same; 1: not.
    """
    from zarrcache.data import DataLock, differences

    one = DataLock.load(first)
    is_config = second.suffix.lower() in (".yaml", ".yml")
    other = _of_config(second) if is_config else DataLock.load(second)
    found = list(differences(one, other))
    if as_json:
        show_json({"materials": len(one.densities), "differences": found})
        return int(bool(found))
    for line in found[:_MOST]:
        show(line)
    if len(found) > _MOST:
        say(f"{len(found) - _MOST} more; --json lists all")
    if not found:
        show(f"No difference in {plural(len(one.densities), 'material')}.")
    return int(bool(found))


def _of_config(path: Path) -> DataLock:
    from zarrcache.cli.progress import Meter
    from zarrcache.ops import make_lock

    config = data_config(path, needs_cache=False)
    with Meter("Reading", "densities", 0) as meter:
        return make_lock(config, progress=meter.reach)
