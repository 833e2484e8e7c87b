"""Locks of a cache directory: one fetcher per entry, and which writers are still alive.

Lock files are opened here, not by a library: the descriptor is checked after it is open, so a link
or FIFO that a member of the group plants in ``locks/`` is refused at any moment, and nothing is
truncated.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import stat
import struct
import sys
import time
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from weakref import WeakSet

from zarrcache.disk._publish import is_dead, is_same_namespace, is_stopped, owner_of
from zarrcache.disk.directory import OPEN_DIRECTORY, CacheDir, file_identity
from zarrcache.disk.filesystems import file_system_of, is_network
from zarrcache.errors import LockTimeoutError
from zarrcache.stats import LogOnce

__all__ = ["LockFile", "Owners", "SingleFlight"]

logger = logging.getLogger(__name__)

#: Number of lock files. Digests share them: one file per digest would leave 200,000 empty files,
#: and a lock file cannot be removed safely while processes wait on its inode. With 32 holders, two
#: of them share a file about one eighth of the time. They then wait for each other, which costs
#: time but cannot deadlock, because no process holds two locks.
STRIPES = 4096
#: Seconds between two attempts of a waiter; flock has no timeout.
_POLL_S = 0.02
#: Seconds between two looks at the holder.
_LOOK_S = 1.0

_IS_LINUX = sys.platform == "linux"
#: ``struct flock`` of Linux: type, whence, start, length, pid.
_FLOCK = struct.Struct("hhqqi4x")


def _lock(kind: int, start: int) -> bytes:
    """A lock on one byte."""
    return _FLOCK.pack(kind, os.SEEK_SET, start, 1, 0)


class LockFile:
    """An open lock file. A forked child closes its copy, so that a lock ends with its holder.

    Parameters
    ----------
    directory : Path
        It has to exist and is not followed if it is a link.
    name : str
    mode : int
        Permissions, regardless of the umask.

    Raises
    ------
    OSError
        It cannot be opened, or it is not a regular file with one name.
    """

    def __init__(self, directory: Path, name: str, mode: int) -> None:
        # O_NONBLOCK: opening a planted FIFO must not wait. Never O_TRUNC.
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        above = os.open(directory, OPEN_DIRECTORY)
        try:
            fd = os.open(name, flags, mode, dir_fd=above)
        except OSError as exc:
            exc.filename = os.fspath(directory / name)
            raise
        finally:
            os.close(above)
        self._file = FileIO(fd, "r+b")
        found = os.fstat(fd)
        # Another name of this file may be a file of the user's own (a hard link).
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            self._file.close()
            raise OSError(
                errno.ELOOP, "not a lock file of zarrcache; remove it", f"{directory / name}"
            )
        if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) != mode:
            with contextlib.suppress(OSError):
                os.fchmod(fd, mode)  # open applies the umask
        self.identity = found.st_dev, found.st_ino
        _open_files.add(self)

    def fileno(self) -> int:
        """The descriptor."""
        return self._file.fileno()

    def acquire(self) -> bool:
        """Take the file's lock; False if it is held. Raises OSError without locks."""
        try:
            fcntl.flock(self.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        # A POSIX lock as well, because the kernel reports the pid of its holder and not that of the
        # lock above. It protects nothing: it is lost when any thread closes the same file.
        with contextlib.suppress(OSError):
            fcntl.lockf(self.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
        return True

    def stopped_holder(self) -> int:
        """The pid of the holder if it is stopped, by a signal or a debugger; otherwise 0."""
        if not _IS_LINUX:
            return 0
        try:
            answer = fcntl.fcntl(self.fileno(), fcntl.F_GETLK, _lock(fcntl.F_WRLCK, 0))
            kind, *_, pid = _FLOCK.unpack(answer)
            return pid if kind != fcntl.F_UNLCK and pid > 0 and is_stopped(pid) else 0
        except OSError:
            return 0

    def close(self) -> None:
        """Close the file, which releases its locks."""
        self._file.close()

    def __del__(self) -> None:
        file: FileIO | None = getattr(self, "_file", None)
        if file is not None:
            with contextlib.suppress(OSError):  # the file system is gone, and the lock with it
                file.close()


_open_files: WeakSet[LockFile] = WeakSet()


def _close_in_child() -> None:
    for file in list(_open_files):
        with contextlib.suppress(OSError):
            file.close()
    _open_files.clear()


os.register_at_fork(after_in_child=_close_in_child)


# -- owners
# --------------------------------------------------------------------------------------------------


class Owners:
    """Whether the process that announced a file in the index still runs.

    Within a pid namespace that is a question of pid and start time. Of other containers only the
    kernel knows: each process that announces files holds a lock on a byte of ``locks/owners.lock``
    while it lives, at an offset that is a digest of its identity. So neither a wrong clock nor a
    long transfer makes a living process count as dead, and the room of a killed container is free
    at once. These are open-file-description locks: another descriptor of the same file that this
    process closes does not release them, as it would POSIX locks.

    On a network file system such a lock may be known to one node only. There an unlocked byte
    counts as dead after a day, by the clocks of both nodes.

    Parameters
    ----------
    directory : CacheDir
    """

    def __init__(self, directory: CacheDir) -> None:
        self._dir = directory
        self._path = directory.locks / "owners.lock"
        self._held: tuple[int, LockFile] | None = None

    def announce(self) -> str:
        """Hold this process's lock from now on. Returns the owner to name in a row.

        Raises
        ------
        OSError
            The file system has no locks. Nothing must be announced then.
        """
        pid = os.getpid()
        owner = owner_of(pid)
        held = self._held
        if held is not None and held[0] == pid and held[1].identity == file_identity(self._path):
            return owner
        if _IS_LINUX:
            file = LockFile(self._dir.locks, self._path.name, self._dir.written_mode)
            # Shared: several indexes of this process hold it, each with a file of its own.
            fcntl.fcntl(file.fileno(), fcntl.F_OFD_SETLK, _lock(fcntl.F_RDLCK, _byte_of(owner)))
            self._held = pid, file
        return owner

    def is_dead(self, owner: str, age_s: float) -> bool:
        """Whether ``owner``, which announced a file ``age_s`` seconds ago, has ended."""
        if is_same_namespace(owner) or not _IS_LINUX:
            return is_dead(owner, age_s)
        try:
            file = LockFile(self._dir.locks, self._path.name, self._dir.written_mode)
        except OSError:
            return is_dead(owner, age_s)
        try:
            answer = fcntl.fcntl(
                file.fileno(), fcntl.F_OFD_GETLK, _lock(fcntl.F_WRLCK, _byte_of(owner))
            )
        except OSError:
            return is_dead(owner, age_s)
        finally:
            file.close()
        if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
            return False
        return not is_network(file_system_of(self._dir.locks)) or is_dead(owner, age_s)


def _byte_of(owner: str) -> int:
    """Offset of the byte that ``owner`` locks, 0 to 2**62."""
    return int.from_bytes(hashlib.blake2b(owner.encode(), digest_size=8).digest(), "big") >> 2


class SingleFlight:
    """Allows one fetcher per digest among the threads and processes of a node.

    The kernel releases a lock when its holder dies, so after a killed fetcher the next waiter
    proceeds immediately. A holder that is stopped (SIGSTOP, a suspended job) costs a waiter two
    seconds; its pid can be seen within one pid namespace.

    Parameters
    ----------
    directory : Path
        It has to exist.
    timeout_s : float
        Seconds to wait for another fetcher before continuing without the lock.
    mode : int
        Permissions of the lock files.
    name : str
        Purpose of the locks. Locks with different names are independent.
    log_once : LogOnce, optional
        That of the cache to which the locks belong. If it has logged any fault, a failing lock is
        taken for a consequence and is not logged.
    """

    def __init__(
        self,
        directory: Path,
        *,
        timeout_s: float,
        mode: int = 0o600,
        name: str = "flight",
        log_once: LogOnce | None = None,
    ) -> None:
        self._directory = directory
        self._name = name
        self._timeout_s = timeout_s
        self._mode = mode
        self._log_once = LogOnce() if log_once is None else log_once

    @contextlib.contextmanager
    def hold(self, digest: str) -> Iterator[bool]:
        """Hold the lock of ``digest`` (hex).

        Yields False if it could not be taken; the caller continues nevertheless. That costs
        duplicated bandwidth, never data, because entries are published atomically. So it is logged
        once and does not stop a training run.
        """
        name = f"{self._name}-{int(digest[:8], 16) % STRIPES:03x}.lock"
        lock = None
        try:
            lock = LockFile(self._directory, name, self._mode)
        except OSError as exc:
            self._warn(exc)
        # Not in the handler above: an error of the caller would be shown as caused by that of the
        # lock.
        if lock is None:
            yield False
            return
        try:
            yield self._wait(lock, name)
        finally:
            lock.close()

    def _wait(self, lock: LockFile, name: str) -> bool:
        """Take the lock, or give up: after the timeout, or if its holder is stopped."""
        start_s = looked_s = time.monotonic()
        stopped = 0
        try:
            while not lock.acquire():
                now_s, why = time.monotonic(), ""
                if now_s - start_s >= self._timeout_s:
                    why = f"was not free within {self._timeout_s:.0f} s"
                elif now_s - looked_s >= _LOOK_S:
                    looked_s, holder = now_s, lock.stopped_holder()
                    # Seen twice, because SIGCONT often follows at once.
                    if holder and holder == stopped:
                        why = f"is held by process {holder}, which is stopped"
                    stopped = holder
                if why:
                    self._warn(
                        LockTimeoutError(
                            f"{self._directory / name} {why}; continuing without it. Look for a "
                            "stopped process of the same job."
                        )
                    )
                    return False
                time.sleep(_POLL_S)
        except OSError as exc:  # the file system has no locks
            self._warn(exc)
            return False
        return True

    def _warn(self, exc: Exception) -> None:
        if not self._log_once:
            self._log_once.warning(
                "single flight",
                logger,
                "single flight is off, objects may be fetched more than once: %s",
                exc,
            )
