"""Run work in child processes, on the nodes of a job, or on a Dask cluster."""

from __future__ import annotations

from zarrcache.parallel.dask import open_cluster, run_on_each_node
from zarrcache.parallel.pool import Died, Engine, Reserve, cores, spread
from zarrcache.parallel.process import ChildProcess, HungUp, receive, receive_bytes
from zarrcache.parallel.signals import Terminated, end_signalled, exit_code, raise_on_signals
from zarrcache.parallel.topology import World, each_node_world, node_name

__all__ = [
    "ChildProcess",
    "Died",
    "Engine",
    "HungUp",
    "Reserve",
    "Terminated",
    "World",
    "cores",
    "each_node_world",
    "end_signalled",
    "exit_code",
    "node_name",
    "open_cluster",
    "raise_on_signals",
    "receive",
    "receive_bytes",
    "run_on_each_node",
    "spread",
]
