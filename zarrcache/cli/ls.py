"""``zarrcache ls``: the cached densities, a line each."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated, Literal

import typer

from zarrcache._keys import density_name
from zarrcache._units import format_bytes
from zarrcache.cli.app import command, show_json, show_table
from zarrcache.cli.options import Directory, Ids, Json, OptionalConfig, cache_source, read_ids

__all__ = ["ls"]


@command(resumable=False)
def ls(
    config: OptionalConfig = None,
    directory: Directory = None,
    ids: Ids = None,
    match: Annotated[
        str, typer.Option(metavar="GLOB", help="only ids that match, e.g. 'mp-12*'")
    ] = "*",
    sort: Annotated[
        Literal["id", "role", "shape", "bytes", "units", "encoding", "stored"],
        typer.Option(help="column to sort by"),
    ] = "id",
    reverse: Annotated[
        bool, typer.Option("--reverse", "-r", help="in descending order: largest or latest first")
    ] = False,
    as_json: Json = False,
) -> int:
    """List cached densities: id, role, shape, bytes, units, time.

    Without CONFIG: all of the cache, without roles. Sends no request.
    """
    from zarrcache.ops import list_entries

    entries = list_entries(
        cache_source(config, directory),
        ids=read_ids(ids),
        match=match,
        sort=sort,
        reverse=reverse,
    )
    if as_json:
        show_json({"entries": [asdict(entry) for entry in entries]})
        return 0
    rows = [("ID", "ROLE", "ARRAY", "SHAPE", "BYTES", "UNITS", "ENCODING", "STORED")]
    rows += [
        (
            entry.task_id,
            entry.role or "-",
            density_name(entry.array or "-"),
            "x".join(map(str, entry.shape)) or "damaged",
            format_bytes(entry.disk_bytes),
            entry.units or "-",
            entry.encoding or "-",
            time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.stored_s)),
        )
        for entry in entries
    ]
    show_table(rows)
    return 0
