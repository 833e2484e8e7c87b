"""Work spread over processes of its own, where a killed process costs its one item at the most.

Not ``concurrent.futures.ProcessPoolExecutor``: when one of its processes is killed it gives up all items and cannot say which one was to blame.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, TypeVar

from zarrcache.errors import ConfigError

__all__ = ["Died", "cores", "spread"]

T = TypeVar("T")
R = TypeVar("R")

#: How long a process may go on with its item when nobody wants the rest any more. One that takes longer is killed.
_STOP_S = 10.0


@dataclass(frozen=True)
class Died:
    """In place of a result: the process was gone, twice, the second time with nothing beside it.

    Attributes
    ----------
    exitcode : int or None
        Negative: the signal that ended it.
    """

    exitcode: int | None

    def __str__(self) -> str:
        if self.exitcode is None or self.exitcode >= 0:
            return f"exit code {self.exitcode}"
        name = signal.Signals(-self.exitcode).name if -self.exitcode in set(signal.Signals) else f"signal {-self.exitcode}"
        return f"{name}, perhaps for lack of memory" if name == "SIGKILL" else name


def cores() -> int:
    """Cores that this process may use, which under Slurm are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(function: Callable[[T], R], items: Sequence[T], workers: int) -> Generator[tuple[T, R | Died]]:
    """``(item, function(item))`` for every item, in the order in which they are ready.

    The processes are spawned, not forked, so no client and no lock of the caller gets into them. An item whose process dies is tried once
    more, after all others and alone. Closing the iterator, or an exception at its caller (Ctrl-C too), ends the processes: each finishes its
    item and goes, and is killed if it has not gone within ten seconds.

    Parameters
    ----------
    function : callable
        It has to be picklable, like items and results, and to report its failures in its result.
    workers : int

    Raises
    ------
    ConfigError
        Processes cannot start at all.
    """
    todo = deque(items)
    orphans: deque[T] = deque()
    pool: list[_Worker[T, R]] = []
    can_start = False
    try:
        for queue, most, last in ((todo, workers, False), (orphans, 1, True)):
            while queue or pool:
                while queue and len(pool) < most:
                    pool.append(_Worker(function, queue.popleft()))
                ready = set(wait([worker.connection for worker in pool]))
                for worker in [worker for worker in pool if worker.connection in ready]:
                    item = worker.item
                    try:
                        is_result, result = worker.receive()
                    except (EOFError, OSError):
                        pool.remove(worker)
                        exitcode = worker.end()
                        if not can_start:
                            raise ConfigError(
                                f"A worker process ended before it could begin (exit code {exitcode}); its last words are above. If a script "
                                "of yours starts the conversion, put that below `if __name__ == '__main__':`, or use workers=1."
                            ) from None
                        if last:
                            yield item, Died(exitcode)
                        else:
                            orphans.append(item)
                        continue
                    can_start = True
                    if not is_result:
                        continue
                    # The next item goes out before the caller works on this result. A process for orphans gets a single one.
                    if queue and not last:
                        worker.send(queue.popleft())
                    else:
                        pool.remove(worker)
                        worker.end()
                    yield item, result
    finally:
        _stop(pool)


class _Worker(Generic[T, R]):
    """A process and the item it works on."""

    def __init__(self, function: Callable[[T], R], item: T) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: SpawnProcess = context.Process(target=_work, args=(theirs, function), daemon=True)
        # The signal mask is inherited: Ctrl-C in the terminal reaches this process only, and this process ends the others in order.
        # The resource tracker comes first, because starting it would unblock the signal again.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        self.send(item)

    def send(self, item: T) -> None:
        self.item = item
        with contextlib.suppress(OSError):  # it is gone: receive() finds that out
            self.connection.send(item)

    def receive(self) -> tuple[bool, Any]:
        """``(True, result)``, or ``(False, None)`` once in the beginning. Raises EOFError or OSError if the process is gone."""
        message: tuple[bool, Any] = self.connection.recv()
        return message

    def end(self) -> int | None:
        """Hang up, upon which an idle process ends; its exit code."""
        self.connection.close()
        self.process.join()
        return self.process.exitcode


def _stop(pool: Sequence[_Worker[Any, Any]]) -> None:
    # Not by SIGTERM: an exception in the middle of zarr or of an upload is a lot of words on stderr, and half a store to take back.
    for worker in pool:
        worker.connection.close()
    deadline = time.monotonic() + _STOP_S
    for worker in pool:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()


def _work(connection: Connection, function: Callable[[Any], Any]) -> None:
    """What a process does: results of what comes, until the other side hangs up or dies."""
    message: tuple[bool, Any] = (False, None)
    while True:
        try:
            connection.send(message)
            item = connection.recv()
        except (EOFError, OSError):
            return
        message = True, function(item)
