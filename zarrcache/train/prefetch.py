"""The process of a ``Lookahead``: fetch densities in the order of the training, ahead of it."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
import time
from collections import deque
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from zarrcache._keys import FLOAT32, ROLES, Channel
from zarrcache.disk import CACHE_FAULTS, disk_bytes, expected_bytes
from zarrcache.errors import ZarrCacheError
from zarrcache.parallel import HungUp, receive
from zarrcache.train.progress import ReadProgress

if TYPE_CHECKING:
    from zarrcache.data import ZarrS3Reader

__all__ = ["Prefetch", "prefetch"]

logger = logging.getLogger(__name__)

#: Densities that all ranks of a node fetch at once: while one waits for its listing, others are
#: fetched and decoded. On two cores, the training of `tools/bench lookahead` waits 2 times as long
#: with 4 threads and 1.5 times as long with 12.
THREADS = 8
#: Minimum number of threads per rank.
_MIN_THREADS = 2
#: Size of an entry's header, which comes before the values.
_HEADER_BYTES = 4096
#: Interval at which the position of the training is checked.
_STEP_S = 0.02
#: Largest number of densities in the window, however small they are.
_MAX_WINDOW = 4096
#: A loan that was not taken this long after the training started to read it will not be taken.
_STALE_S = 10.0
#: Pause after a density that could not be read. The training hits the error itself and raises it.
_PAUSE_S = 1.0
#: Time that fetches in progress get after the training has ended. Partial files that remain are
#: removed like those of a killed process.
_END_S = 2.0


def prefetch(connection: Connection, parent: int) -> None:
    """Fetch ahead, in the child process, until the parent hangs up or dies."""
    with contextlib.suppress(HungUp):
        reader, progress, budget_bytes = receive(connection)
        ahead = Prefetch(reader, progress, budget_bytes)
        # Forked DataLoader workers have a copy of the parent's end of the connection and may
        # outlive the parent; its pid shows at once that it has died.
        while not connection.poll(_STEP_S) and os.getppid() == parent:
            ahead.step()
        ahead.close()
    os._exit(0)  # a request without an answer would keep the interpreter waiting


@dataclass(slots=True, eq=False)
class _Item:
    """A future read of the training, and its share of the budget."""

    epoch: int
    sample: int
    channel: Channel
    role: int
    nth: int  # number of earlier reads of the sample in its epoch
    place: int
    digest: str
    size: int = 0  # bytes on disk; 0 if unknown
    held: int = 0  # bytes of the budget
    is_coming: bool = False
    is_waiting: bool = False  # for an earlier read of the same entry, which may use the loan
    was_there: bool = False  # stored or lent when this process last knew
    is_over: bool = False
    over_s: float = 0.0
    loan: str = ""  # file of its loan


class _NotNow(BaseException):
    """A density is not fetched: it does not fit at present, or the training has read it."""


class Prefetch:
    """A window of future reads, in the order of the training, that are stored or being fetched.

    ``step()`` moves the window.

    Parameters
    ----------
    reader : ZarrS3Reader
    progress : ReadProgress
        The orders, and the position of the training.
    budget_bytes : int
        Bytes on disk of the densities in the window.
    """

    def __init__(self, reader: ZarrS3Reader, progress: ReadProgress, budget_bytes: int) -> None:
        self._reader = reader
        self._channels = reader.reads
        self._progress = progress
        self._budget = budget_bytes
        self._loans = reader.cache.lend(budget_bytes)
        config = reader.cache_config
        self._encoding = config.arrays.encoding if config is not None else FLOAT32
        self._lock = threading.Lock()
        self._held = self._shown = 0
        self._window: deque[_Item] = deque()
        self._postponed: deque[_Item] = deque()  # did not fit
        self._lent: deque[_Item] = deque()  # being read, perhaps not taken yet
        self._coming: set[str] = set()
        self._typical: deque[int] = deque(maxlen=64)
        self._expansion = 1.0
        self._pause_until_s = 0.0
        self._is_over = False
        self._begin_epoch(self._progress.epoch)
        self._work: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[tuple[_Item, str]] = queue.SimpleQueue()
        threads = max(_MIN_THREADS, THREADS // self._progress.orders.ranks)
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(threads)]
        for thread in self._threads:
            thread.start()
        if not self._progress.is_shared:
            self._is_over = True
            logger.warning(
                "no look-ahead: this system has no /proc, which processes need to share memory"
            )

    def step(self) -> None:
        """Collect results, release what was read, then fetch what fits."""
        try:
            self._collect()
            self._retire()
            if not self._is_over and time.monotonic() >= self._pause_until_s:
                self._fill()
            if self._held != self._shown:
                self._shown = self._held
                self._reader.cache.counters.set(ahead_bytes=self._held)
        except CACHE_FAULTS as exc:  # the training hits the fault too, and logs it
            self._reader.cache.reopen(exc)
            self._pause_until_s = time.monotonic() + _PAUSE_S

    def close(self) -> None:
        """End the threads and drop the loans."""
        self._reader.cache.counters.set(ahead_bytes=0)
        for _ in self._threads:
            self._work.put(None)
        end_s = time.monotonic() + _END_S
        for thread in self._threads:
            thread.join(max(0.0, end_s - time.monotonic()))
        with contextlib.suppress(*CACHE_FAULTS):
            self._loans.close()

    # -- the order

    def _begin_epoch(self, epoch: int) -> None:
        self._epoch = epoch
        self._order: list[int] = self._progress.orders.of_rank(epoch).tolist()
        self._place = 0
        self._seen: dict[int, int] = {}

    def _next(self) -> _Item | None:
        """The next read, up to the end of the epoch after the current one."""
        if self._postponed:
            return self._postponed.popleft()
        if self._place >= len(self._channels) * len(self._order):
            if self._epoch > self._progress.epoch:
                return None
            self._begin_epoch(self._epoch + 1)
            if not self._order:
                return None
        step, number = divmod(self._place, len(self._channels))
        self._place += 1
        sample, channel = self._order[step], self._channels[number]
        nth = self._seen.get(sample, 0)
        if number == len(self._channels) - 1:
            self._seen[sample] = nth + 1
        digest = self._reader.key(self._progress.orders.names[sample], *channel).digest
        role = ROLES.index(channel.role)
        return _Item(self._epoch, sample, channel, role, nth, self._place, digest)

    def _is_wanted(self, item: _Item) -> bool:
        epoch = self._progress.epoch
        return (
            item.epoch in (epoch, epoch + 1)
            and not self._progress.has_started(item.epoch, item.sample, item.role, item.nth)
            and not self._reader.lacks(self._progress.orders.names[item.sample], *item.channel)
        )

    # -- moving the window

    def _collect(self) -> None:
        """Record the outcomes of the threads."""
        while not self._done.empty():
            item, outcome = self._done.get()
            item.is_coming = False
            self._coming.discard(item.digest)
            if outcome == "not now":
                with contextlib.suppress(ValueError):  # its read is over
                    self._window.remove(item)
                self._postponed.append(item)
            elif outcome == "failed":
                self._pause_until_s = time.monotonic() + _PAUSE_S
            elif outcome == "bypass" and self._loans.is_refused:
                # The disk is full. Without look-ahead the training waits, but nothing is fetched
                # twice.
                self._is_over = True
            elif outcome == "bypass" and not self._loans.is_open:
                # A cache fault, which may be temporary.
                self._pause_until_s = time.monotonic() + _PAUSE_S
            item.was_there = outcome in ("hit", "miss") or item.digest in self._loans
            if not item.was_there:
                self._hold(item, 0)
            if item.is_over:
                self._finish(item)

    def _retire(self) -> None:
        """Release what the training has started to read, or will not read any more."""
        epoch, now_s = self._progress.epoch, time.monotonic()
        if epoch not in (self._epoch, self._epoch - 1):
            self._begin_epoch(epoch)
        self._loans.look()
        window: deque[_Item] = deque()
        for place, item in enumerate(self._window):
            if not self._is_wanted(item):
                item.is_over, item.over_s = True, now_s if item.epoch == epoch else -_STALE_S
                if not item.is_coming:
                    self._finish(item)
            elif (
                item.is_waiting
                and item.digest not in self._coming
                and not self._loans.is_lent(item.digest)
            ):
                self._postponed.append(item)
            elif place < len(self._threads) and self._is_gone(item):
                self._hold(item, 0)
                item.was_there = False
                self._postponed.append(item)
            else:
                window.append(item)
        self._window = window
        self._postponed = deque(
            sorted(
                filter(self._is_wanted, self._postponed), key=lambda item: (item.epoch, item.place)
            )
        )
        while self._lent and (
            self._loans.file_of(self._lent[0].digest) != self._lent[0].loan
            or now_s - self._lent[0].over_s >= _STALE_S
        ):
            item = self._lent.popleft()
            self._loans.drop(item.digest, item.loan)

    def _is_gone(self, item: _Item) -> bool:
        """Whether an entry was dropped after it came into the window.

        The room for the first loan is made by dropping entries, and ``zarrcache evict`` may run.
        Only the next reads are looked up, because the window can be long.
        """
        return (
            item.was_there
            and not item.is_coming
            and self._reader.cache.lookup(item.digest) is None
            and not self._loans.is_lent(item.digest)
        )

    def _finish(self, item: _Item) -> None:
        self._hold(item, 0)
        if (loan := self._loans.file_of(item.digest)) is not None:
            item.loan = loan
            self._lent.append(item)

    def _hold(self, item: _Item, nbytes: int) -> bool:
        """Set an item's share of the budget; False, without a change, if that does not fit."""
        with self._lock:
            more = nbytes - item.held
            if more > 0 and self._held + more > self._budget:
                return False
            self._held += more
            item.held = nbytes
            return True

    def _fill(self) -> None:
        while len(self._window) < _MAX_WINDOW and len(self._coming) < len(self._threads):
            if self._coming and not self._typical:
                # Wait until one size is known: later densities could take the budget of this one.
                return
            if (item := self._next()) is None:
                return
            if not self._is_wanted(item):
                continue
            stored = self._reader.cache.lookup(item.digest)
            item.is_waiting = stored is None and (
                item.digest in self._coming or self._loans.is_lent(item.digest)
            )
            item.was_there = stored is not None
            is_there = item.was_there or item.is_waiting
            size = (
                stored.size_bytes
                if stored is not None
                else 0
                if is_there
                else item.size or self._estimate()
            )
            if size > self._budget:
                continue  # larger than the whole budget: the training fetches it
            if not is_there and not item.size and not self._coming:
                # It may be smaller than the estimate; one LIST tells.
                size = min(size, max(0, self._budget - self._held))
            lent = self._loans.held_bytes if self._loans.is_open and not is_there else 0
            if lent + sum(
                other.held for other in self._window if other.is_coming
            ) + size > self._budget or not self._hold(item, size):
                self._postponed.appendleft(item)
                return
            self._window.append(item)
            if not is_there:
                item.is_coming = True
                self._coming.add(item.digest)
                self._work.put(item)

    def _estimate(self) -> int:
        # Twice the mean. If that is too little, one LIST is wasted, and then the size is known.
        return (
            min(self._budget, 2 * sum(self._typical) // len(self._typical)) if self._typical else 0
        )

    # -- in the threads

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            self._done.put((item, self._fetch(item)))

    def _fetch(self, item: _Item) -> str:
        name, (role, array) = self._progress.orders.names[item.sample], item.channel
        fetched: list[int] = []

        def reserve(nbytes: int) -> None:
            """Called first with the bytes of the objects, then with those of the array."""
            is_late = self._progress.has_finished if fetched else self._progress.has_started
            if is_late(item.epoch, item.sample, item.role, item.nth):
                raise _NotNow
            decoded = nbytes if fetched else int(self._expansion * nbytes)
            item.size = disk_bytes(expected_bytes(decoded, self._encoding)) + _HEADER_BYTES
            if not self._hold(item, item.size):
                raise _NotNow
            if fetched:
                self._typical.append(item.size)
                self._expansion = max(self._expansion, nbytes / max(1, fetched[0]))
            fetched.append(nbytes)

        try:
            outcome, _ = self._reader.ensure(name, role, array, reserve=reserve)
        except _NotNow:
            return "not now"
        except ZarrCacheError as exc:
            logger.debug("%s (%s) is not fetched ahead: %s", name, role, exc)
            return "failed"
        except Exception:
            # One bad store must not end the look-ahead; the training hits the error too.
            logger.warning("%s (%s) could not be fetched ahead", name, role, exc_info=True)
            return "failed"
        return outcome
