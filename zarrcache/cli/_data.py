"""Commands that make stores and fill the cache: ``demo``, ``convert``, ``warm``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from zarrcache.cli._nodes import engine_of, on_each_node
from zarrcache.cli.app import app, failures, guarded, guarded_look, say, show, show_json
from zarrcache.cli.options import (
    Config,
    Dask,
    DryRun,
    Ids,
    Json,
    chunk_sizes,
    data_config,
    read_ids,
    s3_options,
    size,
)
from zarrcache.errors import ConfigError
from zarrcache.parallel import node_name

if TYPE_CHECKING:
    from zarrcache.convert import ConvertResult

__all__ = ["convert", "demo", "warm"]


@app.command()
@guarded_look
def demo(
    source: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="CHGCAR or json.gz pairs of your own [default: made-up densities]"
        ),
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", min=2, help="pairs at the most")] = 8,
    keep: Annotated[
        bool,
        typer.Option("--keep", help="keep the directory with sources, configs, cache and logs"),
    ] = False,
    as_json: Json = False,
) -> int:
    """Run the whole story on this machine.

    In under two minutes: embedded S3 server, conversion, a cold epoch, warm epochs, one with S3
    switched off.
    """
    from zarrcache.cli.format import demo_rows
    from zarrcache.cli.progress import show_table
    from zarrcache.demo import run_demo

    report = run_demo(source, samples, keep=keep, say=say)
    if as_json:
        show_json({**asdict(report), "is_good": report.is_good})
        return 0 if report.is_good else 1
    show_table(demo_rows(report))
    show(
        "All tensors are bit-identical to a plain zarr read."
        if report.identical
        else "error: tensors differ from a plain zarr read."
    )
    if report.directory is not None:
        say(f"Everything is in {report.directory}.")
    return 0 if report.is_good else 1


@app.command()
@guarded
def convert(
    src: Annotated[
        Path,
        typer.Argument(
            metavar="SRC",
            help="CHGCAR or Materials Project json file, plain or compressed, or a directory of "
            "them",
        ),
    ],
    dst: Annotated[
        str,
        typer.Argument(
            metavar="DST",
            help="directory or s3://bucket/prefix; the stores get the names <task_id>.zarr",
        ),
    ],
    pattern: Annotated[
        str | None,
        typer.Option(
            metavar="GLOB",
            help="which files below SRC, e.g. '**/CHGCAR' [default: whatever looks like a density]",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            help="processes [default: one a core, and one for 8 MiB of files]",
            show_default=False,
        ),
    ] = None,
    chunks: Annotated[
        str, typer.Option(metavar="N[,N,N]", help="grid points of a chunk along each axis")
    ] = "16",
    as_zip: Annotated[
        bool, typer.Option("--zip", help="one file a store, <task_id>.zarr.zip: one request on S3")
    ] = False,
    zarr_format: Annotated[
        int,
        typer.Option(
            "--zarr-format", metavar="2|3", min=2, max=3, help="version of the Zarr format"
        ),
    ] = 2,
    diff: Annotated[
        bool,
        typer.Option(
            "--diff", help="also the spin density (charge_density_diff) where there is one"
        ),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="convert again what is there [default: skip it]")
    ] = False,
    dask: Dask = None,
    dry_run: DryRun = False,
    endpoint_url: Annotated[
        str | None, typer.Option(metavar="URL", help="S3 server of DST other than Amazon's")
    ] = None,
    profile: Annotated[
        str | None, typer.Option(metavar="NAME", help="profile of ~/.aws/config")
    ] = None,
    anon: Annotated[bool, typer.Option("--anon", help="no credentials")] = False,
    s3_kwargs: Annotated[
        str | None,
        typer.Option(
            "--s3-kwargs", metavar="JSON", help="arguments of s3fs.S3FileSystem, as a JSON object"
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="CONFIG", help="take s3_kwargs from this training config"),
    ] = None,
    as_json: Json = False,
) -> int:
    """Convert charge densities to Zarr stores.

    What is converted already is skipped; a file that cannot be read is named, and the rest goes on.
    """
    from zarrcache.cli.format import convert_plan_words, convert_words
    from zarrcache.cli.progress import Meter
    from zarrcache.convert import plan_convert

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
        s3_kwargs=s3_options(
            config, s3_kwargs, endpoint_url=endpoint_url, profile=profile, anon=anon
        ),
    )
    if dry_run:
        if as_json:
            show_json(
                {
                    "dst": plan.dst,
                    "files": plan.files,
                    "skipped": plan.skipped,
                    "source_bytes": plan.source_bytes,
                    "workers": plan.workers,
                }
            )
        else:
            show(convert_plan_words(plan))
        return 0
    start_s = time.monotonic()
    done: list[ConvertResult] = []
    try:
        with (
            engine_of(dask if plan.files else None, workers) as engine,
            Meter("Converting", "files", len(plan.files)) as meter,
        ):

            def progress(result: ConvertResult) -> None:
                done.append(result)
                meter.advance(failed=result.error is not None)

            report = plan.execute(progress, engine=engine)
    except BaseException:
        # Ctrl-C too: the next run skips what is converted, and would not say again what looks wrong
        # with it
        _what_is_wrong(sorted(done, key=lambda result: result.path))
        raise
    _what_is_wrong((*report.converted, *report.failed))
    show_json(asdict(report)) if as_json else show(
        convert_words(plan.dst, report, time.monotonic() - start_s)
    )
    return 1 if report.failed else 0


def _what_is_wrong(results: Sequence[ConvertResult]) -> None:
    """Warnings and failures, on stderr."""
    for result in results:
        for warning in result.warnings:
            say(f"warning: {result.path}: {warning}")
    failures(result.error for result in results if result.error is not None)


@app.command()
@guarded
def warm(
    config: Config,
    split: Annotated[
        Literal["train", "test", "all"], typer.Option(help="which ids of CONFIG")
    ] = "all",
    ids: Ids = None,
    revalidate: Annotated[
        bool,
        typer.Option(
            "--revalidate",
            help="list the directories anew, and compare what is in the cache with the origin, by "
            "one LIST each "
            "[default: unless cache.revalidate is never]",
            show_default=False,
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            metavar="N",
            min=1,
            help="processes [default: one a core, at most 8, and one for 16 densities]",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            parser=size,
            metavar="SIZE",
            help="stop when this much is warm, e.g. '50 GiB' [default: no limit]",
        ),
    ] = None,
    dask: Dask = None,
    each_node: Annotated[
        bool,
        typer.Option(
            "--each-node",
            help="fill the cache of every node, once: under `srun --ntasks-per-node=1`, or of "
            "every host of --dask",
        ),
    ] = False,
    assignment: Annotated[
        Literal["global", "node"] | None,
        typer.Option(
            help="with --each-node, what of CONFIG: all of it, or what NodeSampler assigns to the "
            "node [default: global]",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print requests and bytes; fetch nothing")
    ] = False,
    as_json: Json = False,
) -> int:
    """Fill the cache with every density of CONFIG.

    Safe to stop and run again: only what is missing is fetched, and with --revalidate what the
    origin has changed.
    """
    from zarrcache.cli.format import estimate_words, warm_words
    from zarrcache.cli.progress import Meter
    from zarrcache.ops import plan_warm
    from zarrcache.parallel import this_node

    if assignment is not None and not each_node:
        raise ConfigError("--assignment says what each node of several warms. Add --each-node.")
    if each_node and dask is not None:
        options = {
            "--split": split,
            "--ids": ids and ids.absolute(),
            "--workers": workers,
            "--limit": limit,
            "--assignment": assignment,
        }
        return on_each_node(
            dask,
            ["warm", str(config.absolute())],
            options,
            {"--revalidate": revalidate, "--dry-run": dry_run},
            as_json=as_json,
        )
    world = this_node() if each_node else None
    if world is not None and world.local_rank > 0:
        say(f"{node_name()}: left to the first process of this node.")
        return 0
    asked = True if revalidate else None
    own = world if assignment == "node" else None
    plan = plan_warm(
        data_config(config),
        split=split,
        ids=read_ids(ids),
        revalidate=asked,
        workers=workers,
        limit_bytes=limit,
        world=own,
    )
    notes: list[str] = []
    if dry_run:
        with Meter("Listing", "densities", len(plan.densities)) as meter:
            estimate = plan.estimate(meter.reach)
        failed, is_good = estimate.failed, not estimate.failed
        document, words = (
            {**asdict(estimate), "ids": len(plan.task_ids), "missing": plan.missing},
            estimate_words(plan, estimate),
        )
    else:
        here = engine_of(dask if plan.densities else None, workers, only_here=True)
        with (
            here as engine,
            Meter(
                "Warming", "densities", len(plan.densities), lambda: plan.reader.stats.fetched_bytes
            ) as meter,
        ):
            report = plan.execute(
                lambda result: meter.advance(failed=result.outcome == "failed"), engine=engine
            )
        failed, is_good = report.failed, report.is_good
        document, (words, notes) = (
            {**asdict(report), "missing": plan.missing},
            warm_words(plan, report),
        )
    failures(f"{result.task_id} ({result.role}): {result.error}" for result in failed)
    if world is not None:  # many nodes write to one terminal
        document, words = (
            {"nodes": [{"node": node_name(), "summary": words, **document}]},
            f"{node_name()}: {words}",
        )
    if as_json:
        show_json(document)
    else:
        show(words)
        for note in notes:
            say(note)
    return 0 if is_good else 1
