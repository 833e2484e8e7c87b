"""State that the processes of a run share: counters, sets of digests, and the file behind them.

Also warnings that are logged once per kind.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import html
import logging
import mmap
import os
import secrets
import struct
import tempfile
import threading
import weakref
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from zarrcache._units import format_bytes

__all__ = [
    "Board",
    "Counters",
    "LogOnce",
    "SharedFile",
    "SharedSet",
    "Stats",
    "find_boards",
    "html_table",
]


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot of counters. Add snapshots of several processes with ``+``.

    Attributes
    ----------
    hits, misses : int
        Array tier: densities served from disk, and densities that had to be fetched.
    bypasses : int
        Densities read from the origin that were not admitted (limit reached, disk full, tier
        switched off).
    byte_hits, byte_misses : int
        The same for the byte tier, in objects and blocks.
    purges : int
        Bad entries dropped (checksum, identity, truncation), and bad entries received and rejected.
    cache_errors : int
        Cache errors that became misses or pass-through.
    requests, retries : int
        Requests sent to the origin, and those among them that repeat a failed one.
    fetched_bytes, served_bytes : int
        Bytes from the origin, and bytes served from disk.
    lower_hits, peer_hits : int
        Misses served by the lower layer or by another node instead of the origin.
    peer_bytes, sent_bytes : int
        Bytes of entries received from other nodes, and sent to them by ``zarrcache serve``.
    ahead_bytes : int
        Bytes on disk that look-ahead has fetched and the training has not read; not a sum over
        time.
    unencoded : int
        Densities stored as float32 because ``cache.arrays.encoding`` cannot hold their values
        within its error bound.
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
    lower_hits: int = 0
    peer_hits: int = 0
    peer_bytes: int = 0
    sent_bytes: int = 0
    ahead_bytes: int = 0
    unencoded: int = 0

    def __add__(self, other: Stats) -> Stats:
        return Stats(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __sub__(self, other: Stats) -> Stats:
        return Stats(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))

    @property
    def hit_ratio(self) -> float:
        """Hits over reads of the array tier, 0 to 1; 0.0 before the first read."""
        reads = self.hits + self.misses
        return self.hits / reads if reads else 0.0

    def _repr_html_(self) -> str:
        """As a table, in notebooks."""
        rows = {name: f"{getattr(self, name):,}" for name in _NAMES}
        for name in ("fetched_bytes", "served_bytes"):
            rows[name] = format_bytes(getattr(self, name))
        return html_table("Stats", rows | {"hit_ratio": f"{100 * self.hit_ratio:.1f} %"})


def html_table(title: str, rows: Mapping[str, object]) -> str:
    """A table of names and values in HTML, for ``_repr_html_``."""
    lines = "".join(
        f"<tr><th style='text-align:left'>{html.escape(name)}</th>"
        f"<td style='text-align:left'>{html.escape(str(value))}</td></tr>"
        for name, value in rows.items()
    )
    return f"<table><caption><b>{html.escape(title)}</b></caption>{lines}</table>"


_NAMES = tuple(f.name for f in fields(Stats))
_SLOT = struct.Struct(f"<{len(_NAMES)}q")


class Counters:
    """Live counters. Safe from any thread; ``total()`` sums over the processes that share a board.

    Parameters
    ----------
    shared : bool
        Keep a board with one slot per process: children made by fork or by pickling (DataLoader
        workers) then count in ``total()`` of their parent, also after they have ended.
    directory : Path, optional
        The ``cache.dir`` that is counted. Other processes of the same user find a shared board by
        it (`find_boards`).
    """

    def __init__(self, *, shared: bool = False, directory: Path | None = None) -> None:
        name = "" if directory is None else _board_name(directory)
        self._board = SharedFile.new(name) if shared else None
        self._start()

    def _start(self) -> None:
        # A forked child starts at 0: its parent reports the inherited values, and the inherited
        # lock may be held by a thread that exists only in the parent.
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
                    self._slot = self._board.append(bytes(_SLOT.size))
                self._board.write(self._slot, _SLOT.pack(*self._values.values()))

    def set(self, **values: int) -> None:
        """Set counters that are not sums, for example ``set(ahead_bytes=0)``. From one thread."""
        self.add(**{name: value - getattr(self.snapshot(), name) for name, value in values.items()})

    def snapshot(self) -> Stats:
        """Counters of this process at one instant."""
        if self._pid != os.getpid():
            self._start()
        with self._lock:
            return Stats(**self._values)

    def total(self) -> Stats:
        """Counters summed over this process and all that share its board."""
        return self.snapshot() if self._board is None else _total(self._board.read())

    def __getstate__(self) -> dict[str, SharedFile | None]:
        return {"board": self._board}

    def __setstate__(self, state: dict[str, SharedFile | None]) -> None:
        self._board = state["board"]
        self._start()


@dataclass(frozen=True)
class Board:
    """The counters of one run on this machine, as another process sees them.

    Attributes
    ----------
    inode : int
        Identifies the board.
    pids : tuple of int
        Its processes: the one that reads, its DataLoader workers, its look-ahead.
    stats : Stats
        Summed over all processes that the run has had.
    """

    inode: int
    pids: tuple[int, ...]
    stats: Stats


def find_boards(directory: Path) -> list[Board]:
    """Counters of every run on this machine that uses a cache directory, oldest process first.

    Processes of other users are left out unless this one is root. The counters of a run end with
    its last process. Nothing is written, and no process is interrupted.

    Parameters
    ----------
    directory : Path
        ``cache.dir``.

    Raises
    ------
    FileNotFoundError
        This system has no ``/proc``.
    """
    start = f"/memfd:zarrcache-{_board_name(directory)}"
    found: dict[int, tuple[set[int], Stats]] = {}
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdecimal()):
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            for name in os.listdir(f"/proc/{pid}/fd"):
                path = f"/proc/{pid}/fd/{name}"
                with contextlib.suppress(OSError):
                    if not os.readlink(path).startswith(start):
                        continue
                    inode = os.stat(path).st_ino
                    if inode not in found:
                        content = Path(path).read_bytes()
                        found[inode] = set(), _total(content)
                    found[inode][0].add(pid)
    return [Board(inode, tuple(sorted(pids)), stats) for inode, (pids, stats) in found.items()]


def _board_name(directory: Path) -> str:
    """Beginning of a board's name: of the directory, and of the counters that it has."""
    where = os.path.realpath(directory)
    digest = hashlib.blake2b("\n".join((where, *_NAMES)).encode(), digest_size=8)
    return f"counters-{digest.hexdigest()}-"


def _total(board: bytes) -> Stats:
    # A slot may be half written at its end.
    slots = list(_SLOT.iter_unpack(board[: len(board) // _SLOT.size * _SLOT.size]))
    return Stats(*map(sum, zip(*slots, strict=True))) if slots else Stats()


class LogOnce:
    """Logs one warning per kind of fault: a full disk must not cause a log line per sample.

    One object per owner (an index, a reader, the peers of a config). Safe from any thread; two
    threads that hit the same fault at the same moment may both log it. A copy in another process
    starts with nothing logged: each process writes its own log.
    """

    def __init__(self) -> None:
        self._logged: set[Hashable] = set()

    def __bool__(self) -> bool:
        """Whether anything was logged."""
        return bool(self._logged)

    def __reduce__(self) -> tuple[type[LogOnce], tuple[()]]:
        return type(self), ()

    def warning(self, kind: Hashable, logger: logging.Logger, message: str, *args: object) -> None:
        """Log a warning, unless one of this ``kind`` was logged before."""
        if kind not in self._logged:
            self._logged.add(kind)
            logger.warning(message, *args, stacklevel=2)


# -- the shared file -----------------------------------------------------------------------------

_appending = threading.Lock()


def _forget_threads() -> None:
    """Replace the lock in a forked child, where the thread that held it does not exist."""
    global _appending
    _appending = threading.Lock()


os.register_at_fork(after_in_child=_forget_threads)


class SharedFile:
    """An unnamed file: inherited by forked children, reopened by spawned ones through ``/proc``.

    Without ``memfd`` or ``/proc`` (macOS) a spawned child gets its own, empty file.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        weakref.finalize(self, os.close, fd)

    @classmethod
    def new(cls, name: str = "") -> SharedFile:
        """Create an empty file, which ``/proc`` shows by its name."""
        if hasattr(os, "memfd_create"):
            token = secrets.token_hex(8)
            return cls(os.memfd_create(f"zarrcache-{name}{token}", os.MFD_CLOEXEC))
        with tempfile.TemporaryFile() as file:
            return cls(os.dup(file.fileno()))

    def __reduce__(self) -> tuple[object, ...]:
        path = f"/proc/{os.getpid()}/fd/{self._fd}"
        try:
            return _reopen, (path, os.readlink(path))
        except OSError:
            return SharedFile.new, ()

    @property
    def nbytes(self) -> int:
        """Length of the file."""
        return os.fstat(self._fd).st_size

    def append(self, data: bytes) -> int:
        """Write at the end and return the offset. Safe from any thread and process."""
        # Not flock: parent and child share one open file description, which flock treats as one
        # owner. lockf in turn treats all threads of a process as one, hence the second lock.
        with _appending:
            fcntl.lockf(self._fd, fcntl.LOCK_EX)
            try:
                offset = self.nbytes
                os.pwrite(self._fd, data, offset)
            finally:
                fcntl.lockf(self._fd, fcntl.LOCK_UN)
        return offset

    def write(self, offset: int, data: bytes) -> None:
        """Overwrite the bytes at ``offset``."""
        os.pwrite(self._fd, data, offset)

    def read(self, offset: int = 0) -> bytes:
        """Read from ``offset`` to the end."""
        return os.pread(self._fd, max(0, self.nbytes - offset), offset)

    def map(self, nbytes: int) -> mmap.mmap:
        """Map the first ``nbytes``, initially zeros, as shared memory. Do not append later."""
        if self.nbytes < nbytes:
            os.ftruncate(self._fd, nbytes)
        return mmap.mmap(self._fd, nbytes)


def _reopen(path: str, name: str) -> SharedFile:
    """Open ``path`` if it still is the file ``name``; otherwise create a new file.

    It is another file on another machine, or after the parent has ended.
    """
    try:
        if os.readlink(path) == name:
            return SharedFile(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        pass
    return SharedFile.new()


#: Digests in one :class:`SharedSet`: 16 MiB in all, and about 100 MB in each process.
_MOST_DIGESTS = 2**20
_DIGEST_BYTES = 16


class SharedSet:
    """A set of digests (32 hex digits) shared by the processes of a run. Safe from any thread.

    It holds at most 2**20, enough for two densities of each of 500,000 materials; further digests
    are not added. Use it only for work that may be repeated: to verify a checksum, to compare a
    listing.
    """

    def __init__(self) -> None:
        self._file = SharedFile.new()
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._known: set[bytes] = set()
        self._read_bytes = 0

    def __getstate__(self) -> SharedFile:
        return self._file

    def __setstate__(self, file: SharedFile) -> None:
        self._file = file
        self._start()

    def __contains__(self, digest: str) -> bool:
        raw = bytes.fromhex(digest)
        with self._lock_of_this_process():
            if raw not in self._known:
                news = self._file.read(self._read_bytes)
                self._read_bytes += len(news)
                self._known.update(
                    news[i : i + _DIGEST_BYTES] for i in range(0, len(news), _DIGEST_BYTES)
                )
            return raw in self._known

    def add(self, digest: str) -> None:
        """Add a digest, for every process that shares the set, unless the set is full."""
        raw = bytes.fromhex(digest)
        with self._lock_of_this_process():
            if raw not in self._known and self._file.nbytes < _MOST_DIGESTS * _DIGEST_BYTES:
                self._known.add(raw)
                self._file.append(raw)

    def _lock_of_this_process(self) -> threading.Lock:
        # In a forked child the lock may be held by a thread that exists only in the parent.
        if self._pid != os.getpid():
            self._start()
        return self._lock
