"""The command line. Data on stdout, talk and prompts on stderr; exit 0 done, 1 some failed, 2 usage or settings, 130 Ctrl-C.

Every command imports what it needs when it runs, so that ``zarrcache --help`` is there at once.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from zarrcache import __version__
from zarrcache.cliargs import (
    Config,
    Directory,
    DryRun,
    Ids,
    Json,
    MaybeConfig,
    chunk_sizes,
    data_config,
    read_ids,
    s3_options,
    seconds,
    size,
    where,
)
from zarrcache.errors import ConfigError, ZarrCacheError

__all__ = ["main"]

app = typer.Typer(
    name="zarrcache",
    help="Train from S3 at the speed of the node's own SSD: convert, cache and look after charge densities in Zarr stores.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: it needs no rich, and can be searched
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)

_SHOWN = 20  # failures that are printed; --json has all
_settings = {"debug": False}


def _guarded(command: Callable[..., int | None]) -> Callable[..., None]:
    """Exit codes and words for what may end a command early."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            code = command(*args, **kwargs) or 0
        except ZarrCacheError as exc:
            if _settings["debug"]:
                traceback.print_exc()
            _say(f"error: {exc}")
            code = 2 if isinstance(exc, ConfigError) else 1
        except KeyboardInterrupt:
            _say("Interrupted. What is finished stays; run the same command again to go on.")
            code = 130
        raise typer.Exit(code)

    return run


def _version(is_asked: bool) -> None:
    if is_asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, help="print the version and exit", is_eager=True)] = False,
    debug: Annotated[bool, typer.Option("--debug", help="log everything, and show the traceback of an error")] = False,
) -> None:
    from zarrcache.terminal import StderrHandler

    _settings["debug"] = debug
    logging.getLogger("zarrcache").setLevel(logging.DEBUG if debug else logging.WARNING)
    logging.basicConfig(level=logging.WARNING, handlers=[StderrHandler()], format="%(message)s")


@app.command()
@_guarded
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

    report = run_demo(source, samples, keep=keep, say=_say)
    if as_json:
        _json({**asdict(report), "is_good": report.is_good})
        return 0 if report.is_good else 1
    show_table(demo_rows(report))
    print("All tensors are bit-identical to a plain zarr read." if report.identical else "error: tensors differ from a plain zarr read.")
    if report.directory is not None:
        _say(f"Everything is in {report.directory}.")
    return 0 if report.is_good else 1


@app.command()
@_guarded
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
            _json({"dst": plan.dst, "files": plan.files, "skipped": plan.skipped, "source_bytes": plan.source_bytes, "workers": plan.workers})
        else:
            print(convert_plan_words(plan))
        return 0
    start_s = time.monotonic()
    with Meter("Converting", "files", len(plan.files)) as meter:
        report = plan.execute(lambda result: meter.advance(failed=result.error is not None))
    for result in report.converted:
        for warning in result.warnings:
            _say(f"warning: {result.path}: {warning}")
    _failures(result.error or "" for result in report.failed)
    _json(asdict(report)) if as_json else print(convert_words(plan.dst, report, time.monotonic() - start_s))
    return 1 if report.failed else 0


@app.command()
@_guarded
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
        _failures(f"{result.task_id} ({result.role}): {result.error}" for result in estimate.failed)
        if as_json:
            _json({**asdict(estimate), "ids": len(plan.task_ids), "missing": plan.missing})
        else:
            print(estimate_words(plan, estimate))
        return 1 if estimate.failed else 0
    with Meter("Warming", "densities", len(plan.densities), lambda: plan.reader.stats.fetched_bytes) as meter:
        report = plan.execute(lambda result: meter.advance(failed=result.outcome == "failed"))
    _failures(f"{result.task_id} ({result.role}): {result.error}" for result in report.failed)
    if as_json:
        _json({**asdict(report), "missing": plan.missing})
    else:
        words, notes = warm_words(plan, report)
        print(words)
        for note in notes:
            _say(note)
    return 0 if report.is_good else 1


@app.command()
@_guarded
def evict(
    config: MaybeConfig = None,
    everything: Annotated[bool, typer.Option("--all", help="every entry of the cache directory, not only CONFIG's")] = False,
    directory: Directory = None,
    older_than: Annotated[
        float | None, typer.Option(parser=seconds, metavar="TIME", help="only what was stored this long ago, e.g. 30d, 12h")
    ] = None,
    target: Annotated[
        int | None, typer.Option(parser=size, metavar="SIZE", help="only the oldest, until the cache is this small, e.g. '50 GiB'")
    ] = None,
    ids: Ids = None,
    stale: Annotated[bool, typer.Option("--stale", help="only stores that the origin has changed or lost; one LIST for each entry")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> int:
    """Drop entries of CONFIG's ids, or --all.

    Options narrow that down. Nothing outside <cache.dir>/zarrcache-v1/ is touched.
    """
    from zarrcache.cliwords import plural
    from zarrcache.evicting import plan_evict
    from zarrcache.terminal import Meter

    plan = plan_evict(where(config, directory), ids=read_ids(ids), older_than_s=older_than, target_bytes=target, stale=stale, everything=everything)
    what = f"{plural(len(plan.entries), 'entry', 'entries')} ({_bytes(plan.disk_bytes)}) from {plan.directory}"
    done = {"directory": plan.directory, "entries": len(plan.entries), "disk_bytes": plan.disk_bytes, "freed_bytes": 0}
    if not plan.entries:
        words = "Nothing to evict."
    elif dry_run:
        words = f"Would evict {what}. Dry run: nothing was evicted."
    else:
        if not yes:
            if not sys.stdin.isatty():
                raise ConfigError(f"about to evict {what}, and nobody is there to be asked. Add --yes to do it, or --dry-run to look.")
            if not typer.confirm(f"About to evict {what}. Proceed?", err=True):
                _say("Nothing was evicted.")
                return 1
        with Meter("Evicting", "entries", len(plan.entries)) as meter:
            done["freed_bytes"] = freed = plan.execute(meter.reach)
        words = f"Evicted {plural(len(plan.entries), 'entry', 'entries')}, freed {_bytes(freed)} in {plan.directory}."
    _json({**done, "dry_run": dry_run}) if as_json else print(words)
    return 0


@app.command()
@_guarded
def status(config: MaybeConfig = None, directory: Directory = None, as_json: Json = False) -> int:
    """Show entries, bytes, limit; how much is warm.

    Asks the origin nothing; works offline.
    """
    from zarrcache.cliwords import status_lines
    from zarrcache.status import look

    source = where(config, directory)
    state = look(source, has_settings=config is not None)
    if as_json:
        _json(asdict(state))
        return 0
    for line in status_lines(state):
        print(line)
    if state.coverage is not None and not state.coverage.is_complete:
        _say(f"Run `zarrcache warm {config}` to fill the cache.")
    return 0


@app.command()
@_guarded
def verify(
    config: MaybeConfig = None,
    directory: Directory = None,
    against_origin: Annotated[
        bool, typer.Option("--against-origin", help="also drop what the origin has changed since; one LIST for each entry")
    ] = False,
    as_json: Json = False,
) -> int:
    """Read every entry, drop what is corrupt.

    It will be fetched again. Exit 1 if there was any. Safe while trainings run.
    """
    from zarrcache.cliwords import verify_words
    from zarrcache.terminal import Meter
    from zarrcache.verifying import verify as run

    with Meter("Verifying", "", 1) as meter:
        report = run(where(config, directory), against_origin=against_origin, progress=meter.reach)
    _failures((f"{problem.file} ({problem.url}): {problem.why}" for problem in report.corrupt), verdict="corrupt")
    if as_json:
        _json(asdict(report))
    else:
        print(verify_words(report))
        if report.corrupt or report.stale:
            _say("They were dropped. Run `zarrcache warm` to fetch them again.")
    return 0 if report.is_good else 1


@app.command()
@_guarded
def doctor(config: MaybeConfig = None, directory: Directory = None, as_json: Json = False) -> int:
    """Check this node: versions, disk, locks, S3.

    Says what to do. S3 is asked with CONFIG's credentials. Exit 1 if a check failed.
    """
    from zarrcache.doctor import examine

    source = None if config is None and directory is None else where(config, directory, needs_cache=False)
    findings = []
    for finding in examine(source):
        findings.append(finding)
        if not as_json:
            print(f"{finding.verdict:<5} {finding.name}: {finding.found}", flush=True)
            if finding.advice:
                print(f"      {finding.advice}", flush=True)
    failed = any(finding.verdict == "fail" for finding in findings)
    if as_json:
        _json({"ok": not failed, "findings": [asdict(finding) for finding in findings]})
    elif source is None:
        _say("Give a training config to check its cache directory and its origin too.")
    return 1 if failed else 0


def _failures(lines: Iterable[str], verdict: str = "failed") -> None:
    every = list(lines)
    for line in every[:_SHOWN]:
        _say(f"{verdict}: {line}")
    if len(every) > _SHOWN:
        _say(f"{verdict}: {_n(len(every) - _SHOWN)} more; --json lists all")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _json(document: dict[str, Any]) -> None:
    print(json.dumps(document, indent=2, default=str))


def _n(number: int) -> str:
    from zarrcache.cliwords import count

    return count(number)


def _bytes(number: int) -> str:
    from zarrcache.config import format_bytes

    return format_bytes(number)


def main() -> None:
    """Entry point of ``zarrcache`` and ``python -m zarrcache``."""
    app()


if __name__ == "__main__":
    main()
