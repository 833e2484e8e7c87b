"""Counters: what a run did, merged over the processes of a node."""

from __future__ import annotations

import fcntl
import os
import secrets
import struct
import tempfile
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, fields

__all__ = ["Counters", "Stats"]


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of counters. Add snapshots of several processes with ``+``.

    Attributes
    ----------
    hits, misses : int
        Array tier: densities served from disk, and densities that were not there.
    bypasses : int
        Densities read from the origin that were not admitted (limit reached, disk full, tier switched off).
    byte_hits, byte_misses : int
        The same for the byte tier, in objects and blocks.
    purges : int
        Bad entries dropped (checksum, identity, truncation).
    cache_errors : int
        Cache faults that became misses or pass-through.
    requests, retries : int
        Requests sent to the origin, and those among them that repeat a failed one.
    fetched_bytes, served_bytes : int
        Bytes from the origin, and bytes served from disk.
    """

    hits: int = 0
    misses: int = 0
    bypasses: int = 0
    byte_hits: int = 0
    byte_misses: int = 0
    purges: int = 0
    cache_errors: int = 0
    requests: int = 0
    retries: int = 0
    fetched_bytes: int = 0
    served_bytes: int = 0

    def __add__(self, other: Stats) -> Stats:
        return Stats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Stats) -> Stats:
        return Stats(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    @property
    def hit_ratio(self) -> float:
        """Hits over reads of the array tier, 0 to 1; 0.0 before the first read."""
        reads = self.hits + self.misses
        return self.hits / reads if reads else 0.0


class Counters:
    """Live counters. Safe from any thread; each process counts for itself, and ``total()`` sums over the processes that share a board.

    Parameters
    ----------
    shared : bool
        Keep a board: children made by fork or by pickling (DataLoader workers) then appear in ``total()`` of their parent, also after
        they have ended.
    """

    def __init__(self, *, shared: bool = False) -> None:
        self._board = _Board.new() if shared else None
        self._start()

    def _start(self) -> None:
        # A forked child has a lock that some thread of its parent may have held for ever, and values that its parent reports.
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._values = dict.fromkeys(_NAMES, 0)
        self._slot: int | None = None

    def add(self, **increments: int) -> None:
        """Add to counters by name, for example ``add(hits=1, served_bytes=5_000_000)``."""
        if self._pid != os.getpid():
            self._start()
        with self._lock:
            for name, n in increments.items():
                self._values[name] += n
            if self._board is not None:
                if self._slot is None:
                    self._slot = self._board.claim()
                self._board.write(self._slot, self._values.values())

    def snapshot(self) -> Stats:
        """Counters of this process at one instant."""
        if self._pid != os.getpid():
            self._start()
        with self._lock:
            return Stats(**self._values)

    def total(self) -> Stats:
        """Counters of this process and of all that share its board."""
        return self.snapshot() if self._board is None else self._board.total()

    def __getstate__(self) -> dict[str, object]:
        return {"board": None if self._board is None else self._board.address}

    def __setstate__(self, state: dict[str, object]) -> None:
        address = state["board"]
        self._board = _Board.at(address) if isinstance(address, tuple) else None
        self._start()


_NAMES = tuple(f.name for f in fields(Stats))
_SLOT = struct.Struct(f"<{len(_NAMES)}q")


class _Board:
    """Counters of several processes in one file without a name: a slot for each, appended when a process counts for the first time.

    A file without a name needs no directory and no sweep, and lives as long as a process that has it open.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        weakref.finalize(self, os.close, fd)

    @classmethod
    def new(cls) -> _Board:
        if hasattr(os, "memfd_create"):
            return cls(os.memfd_create(f"zarrcache-{secrets.token_hex(8)}", os.MFD_CLOEXEC))
        with tempfile.TemporaryFile() as file:
            return cls(os.dup(file.fileno()))

    @property
    def address(self) -> tuple[str, str] | None:
        """Where another process of this user finds the file, and what has to be there."""
        path = f"/proc/{os.getpid()}/fd/{self._fd}"
        try:
            return path, os.readlink(path)
        except OSError:  # no /proc: a spawned child counts for itself
            return None

    @classmethod
    def at(cls, address: tuple[str, str]) -> _Board:
        """The board at ``address``, or a new one if it is gone (another machine, an ended parent)."""
        path, name = address
        try:
            if os.readlink(path) == name:
                return cls(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError:
            pass
        return cls.new()

    def claim(self) -> int:
        """Offset of a slot of this process's own."""
        fcntl.lockf(self._fd, fcntl.LOCK_EX)  # not flock: parent and child have one open file, which flock does not tell apart
        try:
            offset = os.fstat(self._fd).st_size
            os.pwrite(self._fd, bytes(_SLOT.size), offset)
        finally:
            fcntl.lockf(self._fd, fcntl.LOCK_UN)
        return offset

    def write(self, offset: int, values: Iterable[int]) -> None:
        os.pwrite(self._fd, _SLOT.pack(*values), offset)

    def total(self) -> Stats:
        raw = os.pread(self._fd, os.fstat(self._fd).st_size, 0)
        return Stats(*map(sum, zip(*_SLOT.iter_unpack(raw), strict=True))) if raw else Stats()
