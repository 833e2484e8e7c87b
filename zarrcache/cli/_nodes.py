"""What ``--dask`` and ``--each-node`` do: which engine works, and one command on every node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from zarrcache.cli.app import say, show, show_json
from zarrcache.errors import ConfigError
from zarrcache.parallel import node_name

if TYPE_CHECKING:
    from zarrcache.parallel import Engine

__all__ = ["engine_of", "on_each_node"]


@contextmanager
def engine_of(
    dask: str | None, workers: int | None, *, only_here: bool = False
) -> Iterator[Engine | None]:
    """The engine of ``--dask``; None without it. ``only_here``: its workers have to be on this
    node, whose cache they fill.
    """
    if dask is None:
        yield None
        return
    from zarrcache.parallel import open_cluster

    with open_cluster(dask, workers=workers) as cluster:
        if only_here and (elsewhere := [node for node in cluster.nodes() if node != node_name()]):
            raise ConfigError(
                f"workers of {dask} are on "
                f"{', '.join(elsewhere[:3])}{' and others' if elsewhere[3:] else ''}, and each "
                "node has a cache of its own; "
                f"this is {node_name()}. Add --each-node to fill them all."
            )
        yield cluster.spread


def on_each_node(
    dask: str,
    command: Sequence[str],
    options: Mapping[str, object],
    flags: Mapping[str, bool],
    *,
    as_json: bool,
) -> int:
    """Run a command with ``--each-node`` on every node of a Dask cluster; a line for each. Options
    without a value are left out.
    """
    from zarrcache.parallel import open_cluster, run_on_each_node

    arguments = [
        *command,
        "--each-node",
        "--json",
        *(flag for flag, given in flags.items() if given),
    ]
    for option, value in options.items():
        arguments += [] if value is None else [option, str(value)]
    nodes = []
    with open_cluster(dask) as cluster:
        for outcome in run_on_each_node(
            cluster, arguments, lambda node, line: say(f"{node}: {line}")
        ):
            of_node = outcome.document.get("nodes") or [
                {"node": outcome.node, "error": outcome.error.removeprefix("error: ")}
            ]
            nodes += [{**one, "exit_code": outcome.code} for one in of_node]
            if not as_json:
                show(
                    f"{outcome.node}: {nodes[-1].get('summary') or 'failed: ' + nodes[-1]['error']}"
                )
    if as_json:
        show_json({"nodes": nodes})
    failed = [one["node"] for one in nodes if one["exit_code"]]
    if failed:
        say(f"{len(failed)} of {len(nodes)} nodes failed: {', '.join(failed)}.")
    return 1 if failed else 0
