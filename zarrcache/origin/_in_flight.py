"""Limit the requests of each fetch: a fixed number per node, divided by the fetches that run.

A process alone on its node reads a density in two round trips instead of six, and 64 processes do
not open 4,000 connections. Every fetch holds a lock while it runs, and counts those of the others:
the kernel releases the locks of a process that is killed, so none is counted for longer than it
lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import resource
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

__all__ = ["FETCH_REQUESTS", "InFlight"]

#: Requests in flight on a node, of all fetches together. With eight fetches each has 64.
NODE_REQUESTS = 512
#: Requests in flight of one fetch, at most; with more the CPU is the limit
#: (docs/explanation/decisions/011).
FETCH_REQUESTS = 192
#: A fetch uses at most this share of the descriptors that the process may have open, often 1,024:
#: each directory of stores has its own connections, which stay open for later fetches.
_FILES_RATIO = 1 / 5
#: Requests in flight of one fetch if the other fetches of the node cannot be counted.
DEFAULT_REQUESTS = 64
#: Seconds between two counts of a running fetch.
COUNT_S = 0.1

#: ``struct flock`` of Linux: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi4x")
_BYTES = 2**62
# Not the shared generator: a fetch must not change the numbers of a seeded training run.
_random = random.SystemRandom()

_open_files: set[int] = set()


def _close_in_child() -> None:
    # The lock would last until the child closes its copy of the descriptor.
    for fd in _open_files:
        with contextlib.suppress(OSError):
            os.close(fd)
    _open_files.clear()


os.register_at_fork(after_in_child=_close_in_child)


class InFlight:
    """Limits the requests of fetches. Picklable; safe from any thread or process.

    Parameters
    ----------
    concurrency : int or "auto"
        ``cache.fetch.concurrency``.
    directory : Path, optional
        An existing directory that the node's processes share. Without it, where it is gone, and on
        systems other than Linux the fetches of other processes are unknown.
    """

    def __init__(self, concurrency: int | Literal["auto"], directory: Path | None = None) -> None:
        self._concurrency, self._directory = concurrency, directory

    @contextlib.contextmanager
    def of_a_fetch(self) -> Iterator[Callable[[], int]]:
        """Count a fetch while it runs. Yields a function that returns its limit now.

        The limit falls when other fetches begin. All of them together exceed ``NODE_REQUESTS`` for
        no longer than a request takes.
        """
        if self._concurrency != "auto":
            most = self._concurrency
            yield lambda: most
            return
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        files = (
            FETCH_REQUESTS if soft == resource.RLIM_INFINITY else max(1, int(soft * _FILES_RATIO))
        )
        fd = None
        if self._directory is not None and sys.platform == "linux":
            with contextlib.suppress(OSError):
                fd = _locked(self._directory)
        if fd is None:
            yield lambda: min(DEFAULT_REQUESTS, files)
            return
        counted_s, limit = -COUNT_S, DEFAULT_REQUESTS

        def now() -> int:
            nonlocal counted_s, limit
            if time.monotonic() - counted_s >= COUNT_S:
                counted_s = time.monotonic()
                limit = min(FETCH_REQUESTS, files, max(1, NODE_REQUESTS // (1 + _count_others(fd))))
            return limit

        try:
            yield now
        finally:
            # Not in a child that was forked meanwhile: there it is closed, and its number may be
            # that of another file.
            if fd in _open_files:
                _open_files.remove(fd)
                with contextlib.suppress(OSError):
                    os.close(fd)


def _locked(directory: Path) -> int:
    """Open ``directory`` and lock one byte of it, which no other fetch locks.

    The directory itself: a file in it would have an owner, and could be a planted link. The lock
    belongs to the descriptor, not to the process as a POSIX lock does, which ends when any thread
    closes the directory. Directories of network file systems are locked within their node.
    """
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    _open_files.add(fd)
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _lock(fcntl.F_RDLCK, _random.randrange(_BYTES), 1))
    except BaseException:
        _open_files.discard(fd)
        os.close(fd)
        raise
    return fd


def _count_others(fd: int) -> int:
    """Count the bytes that others have locked, up to ``NODE_REQUESTS``."""
    # The kernel names one lock of a range, not necessarily its first one.
    ranges, n = [(0, _BYTES)], 0
    with contextlib.suppress(OSError):
        while ranges and n < NODE_REQUESTS:
            start, stop = ranges.pop()
            if start == stop:
                continue
            answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _lock(fcntl.F_WRLCK, start, stop - start))
            kind, _, first, length, _ = _FLOCK.unpack(answer)
            if kind == fcntl.F_UNLCK or not length:
                continue
            n += 1
            ranges += [(start, max(start, first)), (min(first + length, stop), stop)]
    return n


def _lock(kind: int, start: int, length: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, start, length, 0)
