"""Commands about many nodes: ``plan``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Literal

import typer

from zarrcache.cliapp import app, guarded, show, show_json
from zarrcache.cliargs import Config, Json, data_config, size

__all__ = ["plan"]


@app.command()
@guarded
def plan(
    config: Config,
    nodes: Annotated[int, typer.Option("--nodes", metavar="N", min=1, help="nodes, each with a cache of its own")] = 1,
    capacity: Annotated[
        int | None, typer.Option(parser=size, metavar="SIZE", help="of the cache of each node, e.g. '200 GiB' [default: cache.limit]")
    ] = None,
    assignment: Annotated[
        Literal["global", "node"], typer.Option(help="global: all nodes share one shuffle. node: each has samples of its own")
    ] = "global",
    eviction: Annotated[
        Literal["none", "least-recently-stored", "belady"] | None,
        typer.Option(help="what a full cache does [default: cache.eviction]", show_default=False),
    ] = None,
    ranks_per_node: Annotated[int, typer.Option("--ranks-per-node", metavar="N", min=1, help="training processes of a node")] = 1,
    epochs: Annotated[int, typer.Option("--epochs", metavar="N", min=1, help="of the whole run")] = 50,
    workers: Annotated[int, typer.Option("--workers", metavar="N", min=1, help="processes of a node that read at a time, for the seconds")] = 1,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, help="of the order of samples")] = 0,
    probe: Annotated[bool, typer.Option("--probe", help="read a few densities from here, and say how long an epoch waits for data")] = False,
    as_json: Json = False,
) -> int:
    """Forecast a run: requests, bytes, cost, hits.

    For CONFIG's training split. Lists up to 1,000 densities at the origin; caches nothing. Prices are those of cache.prices.
    """
    from zarrcache.cliwords import plan_lines
    from zarrcache.forecast import plan_training
    from zarrcache.terminal import Meter

    # The number of densities that are asked is known only to the plan.
    with Meter("Measuring", "densities", 1) as meter:
        found = plan_training(
            data_config(config, needs_cache=False),
            nodes=nodes,
            capacity_bytes=capacity,
            assignment=assignment,
            eviction=eviction,
            ranks_per_node=ranks_per_node,
            epochs=epochs,
            seed=seed,
            workers=workers,
            probe=probe,
            progress=meter.reach,
        )
    if as_json:
        others = [{**asdict(way), "hit_ratio": ratio} for way, ratio in found.others.items()]
        show_json({**{name: value for name, value in vars(found).items() if name not in ("epochs", "total", "others", "variant", "prices", "speed")},
                   "variant": asdict(found.variant), "epochs": [asdict(epoch) for epoch in found.epochs], "total": asdict(found.total),
                   "others": others, "prices": found.prices.model_dump(), "speed": asdict(found.speed) if found.speed else None})  # fmt: skip
        return 0
    for line in plan_lines(found):
        show(line)
    return 0
