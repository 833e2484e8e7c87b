"""Single flight: one thread or process of a node fetches an object; the others wait for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from zarrcache.disk._locks import LockFile
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
#: Seconds between two looks at the holder.
_LOOK_S = 1.0


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
        name = f"{self._name}-{int(digest[:8], 16) % STRIPES:03x}.lock"
        try:
            lock = LockFile(self._directory, name, self._mode)
        except OSError as exc:
            self._warn(exc)
            yield False
            return
        try:
            yield self._wait(lock, name)
        finally:
            lock.close()

    def _wait(self, lock: LockFile, name: str) -> bool:
        """Take the lock, or give up: after the timeout, or when its holder turns out stopped."""
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
