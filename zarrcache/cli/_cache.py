"""Commands that look after a cache: ``evict``, ``status``, ``verify``, ``doctor``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from zarrcache.cli.app import app, failures, guarded, guarded_look, say, show, show_json
from zarrcache.cli.options import (
    Directory,
    DryRun,
    Ids,
    Json,
    MaybeConfig,
    read_ids,
    seconds,
    size,
    where,
)
from zarrcache.errors import ConfigError

__all__ = ["doctor", "evict", "status", "verify"]


@app.command()
@guarded
def evict(
    config: MaybeConfig = None,
    everything: Annotated[
        bool, typer.Option("--all", help="every entry of the cache directory, not only CONFIG's")
    ] = False,
    directory: Directory = None,
    older_than: Annotated[
        float | None,
        typer.Option(
            parser=seconds, metavar="TIME", help="only what was stored this long ago, e.g. 30d, 12h"
        ),
    ] = None,
    target: Annotated[
        int | None,
        typer.Option(
            parser=size,
            metavar="SIZE",
            help="only the oldest, until the cache is this small, e.g. '50 GiB'",
        ),
    ] = None,
    ids: Ids = None,
    stale: Annotated[
        bool,
        typer.Option(
            "--stale",
            help="only stores that the origin has changed or lost; one LIST for each entry",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> int:
    """Drop entries of CONFIG's ids, or --all.

    Options narrow that down. Nothing outside <cache.dir>/zarrcache-v1/ is touched.
    """
    from zarrcache._units import format_bytes
    from zarrcache.cli.format import plural
    from zarrcache.cli.progress import Meter
    from zarrcache.ops import plan_evict

    plan = plan_evict(
        where(config, directory),
        ids=read_ids(ids),
        older_than_s=older_than,
        target_bytes=target,
        stale=stale,
        everything=everything,
    )
    what = f"{plural(len(plan.entries), 'entry', 'entries')} ({format_bytes(plan.disk_bytes)}) from {plan.directory}"
    done = {
        "directory": plan.directory,
        "entries": len(plan.entries),
        "disk_bytes": plan.disk_bytes,
        "freed_bytes": 0,
    }
    if not plan.entries:
        words = "Nothing to evict."
    elif dry_run:
        words = f"Would evict {what}. Dry run: nothing was evicted."
    else:
        if not yes:
            if not sys.stdin.isatty():
                raise ConfigError(
                    f"about to evict {what}, and nobody is there to be asked. Add --yes to do it, "
                    "or --dry-run to look."
                )
            if not typer.confirm(f"About to evict {what}. Proceed?", err=True):
                say("Nothing was evicted.")
                return 1
        with Meter("Evicting", "entries", len(plan.entries)) as meter:
            done["freed_bytes"] = freed = plan.execute(meter.reach)
        words = f"Evicted {plural(len(plan.entries), 'entry', 'entries')}, freed {format_bytes(freed)} in {plan.directory}."
    show_json({**done, "dry_run": dry_run}) if as_json else show(words)
    return 0


@app.command()
@guarded_look
def status(config: MaybeConfig = None, directory: Directory = None, as_json: Json = False) -> int:
    """Show entries, bytes, limit; how much is warm.

    Asks the origin nothing; works offline.
    """
    from zarrcache.cli.format import status_lines
    from zarrcache.ops import read_status

    source = where(config, directory)
    state = read_status(source, has_settings=config is not None)
    if as_json:
        show_json(asdict(state))
        return 0
    for line in status_lines(state):
        show(line)
    if state.coverage is not None and not state.coverage.is_complete:
        say(f"Run `zarrcache warm {config}` to fill the cache.")
    return 0


@app.command()
@guarded
def verify(
    config: MaybeConfig = None,
    directory: Directory = None,
    against_origin: Annotated[
        bool,
        typer.Option(
            "--against-origin",
            help="also drop what the origin has changed since; one LIST for each entry",
        ),
    ] = False,
    as_json: Json = False,
) -> int:
    """Read every entry, drop what is corrupt.

    It will be fetched again. Exit 1 if there was any. Safe while trainings run.
    """
    from zarrcache import ops
    from zarrcache.cli.format import verify_words
    from zarrcache.cli.progress import Meter

    with Meter("Verifying", "", 1) as meter:
        report = ops.verify(
            where(config, directory), against_origin=against_origin, progress=meter.reach
        )
    failures(
        (f"{problem.file} ({problem.url}): {problem.why}" for problem in report.corrupt),
        verdict="corrupt",
    )
    if as_json:
        show_json(asdict(report))
    else:
        show(verify_words(report))
        if report.corrupt or report.stale:
            say("They were dropped. Run `zarrcache warm` to fetch them again.")
    return 0 if report.is_good else 1


@app.command()
@guarded_look
def doctor(config: MaybeConfig = None, directory: Directory = None, as_json: Json = False) -> int:
    """Check this node: versions, disk, locks, S3.

    Says what to do. S3 is asked with CONFIG's credentials. Exit 1 if a check failed.
    """
    from zarrcache.ops import examine

    source = (
        None
        if config is None and directory is None
        else where(config, directory, needs_cache=False)
    )
    findings = []
    for finding in examine(source):
        findings.append(finding)
        if not as_json:
            show(f"{finding.verdict:<5} {finding.name}: {finding.found}")
            if finding.advice:
                show(f"      {finding.advice}")
    failed = any(finding.verdict == "fail" for finding in findings)
    if as_json:
        show_json({"ok": not failed, "findings": [asdict(finding) for finding in findings]})
    elif source is None:
        say("Give a training config to check its cache directory and its origin too.")
    return 1 if failed else 0
