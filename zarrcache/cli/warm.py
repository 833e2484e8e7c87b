"""``zarrcache warm``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from zarrcache.cli.app import command, failures, say, show, show_json
from zarrcache.cli.options import (
    Config,
    Dask,
    Ids,
    Json,
    data_config,
    open_engine,
    read_ids,
    size,
    whole,
)
from zarrcache.cli.progress import Meter, is_quiet
from zarrcache.errors import ConfigError
from zarrcache.parallel import node_name

if TYPE_CHECKING:
    from zarrcache.ops import WarmPlan

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
            "LIST each [default: unless cache.revalidate is never]",
            show_default=False,
        ),
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            metavar="N",
            parser=whole(1),
            help="worker processes [default: min(cores, 8, densities / 16)]",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(
            parser=size,
            metavar="SIZE",
            help="stop when this many decoded bytes are warm, e.g. '50 GiB' [default: no limit]",
            show_default=False,
        ),
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
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print requests and bytes; fetch nothing")
    ] = False,
    as_json: Json = False,
) -> int:
    """Fill the cache with every density of CONFIG.

    Safe to stop and run again: only missing densities are fetched, with --revalidate also those
    that changed at the origin.
    """
    from zarrcache.cli.format import nothing_selected
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
    if dry_run:
        document, text, errors, notes, is_good = _estimate(plan)
    else:
        document, text, errors, notes, is_good = _execute(plan, dask, workers)
    if not plan.task_ids and world is None and not document.get("refusal"):
        errors = [nothing_selected(plan, split), *errors]
        is_good = False
    document["missing"] = plan.missing
    refusal = document.get("refusal", "")
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
    if refusal:  # hours later it would stop the training
        raise ConfigError(refusal)
    return 0 if is_good else 1


#: As JSON and as text, errors, hints, and whether all is well.
_Result = tuple[dict[str, Any], str, list[str], list[str], bool]


def _estimate(plan: WarmPlan) -> _Result:
    from zarrcache.cli.format import estimate_notes, format_warm_estimate

    with Meter("Listing", "densities", len(plan.densities)) as meter:
        estimate = plan.estimate(meter.reach)
    failures(f"{result.name}: {result.error}" for result in estimate.failed)
    document = {**asdict(estimate), "ids": len(plan.task_ids)}
    return (
        document,
        format_warm_estimate(plan, estimate),
        [],
        estimate_notes(plan, estimate),
        not estimate.failed,
    )


def _execute(plan: WarmPlan, dask: str | None, workers: int | None) -> _Result:
    from zarrcache.cli.format import format_warm_report, warm_errors, warm_notes

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
    failures(
        (f"{result.name}: {result.flaws}" for result in report.flawed),
        verdict="flawed",
    )
    return (
        asdict(report),
        format_warm_report(report, plan.cache.dir),
        warm_errors(plan, report),
        warm_notes(plan, report),
        report.is_good,
    )


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
