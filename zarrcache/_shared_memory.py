"""A file without a name that the processes of one run share: no directory, no sweep, gone with the
last of them.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import secrets
import tempfile
import threading
import weakref

__all__ = ["SharedFile", "SharedSet"]

_appending = threading.Lock()


def _forget_threads() -> None:
    """In a forked child: the thread that held the lock is not here."""
    global _appending
    _appending = threading.Lock()


os.register_at_fork(after_in_child=_forget_threads)


class SharedFile:
    """Open in this process, inherited by forked children, found again by spawned ones through its
    address.

    Where there is no ``memfd`` or no ``/proc`` (macOS), a spawned child gets a file of its own.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        weakref.finalize(self, os.close, fd)

    @classmethod
    def new(cls) -> SharedFile:
        """An empty file."""
        if hasattr(os, "memfd_create"):
            return cls(os.memfd_create(f"zarrcache-{secrets.token_hex(8)}", os.MFD_CLOEXEC))
        with tempfile.TemporaryFile() as file:
            return cls(os.dup(file.fileno()))

    def __reduce__(self) -> tuple[object, ...]:
        path = f"/proc/{os.getpid()}/fd/{self._fd}"
        try:
            return _reopen, (path, os.readlink(path))
        except OSError:
            return SharedFile.new, ()

    def append(self, data: bytes) -> int:
        """Write at the end; the offset. Safe from any thread and process."""
        # Not flock: parent and child have one open file, which flock does not tell apart. lockf in
        # turn does not tell threads apart.
        with _appending:
            fcntl.lockf(self._fd, fcntl.LOCK_EX)
            try:
                offset = os.fstat(self._fd).st_size
                os.pwrite(self._fd, data, offset)
            finally:
                fcntl.lockf(self._fd, fcntl.LOCK_UN)
        return offset

    def write(self, offset: int, data: bytes) -> None:
        """Replace what was appended at ``offset``."""
        os.pwrite(self._fd, data, offset)

    def read(self, offset: int = 0) -> bytes:
        """Everything from ``offset`` on."""
        return os.pread(self._fd, max(0, os.fstat(self._fd).st_size - offset), offset)

    def map(self, nbytes: int) -> mmap.mmap:
        """Its first ``nbytes`` as memory that all who have the file share; zeros at first. For a
        file that nobody appends to.
        """
        if os.fstat(self._fd).st_size < nbytes:
            os.ftruncate(self._fd, nbytes)
        return mmap.mmap(self._fd, nbytes)


def _reopen(path: str, name: str) -> SharedFile:
    """The file at ``path`` if it still is the one named; else a new one: another machine, or a
    parent that has ended.
    """
    try:
        if os.readlink(path) == name:
            return SharedFile(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        pass
    return SharedFile.new()


class SharedSet:
    """Digests of 32 hex digits that any process of the run has added. Safe from any thread."""

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
                self._known.update(news[i : i + 16] for i in range(0, len(news), 16))
            return raw in self._known

    def add(self, digest: str) -> None:
        """Add, for every process that has the set."""
        raw = bytes.fromhex(digest)
        with self._lock_of_this_process():
            if raw not in self._known:
                self._known.add(raw)
                self._file.append(raw)

    def _lock_of_this_process(self) -> threading.Lock:
        # a forked child has a lock that some thread of its parent may have held for ever
        if self._pid != os.getpid():
            self._start()
        return self._lock
