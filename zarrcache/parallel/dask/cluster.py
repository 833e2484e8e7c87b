"""Connect to a Dask cluster, or start one, and run items on it.

>>> with open_cluster("tcp://login1:8786") as cluster:  # doctest: +SKIP
...     plan_convert("chgcars/", "s3://bucket/label").execute(engine=cluster.spread)
"""

from __future__ import annotations

import contextlib
import copyreg
import functools
import json
import logging
import multiprocessing
import os
import pickle
import secrets
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from zarrcache.errors import ConfigError, ZarrCacheError
from zarrcache.parallel.pool import Died, Reserve, cores
from zarrcache.parallel.signals import signals_blocked
from zarrcache.parallel.topology import node_name, sorted_nodes

__all__ = ["Cluster", "open_cluster"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

#: Seconds for a scheduler to answer, and to wait for a worker before a warning is logged.
_CONNECT_S = 5.0
#: Items on the scheduler per thread of the cluster: enough that no thread waits for this process,
#: and few enough that 314,000 materials do not overload the scheduler.
_AHEAD = 4
#: At least this many items on the scheduler, so that a cluster that scales with its load sees work.
_MIN_AHEAD = 200
#: Seconds for which the number of the cluster's threads is cached.
_THREADS_KNOWN_S = 5.0
#: Seconds for items that have begun to finish when the rest is cancelled.
_STOP_S = 10.0


@contextlib.contextmanager
def open_cluster(scheduler: str, *, workers: int | None = None) -> Iterator[Cluster]:
    """Connect to a Dask cluster, or start one on this machine.

    Parameters
    ----------
    scheduler : str
        Address (``tcp://host:8786``, ``host:8786``) or scheduler file of a running cluster, which
        keeps running; or ``local``.
    workers : int, optional
        Number of processes of ``local``. Default: the cores that this process may use.

    Raises
    ------
    ConfigError
        Dask is not installed, no scheduler answers, or processes cannot start.
    """
    try:
        import distributed
    except ImportError as exc:
        raise ConfigError(
            f"--dask needs Dask ({exc}). Install it: pip install 'zarrcache[dask]'"
        ) from exc
    _pickle_errors_without_causes()
    if workers is not None and (workers < 1 or scheduler != "local"):
        raise ConfigError(
            f"workers is {workers!r} with the Dask scheduler {scheduler!r}: only `local` starts "
            "workers, one or more; a running cluster has its own."
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
                "Start one (`dask scheduler`) and pass its address, tcp://host:8786, or its "
                "scheduler file; or pass `local` to start processes on this machine."
            ) from exc
        stack.callback(client.close, _CONNECT_S)
        yield Cluster(scheduler, client)


def _pickle_errors_without_causes() -> None:
    """Pickle errors of this package as one string again.

    When distributed is imported, it makes every exception class pickle its causes as well (through
    tblib). A cause from botocore holds a lock, so pickling the error would raise a TypeError.
    """
    todo: list[type[ZarrCacheError]] = [ZarrCacheError]
    while todo:
        kind = todo.pop()
        todo += kind.__subclasses__()
        copyreg.pickle(kind, kind.__reduce__)


def _address(scheduler: str) -> str:
    """The address in a scheduler file, or ``scheduler`` itself if it is an address.

    Raises OSError, ValueError, KeyError or TypeError if it is neither.
    """
    from distributed.comm.addressing import resolve_address

    address: str = (
        json.loads(Path(scheduler).read_text(encoding="utf-8"))["address"]
        if os.path.isfile(scheduler)
        else scheduler
    )
    # Checked here, because a Client that has never been connected cannot be closed.
    resolve_address(address)
    return address


@contextlib.contextmanager
def _local(workers: int) -> Iterator[Any]:
    # The first named lock starts multiprocessing's resource tracker, which unblocks signals up to
    # Python 3.12.8 (https://github.com/python/cpython/issues/127586). So it starts here.
    multiprocessing.get_context("spawn").Lock()
    log = logging.getLogger("distributed")
    level = log.level
    log.setLevel(logging.CRITICAL)  # its errors are reported here, as exceptions
    try:
        with contextlib.ExitStack() as stack:
            # Only this process handles a Ctrl-C or SIGTERM sent to the whole job; it ends the
            # workers.
            with signals_blocked():
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

    # Locks that the workers create (numcodecs creates one) are then unnamed, so that none is
    # reported as leaked when a worker is killed.
    unnamed_locks = "import multiprocessing; multiprocessing.set_start_method('fork', force=True)"
    return distributed.LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        host="127.0.0.1",
        dashboard_address="127.0.0.1:0",  # cannot be switched off; any free local port
        silence_logs=logging.CRITICAL,
        memory_limit=0,  # no limit by Dask; the kernel's applies
        preload=[*dask.config.get("distributed.worker.preload"), unnamed_locks],
        scheduler_kwargs={"allowed_failures": 0},  # items of a dead worker are retried here, alone
    )


@dataclass(frozen=True)
class _Work:
    """A pickled function for the workers.

    It is sent once to each worker, as the dependency of every item. Dask computes it again if it is
    lost.
    """

    version: str
    log_level: int
    pickled: bytes = field(repr=False)  # not in a worker's log: it may hold credentials


@functools.cache
def _version() -> str:
    from importlib import metadata  # here: 10 ms that only users of Dask need to wait

    return metadata.version("zarrcache")


class Cluster:
    """A Dask cluster; made by :func:`open_cluster`.

    Parameters
    ----------
    name : str
        The address, file or ``local`` that the user passed.
    client : distributed.Client
    """

    def __init__(self, name: str, client: Any) -> None:
        self.name = name
        self.client = client
        self._threads, self._threads_at_s = 0, -_THREADS_KNOWN_S

    def spread(
        self, function: Callable[[T, Reserve], R], items: Sequence[T]
    ) -> Generator[tuple[T, R | Died]]:
        """Yield ``(item, function(item, reserve))`` in order of completion.

        A few items per thread are on the scheduler at once; workers that join get some. An item
        whose worker died is retried on other workers as often as the scheduler allows
        (``allowed-failures``), and then once more after all others, alone in the cluster. Memory is
        not reserved: the number of the workers' threads bounds it. Closing the iterator, or an
        exception in its consumer (also Ctrl-C), cancels items that have not started, and waits 10 s
        for those that have.

        Raises
        ------
        ConfigError
            A worker cannot run the function because it has no zarrcache, or another version.
        ZarrCacheError
            The scheduler is gone.
        """
        if not items:
            return
        name = f"zarrcache-{secrets.token_hex(8)}"
        running: dict[Any, T] = {}
        todo, lost = deque(items), deque[T]()
        try:
            level = logging.getLogger("zarrcache").level
            work = self._send(_Work(_version(), level, pickle.dumps(function)), name)
            yield from self._run(work, f"{name}-item", todo, running, lost)
            yield from self._run(work, f"{name}-again", lost, running, None)
        finally:
            if running:
                self.take_back(running, name)

    def _run(
        self, work: Any, name: str, queue: deque[T], running: dict[Any, T], lost: deque[T] | None
    ) -> Generator[tuple[T, Any]]:
        """Yield the results of a queue.

        Items whose worker died are appended to ``lost``. With None this is their second try: they
        run one at a time, and are reported as Died if the worker dies again.
        """
        from distributed import as_completed

        arriving = as_completed(loop=self.client.loop)
        number = 0
        ready: list[tuple[T, Any]] = []
        while True:
            # Send the next items before the consumer works on these results.
            while queue and len(running) < (
                1 if lost is None else max(_MIN_AHEAD, _AHEAD * self._count_threads())
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
                # Release it now: Dask recomputes a result that is still held if its worker dies.
                future.release()
                if isinstance(outcome, Died) and lost is not None:
                    logger.warning(
                        "a worker of %s died while it worked on %s or beside it; retrying the item "
                        "alone, after all others",
                        self.name,
                        item,
                    )
                    lost.append(item)
                else:
                    ready.append((item, outcome))

    def outcomes(self, futures: Sequence[Any]) -> list[Any]:
        """Results of futures that are done; Died for one whose worker was lost."""
        from distributed import CancelledError

        outcomes: list[Any] = []
        for future in futures:
            try:
                outcomes.append(future.result())
            except CancelledError as exc:
                raise ZarrCacheError(
                    f"the Dask scheduler {self.name} is gone. Finished work is kept; start it and "
                    "run the same command again to continue."
                ) from exc
            except Exception as exc:  # noqa: BLE001 - the cluster's, not an item's
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
            f"needs the same zarrcache as this machine ({_version()}), with the same extras."
        ) from exc

    def _send(self, work: _Work, name: str) -> Any:
        """Let one worker load the function, to find out whether it can."""
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
                f"the workers of {self.name} exit before they start to work. See their logs."
            )
        return future

    def _count_threads(self) -> int:
        """Number of threads of all workers, which may join and leave."""
        if time.monotonic() - self._threads_at_s >= _THREADS_KNOWN_S:
            self._threads = sum(self.client.nthreads().values())
            self._threads_at_s = time.monotonic()
        return self._threads

    def take_back(self, running: Mapping[Any, object], name: str) -> None:
        """Cancel items that have not started, and wait 10 s for those that have.

        Their keys are pairs that begin with ``name``.
        """
        try:
            self.client.cancel(list(running), force=True)
            deadline = time.monotonic() + _STOP_S
            while self._is_any_left(name) and time.monotonic() < deadline:
                time.sleep(0.1)
        except (OSError, TimeoutError) as exc:
            logger.warning(
                "%s does not answer; items that have started may still run (%s)", self.name, exc
            )

    def _is_any_left(self, name: str) -> bool:
        # The scheduler first: no worker begins an item that the scheduler has dropped.
        if self.client.run_on_scheduler(_is_known, name=name):
            return True
        return any(self.client.run(_is_busy, name=name, on_error="ignore").values())

    def nodes(self) -> dict[str, list[str]]:
        """Addresses of the present workers by node, in Slurm's order of nodes.

        Raises
        ------
        ConfigError
            There are no workers.
        """
        found = self.places()
        if not found:
            raise ConfigError(
                f"{self.name} has no workers. Start some (`dask worker`, or scale the cluster) and "
                "run the same command again."
            )
        return {node: found[node] for node in sorted_nodes(found)}

    def places(self) -> dict[str, list[str]]:
        """Like :meth:`nodes`, but in any order, and perhaps empty."""
        found: dict[str, list[str]] = {}
        for address, node in sorted(self.client.run(node_name, on_error="ignore").items()):
            found.setdefault(node, []).append(address)
        return found


# -- an item, in a worker
# --------------------------------------------------------------------------------


def _carry(work: _Work) -> _Work:
    _load(work)
    return work


def _do(work: _Work, item: Any) -> Any:
    return _load(work)(item, _reserve_nothing)


@functools.lru_cache(maxsize=1)
def _load(work: _Work) -> Callable[[Any, Reserve], Any]:
    """The function, unpickled once in each process: it keeps connections open."""
    if work.version != _version():
        raise ConfigError(
            f"the Dask worker on {node_name()} has zarrcache {_version()}, and this machine "
            f"{work.version}. Install the same version on both."
        )
    logging.getLogger("zarrcache").setLevel(work.log_level)  # --quiet and --verbose hold there too
    function: Callable[[Any, Reserve], Any] = pickle.loads(work.pickled)
    return function


def _reserve_nothing(nbytes: int) -> None:
    """Do nothing: a worker has no memory budget, and the kernel kills it if memory runs out."""


def _is_busy(name: str, dask_worker: Any) -> bool:
    return any(
        _is_of(name, task.key) and task.state not in ("memory", "released", "error", "forgotten")
        for task in dask_worker.state.tasks.values()
    )


def _is_known(name: str, dask_scheduler: Any) -> bool:
    return any(_is_of(name, key) for key in list(dask_scheduler.tasks))


def _is_of(name: str, key: object) -> bool:
    return isinstance(key, tuple) and str(key[0]).startswith(name)
