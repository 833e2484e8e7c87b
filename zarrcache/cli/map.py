"""``zarrcache map``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from zarrcache._units import counted
from zarrcache.cli.app import command, say, show, show_json
from zarrcache.cli.options import (
    Anonymous,
    EndpointUrl,
    Json,
    Profile,
    S3Config,
    S3Kwargs,
    output_file,
    s3_options,
    string,
)

__all__ = ["map"]


@command(resumable=False)
def map(
    directories: Annotated[
        list[str],
        typer.Argument(
            metavar="DIR...",
            help="directory or s3://bucket/prefix with densities; with several (input and label), "
            "only ids that are in all of them",
        ),
    ],
    output: Annotated[Path, output_file("map to write, compressed if it ends with .gz")] = Path(
        "map.json.gz"
    ),
    functional: Annotated[
        str | None,
        string(
            "NAME", "name of the ids in the map, `functional` of a training config [default: GGA]"
        ),
    ] = None,
    source: Annotated[
        str,
        string(
            "KINDS",
            "kinds of sources, comma-separated: zarr, zarr.zip, json.gz, CHGCAR, "
            "directory, or auto for all",
        ),
    ] = "auto",
    force: Annotated[
        bool, typer.Option("--force", help="replace the ids of this functional in FILE")
    ] = False,
    endpoint_url: EndpointUrl = None,
    profile: Profile = None,
    anon: Anonymous = False,
    s3_kwargs: S3Kwargs = None,
    config: S3Config = None,
    as_json: Json = False,
) -> int:
    """Write a map: the task ids of directories.

    Lists the ids under the name of a functional. If the map exists, keeps its other functionals.
    """
    from zarrcache.data import first_ids
    from zarrcache.ops import find_ids, write_map

    kinds = source.split(",") if "," in source else source
    options = s3_options(config, s3_kwargs, endpoint_url=endpoint_url, profile=profile, anon=anon)
    found = find_ids(directories, source=kinds, s3_kwargs=options, beside=output)
    for names, why in (
        (found.partial, "not in every directory"),
        (found.refused, "not named like a task id (letters, digits and ._+=@-)"),
    ):
        if names:
            say(f"left out: {counted(len(names), 'id')} {why}: {first_ids(names)}")
    if not found.ids:
        say("error: the directories have no id in common, so no map is written.", always=True)
        return 1
    name = "GGA" if functional is None else functional
    kept = write_map(output, name, found.ids, force=force)
    if as_json:
        show_json({"file": str(output), "functional": name, **asdict(found)})
        return 0
    beside = f", beside {counted(kept, 'other functional')}" if kept else ""
    show(f"Wrote {counted(len(found.ids), 'id')} as {name} to {output}{beside}.")
    if functional is None:
        say(f"--functional was not given, so the ids are those of {name}, the default.")
    chosen = "" if source == "auto" else f", source: {source}"
    say(f"In a training config: map_dir: {output}, functional: {name}{chosen}")
    return 0
