"""``zarrcache warm``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from zarrcache._keys import FLOAT32, ROLES, Missing
from zarrcache._units import counted, format_bytes, format_seconds
from zarrcache.cli.app import command, failures, say, show, show_json
from zarrcache.cli.options import (
    Config,
    Dask,
    Ids,
    Json,
    data_config,
    nbytes,
    number,
    open_engine,
    read_ids,
)
from zarrcache.cli.progress import Meter, is_quiet
from zarrcache.errors import ConfigError
from zarrcache.parallel import node_name

if TYPE_CHECKING:
    from zarrcache.ops import WarmEstimate, WarmPlan, WarmReport

__all__ = ["warm"]


@command(resumable=True)
def warm(
    config: Config,
    split: Annotated[
        Literal["train", "test", "all"], typer.Option(help="part of CONFIG's split to fetch")
    ] = "all",
    ids: Ids = None,
    revalidate: Annotated[
        bool,
        typer.Option(
            "--revalidate",
            help="list the directories again and compare cached densities with the origin, by one "
            "LIST each [default: if cache.revalidate is run or epoch]",
        ),
    ] = False,
    workers: Annotated[
        int | None, number(1, "worker processes [default: min(cores, 8, densities / 16)]")
    ] = None,
    limit: Annotated[
        int | None,
        nbytes("stop when this many decoded bytes are warm, e.g. '50 GiB' [default: no limit]"),
    ] = None,
    dask: Dask = None,
    each_node: Annotated[
        bool,
        typer.Option(
            "--each-node",
            help="fill the cache of every node: under `srun --ntasks-per-node=1`, or of every "
            "host of --dask",
        ),
    ] = False,
    assignment: Annotated[
        Literal["global", "node"] | None,
        typer.Option(
            help="with --each-node: global: all of CONFIG on each node. node: the node's share, "
            "as NodeSampler assigns it [default: global]",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print requests and bytes; fetch nothing")
    ] = False,
    as_json: Json = False,
) -> int:
    """Fill the cache with every density of CONFIG.

    Safe to stop and run again: fetches only missing densities, and with --revalidate also
    densities that changed at the origin.
    """
    from zarrcache.ops import plan_warm
    from zarrcache.parallel import each_node_world

    if assignment is not None and not each_node:
        raise ConfigError("--assignment is only for several nodes. Add --each-node.")
    if each_node and dask is not None:
        options = {
            "--split": split,
            "--ids": ids and ids.absolute(),
            "--workers": workers,
            "--limit": limit,
            "--assignment": assignment,
            "--revalidate": revalidate,
            "--dry-run": dry_run,
            "--quiet": is_quiet(),
        }
        return _on_each_node(dask, config.absolute(), options, as_json=as_json)
    world = each_node_world() if each_node else None
    if world is not None and world.local_rank > 0:
        say(f"{node_name()}: left to the first process of this node.")
        return 0
    plan = plan_warm(
        data_config(config),
        split=split,
        ids=read_ids(ids),
        revalidate=True if revalidate else None,
        workers=workers,
        limit_bytes=limit,
        world=world if assignment == "node" else None,
    )
    report, text, errors, notes = _estimate(plan) if dry_run else _execute(plan, dask, workers)
    if not plan.task_ids and world is None and not report.refusal:
        errors = [nothing_selected(plan, split), *errors]
    document = {**asdict(report), "missing": plan.missing}
    if world is not None:  # many nodes write to one terminal
        document = {"nodes": [{"node": node_name(), "summary": text, **document}]}
        text = f"{node_name()}: {text}"
    if as_json:
        show_json(document)
    else:
        show(text)
        for error in errors:
            say(f"error: {error}", always=True)
        for note in notes:
            say(note)
    if report.refusal:  # hours later it would stop the training
        raise ConfigError(report.refusal)
    return int(bool(errors) or not report.is_good)


#: Also its text, errors and hints.
_Result = tuple["WarmEstimate | WarmReport", str, list[str], list[str]]


def _estimate(plan: WarmPlan) -> _Result:
    with Meter("Listing", "densities", 0) as meter:
        estimate = plan.estimate(meter.reach)
    failures(f"{result.name}: {result.error}" for result in estimate.failed)
    return estimate, format_warm_estimate(plan, estimate), [], estimate_notes(plan, estimate)


def _execute(plan: WarmPlan, dask: str | None, workers: int | None) -> _Result:
    def fetched_bytes() -> int:
        return plan.reader.stats.fetched_bytes

    with (
        open_engine(dask if plan.densities else None, workers, only_here=True) as engine,
        Meter("Warming", "densities", len(plan.densities), fetched_bytes) as meter,
    ):
        report = plan.execute(
            lambda result: meter.advance(failed=result.outcome == "failed"), engine=engine
        )
    failures(f"{result.name}: {result.error}" for result in report.failed)
    failures((f"{result.name}: {result.flaws}" for result in report.flawed), verdict="flawed")
    text = format_warm_report(report, plan.cache.dir)
    return report, text, warm_errors(plan, report), warm_notes(plan, report)


def _on_each_node(dask: str, config: Path, options: Mapping[str, object], *, as_json: bool) -> int:
    """Run ``warm --each-node`` on every node of a Dask cluster; print one line per node.

    Options with the value None or False are left out; True is passed as a flag.
    """
    from zarrcache.parallel import open_cluster, run_on_each_node

    arguments = ["warm", str(config), "--each-node", "--json"]
    for option, value in options.items():
        if value is True:
            arguments.append(option)
        elif value is not None and value is not False:
            arguments += [option, str(value)]
    nodes = []
    with open_cluster(dask) as cluster:
        for outcome in run_on_each_node(
            cluster, arguments, lambda node, line: say(f"{node}: {line}", always=True)
        ):
            error = {"node": outcome.node, "error": outcome.error.removeprefix("error: ")}
            reports = outcome.document.get("nodes") or [error]
            nodes += [{**report, "exit_code": outcome.code} for report in reports]
            if not as_json:
                text = nodes[-1].get("summary") or f"failed: {nodes[-1]['error']}"
                show(f"{outcome.node}: {text}")
    if as_json:
        show_json({"nodes": nodes})
    failed = [node["node"] for node in nodes if node["exit_code"]]
    if failed:
        say(f"{len(failed)} of {len(nodes)} nodes failed: {', '.join(failed)}.", always=True)
    return 1 if failed else 0


def nothing_selected(plan: WarmPlan, split: str) -> str:
    """Say why ``warm`` has no ids to fetch."""
    reader = plan.reader
    if reader.if_missing == "drop" and reader.stored_ids:
        return (
            "all ids lack a channel of density_type, so missing: drop leaves none. If "
            "only input or label has it, write density_type: {data: ..., label: ...}."
        )
    if not plan.missing:
        part = "has no ids" if split == "all" else f"has no ids in the {split} set"
        return f"{reader.functional} {part}. Check functional and map_dir ({reader.map_dir})."
    ids = f"{counted(len(plan.missing), 'id')} of {reader.functional}"
    number = {
        reader.origin(role).url: len(reader.store_names(role).keys() & set(plan.missing))
        for role in ROLES
    }
    found = ", ".join(f"{n:,} in {url}" for url, n in number.items())
    return (
        f"none of the {ids} has a store for both input and label: {found}. Check data_dir, "
        f"label_dir and source ({reader.source}): the stores are <task_id>.zarr or .zarr.zip, or "
        "files <task_id>.json.gz or .CHGCAR, directly below them."
    )


def format_warm_estimate(plan: WarmPlan, estimate: WarmEstimate) -> str:
    """One line for ``warm --dry-run``."""
    densities = counted(plan.trusted + len(plan.densities), "density", "densities")
    about = ""
    if estimate.compared < len(plan.densities):
        about = f" (extrapolated from {estimate.compared:,})"
    return (
        f"Would fetch {estimate.to_fetch:,} of {densities} of "
        f"{counted(len(plan.task_ids), 'id')}{about} "
        f"({format_bytes(estimate.fetch_bytes)}, {counted(estimate.requests, 'request')}); "
        f"{estimate.fresh:,} fresh. "
        "Dry run: nothing was fetched."
    )


def estimate_notes(plan: WarmPlan, estimate: WarmEstimate) -> list[str]:
    """Hints for the user after ``warm --dry-run``, one per line."""
    notes = []
    if estimate.lacking and not estimate.refusal:
        note = _lacking_note(estimate.lacking, plan.reader.if_missing)
        if estimate.compared < len(plan.densities):
            note = f"Of {estimate.compared:,} densities compared: {note}"
        notes.append(note)
    if estimate.unread:
        notes.append(
            f"The channels of {counted(estimate.unread, 'file')} (CHGCAR, json.gz, .zarr.zip) are "
            "known only after they are read, without --dry-run."
        )
    return notes


def format_warm_report(report: WarmReport, directory: object) -> str:
    """One line for ``warm``."""
    fresh = f"; {report.fresh:,} fresh already" if report.fresh else ""
    cost = (
        f"{format_bytes(report.nbytes)} decoded, {counted(report.stats.requests, 'request')}{fresh}"
    )
    return (
        f"Warmed {report.warm:,} of {counted(report.ids, 'id')} ({cost}) in {directory} in "
        f"{format_seconds(report.seconds)}; {len(report.failed_ids):,} failed."
    )


def warm_notes(plan: WarmPlan, report: WarmReport) -> list[str]:
    """Hints for the user after ``warm``, one per line."""
    from zarrcache.data import first_ids

    notes = []
    if plan.trusted and not plan.revalidate:
        trusted = counted(plan.trusted, "density was", "densities were")
        notes.append(
            f"{trusted} in the cache already, and not compared with the origin (cache.revalidate: "
            "never). Pass --revalidate to compare."
        )
    if any(result.is_gone for result in report.failed) and not plan.revalidate:
        notes.append(
            "If stores were moved or removed since the directories were last listed, pass "
            "--revalidate to list them again."
        )
    if report.unequal:
        notes.append(
            f"{counted(len(report.unequal), 'id')} with input and label on different grids: "
            f"{first_ids(report.unequal)}. If the network needs equal grids, leave them out of "
            "the map."
        )
    if report.lacking and not report.refusal:
        notes.append(_lacking_note(report.lacking, plan.reader.if_missing))
    if any(result.is_absent for result in report.failed) and not report.refusal:
        notes.append(
            "Set missing: zero, which fills a channel that is absent with zeros, or missing: drop, "
            "which leaves out the materials that lack one."
        )
    if report.untried:
        limit = format_bytes(plan.limit_bytes or 0)
        notes.append(f"{counted(report.untried, 'id')} left out: --limit ({limit}) is reached.")
    is_full = report.bypassed and not report.stats.cache_errors and not report.is_disk_full
    if is_full and report.warm:
        notes.append(_limit_reached(plan, report))
    return notes


def warm_errors(plan: WarmPlan, report: WarmReport) -> list[str]:
    """Reasons for a failed ``warm``, besides densities that cannot be read, one per line."""
    if report.stats.cache_errors:
        times = counted(report.stats.cache_errors, "time")
        advice = "Run `zarrcache doctor` with the same config."
        return [f"the cache in {plan.cache.dir} failed {times}, see above. {advice}"]
    if report.bypassed and report.is_disk_full:
        left_out = f"{counted(len(report.bypassed), 'id')} did not fit"
        full = f"the disk of {plan.cache.dir} is full, or cache.min_free is reached"
        advice = "Free space there, or choose a larger disk."
        needed = f"{_needed(report)}. " if report.needed_bytes else ""
        return [f"{left_out}: {full}. {needed}{advice}"]
    return [_limit_reached(plan, report)] if report.bypassed and not report.warm else []


def _limit_reached(plan: WarmPlan, report: WarmReport) -> str:
    raise_it = f"{_needed(report)}: raise" if report.needed_bytes else "Raise"
    smaller = ""
    if plan.cache.arrays.encoding == FLOAT32:
        smaller = " Entries in float16 take half the bytes (cache.arrays.encoding)."
    return (
        f"{counted(len(report.bypassed), 'id')} did not fit: cache.limit "
        f"({format_bytes(plan.cache.limit)}) or cache.min_free is reached, and training will read "
        "these from the origin in every epoch. "
        f"{raise_it} cache.limit, or free space with `zarrcache evict`.{smaller}"
    )


def _needed(report: WarmReport) -> str:
    return f"The cache needs about {format_bytes(report.needed_bytes)} on disk for all ids"


def _lacking_note(task_ids: Sequence[str], missing: Missing) -> str:
    """Report how ids that lack a channel are handled."""
    from zarrcache.data import first_ids

    effect = {"zero": "it is filled with zeros", "drop": "they are left out of the split"}
    lack = "lacks" if len(task_ids) == 1 else "lack"
    return (
        f"{counted(len(task_ids), 'id')} {lack} a channel of density_type; {effect[missing]} "
        f"(missing: {missing}): {first_ids(task_ids)}."
    )
