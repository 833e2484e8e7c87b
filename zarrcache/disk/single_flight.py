"""Single flight: one thread or process of a node fetches an object; the others wait for it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from zarrcache.errors import LockTimeoutError
from zarrcache.stats import LogOnce

__all__ = ["SingleFlight"]

logger = logging.getLogger(__name__)

#: Number of lock files. Digests share them: one file per digest would leave 200,000 empty files,
#: and a lock file cannot be removed safely while processes wait on its inode. With 32 holders, two
#: of them share a file about one eighth of the time. They then wait for each other, which costs
#: time but cannot deadlock, because no process holds two locks.
STRIPES = 4096
#: Seconds between two attempts of a waiter; flock has no timeout.
_POLL_S = 0.02


class SingleFlight:
    """Allows one fetcher per digest among the threads and processes of a node.

    The kernel releases a lock when its holder dies, so after a killed fetcher the next waiter
    proceeds immediately.

    Parameters
    ----------
    directory : Path
        It has to exist.
    timeout_s : float
        Seconds to wait for another fetcher before continuing without the lock.
    mode : int
        Permissions of the lock files.
    name : str
        What the locks are for. Locks of different names are independent.
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

    @contextmanager
    def hold(self, digest: str) -> Iterator[bool]:
        """Hold the lock of ``digest`` (hex).

        Yields False if it could not be taken; the caller continues nevertheless. That costs
        duplicated bandwidth, never data, because entries are published atomically. So it is logged
        once and does not stop a training run.
        """
        path = self._directory / f"{self._name}-{int(digest[:8], 16) % STRIPES:03x}.lock"
        lock = FileLock(path, mode=self._mode, poll_interval=_POLL_S)
        try:
            # FileLock would create the directory with other permissions.
            os.stat(self._directory)
            lock.acquire(timeout=self._timeout_s)
        except Timeout:
            self._warn(
                LockTimeoutError(
                    f"{path} was not free within {self._timeout_s:.0f} s; continuing without it. "
                    "Look for a stopped process of the same job."
                )
            )
            yield False
            return
        except (OSError, NotImplementedError) as exc:
            # NotImplementedError: older filelock, on a file system without flock
            self._warn(exc)
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def _warn(self, exc: Exception) -> None:
        if not self._log_once:
            self._log_once.warning(
                "single flight",
                logger,
                "single flight is off, objects may be fetched more than once: %s",
                exc,
            )
