"""Work spread over the machines of a Dask cluster. The only import of Dask (``pip install
'zarrcache[dask]'``), and only where it is needed.

>>> with open_cluster("tcp://login1:8786") as cluster:  # doctest: +SKIP
...     plan_convert("chgcars/", "s3://bucket/label").execute(engine=cluster.spread)
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import json
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import resource_tracker
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, TypeVar

from zarrcache import __version__
from zarrcache.errors import ConfigError, ZarrCacheError
from zarrcache.parallel._nodes import in_order, node_name
from zarrcache.parallel.pool import Died, Reserve, cores
from zarrcache.parallel.signals import deferred_signals

__all__ = ["Cluster", "open_cluster"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

#: Seconds for a scheduler to answer, and for workers to appear before it is said that there are
#: none.
_CONNECT_S = 5.0
#: Items on the scheduler for each thread of the cluster: enough that none waits for us, few enough
#: that 314,000 are nothing to the scheduler.
_AHEAD = 4
#: And at least so many, from which a cluster that scales by its load sees that there is work.
_LEAST_AHEAD = 200
#: How old the number of the cluster's threads may be.
_LOOK_EVERY_S = 5.0
#: How long items that have begun may go on when nobody wants the rest any more.
_STOP_S = 10.0


@contextlib.contextmanager
def open_cluster(scheduler: str, *, workers: int | None = None) -> Iterator[Cluster]:
    """Connect to a Dask cluster, or start one on this machine.

    Parameters
    ----------
    scheduler : str
        Address (``tcp://host:8786``, ``host:8786``) or scheduler file of a cluster that runs, which
        goes on to run; or ``local``.
    workers : int, optional
        Processes of ``local``. Default: one a core that this process may use.

    Raises
    ------
    ConfigError
        Dask is not installed, nobody answers there, or processes cannot start.
    """
    try:
        import distributed
    except ImportError as exc:
        raise ConfigError(
            f"this needs Dask ({exc}). Install it: pip install 'zarrcache[dask]'."
        ) from exc
    _pickle_errors_as_words()
    if workers is not None and (workers < 1 or scheduler != "local"):
        raise ConfigError(
            f"workers is {workers!r} and Dask {scheduler!r}: only `local` starts workers, one or "
            "more; a cluster has those it has."
        )
    with contextlib.ExitStack() as stack:
        try:
            where = (
                stack.enter_context(_local(workers or cores()))
                if scheduler == "local"
                else _address(scheduler)
            )
            client = distributed.Client(where, timeout=_CONNECT_S, set_as_default=False)
        except (OSError, TimeoutError, ValueError, KeyError, TypeError) as exc:
            if isinstance(exc, ZarrCacheError):
                raise
            raise ConfigError(
                f"no Dask scheduler answers at {scheduler} ({str(exc) or type(exc).__name__}). "
                "Start one (`dask scheduler`) and give its address, "
                "tcp://host:8786, or its scheduler file, or write `local` for processes of this "
                "machine."
            ) from exc
        stack.callback(client.close, _CONNECT_S)
        yield Cluster(scheduler, client)


def _pickle_errors_as_words() -> None:
    """Our errors go from process to process as one string. distributed, when it is imported, has
    every exception that there is pickle its causes as well (tblib), and a lock somewhere in
    botocore's does not: the error that was to be told would become a TypeError.
    """
    for kind in (ZarrCacheError, *_kinds_of(ZarrCacheError)):
        if kind in copyreg.dispatch_table:
            del copyreg.dispatch_table[kind]


def _kinds_of(kind: type[ZarrCacheError]) -> Iterator[type[ZarrCacheError]]:
    for one in kind.__subclasses__():
        yield one
        yield from _kinds_of(one)


def _address(scheduler: str) -> str:
    """What an address or a scheduler file says. Raises OSError, ValueError, KeyError or TypeError
    where it says nothing.
    """
    from distributed.comm.addressing import get_address_host_port

    address: str = (
        json.loads(Path(scheduler).read_text(encoding="utf-8"))["address"]
        if os.path.isfile(scheduler)
        else scheduler
    )
    # here, because a client that was never connected cannot be closed
    get_address_host_port(address)
    return address


@contextlib.contextmanager
def _local(workers: int) -> Iterator[Any]:
    resource_tracker.ensure_running()  # here: it lets signals through again that it has held back
    log = logging.getLogger("distributed")
    level = log.level
    log.setLevel(logging.CRITICAL)  # what matters of it is said here, in words
    try:
        with contextlib.ExitStack() as stack:
            # a signal to all of a job is for this process, and not for what Dask starts
            with deferred_signals():
                try:
                    cluster = stack.enter_context(_local_cluster(workers))
                except (OSError, RuntimeError) as exc:
                    raise ConfigError(
                        f"Dask cannot start processes here ({exc}). If a script of yours calls "
                        "this, put the call below `if __name__ == '__main__':`."
                    ) from exc
            yield cluster
    finally:
        log.setLevel(level)


def _local_cluster(workers: int) -> Any:
    import dask
    import distributed

    # Locks that are made in there (numcodecs makes one) then have no name in the system, and none
    # is called leaked where a worker is killed.
    unnamed_locks = "import multiprocessing; multiprocessing.set_start_method('fork', force=True)"
    return distributed.LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",  # there is no way to have none; nobody is told the port
        silence_logs=logging.CRITICAL,
        memory_limit=0,  # the kernel decides, as without Dask
        preload=[*dask.config.get("distributed.worker.preload"), unnamed_locks],
        scheduler_kwargs={"allowed_failures": 0},  # whose process died is tried again by us, alone
    )


@dataclass(frozen=True)
class _Work:
    """A function on its way to the workers. Sent once to each of them, as what every item depends
    on; Dask makes it anew where it is lost.
    """

    version: str
    pickled: bytes = field(repr=False)  # not in the logs of a worker: it may hold credentials


class Cluster:
    """A Dask cluster; made by :func:`open_cluster`.

    Parameters
    ----------
    name : str
        What the user calls it.
    client : distributed.Client
    """

    def __init__(self, name: str, client: Any) -> None:
        self.name = name
        self.client = client
        self._threads, self._looked_s = 0, -_LOOK_EVERY_S

    def spread(
        self, function: Callable[[T, Reserve], R], items: Sequence[T]
    ) -> Generator[tuple[T, R | Died]]:
        """As :func:`zarrcache.parallel.pool.spread`, an engine: ``(item, function(item, reserve))``
        in the order in which they are ready.

        A few items a thread are on the scheduler at a time; workers that join get some. An item
        whose worker died is tried elsewhere, as often as the scheduler allows
        (``allowed-failures``), and then once more after all others, alone in the cluster. Memory is
        not reserved: what the workers hold together is bounded by their threads. Closing the
        iterator, or an exception at its caller (Ctrl-C too), takes back what has not begun, and
        waits a while for what has.

        Raises
        ------
        ConfigError
            A worker cannot do this at all: it has no zarrcache, or another one.
        ZarrCacheError
            The scheduler has gone.
        """
        if not items:
            return
        name = f"zarrcache-{secrets.token_hex(8)}"
        running: dict[Any, T] = {}
        todo, orphans = deque(items), deque[T]()
        try:
            work = self._send(_Work(__version__, bytes(ForkingPickler.dumps(function))), name)
            for queue, alone in ((todo, False), (orphans, True)):
                yield from self._rounds(
                    work,
                    f"{name}-{'again' if alone else 'item'}",
                    queue,
                    running,
                    None if alone else orphans,
                )
        finally:
            if running:
                self.take_back(running, name)

    def _rounds(
        self, work: Any, name: str, queue: deque[T], running: dict[Any, T], orphans: deque[T] | None
    ) -> Generator[tuple[T, Any]]:
        """Results of a queue. Items that died go to ``orphans``; without one they are tried one at
        a time, and given up.
        """
        from distributed import as_completed

        arriving = as_completed(loop=self.client.loop)
        number = 0
        ready: list[tuple[T, Any]] = []
        while True:
            # The next items go out before the caller works on these results.
            while queue and len(running) < (
                1 if orphans is None else max(_LEAST_AHEAD, _AHEAD * self._look())
            ):
                item = queue.popleft()
                future = self.client.submit(_do, work, item, key=(name, number), pure=False)
                number += 1
                running[future] = item
                arriving.add(future)
            yield from ready
            if not running:
                return
            batch = arriving.next_batch()
            ready = []
            for future, outcome in zip(batch, self.outcomes(batch), strict=True):
                item = running.pop(future)
                # at once: of a result that is still held Dask makes another one when its worker
                # dies
                future.release()
                if isinstance(outcome, Died) and orphans is not None:
                    logger.warning(
                        "a worker of %s died over %s, or beside it; it is tried again alone, after "
                        "all others",
                        self.name,
                        item,
                    )
                    orphans.append(item)
                else:
                    ready.append((item, outcome))

    def outcomes(self, futures: Sequence[Any]) -> list[Any]:
        """What became of items that are done; Died where a worker was lost over one."""
        from distributed import CancelledError

        outcomes: list[Any] = []
        for future in futures:
            try:
                outcomes.append(future.result())
            except CancelledError as exc:
                raise self._gone() from exc
            except Exception as exc:  # noqa: BLE001 - items report their failures in their results: this is the cluster's
                outcomes.append(self._died(exc))
        return outcomes

    def _died(self, exc: Exception) -> Died:
        from distributed import KilledWorker

        if isinstance(exc, KilledWorker):
            return Died(None)
        if isinstance(exc, ZarrCacheError):
            raise exc
        raise ConfigError(
            f"a worker of {self.name} cannot do this: {type(exc).__name__}: {exc}. Every worker "
            "needs the same zarrcache as this machine "
            f"({__version__}), with the same extras."
        ) from exc

    def _gone(self) -> ZarrCacheError:
        return ZarrCacheError(
            f"the Dask scheduler {self.name} has gone. What is finished stays; start it and run "
            "the same again to go on."
        )

    def _send(self, work: _Work, name: str) -> Any:
        """Have one worker take it, which shows whether it can."""
        from distributed import wait

        future = self.client.submit(_carry, work, key=f"{name}-work", pure=False)
        with self.client.as_current():
            try:
                wait(future, timeout=_CONNECT_S)
            except TimeoutError:
                logger.warning(
                    "waiting for a worker of %s; its workers may still be in the queue of the "
                    "batch system",
                    self.name,
                )
                wait(future)
        (outcome,) = self.outcomes([future])
        if isinstance(outcome, Died):
            raise ConfigError(
                f"the workers of {self.name} end before they can begin. Look into their logs."
            )
        return future

    def _look(self) -> int:
        """Threads of all workers, which come and go."""
        if time.monotonic() - self._looked_s >= _LOOK_EVERY_S:
            self._threads = sum(self.client.nthreads().values())
            self._looked_s = time.monotonic()
        return self._threads

    def take_back(self, running: Mapping[Any, object], name: str) -> None:
        """Cancel what has not begun, and wait a while for what has. Keys are pairs that begin with
        ``name``.
        """
        try:
            self.client.cancel(list(running), force=True)
            deadline = time.monotonic() + _STOP_S
            while self._is_any_left(name) and time.monotonic() < deadline:
                time.sleep(0.1)
        except (OSError, TimeoutError) as exc:
            logger.warning(
                "%s does not answer, so items that have begun may go on there (%s)", self.name, exc
            )

    def _is_any_left(self, name: str) -> bool:
        # The scheduler first: what it has not given out and has dropped, no worker begins.
        if self.client.run_on_scheduler(_is_known, name=name):
            return True
        return any(self.client.run(_is_busy, name=name, on_error="ignore").values())

    # -- the machines
    # ------------------------------------------------------------------------------------------------------------

    def nodes(self) -> dict[str, list[str]]:
        """The machines that have workers by now, in the order in which Slurm counts, and the
        addresses of those workers.

        Raises
        ------
        ConfigError
            There is no worker.
        """
        found = self.places()
        if not found:
            raise ConfigError(
                f"{self.name} has no workers. Start some (`dask worker`, or scale the cluster) and "
                "run the same again."
            )
        return {node: found[node] for node in in_order(found)}

    def places(self) -> dict[str, list[str]]:
        """As :meth:`nodes`, in no order, and perhaps none."""
        found: dict[str, list[str]] = {}
        for address, node in sorted(self.client.run(node_name, on_error="ignore").items()):
            found.setdefault(node, []).append(address)
        return found


# -- in a worker
# ------------------------------------------------------------------------------------------------------------------------


def _carry(work: _Work) -> _Work:
    _function_of(work)
    return work


def _do(work: _Work, item: Any) -> Any:
    return _function_of(work)(item, _take)


@functools.lru_cache(maxsize=1)
def _function_of(work: _Work) -> Callable[[Any, Reserve], Any]:
    """Unpickled once in each process: it keeps connections open."""
    if work.version != __version__:
        raise ConfigError(
            f"the Dask worker on {node_name()} has zarrcache {__version__}, and this machine "
            f"{work.version}. Install the same on both."
        )
    function: Callable[[Any, Reserve], Any] = ForkingPickler.loads(work.pickled)
    return function


def _take(nbytes: int) -> None:
    """Memory is there, or the worker dies."""


def _is_busy(name: str, dask_worker: Any) -> bool:
    return any(
        _is_of(name, task.key) and task.state not in ("memory", "released", "error", "forgotten")
        for task in dask_worker.state.tasks.values()
    )


def _is_known(name: str, dask_scheduler: Any) -> bool:
    return any(_is_of(name, key) for key in list(dask_scheduler.tasks))


def _is_of(name: str, key: object) -> bool:
    return isinstance(key, tuple) and str(key[0]).startswith(name)
