"""``zarrcache evict``, ``status``, ``verify`` and ``doctor``: maintain a cache directory."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import Annotated

import typer

from zarrcache.cli.app import command, failures, say, say_refusal, show, show_json
from zarrcache.cli.options import (
    Directory,
    DryRun,
    Ids,
    Json,
    OptionalConfig,
    cache_source,
    read_ids,
    seconds,
    size,
)
from zarrcache.errors import ConfigError

__all__ = ["doctor", "evict", "status", "verify"]


@command(resumable=True)
def evict(
    config: OptionalConfig = None,
    everything: Annotated[
        bool, typer.Option("--all", help="every entry of the cache, not only those of CONFIG")
    ] = False,
    directory: Directory = None,
    older_than: Annotated[
        float | None,
        typer.Option(
            parser=seconds,
            metavar="TIME",
            help="only entries stored at least this long ago, e.g. 30d, 12h",
        ),
    ] = None,
    target: Annotated[
        int | None,
        typer.Option(
            parser=size,
            metavar="SIZE",
            help="only the oldest, until the cache takes at most this size, e.g. '50 GiB'",
        ),
    ] = None,
    ids: Ids = None,
    stale: Annotated[
        bool,
        typer.Option(
            "--stale",
            help="only stores that changed or are gone at the origin; one LIST per entry",
        ),
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask for confirmation")] = False,
    dry_run: DryRun = False,
    as_json: Json = False,
) -> int:
    """Drop entries of CONFIG's ids, or --all.

    Further options narrow the choice. Only <cache.dir>/zarrcache-v1/ is touched.
    """
    from zarrcache._units import format_bytes
    from zarrcache.cli.format import entries_by_kind, plural
    from zarrcache.cli.progress import Meter
    from zarrcache.ops import plan_evict

    plan = plan_evict(
        cache_source(config, directory),
        ids=read_ids(ids),
        older_than_s=older_than,
        target_bytes=target,
        stale=stale,
        everything=everything,
    )
    entries = plural(len(plan.entries), "entry", "entries")
    of = "every config" if everything else config
    what = (
        f"{entries} ({format_bytes(plan.disk_bytes)}) of {of} from {plan.directory}: "
        f"{entries_by_kind(plan.entries)}"
    )
    freed = 0
    if not plan.entries:
        text = "Nothing to evict."
    elif dry_run:
        text = f"Would evict {what}. Dry run: nothing was evicted."
    else:
        if not yes:
            if not sys.stdin.isatty():
                raise ConfigError(
                    f"About to evict {what}, but there is no terminal to ask for confirmation. "
                    "Pass --yes to evict, or --dry-run to see what would be evicted."
                )
            if not _confirmed(f"About to evict {what}. Proceed?"):
                say("Nothing was evicted.")
                return 1
        with Meter("Evicting", "entries", len(plan.entries)) as meter:
            freed = plan.execute(meter.reach)
        text = f"Evicted {entries}, freed {format_bytes(freed)} in {plan.directory}."
    if as_json:
        show_json(
            {
                "directory": plan.directory,
                "entries": len(plan.entries),
                "disk_bytes": plan.disk_bytes,
                "freed_bytes": freed,
                "dry_run": dry_run,
            }
        )
    else:
        show(text)
    return 0


def _confirmed(question: str) -> bool:
    """Ask on the terminal; Ctrl-C there ends the command as anywhere else."""
    try:
        return typer.confirm(question, err=True)
    except typer.Abort as exc:  # also the end of the input, which is a no
        say("")
        if isinstance(exc.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        return False


@command(resumable=False)
def status(
    config: OptionalConfig = None, directory: Directory = None, as_json: Json = False
) -> int:
    """Show entries, bytes, limit; how much is warm.

    Sends no request; works offline.
    """
    from zarrcache.cli.format import status_lines
    from zarrcache.ops import known_refusal, read_status

    source = cache_source(config, directory)
    state = read_status(source, has_settings=config is not None)
    refusal = known_refusal(source)
    if as_json:
        show_json({**asdict(state), "refusal": refusal})
        return 0
    for line in status_lines(state):
        show(line)
    say_refusal(refusal)
    if state.coverage is not None and not state.coverage.is_complete:
        if state.limit_bytes is not None and state.volume_bytes > 0.9 * state.limit_bytes:
            say("The cache is near its limit: raise cache.limit, or free space with evict, first.")
        if state.min_free_bytes is not None and state.free_bytes < state.min_free_bytes:
            say(
                "The disk has less free than cache.min_free, so nothing more is stored: free space "
                "there, lower cache.min_free, or choose another cache.dir first."
            )
        say(f"Run `zarrcache warm {config}` to fill the cache.")
    return 0


@command(resumable=True)
def verify(
    config: OptionalConfig = None,
    directory: Directory = None,
    against_origin: Annotated[
        bool,
        typer.Option(
            "--against-origin",
            help="also drop entries that differ from the origin's version, and name stores that "
            "lack chunks or state another number of electrons; sends one LIST and two GETs of "
            "metadata per entry (one GET of the file for .zarr.zip)",
        ),
    ] = False,
    as_json: Json = False,
) -> int:
    """Read every entry, drop what is corrupt.

    The next read fetches it again. Exit 1 if anything was corrupt or cannot be read, not if it was
    only stale. Safe while trainings run.
    """
    from zarrcache import ops
    from zarrcache.cli.format import format_verification
    from zarrcache.cli.progress import Meter

    source = cache_source(config, directory)
    with Meter("Verifying", "", 1) as meter:
        report = ops.verify(source, against_origin=against_origin, progress=meter.reach)
    for problems, verdict in ((report.corrupt, "corrupt"), (report.unreadable, "cannot be read")):
        failures((f"{one.file} ({one.url}): {one.why}" for one in problems), verdict=verdict)
    failures((f"{one.url}: {one.why}" for one in report.stale), verdict="stale")
    failures(
        (f"{one.url}: {one.why}" for one in (*report.flawed, *report.filled)), verdict="flawed"
    )
    if as_json:
        show_json(asdict(report))
    else:
        show(format_verification(report))
        if report.is_read_only and (report.corrupt or report.stale):
            say("They were not dropped: this process cannot write to the cache.")
        elif report.corrupt or report.stale:
            say("They were dropped. Run `zarrcache warm` to fetch them again.")
    return 0 if report.is_good else 1


@command(resumable=False)
def doctor(
    config: OptionalConfig = None, directory: Directory = None, as_json: Json = False
) -> int:
    """Check this node: versions, disk, locks, S3.

    Prints what to do about each problem. S3 is read with CONFIG's credentials. Exit 1 if a check
    failed.
    """
    from zarrcache.ops import examine

    source = None
    if config is not None or directory is not None:
        source = cache_source(config, directory, needs_cache=False)
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
        say("Pass a training config to check its cache directory and its origin as well.")
    return 1 if failed else 0
