"""Fetch the samples of a sampler before the training reads them.

>>> sampler = NodeSampler(dataset, seed=42)  # doctest: +SKIP
>>> with Lookahead(dataset, sampler) as ahead:  # doctest: +SKIP
...     for epoch in range(50):
...         sampler.set_epoch(epoch)
...         ahead.set_epoch(epoch)
...         for batch in loader:
...             ...
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import threading
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from zarrcache._keys import ROLES
from zarrcache.errors import ConfigError
from zarrcache.parallel import ChildProcess, Died, World
from zarrcache.train.belady import BeladyPolicy
from zarrcache.train.prefetch import prefetch
from zarrcache.train.progress import Listed, Orders, ReadProgress, Scheduled

if TYPE_CHECKING:
    from zarrcache.data import ZarrS3Reader
    from zarrcache.train.sampler import NodeSampler

__all__ = ["Lookahead", "node_budget_bytes"]

logger = logging.getLogger(__name__)

#: At most this fraction (1/4) of ``cache.limit`` is used ahead; the rest is for what is stored.
_SHARE_OF_LIMIT = 4
#: Seconds for the process to end before it is killed.
_END_S = 10.0

#: A sampler, or what one has drawn: task ids or positions, one list per epoch.
Order: TypeAlias = "NodeSampler | Sequence[Sequence[str]] | Sequence[Sequence[int]]"


def node_budget_bytes(lookahead_bytes: int, limit_bytes: int) -> int:
    """Bytes that all ranks of a node fetch ahead, of ``cache.lookahead`` and ``cache.limit``."""
    return min(lookahead_bytes, limit_bytes // _SHARE_OF_LIMIT)


class Lookahead:
    """Fetches ahead of this rank's training, and passes the order of reads to ``belady``.

    A separate process fetches the samples in the sampler's order, at most ``cache.lookahead`` bytes
    ahead. The bytes are those of decoded densities, divided by the ranks of the node, and at most a
    quarter of ``cache.limit``. The process reads through the cache as the training does, so each
    density is fetched once, by the process that needs it first, and stored like any other. In a
    full cache the look-ahead uses the bytes of the entries that were stored first, and drops its
    own entries after they were read.

    Create one on every rank, before the DataLoader's workers start and after
    ``sampler.load_state_dict()``. Without a cache, or with ``lookahead: 0`` and without ``eviction:
    belady``, it does nothing.

    Parameters
    ----------
    source : ZarrDataset, RhoData or ZarrS3Reader
        The dataset that is read. For a reader, the samples are the training ids of
        its ``split()``.
    order : NodeSampler, or sequence of sequences
        The sampler of the DataLoader. Or, for other samplers, the drawn task ids or positions: one
        list per epoch from epoch 0 on, with or without repetitions. With ``eviction: belady``, such
        lists work only with one rank per node.
    epoch : int, optional
        The first epoch. Default: the sampler's, or 0.

    Raises
    ------
    ConfigError
        ``source`` does not read through a zarrcache reader; ``order`` has other samples; or
        ``order`` is lists, with ``eviction: belady`` and several ranks on the node.
    """

    def __init__(self, source: Any, order: Order, *, epoch: int | None = None) -> None:
        self._reader, names = _read_by(source)
        self._prefetcher: _Prefetcher | None = None
        self._is_missing = False
        config = self._reader.cache_config
        if (
            config is None
            or not config.arrays.enabled
            or not (config.lookahead or config.eviction == "belady")
        ):
            self._progress: ReadProgress | None = None
            return
        orders = _orders(order, names)
        self._progress = ReadProgress(
            orders, int(getattr(order, "epoch", 0)) if epoch is None else epoch
        )
        if config.eviction == "belady" and isinstance(orders, Listed) and orders.ranks > 1:
            raise ConfigError(
                f"cache.eviction is belady, and this node has {orders.ranks} ranks: a rank's own "
                "list does not contain what the other ranks read. Give a NodeSampler, or set "
                "cache.eviction to none."
            )
        self._reader.observe(self._progress)
        if config.eviction == "belady":
            self._reader.cache.set_eviction_policy(
                BeladyPolicy(
                    self._progress,
                    _digests(self._reader, orders.names),
                    [ROLES.index(channel.role) for channel in self._reader.reads],
                )
            )
        budget = node_budget_bytes(config.lookahead, config.limit) // orders.ranks
        if budget:
            try:
                self._prefetcher = _Prefetcher(self._reader, self._progress, budget)
            except OSError as exc:
                self._is_missing = True
                logger.warning(
                    "no look-ahead: its process cannot be started (%s). Training continues "
                    "without it and waits for each read.",
                    exc,
                )
            except BaseException:
                # Ctrl-C: in a notebook, the kept traceback would keep the process running.
                self.close()
                raise

    def __enter__(self) -> Lookahead:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id of the process that fetches ahead, or None."""
        return self._prefetcher.pid if self._prefetcher is not None else None

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch that is read next. Call it together with the sampler's ``set_epoch``."""
        if self._progress is not None:
            self._progress.set_epoch(epoch)

    def check(self) -> bool:
        """Whether the process runs; False if it has died or could not be started.

        Either is also logged when it happens, as one warning; training continues without it.
        """
        return not self._is_missing and (self._prefetcher is None or self._prefetcher.check())

    def close(self) -> None:
        """End the process and free the room that it reserved."""
        if self._prefetcher is not None:
            self._prefetcher.close()
        if self._progress is not None:
            self._reader.unobserve(self._progress)
        self._prefetcher = self._progress = None
        self._reader.cache.set_eviction_policy(None)


class _Prefetcher:
    """The process that fetches ahead, seen from its parent.

    A fresh interpreter, because obstore hangs in a child forked after its parent has used it.
    """

    def __init__(self, reader: ZarrS3Reader, progress: ReadProgress, budget_bytes: int) -> None:
        self._is_reported = False
        self._lock = threading.Lock()
        work = pickle.dumps((reader, progress, budget_bytes))
        self._process = ChildProcess(prefetch, os.getpid())
        try:
            # A thread, so that the death of the process is logged when it happens.
            watch = threading.Thread(
                target=_attend,
                args=(weakref.ref(self), self._process, work),
                daemon=True,
                name="zarrcache watch",
            )
            self._end = weakref.finalize(self, _end, self._process, watch, os.getpid())
            watch.start()
        except BaseException as exc:
            self._process.kill()
            if isinstance(exc, RuntimeError):  # Python's error when there are too many threads
                raise OSError(str(exc)) from exc
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def check(self) -> bool:
        """Whether the process runs; logs a warning the first time that it does not."""
        with self._lock:
            if not self._end.alive or not self._process.has_ended():
                return True
            if not self._is_reported:
                self._is_reported = True
                logger.warning(
                    "the look-ahead process %s has ended (%s). Training continues without it and "
                    "waits for each read. If it ran out of memory, lower cache.lookahead; a new "
                    "Lookahead() starts another process.",
                    self.pid,
                    Died(self._process.wait()),
                )
        return False

    def close(self) -> None:
        """End the process."""
        self._end()


def _attend(prefetcher: weakref.ref[_Prefetcher], process: ChildProcess, work: bytes) -> None:
    """Send the process its work, then wait for its end.

    In a thread: a reader with the names of 200,000 stores is larger than the socket's buffer, and
    the process imports first.
    """
    with contextlib.suppress(OSError):  # it has died, or the connection is closed
        process.connection.send_bytes(work)
    process.wait()
    ours = prefetcher()
    if ours is not None:
        ours.check()


def _end(process: ChildProcess, watch: threading.Thread, owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked DataLoader worker drops its copy
    process.hang_up()
    process.has_ended(_END_S)
    process.kill()
    if watch.ident is not None and watch is not threading.current_thread():
        watch.join()
    process.close()


def _read_by(source: Any) -> tuple[ZarrS3Reader, tuple[str, ...]]:
    """The reader of a dataset, and the names of its samples."""
    of_sequence = getattr(getattr(source, "data", None), "reader", None)  # a RhoData
    readers = (source, getattr(source, "reader", None), of_sequence)
    reader = next((found for found in readers if hasattr(found, "cache")), None)
    if reader is None:
        raise ConfigError(
            f"{type(source).__name__} does not read through zarrcache. Give a ZarrDataset, a "
            "RhoData of get_dataset(), or a ZarrS3Reader."
        )
    return reader, tuple(reader.split().train if reader is source else source.task_ids)


def _orders(order: Any, names: tuple[str, ...]) -> Orders:
    if not hasattr(order, "schedule"):
        return Listed.of(order, names, ranks=World.here().local_ranks)
    if order.schedule.names != names:
        raise ConfigError(
            "The sampler and the dataset have different samples. Make the sampler of this dataset: "
            "NodeSampler(dataset)."
        )
    return Scheduled(order.schedule, order.world.rank, order.epoch, order.history)


def _digests(reader: ZarrS3Reader, names: Sequence[str]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The first 64 bits of the digest of each sample's entries, for `BeladyPolicy`."""
    return np.array(
        [
            [int(reader.key(name, *channel).digest[:16], 16) for channel in reader.reads]
            for name in names
        ],
        np.uint64,
    )
