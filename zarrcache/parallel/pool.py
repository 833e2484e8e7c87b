"""Work spread over processes of its own, where a killed process costs the items it worked on at the
most.

Not ``concurrent.futures.ProcessPoolExecutor``: when one of its processes is killed it gives up all
items and cannot say which one was to blame.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from zarrcache.errors import ConfigError
from zarrcache.parallel._budget import Budget
from zarrcache.parallel.process import Interpreter
from zarrcache.parallel.signals import deferred_signals

__all__ = ["Died", "Engine", "Reserve", "cores", "spread"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

#: What an item calls before it takes so many bytes of memory. It waits until they are to be had;
#: they are given back with the result.
Reserve: TypeAlias = Callable[[int], None]


class Engine(Protocol):
    """What spreads work: over processes of this machine (:func:`spread`), or over a cluster
    (:meth:`zarrcache.parallel.dask.Cluster.spread`).
    """

    def __call__(
        self, function: Callable[[T, Reserve], R], items: Sequence[T], /
    ) -> Generator[tuple[T, R | Died]]:
        """``(item, function(item, reserve))`` for every item, in the order in which they are ready.
        Function, items and results pickle.
        """


#: How long a process may go on with its items when nobody wants the rest any more. One that takes
#: longer is killed.
_STOP_S = 10.0


@dataclass(frozen=True)
class Died:
    """In place of a result: the process was gone, twice, the second time with nothing beside it.

    Attributes
    ----------
    exitcode : int or None
        Negative: the signal that ended it. None: it was on another machine, where nobody saw.
    """

    exitcode: int | None

    def __str__(self) -> str:
        if self.exitcode is None:
            return "something that its machine's log may tell"
        if self.exitcode >= 0:
            return f"exit code {self.exitcode}"
        name = (
            signal.Signals(-self.exitcode).name
            if -self.exitcode in set(signal.Signals)
            else f"signal {-self.exitcode}"
        )
        return f"{name}, perhaps for lack of memory" if name == "SIGKILL" else name


def cores() -> int:
    """Cores that this process may use, which under Slurm are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(
    function: Callable[[T, Reserve], R],
    items: Sequence[T],
    workers: int,
    *,
    lanes: int = 1,
    budget_bytes: int | None = None,
    stop_s: float = _STOP_S,
) -> Generator[tuple[T, R | Died]]:
    """``(item, function(item, reserve))`` for every item, in the order in which they are ready.

    The processes are interpreters of their own, not forked, so no client and no lock of the caller
    gets into them. The items of a process that dies are tried once more, after all others and each
    alone. Closing the iterator, or an exception at its caller (Ctrl-C too), ends the processes:
    each finishes its items and goes, and is killed if it has not gone in time.

    Parameters
    ----------
    function : callable
        It has to be picklable, like items and results, and to report its failures in its result.
        The program's main module is run again in the processes only if the function refers to it;
        otherwise items must not be instances of classes that are defined there.
    workers : int
        Processes.
    lanes : int
        Items at a time in each of them, for work that waits more than it computes.
    budget_bytes : int, optional
        Of memory, for all items together; see :class:`~zarrcache.parallel._budget.Budget`.
    stop_s : float
        Seconds that a process may take to finish.

    Raises
    ------
    ConfigError
        Processes cannot start at all.
    """
    work = bytes(ForkingPickler.dumps(function))
    todo = deque(enumerate(items))
    orphans: deque[tuple[int, T]] = deque()
    pool: list[_Worker[T, R]] = []
    budget = _Shared(budget_bytes, pool)
    can_start = False
    try:
        for queue, most, last in ((todo, workers, False), (orphans, 1, True)):
            while queue or pool:
                while queue and len(pool) < most:
                    try:
                        # or Ctrl-C could come when it runs, and before it is noted
                        with deferred_signals():
                            pool.append(_Worker(1 if last else lanes, work))
                    except OSError as exc:
                        if not pool:
                            raise ConfigError(
                                f"No worker process can be started ({exc}). Raise the limit "
                                "(ulimit -n, ulimit -u)."
                            ) from exc
                        most = len(pool)
                        logger.warning(
                            "%d worker processes instead of %d, the next one cannot be started: %s",
                            most,
                            workers,
                            exc,
                        )
                        break
                    pool[-1].assign(*queue.popleft())
                ready = set(wait([worker.connection for worker in pool]))
                for worker in [worker for worker in pool if worker.connection in ready]:
                    try:
                        kind, number, value = worker.receive()
                    except (EOFError, OSError):
                        pool.remove(worker)
                        exitcode = worker.end()
                        if not can_start:
                            raise ConfigError(
                                "A worker process ended before it could begin (exit code "
                                f"{exitcode}); its last words are above. If a script "
                                "of yours calls this, put the call below `if __name__ == "
                                "'__main__':`, or use workers=1."
                            ) from None
                        for lost, item in worker.items.items():
                            budget.release(lost)
                            if last:
                                yield item, Died(exitcode)
                            else:
                                orphans.append((lost, item))
                        continue
                    if kind == "start":
                        worker.begin()
                        continue
                    can_start = True
                    if kind == "reserve":
                        budget.ask(number, value)
                        continue
                    done = [worker.items.pop(number)] if kind == "result" else []
                    if done:
                        budget.release(number)
                    # The next items go out before the caller works on this result. A process for
                    # orphans gets a single one.
                    while queue and not last and len(worker.items) < lanes:
                        worker.assign(*queue.popleft())
                    if not worker.items:
                        pool.remove(worker)
                        worker.end()
                    for item in done:
                        yield item, value
    finally:
        _stop(pool, stop_s)


class _Worker(Generic[T, R]):
    """A process and the items it works on, by number."""

    def __init__(self, lanes: int, work: bytes) -> None:
        self.items: dict[int, T] = {}
        self._work = work
        self._has_begun = False
        self.process = Interpreter(_serve, lanes, work)
        self.connection = self.process.connection

    def assign(self, number: int, item: T) -> None:
        """Give it one more item."""
        self.items[number] = item
        if self._has_begun:
            self._say(("item", number, item))

    def begin(self) -> None:
        """Tell it what to do with its items. Not before it reads: a reader with the names of
        200,000 stores is larger than a pipe, and others start meanwhile.
        """
        self._has_begun = True
        with contextlib.suppress(OSError):
            self.connection.send_bytes(self._work)
        for number, item in self.items.items():
            self._say(("item", number, item))

    def grant(self, number: int) -> None:
        """Let an item that waits for memory go on."""
        self._say(("grant", number, None))

    def _say(self, message: _Message) -> None:
        with contextlib.suppress(OSError):  # it is gone: receive() finds that out
            self.connection.send(message)

    def receive(self) -> _Message:
        """``start``, ``ready``, then ``reserve`` and ``result``. Raises EOFError or OSError if the
        process is gone.
        """
        message: _Message = self.connection.recv()
        return message

    def end(self) -> int:
        """Hang up, upon which an idle process ends; its exit code."""
        self.process.hang_up()
        exitcode = self.process.exitcode
        self.process.close()
        return exitcode


#: Kind, number of the item, and what belongs to it.
_Message: TypeAlias = tuple[str, int, Any]


class _Shared:
    """The budget of all processes. It is kept here, where a dead one's part can be given back; each
    asks through its pipe.
    """

    def __init__(self, budget_bytes: int | None, pool: Sequence[_Worker[Any, Any]]) -> None:
        self._budget = None if budget_bytes is None else Budget(budget_bytes)
        self._pool = pool

    def ask(self, number: int, nbytes: int) -> None:
        self._grant([number] if self._budget is None else self._budget.ask(number, nbytes))

    def release(self, number: int) -> None:
        self._grant([] if self._budget is None else self._budget.release(number))

    def _grant(self, numbers: Sequence[int]) -> None:
        for number in numbers:
            for worker in self._pool:
                if number in worker.items:
                    worker.grant(number)


def _stop(pool: Sequence[_Worker[Any, Any]], stop_s: float) -> None:
    # Not by SIGTERM: an exception in the middle of zarr or of an upload is a lot of words on
    # stderr, and half a store to take back.
    try:
        for worker in pool:
            worker.process.hang_up()
        deadline = time.monotonic() + stop_s
        for worker in pool:
            worker.process.has_ended(max(0.0, deadline - time.monotonic()))
    finally:
        # after a second Ctrl-C too: whoever presses it twice does not want to wait. Nor does a
        # third leave any of them.
        with deferred_signals():
            for worker in pool:
                worker.process.kill()
                worker.process.close()


# -- in the process
# --------------------------------------------------------------------------------------------------------------------


def _serve(connection: Connection, lanes: int) -> None:
    """What a process does: results of what comes, until the other side hangs up or dies."""
    desk = _Desk(connection)
    desk.say("start")
    pool = ThreadPoolExecutor(lanes)
    try:
        function: Callable[[Any, Reserve], Any] = connection.recv()
        desk.say("ready")
        while True:
            kind, number, item = connection.recv()
            if kind == "item":
                pool.submit(_do, desk, function, number, item)
            else:
                desk.granted(number)
    except (EOFError, OSError):
        desk.close()
        # Items that have begun are waited for here, before the interpreter begins to end: from then
        # on no executor in it takes work, and zarr, whose chunks go through one, would fail in the
        # middle of a store, with a traceback for each.
        pool.shutdown(cancel_futures=True)


class _NotWanted(BaseException):
    """The other side has hung up while this item waited for memory."""


class _Desk:
    """The process's end of the pipe. Safe from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()
        self._waiting: dict[int, threading.Event] = {}
        self._is_open = True

    def say(self, kind: str, number: int = 0, value: object = None) -> None:
        with self._lock, contextlib.suppress(OSError):  # hung up: the process is about to end
            self._connection.send((kind, number, value))

    def reserve(self, number: int, nbytes: int) -> None:
        granted = self._waiting[number] = threading.Event()
        self.say("reserve", number, nbytes)
        if self._is_open:
            granted.wait()
        if not self._is_open:
            raise _NotWanted

    def granted(self, number: int) -> None:
        self._waiting.pop(number).set()

    def close(self) -> None:
        self._is_open = False
        for granted in list(self._waiting.values()):
            granted.set()


def _do(desk: _Desk, function: Callable[[Any, Reserve], Any], number: int, item: Any) -> None:
    try:
        result = function(item, lambda nbytes: desk.reserve(number, nbytes))
        desk.say("result", number, result)
    except _NotWanted:
        return
    except BaseException:  # noqa: BLE001 - the process ends, as it would without threads; the other side finds that out
        traceback.print_exc()
        os._exit(1)
