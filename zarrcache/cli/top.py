"""``zarrcache top``: the present use of a cache by the processes of this node."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zarrcache._units import counted, format_bytes
from zarrcache.cli.app import command, show, show_json
from zarrcache.cli.options import (
    Directory,
    Json,
    OptionalConfig,
    cache_source,
    check_output,
    string,
)
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
        typer.Option(metavar="SECONDS", min=0.1, help="time between two updates"),
    ] = 1.0,
    metrics_file: Annotated[
        Path | None,
        string("FILE.prom", "write this file for node_exporter instead; needs the extra metrics"),
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
        raise ConfigError(f"{path} does not end in .prom; node_exporter ignores such files.")
    check_output(path, "a file of metrics", b"# HELP zarrcache_")
    # node_exporter never sees half of the file.
    write_file(path, exposition(monitor))
    while not once:
        time.sleep(interval_s)
        write_file(path, exposition(monitor))


def _watch(monitor: Monitor, interval_s: float, *, once: bool, as_json: bool) -> None:
    from zarrcache.cli.progress import live_text

    if once or as_json or not sys.stdout.isatty():
        while True:
            time.sleep(interval_s)
            activity = monitor.read()
            if as_json and once:
                show_json(activity.as_document())
            elif as_json:  # a line per interval
                show(json.dumps(activity.as_document()))
            else:
                for line in activity_lines(activity):
                    show(line)
            if once:
                return
    with live_text() as show_lines:
        while True:
            show_lines(activity_lines(monitor.read()))
            time.sleep(interval_s)


def activity_lines(activity: Activity) -> list[str]:
    """Lines of ``zarrcache top``, at most 60 columns wide."""
    pids = activity.pids
    named = ", ".join(map(str, pids[:5])) + (", ..." if len(pids) > 5 else "")
    runs = f"{counted(len(activity.boards), 'run')}, {counted(len(pids), 'process', 'processes')}"
    lines = [
        activity.directory if len(activity.directory) <= 60 else f"...{activity.directory[-57:]}",
        f"{runs} ({named})" if pids else "No process of this user uses this cache now.",
        f"{'':<20}{'per second':>18}{'since the start':>20}",
    ]

    def row(name: str, now: str, since: str) -> None:
        lines.append(f"{name:<20}{now:>18}{since:>20}")

    for name, counter in (
        ("hits", "hits"),
        ("misses", "misses"),
        ("not stored", "bypasses"),
        ("requests to origin", "requests"),
        ("retries", "retries"),
    ):
        row(name, f"{activity.per_second(counter):,.1f}", f"{getattr(activity.total, counter):,}")
    for name, counter in (
        ("from the origin", "fetched_bytes"),
        ("from other nodes", "peer_bytes"),
        ("to other nodes", "sent_bytes"),
        ("from disk", "served_bytes"),
    ):
        rate = format_bytes(int(activity.per_second(counter)))
        row(name, f"{rate}/s", format_bytes(getattr(activity.total, counter)))
    row(
        "hit ratio",
        *(
            f"{100 * stats.hit_ratio:.1f} %" if stats.hits + stats.misses else "-"
            for stats in (activity.recent, activity.total)
        ),
    )
    row("look-ahead, ready", "", format_bytes(activity.total.ahead_bytes))
    limit = activity.limit_bytes
    of = ""
    if limit is not None:
        of = f"{100 * activity.volume_bytes / limit:.0f} % of {format_bytes(limit)}"
    row("on disk", of, format_bytes(activity.volume_bytes))
    return lines
