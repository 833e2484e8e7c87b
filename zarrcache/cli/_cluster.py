"""Commands about many nodes: ``plan``, ``serve``."""

from __future__ import annotations

import signal
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from zarrcache.cli.app import app, guarded, guarded_look, say, show, show_json
from zarrcache.cli.options import Config, Json, data_config, size

__all__ = ["plan", "serve"]


@app.command()
@guarded_look
def plan(
    config: Config,
    nodes: Annotated[
        int, typer.Option("--nodes", metavar="N", min=1, help="nodes, each with a cache of its own")
    ] = 1,
    capacity: Annotated[
        int | None,
        typer.Option(
            parser=size,
            metavar="SIZE",
            help="of the cache of each node, e.g. '200 GiB' [default: cache.limit]",
        ),
    ] = None,
    assignment: Annotated[
        Literal["global", "node"],
        typer.Option(help="global: all nodes share one shuffle. node: each has samples of its own"),
    ] = "global",
    eviction: Annotated[
        Literal["none", "least-recently-stored", "belady"] | None,
        typer.Option(help="what a full cache does [default: cache.eviction]", show_default=False),
    ] = None,
    ranks_per_node: Annotated[
        int,
        typer.Option("--ranks-per-node", metavar="N", min=1, help="training processes of a node"),
    ] = 1,
    epochs: Annotated[
        int, typer.Option("--epochs", metavar="N", min=1, help="of the whole run")
    ] = 50,
    workers: Annotated[
        int,
        typer.Option(
            "--workers",
            metavar="N",
            min=1,
            help="processes of a node that read at a time, for the seconds",
        ),
    ] = 1,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", min=0, help="of the order of samples")
    ] = 0,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe",
            help="read a few densities from here, and say how long an epoch waits for data",
        ),
    ] = False,
    as_json: Json = False,
) -> int:
    """Forecast a run: requests, bytes, cost, hits.

    For CONFIG's training split. Lists up to 1,000 densities at the origin; caches nothing. Prices
    are those of cache.prices.
    """
    from zarrcache.cli.format import plan_lines
    from zarrcache.cli.progress import Meter
    from zarrcache.ops import plan_training

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


@app.command()
@guarded
def serve(
    config: Config,
    host: Annotated[
        str,
        typer.Option(
            metavar="HOST",
            help="name or address of this node to listen on; one that others reach needs a token",
        ),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="TCP port; 0 takes one that is free")
    ] = 7070,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="file of mode 0600 with the word that clients have to show [default: CONFIG's "
            "cache.peer_token_file]",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> int:
    """Let other nodes read this node's cache.

    Entries of the array tier, over HTTP, to whoever has the token; nothing is written. Ends on
    SIGTERM and Ctrl-C.
    """
    from zarrcache.ops import cache_of
    from zarrcache.peers import EntryServer, read_token

    cache = cache_of(data_config(config))
    path = token_file or cache.peer_token_file
    token = read_token(path) if path is not None else None
    # Blocked and waited for, in all threads: a handler would run at any place of this one.
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    with EntryServer(cache.dir, host=host, port=port, token=token) as server:
        if as_json:
            show_json({"url": server.url, "directory": cache.dir, "has_token": token is not None})
        else:
            show(f"Serving the array tier of {cache.dir} at {server.url}. Ctrl-C ends it.")
            if token is None:
                say("There is no token: every user of this machine can read it.")
        signal.sigwait(ends)
    return 0
