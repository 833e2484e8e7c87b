"""Every node of a job fills its own cache, once: started there by ``srun``, or from here over the
workers of a Dask cluster.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from zarrcache.errors import ConfigError
from zarrcache.parallel.pool import Died
from zarrcache.parallel.topology import World

if TYPE_CHECKING:
    from zarrcache.parallel.dask import Cluster

__all__ = ["NodeOutcome", "run_on_each_node", "this_node"]

T = TypeVar("T")
R = TypeVar("R")

#: What work on a node may call: with a line to tell, and for whether anybody still wants it.
Tell: TypeAlias = Callable[[str], None]
IsWanted: TypeAlias = Callable[[], bool]

_TRIES_A_NODE = 2
#: How long a node that lost its worker may be without one, and how often to look.
_ABSENT_S = 60.0
_TICK_S = 1.0
#: How long a command that nobody wants any more may take to end.
_END_S = 5.0
#: Lines of its standard error that are kept of a command that fails.
_LAST_LINES = 20


def this_node() -> World:
    """Where this process is among those that ``srun`` or ``torchrun`` started on all nodes.

    Raises
    ------
    ConfigError
        Neither started it; then nobody starts it on the other nodes.
    """
    # The batch script of a job, outside of srun, has Slurm's other variables as well: it would be
    # node 0 of so many, and the others stay cold.
    if not ("SLURM_STEP_ID" in os.environ or {"RANK", "WORLD_SIZE"} <= os.environ.keys()):
        raise ConfigError(
            "--each-node has to be started on every node: `srun --ntasks-per-node=1 zarrcache warm "
            "CONFIG --each-node` in a Slurm job does that, "
            "and --dask SCHEDULER over a Dask cluster."
        )
    return World.of_environment(os.environ)


@dataclass(frozen=True)
class NodeOutcome:
    """How a command ended on one node.

    Attributes
    ----------
    node : str
    code : int
        Its exit code.
    document : dict
        The JSON that it wrote; empty if it wrote none.
    error : str
        Why it wrote none.
    """

    node: str
    code: int
    document: dict[str, Any]
    error: str = ""


def run_on_each_node(
    cluster: Cluster, arguments: Sequence[str], told: Callable[[str, str], object]
) -> Generator[NodeOutcome]:
    """Run ``zarrcache ARGUMENTS`` once on each node that has workers by now, in this directory, and
    collect the JSON that it writes.

    It runs beside the worker, not within: it may use all cores of the node, and whatever it does,
    the worker lives. It finds its place among the nodes in the variables of torchrun; nodes are
    numbered in the order of their names, as Slurm does it.

    Parameters
    ----------
    cluster : Cluster
    arguments : sequence of str
    told : callable
        Called with the node and each line of its standard error, as they come.

    Raises
    ------
    ConfigError
        There are no workers.
    """
    nodes = list(cluster.nodes())
    orders = {
        node: _Order(
            tuple(arguments),
            os.getcwd(),
            {"RANK": str(number), "WORLD_SIZE": str(len(nodes)), "LOCAL_WORLD_SIZE": "1"},
        )
        for number, node in enumerate(nodes)
    }
    with contextlib.closing(_once_a_node(cluster, _run, orders, told)) as outcomes:
        for node, outcome in outcomes:
            if isinstance(outcome, Died):
                yield NodeOutcome(
                    node,
                    1,
                    {},
                    f"the Dask worker that started it was ended by {outcome}; a second one too",
                )
            else:
                code, out, lines = outcome
                try:
                    yield NodeOutcome(node, code, json.loads(out))
                except ValueError:
                    yield NodeOutcome(
                        node, code or 1, {}, lines[-1] if lines else f"exit code {code}"
                    )


def _once_a_node(
    cluster: Cluster,
    function: Callable[[T, Tell, IsWanted], R],
    orders: Mapping[str, T],
    told: Callable[[str, str], object],
) -> Generator[tuple[str, R | Died]]:
    """``(node, function(order, tell, is_wanted))`` for each node, in the order in which they are
    ready; each in one worker of that node.

    A node whose worker dies over it is tried once more, by another of its workers, or by the next
    one that it gets. Closing the iterator, or an exception at its caller (Ctrl-C too), makes
    ``is_wanted()`` false, and waits a while for those that run.

    Parameters
    ----------
    function : callable
    orders : mapping
        What to do, for each name of ``cluster.nodes()``.
    told : callable
        Called with the node and each line that ``function`` tells, in a thread.
    """
    from distributed import Event

    name = f"zarrcache-{secrets.token_hex(8)}"
    unwanted = Event(f"{name}-unwanted", client=cluster.client)
    running: dict[Any, tuple[str, str]] = {}
    tries = dict.fromkeys(orders, 0)
    #: Nodes to start it on, and until when they may be without a worker.
    waiting = dict.fromkeys(orders, time.monotonic())
    cluster.client.subscribe_topic(name, lambda event: told(*event[1]))
    try:
        while waiting or running:
            places = cluster.places() if waiting else {}
            for node, until_s in list(waiting.items()):
                if node in places:
                    del waiting[node]
                    tries[node] += 1
                    key, where = (f"{name}-node", node, tries[node]), places[node][0]
                    future = cluster.client.submit(
                        _do_here,
                        name,
                        node,
                        function,
                        orders[node],
                        key=key,
                        workers=[where],
                        pure=False,
                    )
                    running[future] = node, where
                elif time.monotonic() > until_s:
                    del waiting[node]
                    yield node, Died(None)
            for future in _ended(cluster, running):
                node, _ = running.pop(future)
                (outcome,) = cluster.outcomes([future]) if future.done() else [Died(None)]
                future.cancel()
                if isinstance(outcome, Died) and tries[node] < _TRIES_A_NODE:
                    waiting[node] = time.monotonic() + _ABSENT_S
                else:
                    yield node, outcome
    finally:
        if running:
            unwanted.set()
            cluster.take_back(running, name)
        cluster.client.unsubscribe_topic(name)


def _ended(cluster: Cluster, running: Mapping[Any, tuple[str, str]]) -> list[Any]:
    """Those that are done, or whose worker is gone (Dask would wait for that very one to come
    back), after a while.
    """
    from distributed import wait

    if not running:
        time.sleep(_TICK_S)
        return []
    with cluster.client.as_current(), contextlib.suppress(TimeoutError):
        wait(list(running), timeout=_TICK_S, return_when="FIRST_COMPLETED")
    alive = cluster.client.nthreads()
    return [future for future, (_, where) in running.items() if future.done() or where not in alive]


# -- in a worker
# ----------------------------------------------------------------------------------------------------------------------


def _do_here(
    name: str, node: str, function: Callable[[Any, Tell, IsWanted], Any], order: Any
) -> Any:
    from distributed import Event, get_worker

    worker, unwanted = get_worker(), Event(f"{name}-unwanted")
    return function(
        order, lambda line: worker.log_event(name, (node, line)), lambda: not unwanted.is_set()
    )


@dataclass(frozen=True)
class _Order:
    arguments: tuple[str, ...]
    directory: str
    environment: dict[str, str]


def _run(
    order: _Order, tell: Callable[[str], None], is_wanted: Callable[[], bool]
) -> tuple[int, str, list[str]]:
    """In a worker: exit code, standard output, and the last lines of standard error."""
    # which go before those of the job that the worker runs in
    process = subprocess.Popen(
        [sys.executable, "-m", "zarrcache", *order.arguments],
        cwd=order.directory if os.path.isdir(order.directory) else None,
        env={**os.environ, **order.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines: deque[str] = deque(maxlen=_LAST_LINES)
    out: list[str] = []
    assert process.stdout is not None
    assert process.stderr is not None
    readers = [
        threading.Thread(target=lambda stream: out.append(stream.read()), args=(process.stdout,)),
        threading.Thread(target=_relay, args=(process.stderr, lines, tell)),
    ]
    for reader in readers:
        reader.start()
    try:
        while True:
            try:
                process.wait(1)
                break
            except subprocess.TimeoutExpired:
                if not is_wanted():
                    break
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
            process.kill()  # what it has stored stays, and of what it was fetching nothing does
        for reader in readers:
            reader.join()
    return process.wait(), "".join(out), list(lines)


def _relay(stream: Any, lines: deque[str], tell: Callable[[str], None]) -> None:
    for line in stream:
        lines.append(line.rstrip("\n"))
        tell(lines[-1])
