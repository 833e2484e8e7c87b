"""``zarrcache evict``, ``status``, ``ls``, ``verify`` and ``doctor``: maintain a cache."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from zarrcache._keys import FLOAT32, ArrayKey, density_name, is_density, safe_repr
from zarrcache._units import counted, format_bytes
from zarrcache.cli.app import command, failures, say, say_refusal, show, show_json, show_table
from zarrcache.cli.options import (
    Directory,
    DryRun,
    Ids,
    Json,
    OptionalConfig,
    cache_source,
    nbytes,
    read_ids,
    seconds,
    string,
)
from zarrcache.errors import ConfigError

if TYPE_CHECKING:
    from zarrcache.disk import Row
    from zarrcache.ops import Status, VerifyReport

__all__ = ["doctor", "evict", "ls", "status", "verify"]


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
        nbytes("only the oldest, until the cache takes at most this size, e.g. '50 GiB'"),
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
    from zarrcache.cli.progress import Meter
    from zarrcache.data import first_ids
    from zarrcache.ops import plan_evict

    plan = plan_evict(
        cache_source(config, directory),
        ids=read_ids(ids),
        older_than_s=older_than,
        target_bytes=target,
        stale=stale,
        everything=everything,
    )
    if plan.absent:
        say(f"not cached: {counted(len(plan.absent), 'id')}: {first_ids(plan.absent)}")
    entries = counted(len(plan.entries), "entry", "entries")
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
        kept = " Entries that were stored again meanwhile are kept." * (freed < plan.disk_bytes)
        text = f"Evicted {entries}, freed {format_bytes(freed)} in {plan.directory}.{kept}"
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
    """Show entries, bytes and limit, and how much is warm.

    Sends no request; works offline.
    """
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


@command(resumable=False)
def ls(
    config: OptionalConfig = None,
    directory: Directory = None,
    ids: Ids = None,
    match: Annotated[str, string("GLOB", "only ids that match, e.g. 'mp-12*'")] = "*",
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

    Without CONFIG, lists the whole cache, without roles. Sends no request.
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


@command(resumable=True)
def verify(
    config: OptionalConfig = None,
    directory: Directory = None,
    against_origin: Annotated[
        bool,
        typer.Option(
            "--against-origin",
            help="also drop entries that differ from the origin's version, and list stores that "
            "are gone, lack chunks, or state another number of electrons; sends one LIST and "
            "two GETs of metadata per entry (one GET of the file for .zarr.zip)",
        ),
    ] = False,
    as_json: Json = False,
) -> int:
    """Read every entry and drop corrupt ones.

    The next read fetches them again. Exit code 1 if an entry is corrupt, cannot be read, is flawed
    or is gone at the origin; 0 if entries are only stale. Safe while trainings run.
    """
    from zarrcache import ops
    from zarrcache.cli.progress import Meter

    source = cache_source(config, directory)
    with Meter("Verifying", "", 1) as meter:
        report = ops.verify(source, against_origin=against_origin, progress=meter.reach)
    for problems, verdict in ((report.corrupt, "corrupt"), (report.unreadable, "cannot be read")):
        failures((f"{one.file} ({one.url}): {one.why}" for one in problems), verdict=verdict)
    for problems, verdict in (
        (report.stale, "stale"),
        (report.gone, "gone"),
        ((*report.flawed, *report.filled), "flawed"),
    ):
        failures((f"{one.url}: {one.why}" for one in problems), verdict=verdict)
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

    Prints a remedy for each problem. Reads S3 with CONFIG's credentials. Exit code 1 if a check
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


#: Values of ``normalize_data`` by the units of the entries.
_NORMALIZED = {
    "cell": "normalize_data: false",
    "points": "normalize_data: true",
    "volume": "normalize_data: volume",
}


def entries_by_kind(entries: Iterable[Row]) -> str:
    """The number of entries of each kind."""
    from zarrcache.disk import ARRAY, LISTING

    numbers: Counter[tuple[str, str]] = Counter()
    for row in entries:
        array = row.note.rpartition("\n")[2] if row.kind == ARRAY else ""
        numbers[row.kind, array] += 1
    parts = []
    for (kind, array), number in sorted(numbers.items(), key=lambda one: (one[0][0], -one[1])):
        key = ArrayKey("", "", array)
        parts.append(
            _densities(number, key.source_array, key.units, key.encoding)
            if kind == ARRAY
            else counted(number, "listing")
            if kind == LISTING
            else f"{counted(number, 'entry', 'entries')} of the byte tier"
        )
    return "; ".join(parts)


def status_lines(state: Status) -> list[str]:
    """Lines for ``status``."""
    from zarrcache.config import SMALL_LIMIT_BYTES

    limit = reserve = ""
    if state.limit_bytes is not None:
        percent = 100 * state.volume_bytes / state.limit_bytes
        limit = f" of {format_bytes(state.limit_bytes)} ({percent:.1f} %)"
        if state.limit_bytes < SMALL_LIMIT_BYTES:
            limit += "; write cache.limit with its unit, for example 200 GiB"
    if state.min_free_bytes is not None:
        reserve = f"; min_free {format_bytes(state.min_free_bytes)}"
    free = f"{format_bytes(state.free_bytes)} free of {format_bytes(state.disk_bytes)}"
    densities = counted(state.array_tier.entries - state.listings, "density", "densities")
    arrays = f"{densities}, {counted(state.listings, 'listing')}"
    blocks = counted(state.byte_tier.entries, "entry", "entries")
    lines = [
        f"cache        {state.directory}{'' if state.exists else ' (nothing is cached there yet)'}",
        f"array tier   {arrays}, {format_bytes(state.array_tier.nbytes)}",
        f"byte tier    {blocks}, {format_bytes(state.byte_tier.nbytes)}",
        f"volume       {format_bytes(state.volume_bytes)}{limit}",
        f"file system  {free}{reserve}",
    ]
    if (covered := state.coverage) is not None:
        present = counted(covered.present, "id")
        half = f", {covered.half:,} half" if covered.half else ""
        missing = ""
        if covered.missing:
            verb = "has" if covered.missing == 1 else "have"
            missing = f"; {counted(covered.missing, 'more id')} in the map {verb} no store"
        if covered.dropped:
            verb = "lacks" if covered.dropped == 1 else "lack"
            missing += f"; {counted(covered.dropped, 'id')} {verb} a channel (missing: drop)"
        lines.append(
            f"{covered.functional:<12} {covered.warm:,} of {present} warm "
            f"({100 * covered.warm_ratio:.1f} %){half}{missing}"
        )
        lines += [
            f"{'':<12} not used by this config: "
            f"{_densities(one.densities, one.array, one.units, one.encoding)}"
            for one in covered.unused
        ]
        if covered.to_encode:
            lines.append(
                f"{'':<12} {counted(covered.to_encode, 'id')} of these still in float32; "
                "`zarrcache warm` or the next read encodes them without fetching"
            )
        lines += [f"{'':<12} {text}" for text in covered.several_sources]
    return lines


def _densities(number: int, array: str, units: str, encoding: str) -> str:
    """``24 densities of total, normalize_data: true, encoding float16``."""
    text = f"{counted(number, 'density', 'densities')} of {density_name(array)}"
    if is_density(array):
        text += f", {_NORMALIZED[units]}"
    if encoding != FLOAT32:
        text += f", encoding {encoding}"
    return text if text.isprintable() else safe_repr(text)  # a planted row of a shared cache


def format_verification(report: VerifyReport) -> str:
    """One line for ``verify``."""
    stale = f", {len(report.stale):,} stale" if report.stale else ""
    gone = f", {len(report.gone):,} gone at the origin" if report.gone else ""
    unreadable = f", {len(report.unreadable):,} cannot be read" if report.unreadable else ""
    n_flawed = len({problem.url for problem in (*report.flawed, *report.filled)})
    flawed = f", {n_flawed:,} flawed at the origin" if n_flawed else ""
    within = ""
    if report.within_bound:
        entries = counted(report.within_bound, "rounded entry", "rounded entries")
        within = f"; {entries} read from the origin: within the error bound"
    strays = ""
    if report.strays:
        strays = f"; removed {counted(len(report.strays), 'file')} without an entry"
    return (
        f"Verified {counted(report.entries, 'entry', 'entries')} ({format_bytes(report.nbytes)}): "
        f"{len(report.corrupt):,} corrupt{stale}{gone}{unreadable}{flawed}{within}{strays}."
    )
