"""Processes of this node, the nodes of a job, and the machines of a Dask cluster."""

from __future__ import annotations

from zarrcache.parallel._each_node import run_on_each_node, this_node
from zarrcache.parallel._nodes import node_name
from zarrcache.parallel.dask import open_cluster
from zarrcache.parallel.pool import Died, Engine, Reserve, cores, spread
from zarrcache.parallel.process import Interpreter
from zarrcache.parallel.signals import Terminated, deferred_signals, ending_in_order, exit_code
from zarrcache.parallel.topology import World

__all__ = [
    "Died",
    "Engine",
    "Interpreter",
    "Reserve",
    "Terminated",
    "World",
    "cores",
    "deferred_signals",
    "ending_in_order",
    "exit_code",
    "node_name",
    "open_cluster",
    "run_on_each_node",
    "spread",
    "this_node",
]
