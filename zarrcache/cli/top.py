"""``zarrcache top``: what the processes of this node do with a cache, while they do it."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zarrcache.cli.app import command, show, show_json
from zarrcache.cli.options import Directory, Json, OptionalConfig, cache_source
from zarrcache.errors import ConfigError
from zarrcache.parallel import Terminated

if TYPE_CHECKING:
    from zarrcache.ops import Activity, Monitor

__all__ = ["top"]


@command(resumable=False)
def top(
    config: OptionalConfig = None,
    directory: Directory = None,
    once: Annotated[bool, typer.Option("--once", help="show one interval, then end")] = False,
    interval: Annotated[
        float,
        typer.Option("--interval", metavar="SECONDS", min=0.1, help="time between two looks"),
    ] = 1.0,
    metrics_file: Annotated[
        Path | None,
        typer.Option(
            "--metrics-file",
            metavar="FILE.prom",
            help="keep this file up to date instead, for node_exporter; extra metrics",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Watch hits, requests and bytes of running trainings.

    Sees every process of this user that uses the cache: trainings, warm, serve. Ctrl-C ends it.
    """
    from zarrcache.ops import Monitor

    source = cache_source(config, directory)
    monitor = Monitor(source, has_settings=config is not None)
    try:
        if metrics_file is not None:
            _keep(metrics_file, monitor, interval, once=once)
        else:
            _watch(monitor, interval, once=once, as_json=as_json)
    except KeyboardInterrupt as exc:
        if isinstance(exc, Terminated):
            raise
    return 0


def _keep(path: Path, monitor: Monitor, interval_s: float, *, once: bool) -> None:
    from zarrcache.disk import write_file
    from zarrcache.ops import exposition

    if path.suffix != ".prom":
        raise ConfigError(f"{path} does not end in .prom, without which node_exporter ignores it.")
    # node_exporter never sees half of the file.
    write_file(path, exposition(monitor))
    while not once:
        time.sleep(interval_s)
        write_file(path, exposition(monitor))


def _watch(monitor: Monitor, interval_s: float, *, once: bool, as_json: bool) -> None:
    from zarrcache.cli.format import activity_lines
    from zarrcache.cli.progress import LiveText

    if once or as_json or not sys.stdout.isatty():
        while True:
            time.sleep(interval_s)
            activity = monitor.read()
            if as_json and once:
                show_json(activity.as_document())
            elif as_json:  # a line per interval
                show(json.dumps(activity.as_document()))
            else:
                _print(activity)
            if once:
                return
    with LiveText() as screen:
        while True:
            screen.show(activity_lines(monitor.read()))
            time.sleep(interval_s)


def _print(activity: Activity) -> None:
    from zarrcache.cli.format import activity_lines

    for line in activity_lines(activity):
        show(line)
