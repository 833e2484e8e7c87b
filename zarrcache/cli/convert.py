"""``zarrcache convert``."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from zarrcache._units import counted, format_bytes, format_seconds
from zarrcache.cli.app import command, failures, say, show, show_json
from zarrcache.cli.options import (
    Anonymous,
    Dask,
    DryRun,
    EndpointUrl,
    Json,
    Profile,
    S3Config,
    S3Kwargs,
    chunk_sizes,
    number,
    open_engine,
    s3_options,
    string,
    whole,
)
from zarrcache.errors import ConfigError

if TYPE_CHECKING:
    from zarrcache.convert import ConvertPlan, ConvertReport, ConvertResult

__all__ = ["convert"]

_DRY_RUN = (
    "Dry run: nothing was written. Values were not read: a file that is cut short, or a potential "
    "(LOCPOT) named like a density, is refused when it is converted."
)


@command(resumable=True)
def convert(
    context: typer.Context,
    src: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="CHGCAR or Materials Project JSON file, plain or compressed, or a directory tree "
            "with them",
        ),
    ],
    dst: Annotated[
        str,
        typer.Argument(
            metavar="DST", help="directory or s3://bucket/prefix; stores are named <task_id>.zarr"
        ),
    ],
    pattern: Annotated[
        str | None,
        string(
            "GLOB", "files below SRC, e.g. '**/CHGCAR' [default: every file named like a density]"
        ),
    ] = None,
    id_from: Annotated[
        str,
        string(
            "RULE",
            "rule for the ids: name (of the file), directory, path (below SRC, joined "
            "with _), a regular expression such as '(mp-\\d+)' for that path, or auto: the file's "
            "name; for VASP's own names the nearest directory that is not a step such as relax",
        ),
    ] = "auto",
    prefer: Annotated[
        str | None,
        string(
            "GLOB",
            "if a material has several files, convert the file that matches, e.g. "
            "'**/CHGCAR.3static' [default: such files are an error]",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        number(1, "worker processes [default: min(cores, bytes of the files / 32 MiB)]"),
    ] = None,
    chunks: Annotated[
        str,
        string("N[,N,N]", "grid points per chunk along each axis, at most the grid's"),
    ] = "64",
    as_zip: Annotated[
        bool,
        typer.Option("--zip", help="one file per store, <task_id>.zarr.zip: one request on S3"),
    ] = False,
    zarr_format: Annotated[
        int,
        typer.Option(metavar="2|3", parser=whole(2, 3), help="version of the Zarr format"),
    ] = 2,
    diff: Annotated[
        bool,
        typer.Option(
            "--diff", help="also store the spin density (charge_density_diff) of files that have it"
        ),
    ] = False,
    units: Annotated[
        Literal["cell", "volume"],
        typer.Option(
            help="cell: density times cell volume, as in the file; volume: electrons per cubic "
            "angstrom"
        ),
    ] = "cell",
    dtype: Annotated[
        Literal["float32", "float64"],
        typer.Option(
            help="type of the arrays; from float64, readers compute every unit from the file's own "
            "values"
        ),
    ] = "float32",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace stores that exist [default: skip them]")
    ] = False,
    dask: Dask = None,
    dry_run: DryRun = False,
    endpoint_url: EndpointUrl = None,
    profile: Profile = None,
    anon: Anonymous = False,
    s3_kwargs: S3Kwargs = None,
    config: S3Config = None,
    as_json: Json = False,
) -> int:
    """Convert charge densities to Zarr stores.

    Skips complete stores of the same file. Reports files that cannot be read, and converts the
    others.
    """
    from zarrcache.cli.progress import Meter
    from zarrcache.convert import plan_convert

    if context.args:
        raise ConfigError(
            f"convert takes one SRC and one DST, and {2 + len(context.args)} paths are given. Give "
            "the directory that holds the files, with --pattern 'GLOB' (in quotes) to choose among "
            "them, or convert one SRC after the other."
        )
    plan = plan_convert(
        src,
        dst,
        pattern=pattern,
        prefer=prefer,
        workers=workers,
        chunks=chunk_sizes(chunks),
        zip=as_zip,
        zarr_format=3 if zarr_format == 3 else 2,
        diff=diff,
        units=units,
        dtype=dtype,
        overwrite=overwrite,
        id_from=id_from,
        s3_kwargs=s3_options(
            config, s3_kwargs, endpoint_url=endpoint_url, profile=profile, anon=anon
        ),
    )
    first = dst.partition("/")[0]
    if "/" in dst and "://" not in dst and first.strip("~") and not os.path.lexists(first):
        say(f"note: {first} is a new directory of this machine. For a bucket write s3://{dst}")
    if dry_run:
        if as_json:
            keys = ("dst", "files", "skipped", "source_bytes", "workers", "unrecorded")
            show_json(
                {key: getattr(plan, key) for key in keys}
                | {
                    "task_ids": {str(path): task_id for path, task_id in plan.task_ids.items()},
                    "refused": [asdict(result) for result in plan.refused],
                    "left_out": [asdict(item) for item in plan.left_out],
                }
            )
        else:
            for line in left_out_lines(plan, most=None):
                say(line)
            failures(result.error for result in plan.refused if result.error is not None)
            show(format_convert_plan(plan))
        return 1 if plan.refused else 0
    start_s = time.monotonic()
    done: list[ConvertResult] = []
    try:
        with (
            open_engine(dask if plan.files else None, workers) as engine,
            Meter("Converting", "files", len(plan.files)) as meter,
        ):

            def progress(result: ConvertResult) -> None:
                done.append(result)
                meter.advance(failed=result.error is not None)

            report = plan.execute(progress, engine=engine)
    except BaseException:
        # Also on Ctrl-C, because the next run skips converted files and their warnings.
        _say_problems(sorted(done, key=lambda result: result.path))
        raise
    if not as_json:
        for line in left_out_lines(plan):
            say(line)
    _say_problems((*report.converted, *report.failed))
    if as_json:
        show_json(asdict(report))
    else:
        show(format_conversion(plan.dst, report, time.monotonic() - start_s))
    return 1 if report.failed else 0


def _say_problems(results: Sequence[ConvertResult]) -> None:
    for result in results:
        for warning in result.warnings:
            say(f"warning: {result.path}: {warning}")
    failures(result.error for result in results if result.error is not None)


def format_convert_plan(plan: ConvertPlan) -> str:
    """Text for ``convert --dry-run``: a summary, and each file with its task id."""
    already = f"; {len(plan.skipped):,} converted already" if plan.skipped else ""
    summary = (
        f"Would convert {counted(len(plan.files), 'file')} "
        f"({format_bytes(plan.source_bytes)}) to {plan.dst}{already}"
    )
    ids = plan.task_ids
    width = max(map(len, ids.values()), default=0)
    return "\n".join(
        (
            summary,
            *(f"  {ids[path]:{width}}  {path}" for path in plan.files),
            _DRY_RUN,
        )
    )


def left_out_lines(plan: ConvertPlan, most: int | None = 10) -> list[str]:
    """Files that ``convert`` does not read, each with the reason, at most ``most`` of them."""
    lines = [f"left out: {item.path}: {item.reason}" for item in plan.left_out[:most]]
    if len(plan.left_out) > len(lines):
        more = len(plan.left_out) - len(lines)
        lines.append(f"left out: {more:,} more; --dry-run lists all")
    if plan.unrecorded:
        stores = counted(len(plan.unrecorded), "existing store")
        lines.append(
            f"skipped: {stores} without a record of its file ({plan.unrecorded[0]} for example), "
            "written by an earlier version or another program. --overwrite converts again."
        )
    return lines


def format_conversion(dst: str, report: ConvertReport, seconds: float) -> str:
    """One line for ``convert``."""
    files = len(report.converted) + len(report.failed)
    if not files:
        already = f"{counted(len(report.skipped), 'file')} converted already"
        return f"Nothing to convert to {dst}: {already} (--overwrite converts again)."
    skipped = (
        f", {len(report.skipped):,} skipped (converted already; --overwrite converts them again)"
        if report.skipped
        else ""
    )
    return (
        f"Converted {len(report.converted):,} of {counted(files, 'file')} to {dst} "
        f"({format_bytes(report.written_bytes)}) "
        f"in {format_seconds(seconds)}; {len(report.failed):,} failed{skipped}."
    )
