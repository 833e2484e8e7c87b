"""Spread items over child processes; a killed process costs only the item that killed it.

``concurrent.futures.ProcessPoolExecutor`` and loky are not used: when one of their processes is
killed, they give up all items and cannot tell which one was the cause.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import pickle
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from zarrcache._units import counted
from zarrcache.errors import ConfigError
from zarrcache.parallel.process import ChildProcess, HungUp, receive

__all__ = ["Budget", "Died", "Engine", "Reserve", "cores", "spread"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

#: An item calls this with a number of bytes before it allocates them. The call waits until the
#: memory budget allows it; the bytes are given back with the result.
Reserve: TypeAlias = Callable[[int], None]


class Engine(Protocol):
    """Spreads items over processes: :func:`spread`, or
    :meth:`zarrcache.parallel.dask.Cluster.spread`.
    """

    def __call__(
        self, function: Callable[[T, Reserve], R], items: Sequence[T], /
    ) -> Generator[tuple[T, R | Died]]:
        """Yield ``(item, function(item, reserve))`` for every item, in order of completion.

        Function, items and results have to be picklable.
        """


#: Seconds for a process to finish its items when the rest is cancelled; then it is killed.
_STOP_S = 10.0


@dataclass(frozen=True)
class Died:
    """Stands for a result: two processes died on the item, the second while it had no other.

    Attributes
    ----------
    exitcode : int or None
        Negative: the number of the signal that ended the process. None: it ran on another machine.
    """

    exitcode: int | None

    def __str__(self) -> str:
        if self.exitcode is None:
            return "cause unknown; see the system log of its machine"
        if self.exitcode >= 0:
            return f"exit code {self.exitcode}"
        if self.exitcode == -signal.SIGKILL:
            return "SIGKILL, perhaps out of memory"
        try:
            return signal.Signals(-self.exitcode).name
        except ValueError:
            return f"signal {-self.exitcode}"


def cores() -> int:
    """Number of cores that this process may use; under Slurm this may be fewer than exist."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(
    function: Callable[[T, Reserve], R],
    items: Sequence[T],
    workers: int,
    *,
    threads: int = 1,
    budget_bytes: int | None = None,
    stop_s: float = _STOP_S,
) -> Generator[tuple[T, R | Died]]:
    """Yield ``(item, function(item, reserve))`` for every item, in order of completion.

    The workers are fresh interpreters, so no client and no lock of the caller exists in them. The
    items of a worker that dies are retried once, after all others and one at a time. Closing the
    iterator, or an exception in its consumer (also Ctrl-C), ends the workers: each finishes the
    items it has started, and is killed if that takes more than ``stop_s``.

    Parameters
    ----------
    function : callable
        It has to be picklable, like items and results, and to report failures in its result. If
        function or items are defined in the program's main module, each worker runs that module.
    workers : int
        Number of processes.
    threads : int
        Concurrent items per process, for work that waits more than it computes.
    budget_bytes : int, optional
        Memory limit of all items together; see :class:`Budget`. Default: no limit.
    stop_s : float

    Raises
    ------
    ConfigError
        No process can be started, or none gets to its first item.
    """
    pool = _Pool[T, R](pickle.dumps(function), math.inf if budget_bytes is None else budget_bytes)
    lost: deque[tuple[int, T]] = deque()
    try:
        yield from pool.run(deque(enumerate(items)), workers, threads, lost)
        yield from pool.run(lost, 1, 1, None)
    finally:
        pool.stop(stop_s)


class _Pool(Generic[T, R]):
    """The worker processes of one call, and the budget of memory that they share.

    The budget is kept in this process, so that the share of a dead worker can be released.
    """

    def __init__(self, work: bytes, budget_bytes: float) -> None:
        self._work = work
        self._budget = Budget(budget_bytes)
        self._workers: list[_Worker[T]] = []
        self._has_begun = False

    def run(
        self,
        queue: deque[tuple[int, T]],
        workers: int,
        threads: int,
        lost: deque[tuple[int, T]] | None,
    ) -> Generator[tuple[T, R | Died]]:
        """Yield the results of a queue of numbered items.

        Items of a worker that dies are appended to ``lost``. With None this is their second try:
        each gets a worker of its own, and is reported as Died if that dies too.
        """
        while queue or self._workers:
            workers = self._start(queue, workers, threads)
            ready = wait([worker.connection for worker in self._workers])
            for worker in [one for one in self._workers if one.connection in ready]:
                try:
                    kind, number, value = worker.connection.recv()
                except (EOFError, OSError):
                    yield from self._remove_dead(worker, lost)
                    continue
                if kind == "started":
                    worker.begin(self._work)
                    continue
                self._has_begun = True
                if kind == "reserve":
                    self._grant(self._budget.ask(number, value))
                    continue
                done = [worker.items.pop(number)] if kind == "result" else []
                if done:
                    self._grant(self._budget.release(number))
                # Send the next items before the consumer works on this result.
                while queue and lost is not None and len(worker.items) < threads:
                    worker.assign(*queue.popleft())
                if not worker.items:
                    self._workers.remove(worker)
                    worker.end()
                for item in done:
                    yield item, value

    def _start(self, queue: deque[tuple[int, T]], workers: int, threads: int) -> int:
        """Start processes while there are items for them; return how many are possible."""
        while queue and len(self._workers) < workers:
            try:
                self._workers.append(_Worker(threads))
            except OSError as exc:
                if not self._workers:
                    raise ConfigError(
                        f"No worker process can be started ({exc}). Raise the limits (ulimit -n, "
                        "ulimit -u)."
                    ) from exc
                logger.warning(
                    "%s instead of %d: the next one cannot be started: %s",
                    counted(len(self._workers), "worker process", "worker processes"),
                    workers,
                    exc,
                )
                return len(self._workers)
            self._workers[-1].assign(*queue.popleft())
        return workers

    def _remove_dead(
        self, worker: _Worker[T], lost: deque[tuple[int, T]] | None
    ) -> Generator[tuple[T, Died]]:
        self._workers.remove(worker)
        exitcode = worker.end()
        if not self._has_begun:
            raise ConfigError(
                f"A worker process ended before its first item (exit code {exitcode}); its "
                "output above says why. If a script of yours calls this, put the call below "
                "`if __name__ == '__main__':`, or use workers=1."
            )
        for number, item in worker.items.items():
            self._grant(self._budget.release(number))
            if lost is None:
                yield item, Died(exitcode)
            else:
                lost.append((number, item))

    def _grant(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            for worker in self._workers:
                if number in worker.items:
                    worker.grant(number)

    def stop(self, within_s: float) -> None:
        """End all processes: wait ``within_s`` for items that have started, then kill."""
        # Not by SIGTERM: an exception inside zarr or an upload prints long tracebacks and leaves
        # half a store behind.
        try:
            for worker in self._workers:
                worker.process.hang_up()
            deadline = time.monotonic() + within_s
            for worker in self._workers:
                worker.process.has_ended(max(0.0, deadline - time.monotonic()))
        finally:
            # Also after a second Ctrl-C. Even if a third one interrupts a kill, none is left.
            with contextlib.ExitStack() as stack:
                for worker in self._workers:
                    stack.callback(worker.process.close)
                    stack.callback(worker.process.kill)


#: Kind, number of the item, and a value that depends on the kind.
_Message: TypeAlias = tuple[str, int, Any]


class _Worker(Generic[T]):
    """A process and the items it works on, by number.

    It sends ``started`` when it begins to read, ``ready`` when it has unpickled the function, then
    ``reserve`` and ``result`` for each item.
    """

    def __init__(self, threads: int) -> None:
        self.items: dict[int, T] = {}
        self._has_begun = False
        # Last, so that no statement follows the start: if a signal interrupts it, the pool does not
        # know the worker, its connection is closed, and its process ends.
        self.process = ChildProcess(_serve, threads)

    @property
    def connection(self) -> Connection:
        return self.process.connection

    def assign(self, number: int, item: T) -> None:
        """Assign one more item."""
        self.items[number] = item
        if self._has_begun:
            self._send(("item", number, item))

    def begin(self, work: bytes) -> None:
        """Send the function and the items once the process reads.

        A reader with the names of 200,000 stores is larger than the socket's buffer, and other
        workers start meanwhile.
        """
        self._has_begun = True
        with contextlib.suppress(OSError):
            self.connection.send_bytes(work)
        for number, item in self.items.items():
            self._send(("item", number, item))

    def grant(self, number: int) -> None:
        """Let an item that waits for memory continue."""
        self._send(("grant", number, None))

    def _send(self, message: _Message) -> None:
        with contextlib.suppress(OSError):  # it has died; the next read detects that
            self.connection.send(message)

    def end(self) -> int:
        """Hang up, wait for the process to end, and return its exit code."""
        self.process.hang_up()
        exitcode = self.process.wait()
        self.process.close()
        return exitcode


class Budget:
    """Grants bytes of memory to readers that ask when they know their need.

    A reader first knows only the size of the objects that it fetches; it knows the size of the
    array when it has read the array's metadata. So it asks twice, and holds the first part while it
    waits for the second. A request that exceeds the free bytes waits until other readers finish. If
    all readers that hold memory wait, none would ever finish, so the request of the one that began
    first is granted. At most the budget plus one array is held, and an array larger than the budget
    is read when the other readers are done.

    Parameters
    ----------
    limit_bytes : float
        May be infinite.
    """

    def __init__(self, limit_bytes: float) -> None:
        self._limit_bytes = limit_bytes
        self._held: dict[int, int] = {}
        self._waiting: dict[int, int] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes that all readers hold."""
        return sum(self._held.values())

    def ask(self, reader: int, nbytes: int) -> list[int]:
        """Request ``nbytes`` more for ``reader`` (a number; the smallest began first).

        Returns
        -------
        list of int
            Readers that may continue, perhaps this one.
        """
        self._waiting[reader] = nbytes
        return self._granted()

    def release(self, reader: int) -> list[int]:
        """Release the bytes of ``reader``; return the readers that may continue."""
        self._held.pop(reader, None)
        self._waiting.pop(reader, None)
        return self._granted()

    def _granted(self) -> list[int]:
        granted = []
        while (reader := self._next()) is not None:
            self._held[reader] = self._held.get(reader, 0) + self._waiting.pop(reader)
            granted.append(reader)
        return granted

    def _next(self) -> int | None:
        """A waiting reader that may continue, or None."""
        free = self._limit_bytes - self.held_bytes
        begun = sorted(self._waiting.keys() & self._held.keys())
        for reader in begun:
            if self._waiting[reader] <= free:
                return reader
        # Readers that have begun come first; otherwise small arrays would starve a large one.
        if begun:
            return begun[0] if len(begun) == len(self._held) else None
        first = min(self._waiting, default=None)
        if first is not None and (self._waiting[first] <= free or not self._held):
            return first
        return None


# -- in the child
# --------------------------------------------------------------------------------


def _serve(connection: Connection, threads: int) -> None:
    """Work on the items that arrive until the parent hangs up or dies."""
    parent = _Parent(connection)
    parent.send("started")
    executor = ThreadPoolExecutor(threads)
    try:
        function: Callable[[Any, Reserve], Any] = receive(connection)
        parent.send("ready")
        while True:
            kind, number, item = receive(connection)
            if kind == "item":
                executor.submit(_run, parent, function, number, item)
            else:
                parent.granted(number)
    except HungUp:
        parent.hung_up()
        # Wait here for items that have started, before the interpreter begins to shut down: from
        # then on no executor accepts work, and zarr, which reads chunks through one, would fail in
        # the middle of a store.
        executor.shutdown(cancel_futures=True)


class _Cancelled(BaseException):
    """The parent has hung up while this item waited for memory."""


class _Parent:
    """The parent, as the threads of a worker see it. Safe from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._waiting: dict[int, threading.Event] = {}
        self._is_there = True

    def send(self, kind: str, number: int = 0, value: object = None) -> None:
        with self._lock, contextlib.suppress(OSError):  # it has hung up, so this process will end
            self._connection.send((kind, number, value))

    def reserve(self, number: int, nbytes: int) -> None:
        granted = self._waiting[number] = threading.Event()
        self.send("reserve", number, nbytes)
        if self._is_there:
            granted.wait()
        if not self._is_there:
            raise _Cancelled

    def granted(self, number: int) -> None:
        self._waiting.pop(number).set()

    def hung_up(self) -> None:
        self._is_there = False
        for granted in list(self._waiting.values()):
            granted.set()


def _run(parent: _Parent, function: Callable[[Any, Reserve], Any], number: int, item: Any) -> None:
    try:
        result = function(item, lambda nbytes: parent.reserve(number, nbytes))
        parent.send("result", number, result)
    except _Cancelled:
        return
    except BaseException:  # noqa: BLE001 - a bug: let the process die, which the parent detects
        traceback.print_exc()
        os._exit(1)
