"""Memory that the processes of one run share: an unnamed file, gone with the last process."""

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
    def new(cls) -> SharedFile:
        """Make an empty file."""
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
        """Write at the end and return the offset. Safe from any thread and process."""
        # Not flock: parent and child share one open file description, which flock treats as one
        # owner. lockf in turn treats all threads of a process as one, hence the second lock.
        with _appending:
            fcntl.lockf(self._fd, fcntl.LOCK_EX)
            try:
                offset = os.fstat(self._fd).st_size
                os.pwrite(self._fd, data, offset)
            finally:
                fcntl.lockf(self._fd, fcntl.LOCK_UN)
        return offset

    def write(self, offset: int, data: bytes) -> None:
        """Overwrite the bytes at ``offset``."""
        os.pwrite(self._fd, data, offset)

    def read(self, offset: int = 0) -> bytes:
        """Read from ``offset`` to the end."""
        return os.pread(self._fd, max(0, os.fstat(self._fd).st_size - offset), offset)

    def map(self, nbytes: int) -> mmap.mmap:
        """Map the first ``nbytes``, initially zeros, as shared memory. Not for a file that is
        appended to.
        """
        if os.fstat(self._fd).st_size < nbytes:
            os.ftruncate(self._fd, nbytes)
        return mmap.mmap(self._fd, nbytes)


def _reopen(path: str, name: str) -> SharedFile:
    """Open ``path`` if it still is that file; a new one on another machine or after the parent
    has ended.
    """
    try:
        if os.readlink(path) == name:
            return SharedFile(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        pass
    return SharedFile.new()


class SharedSet:
    """A set of digests (32 hex digits) shared by the processes of a run. Safe from any thread."""

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
        """Add a digest, for every process that shares the set."""
        raw = bytes.fromhex(digest)
        with self._lock_of_this_process():
            if raw not in self._known:
                self._known.add(raw)
                self._file.append(raw)

    def _lock_of_this_process(self) -> threading.Lock:
        # In a forked child the lock may be held by a thread that exists only in the parent.
        if self._pid != os.getpid():
            self._start()
        return self._lock
