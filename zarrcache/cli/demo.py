"""``zarrcache demo``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from zarrcache.cli.app import command, say, show, show_json
from zarrcache.cli.options import Json, whole

__all__ = ["demo"]


@command(resumable=False)
def demo(
    source: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="directory with CHGCAR or json.gz pairs [default: synthetic densities]",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(metavar="N", parser=whole(2), help="maximum number of pairs")
    ] = 8,
    keep: Annotated[
        bool,
        typer.Option("--keep", help="keep the directory with sources, configs, cache and logs"),
    ] = False,
    as_json: Json = False,
) -> int:
    """Run a complete example on this machine.

    In about two minutes: an S3 server on this machine, conversion, a cold epoch, warm epochs, and
    one with S3 switched off.
    """
    from zarrcache.cli.format import demo_rows
    from zarrcache.cli.progress import show_table
    from zarrcache.demo import run_demo

    report = run_demo(source, samples, keep=keep, say=say)
    if as_json:
        show_json({**asdict(report), "is_good": report.is_good})
        return 0 if report.is_good else 1
    show_table(demo_rows(report))
    if report.identical:
        show("All tensors are bit-identical to a plain zarr read.")
    else:
        show("error: tensors differ from a plain zarr read.")
    if report.directory is not None:
        say(f"Everything is in {report.directory}.")
    return 0 if report.is_good else 1
