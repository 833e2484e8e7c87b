"""``zarrcache demo``."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from zarrcache._units import format_bytes
from zarrcache.cli.app import command, say, show, show_json, show_table
from zarrcache.cli.options import Json, number, string

if TYPE_CHECKING:
    from zarrcache.demo import DemoReport

__all__ = ["demo"]


@command(resumable=False)
def demo(
    source: Annotated[
        Path | None,
        string("DIR", "directory with CHGCAR or json.gz pairs [default: synthetic densities]"),
    ] = None,
    samples: Annotated[int, number(2, "maximum number of pairs")] = 8,
    keep: Annotated[
        bool,
        typer.Option("--keep", help="keep the directory with sources, configs, cache and logs"),
    ] = False,
    as_json: Json = False,
) -> int:
    """Run a complete example on this machine.

    In about two minutes it starts an S3 server, converts files, and trains: a cold epoch, warm
    epochs, and one with S3 switched off.
    """
    from zarrcache.demo import run_demo

    report = run_demo(source, samples, keep=keep, say=say)
    if as_json:
        show_json({**asdict(report), "is_good": report.is_good})
        return 0 if report.is_good else 1
    show_table(_rows(report), numeric=True)
    if report.identical:
        show("All tensors are bit-identical to a plain zarr read.")
    else:
        show("error: tensors differ from a plain zarr read.")
    if report.directory is not None:
        say(f"Everything is in {report.directory}.")
    return 0 if report.is_good else 1


def _rows(report: DemoReport) -> list[tuple[str, ...]]:
    """Rows of the table of ``demo``; the first one has the column names."""
    rows: list[tuple[str, ...]] = [
        (
            "epoch",
            "seconds",
            "of these waiting",
            "samples/s",
            "S3 requests",
            "bytes from S3",
            "hit ratio",
        )
    ]
    for row in report.rows:
        ratio = "" if row.hit_ratio is None else f"{100 * row.hit_ratio:.0f} %"
        rows.append(
            (
                row.epoch,
                f"{row.seconds:.2f}",
                f"{row.waited_s:.2f}",
                f"{row.samples_per_s:.1f}",
                f"{row.requests:,}",
                format_bytes(row.fetched_bytes),
                ratio,
            )
        )
    return rows
