"""Prevent forks while a thread of this process is inside SQLite: :class:`no_fork`."""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import time
from types import TracebackType
from typing import Any, Protocol
from weakref import WeakSet

__all__ = ["closed_before_fork", "no_fork"]

logger = logging.getLogger(__name__)


class _Closeable(Protocol):
    def close(self) -> object: ...


class _UserOfSQLite(Protocol):
    def close_before_fork(self) -> None: ...


#: Their connection in the forking thread is closed, because only the parent holds its file locks.
closed_before_fork: WeakSet[_UserOfSQLite] = WeakSet()

#: SQLite itself waits up to 60 s for another process; a thread that is inside for longer hangs.
_FORK_WAIT_S = 90.0


class no_fork:
    """Block forks while a thread is in this block. Used around every call of SQLite; reentrant.

    SQLite has process-wide mutexes. A child that is forked while another thread holds one waits for
    it forever in its first ``connect`` (measured: 1 child in 12 with three reading threads), and so
    does every process that waits for a lock of that child. So each thread holds a lock of its own
    while it is inside, and a fork takes them all. One lock for all threads would be less code, but
    a look-up would wait for the transactions of other threads
    (docs/explanation/decisions/001-fork-and-sqlite.md).

    Threads other than the main one close their connection of ``table``, because Python would close
    it when the thread ends, outside of any such block. That costs them 0.2 ms per look-up; the main
    thread, where DataLoader workers read, keeps its connection and takes 8 us.
    """

    __slots__ = ("_table",)

    def __init__(self, table: _Closeable | None = None) -> None:
        self._table = table

    def __enter__(self) -> None:
        thread = _thread
        if not thread.depth:
            with _fork_lock:  # not taken when nested: a fork may be waiting for this thread
                thread.lock.acquire()
        thread.depth += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        thread = _thread
        thread.depth -= 1
        if not thread.depth:
            try:
                if self._table is not None and not thread.is_main:
                    self._table.close()
            finally:
                thread.lock.release()


class _Thread(threading.local):
    """The lock of a thread.

    Reentrant: after a Ctrl-C between taking and counting it, the main thread must not wait for
    itself.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.lock = threading.RLock()
        self.is_main = threading.current_thread() is threading.main_thread()
        with _fork_lock:
            _locks.add(self.lock)


#: Held during a fork, so that no thread enters and no other thread forks meanwhile. Reentrant like
#: the others: a signal handler may read or fork while the main thread holds it.
_fork_lock = threading.RLock()
#: Locks of running threads; a lock is dropped with its thread, even if it is still held.
_locks: WeakSet[Any] = WeakSet()
_thread = _Thread()
_taken: list[Any] = []


def _before_fork() -> None:
    mine = _thread.lock  # created first, because that takes _fork_lock
    _fork_lock.acquire()
    deadline_s = time.monotonic() + _FORK_WAIT_S
    for lock in list(_locks):
        if lock is mine:
            continue
        if lock.acquire(timeout=max(0.0, deadline_s - time.monotonic())):
            _taken.append(lock)
        else:
            logger.warning(
                "a child is forked while a thread has been inside the index for %.0f s; the child "
                "may hang",
                _FORK_WAIT_S,
            )
    for user in list(closed_before_fork):
        with contextlib.suppress(sqlite3.Error):
            user.close_before_fork()


def _after_fork_in_parent() -> None:
    while _taken:
        _taken.pop().release()
    with contextlib.suppress(RuntimeError):  # Ctrl-C came while this thread waited for it
        _fork_lock.release()


def _after_fork_in_child() -> None:
    global _fork_lock, _locks, _thread
    _fork_lock, _locks = threading.RLock(), WeakSet()  # the other threads do not exist here
    _thread = _Thread()
    _taken.clear()


os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork_in_parent,
    after_in_child=_after_fork_in_child,
)
