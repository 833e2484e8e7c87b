"""Commands that make stores and fill the cache: ``demo``, ``convert``, ``warm``."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from zarrcache.cliapp import app, failures, guarded, say, show, show_json
from zarrcache.cliargs import Config, DryRun, Ids, Json, chunk_sizes, data_config, read_ids, s3_options, size

__all__ = ["convert", "demo", "warm"]


@app.command()
@guarded
def demo(
    source: Annotated[Path | None, typer.Option(metavar="DIR", help="CHGCAR or json.gz pairs of your own [default: made-up densities]")] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=2, help="pairs at the most")] = 8,
    keep: Annotated[bool, typer.Option("--keep", help="keep the directory with sources, configs, cache and logs")] = False,
    as_json: Json = False,
) -> int:
    """Run the whole story on this machine.

    In under two minutes: embedded S3 server, conversion, a cold epoch, warm epochs, one with S3 switched off.
    """
    from zarrcache.cliwords import demo_rows
    from zarrcache.demo import run_demo
    from zarrcache.terminal import show_table

    report = run_demo(source, samples, keep=keep, say=say)
    if as_json:
        show_json({**asdict(report), "is_good": report.is_good})
        return 0 if report.is_good else 1
    show_table(demo_rows(report))
    show("All tensors are bit-identical to a plain zarr read." if report.identical else "error: tensors differ from a plain zarr read.")
    if report.directory is not None:
        say(f"Everything is in {report.directory}.")
    return 0 if report.is_good else 1


@app.command()
@guarded
def convert(
    src: Annotated[Path, typer.Argument(metavar="SRC", help="CHGCAR or Materials Project json file, plain or compressed, or a directory of them")],
    dst: Annotated[str, typer.Argument(metavar="DST", help="directory or s3://bucket/prefix; the stores get the names <task_id>.zarr")],
    pattern: Annotated[
        str | None, typer.Option(metavar="GLOB", help="which files below SRC, e.g. '**/CHGCAR' [default: whatever looks like a density]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="processes [default: one a core, and one for 8 MiB of files]", show_default=False)
    ] = None,
    chunks: Annotated[str, typer.Option(metavar="N[,N,N]", help="grid points of a chunk along each axis")] = "16",
    as_zip: Annotated[bool, typer.Option("--zip", help="one file a store, <task_id>.zarr.zip: one request on S3")] = False,
    zarr_format: Annotated[int, typer.Option("--zarr-format", metavar="2|3", min=2, max=3, help="version of the Zarr format")] = 2,
    diff: Annotated[bool, typer.Option("--diff", help="also the spin density (charge_density_diff) where there is one")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="convert again what is there [default: skip it]")] = False,
    dry_run: DryRun = False,
    endpoint_url: Annotated[str | None, typer.Option(metavar="URL", help="S3 server of DST other than Amazon's")] = None,
    profile: Annotated[str | None, typer.Option(metavar="NAME", help="profile of ~/.aws/config")] = None,
    anon: Annotated[bool, typer.Option("--anon", help="no credentials")] = False,
    s3_kwargs: Annotated[str | None, typer.Option("--s3-kwargs", metavar="JSON", help="arguments of s3fs.S3FileSystem, as a JSON object")] = None,
    config: Annotated[Path | None, typer.Option("--config", metavar="CONFIG", help="take s3_kwargs from this training config")] = None,
    as_json: Json = False,
) -> int:
    """Convert charge densities to Zarr stores.

    What is converted already is skipped; a file that cannot be read is named, and the rest goes on.
    """
    from zarrcache.cliwords import convert_plan_words, convert_words
    from zarrcache.convert import plan_convert
    from zarrcache.terminal import Meter

    plan = plan_convert(
        src,
        dst,
        pattern=pattern,
        workers=workers,
        chunks=chunk_sizes(chunks),
        zip=as_zip,
        zarr_format=3 if zarr_format == 3 else 2,
        diff=diff,
        overwrite=overwrite,
        s3_kwargs=s3_options(config, s3_kwargs, endpoint_url=endpoint_url, profile=profile, anon=anon),
    )
    if dry_run:
        if as_json:
            show_json({"dst": plan.dst, "files": plan.files, "skipped": plan.skipped, "source_bytes": plan.source_bytes, "workers": plan.workers})
        else:
            show(convert_plan_words(plan))
        return 0
    start_s = time.monotonic()
    with Meter("Converting", "files", len(plan.files)) as meter:
        report = plan.execute(lambda result: meter.advance(failed=result.error is not None))
    for result in report.converted:
        for warning in result.warnings:
            say(f"warning: {result.path}: {warning}")
    failures(result.error or "" for result in report.failed)
    show_json(asdict(report)) if as_json else show(convert_words(plan.dst, report, time.monotonic() - start_s))
    return 1 if report.failed else 0


@app.command()
@guarded
def warm(
    config: Config,
    split: Annotated[Literal["train", "test", "all"], typer.Option(help="which ids of CONFIG")] = "all",
    ids: Ids = None,
    revalidate: Annotated[
        bool,
        typer.Option(
            "--revalidate",
            help="list the directories anew, and compare what is in the cache with the origin, by one LIST each "
            "[default: unless cache.revalidate is never]",
            show_default=False,
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", metavar="N", min=1, help="processes [default: one a core, at most 8, and one for 16 densities]", show_default=False
        ),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(parser=size, metavar="SIZE", help="stop when this much is warm, e.g. '50 GiB' [default: no limit]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print requests and bytes; fetch nothing")] = False,
    as_json: Json = False,
) -> int:
    """Fill the cache with every density of CONFIG.

    Safe to stop and run again: only what is missing is fetched, and with --revalidate what the origin has changed.
    """
    from zarrcache.cliwords import estimate_words, warm_words
    from zarrcache.terminal import Meter
    from zarrcache.warming import plan_warm

    asked = True if revalidate else None
    plan = plan_warm(data_config(config), split=split, ids=read_ids(ids), revalidate=asked, workers=workers, limit_bytes=limit)
    if dry_run:
        with Meter("Listing", "densities", len(plan.densities)) as meter:
            estimate = plan.estimate(meter.reach)
        failures(f"{result.task_id} ({result.role}): {result.error}" for result in estimate.failed)
        if as_json:
            show_json({**asdict(estimate), "ids": len(plan.task_ids), "missing": plan.missing})
        else:
            show(estimate_words(plan, estimate))
        return 1 if estimate.failed else 0
    with Meter("Warming", "densities", len(plan.densities), lambda: plan.reader.stats.fetched_bytes) as meter:
        report = plan.execute(lambda result: meter.advance(failed=result.outcome == "failed"))
    failures(f"{result.task_id} ({result.role}): {result.error}" for result in report.failed)
    if as_json:
        show_json({**asdict(report), "missing": plan.missing})
    else:
        words, notes = warm_words(plan, report)
        show(words)
        for note in notes:
            say(note)
    return 0 if report.is_good else 1
