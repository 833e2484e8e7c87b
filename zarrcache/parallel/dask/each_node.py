"""Run a command once on every node of a Dask cluster, in a child process of a worker."""

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
from typing import Any, TypeAlias

from zarrcache.parallel.dask.cluster import Cluster
from zarrcache.parallel.pool import Died

__all__ = ["NodeOutcome", "run_on_each_node"]

#: Attempts to run a command on a node whose worker dies.
_NODE_ATTEMPTS = 2
#: Seconds to wait for a new worker on a node that has lost all of its workers.
_ABSENT_S = 60.0
#: Seconds between two checks of the running commands.
_TICK_S = 1.0
#: Seconds for a cancelled command to end after SIGTERM.
_END_S = 5.0
#: Lines of a command's standard error that are kept for its error message.
_LAST_LINES = 20


@dataclass(frozen=True)
class NodeOutcome:
    """The result of a command on one node.

    Attributes
    ----------
    node : str
    code : int
        Exit code.
    document : dict
        The JSON output; empty if there was none.
    error : str
        The reason why there was none.
    """

    node: str
    code: int
    document: dict[str, Any]
    error: str = ""


def run_on_each_node(
    cluster: Cluster, arguments: Sequence[str], report: Callable[[str, str], object]
) -> Generator[NodeOutcome]:
    """Run ``zarrcache ARGUMENTS`` once on each node that has workers now, and collect its JSON.

    The command runs in this directory, in a child process of the worker: it may use all cores of
    the node, and the worker survives its failures. The variables of torchrun give it its rank among
    the nodes, which are numbered in Slurm's order.

    Parameters
    ----------
    cluster : Cluster
    arguments : sequence of str
    report : callable
        Called with the node and each line of the command's standard error, in a thread.

    Raises
    ------
    ConfigError
        There are no workers.
    """
    nodes = list(cluster.nodes())
    commands = {
        node: _Command(
            tuple(arguments),
            os.getcwd(),
            {"RANK": str(number), "WORLD_SIZE": str(len(nodes)), "LOCAL_WORLD_SIZE": "1"},
        )
        for number, node in enumerate(nodes)
    }
    with contextlib.closing(_once_per_node(cluster, commands, report)) as outcomes:
        for node, outcome in outcomes:
            if isinstance(outcome, Died):
                error = f"two Dask workers died while they ran it ({outcome})"
                yield NodeOutcome(node, 1, {}, error)
                continue
            code, out, lines = outcome
            try:
                yield NodeOutcome(node, code, json.loads(out))
            except ValueError:
                error = lines[-1] if lines else f"exit code {code}"
                yield NodeOutcome(node, code or 1, {}, error)


def _once_per_node(
    cluster: Cluster,
    commands: Mapping[str, _Command],
    report: Callable[[str, str], object],
) -> Generator[tuple[str, _Ran | Died]]:
    """Yield each node of ``commands`` with what :func:`_run` returns, in order of completion.

    One worker of each node runs the command. If that worker dies, another worker of the node, or
    the next one to appear within 60 s, tries once more. Closing the iterator, or an exception in
    its consumer (also Ctrl-C), ends running commands and waits 10 s for them.
    """
    from distributed import Event

    name = f"zarrcache-{secrets.token_hex(8)}"
    cancelled = Event(f"{name}-cancelled", client=cluster.client)
    running: dict[Any, tuple[str, str]] = {}
    attempts = dict.fromkeys(commands, 0)
    #: Nodes to start on, and until when they may have no worker.
    waiting = dict.fromkeys(commands, time.monotonic())
    cluster.client.subscribe_topic(name, lambda event: report(*event[1]))
    try:
        while waiting or running:
            places = cluster.places() if waiting else {}
            for node, until_s in list(waiting.items()):
                if node in places:
                    del waiting[node]
                    attempts[node] += 1
                    where = places[node][0]
                    future = cluster.client.submit(
                        _run,
                        name,
                        node,
                        commands[node],
                        key=(f"{name}-node", node, attempts[node]),
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
                if isinstance(outcome, Died) and attempts[node] < _NODE_ATTEMPTS:
                    waiting[node] = time.monotonic() + _ABSENT_S
                else:
                    yield node, outcome
    finally:
        if running:
            cancelled.set()
            cluster.take_back(running, name)
        cluster.client.unsubscribe_topic(name)


def _ended(cluster: Cluster, running: Mapping[Any, tuple[str, str]]) -> list[Any]:
    """Wait up to 1 s; return the futures that are done, or whose worker is gone.

    Dask would wait for that worker to return.
    """
    from distributed import wait

    if not running:
        time.sleep(_TICK_S)
        return []
    with cluster.client.as_current(), contextlib.suppress(TimeoutError):
        wait(list(running), timeout=_TICK_S, return_when="FIRST_COMPLETED")
    alive = cluster.client.nthreads()
    return [future for future, (_, where) in running.items() if future.done() or where not in alive]


# -- a command, in a worker
# --------------------------------------------------------------------------------

#: Exit code, standard output, and the last lines of standard error.
_Ran: TypeAlias = tuple[int, str, list[str]]


@dataclass(frozen=True)
class _Command:
    arguments: tuple[str, ...]
    directory: str
    environment: dict[str, str]  # overrides the worker's, which may be part of another job


def _run(name: str, node: str, command: _Command) -> _Ran:
    """Run a command, and report each line of its standard error, until it is cancelled."""
    from distributed import Event, get_worker

    worker, cancelled = get_worker(), Event(f"{name}-cancelled")
    process = subprocess.Popen(
        [sys.executable, "-m", "zarrcache", *command.arguments],
        cwd=command.directory if os.path.isdir(command.directory) else None,
        env={**os.environ, **command.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines: deque[str] = deque(maxlen=_LAST_LINES)
    out: list[str] = []

    def relay(stream: Any) -> None:
        for line in stream:
            lines.append(line.rstrip("\n"))
            worker.log_event(name, (node, lines[-1]))

    assert process.stdout is not None
    assert process.stderr is not None
    readers = [
        threading.Thread(target=lambda stream: out.append(stream.read()), args=(process.stdout,)),
        threading.Thread(target=relay, args=(process.stderr,)),
    ]
    for reader in readers:
        reader.start()
    try:
        while not cancelled.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_TICK_S)
                break
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_END_S)
            process.kill()  # stored entries are kept; unfinished ones are never visible
        for reader in readers:
            reader.join()
    return process.wait(), "".join(out), list(lines)
