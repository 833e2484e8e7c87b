"""``zarrcache plan``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from zarrcache._keys import FLOAT32, Eviction
from zarrcache._units import counted, format_bytes, format_money, format_seconds
from zarrcache.cli.app import command, say_refusal, show, show_json
from zarrcache.cli.options import Config, Json, data_config, nbytes, number

if TYPE_CHECKING:
    from zarrcache.ops import EpochForecast, Forecast

__all__ = ["plan"]


@command(resumable=False)
def plan(
    config: Config,
    nodes: Annotated[int, number(1, "nodes, each with its own cache")] = 1,
    capacity: Annotated[
        int | None, nbytes("cache size per node, e.g. '200 GiB' [default: cache.limit]")
    ] = None,
    lookahead: Annotated[
        int | None,
        nbytes("bytes that each node fetches ahead; 0: no look-ahead [default: cache.lookahead]"),
    ] = None,
    assignment: Annotated[
        Literal["global", "node"],
        typer.Option(help="global: one shuffle over all nodes. node: each node has its own share"),
    ] = "global",
    eviction: Annotated[
        Eviction | None,
        typer.Option(help="eviction policy of a full cache [default: cache.eviction]"),
    ] = None,
    ranks_per_node: Annotated[int, number(1, "training processes per node")] = 1,
    epochs: Annotated[int, number(1, "epochs of the whole run")] = 50,
    workers: Annotated[
        int, number(1, "concurrent readers per node; used only for the time estimate")
    ] = 1,
    seed: Annotated[int, number(0, "seed of the order of samples")] = 0,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe", help="read up to 9 densities from here, to estimate the seconds per epoch"
        ),
    ] = False,
    as_json: Json = False,
) -> int:
    """Forecast a run: requests, bytes, cost, hits.

    Forecasts CONFIG's training split at the prices of cache.prices. Measures up to 1,000 densities
    at the origin; caches nothing.
    """
    from zarrcache.cli.progress import Meter
    from zarrcache.ops import known_refusal, measure_split

    source = data_config(config, needs_cache=False)
    # The total is known only after the directories are listed.
    with Meter("Measuring", "densities", 1) as meter:
        split = measure_split(
            source,
            seed=seed,
            probe=probe,
            ranks=nodes * ranks_per_node,
            capacity_bytes=capacity,
            progress=meter.reach,
        )
    forecast = split.forecast(
        nodes=nodes,
        lookahead_bytes=lookahead,
        assignment=assignment,
        eviction=eviction,
        ranks_per_node=ranks_per_node,
        epochs=epochs,
        workers=workers,
    )
    refusal = known_refusal(source)
    if as_json:
        # In JSON a variant cannot be a key.
        others = [{**asdict(way), "hit_ratio": ratio} for way, ratio in forecast.others.items()]
        document = asdict(replace(forecast, others={}))
        show_json({**document, "others": others, "prices": forecast.prices.model_dump()})
    else:
        for line in plan_lines(forecast):
            show(line)
    say_refusal(refusal)
    return 0


def plan_lines(plan: Forecast) -> Iterator[str]:
    """Lines for ``plan``."""
    asked = "all" if plan.measured == plan.densities else f"{plan.measured:,}"
    yield (
        f"Training split: {counted(plan.samples, 'sample')}, "
        f"{counted(plan.densities, 'density', 'densities')} of {plan.gets:.0f} objects on average; "
        f"{format_bytes(plan.stored_bytes)} at the origin, {format_bytes(plan.disk_bytes)} in a "
        f"cache{'' if plan.encoding == FLOAT32 else f' as {plan.encoding}'} ({asked} measured)."
    )
    share = plan.capacity_bytes / plan.disk_bytes if plan.disk_bytes else 1.0
    ahead = ""
    if plan.lookahead_bytes:
        ahead = f" (of which the look-ahead takes {format_bytes(plan.lookahead_bytes)})"
    yield (
        f"{counted(plan.nodes, 'node')}, {counted(plan.ranks, 'rank')}: each cache holds "
        f"{format_bytes(plan.capacity_bytes)}{ahead}, "
        f"{min(1.0, share):.0%} of that; assignment {plan.variant.assignment}, eviction "
        f"{plan.variant.eviction}."
    )
    yield ""
    for n, epoch in enumerate(plan.epochs[:3], start=1):
        yield f"epoch {n}: {_epoch(epoch, plan.prices.currency)}"
    yield f"{counted(plan.run_epochs, 'epoch')}: {_epoch(plan.total, plan.prices.currency)}"
    timed = (
        " The time is that of reading alone, without training."
        if plan.speed is not None
        else " Pass --probe to estimate the time as well."
    )
    yield f"Prices of {plan.prices.dated}, from cache.prices.{timed}"
    if len(plan.others) > 1:
        yield ""
        yield (
            f"Hits in the last half of {counted(len(plan.epochs), 'epoch')}, by assignment and "
            "eviction:"
        )
        for way, ratio in plan.others.items():
            mark = "  <- this" if way == plan.variant else ""
            yield f"  {way.assignment:<7} {way.eviction:<22} {ratio:4.0%}{mark}"


def _epoch(epoch: EpochForecast, currency: str) -> str:
    text = (
        f"{epoch.hit_ratio:.1%} hits, {counted(epoch.requests, 'request')}, "
        f"{format_bytes(epoch.nbytes)}, {format_money(epoch.dollars)} {currency}"
    )
    return text if epoch.seconds is None else f"{text}, {format_seconds(epoch.seconds)}"
