"""A server that says "slow down" says it to the whole node: until when nobody here asks it for
anything.

S3 counts the requests of all processes together.  If only the one that was told pauses, the others
keep the server busy, and it is told again and again until its attempts are used up.  So the pause
is written where every process of the node looks, in the cache's directory, and without such a
directory it holds for all threads and tasks of the process.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Backoff"]

logger = logging.getLogger(__name__)

#: Seconds of a pause, doubled each time that it was of no use.
FIRST_S = 1.0
LONGEST_S = 20.0
#: A pause was of use when the server has given this many answers since; the next one is short
#: again.
_RECOVERED = 10
#: What happened this long ago says nothing about now.
_FORGET_S = 60.0
#: A process that is busy asking looks this often (seconds) whether another one was told; one stat,
#: 2 us.
_LOOK_S = 0.1


@dataclass(slots=True)
class _Told:
    """What a server told this process. Replaced and never altered but for the count, so that
    threads need no lock, which a fork could lose.
    """

    until_s: float = 0.0  # time.monotonic()
    length_s: float = 0.0
    served: int = 0


#: By endpoint. A server tells a process, not one of the readers in it.
_told: dict[str, _Told] = {}


class Backoff:
    """Pauses of all requests to one endpoint. Cheap to make, picklable, safe from any thread and
    process and on both sides of a fork.

    Parameters
    ----------
    endpoint : str
        ``Origin.identity``.
    directory : Path, optional
        Of the node's processes; has to exist. A pause is one empty file in it, modified at the
        pause's end and accessed at its beginning: it can be set and seen in one step, and there is
        nothing in it to be torn or planted. A time further off than ``LONGEST_S`` is not believed.
    """

    def __init__(self, endpoint: str, directory: Path | None = None) -> None:
        self._endpoint = endpoint
        self._path = (
            None
            if directory is None
            else directory / f"slowdown-{hashlib.sha256(endpoint.encode()).hexdigest()[:16]}"
        )
        self._look_s = 0.0

    def remaining_s(self) -> float:
        """Seconds until the next request may be sent; 0.0 if there is no pause."""
        now_s = time.monotonic()
        told = _told.get(self._endpoint)
        if told is not None and now_s < told.until_s:
            return told.until_s - now_s
        if self._path is None or now_s < self._look_s:
            return 0.0
        self._look_s = now_s + _LOOK_S
        found = self._stored()
        if found is None:
            return 0.0
        remaining_s, length_s = found
        _told[self._endpoint] = _Told(now_s + remaining_s, length_s)
        return remaining_s

    def told(self) -> None:
        """The server has just said that it has too many requests: begin a pause. What was in flight
        when one began prolongs nothing.
        """
        if self.remaining_s():
            return
        now_s = time.monotonic()
        last = _told.get(self._endpoint)
        is_new = last is None or last.served >= _RECOVERED or now_s - last.until_s > _FORGET_S
        length_s = FIRST_S if is_new or last is None else min(2 * last.length_s, LONGEST_S)
        _told[self._endpoint] = _Told(now_s + length_s, length_s)
        logger.warning("origin.slow_down wait_s=%.1f endpoint=%s", length_s, self._endpoint)
        if self._path is not None:
            try:
                self._store(length_s)
            except OSError as exc:  # a full or vanished directory: this process pauses all the same
                logger.info("the other processes of this node cannot be told to slow down: %s", exc)

    def served(self) -> None:
        """The server has delivered."""
        told = _told.get(self._endpoint)
        if told is not None:
            told.served += 1

    def _stored(self) -> tuple[float, float] | None:
        """What is left of a pause that any process of the node began, and its whole length; None if
        there is none.
        """
        assert self._path is not None
        try:
            found = os.lstat(self._path)
        except OSError:
            return None
        remaining_s = found.st_mtime - time.time()
        if not 0.0 < remaining_s <= LONGEST_S:
            return None
        return remaining_s, min(max(found.st_mtime - found.st_atime, FIRST_S), LONGEST_S)

    def _store(self, length_s: float) -> None:
        assert self._path is not None
        now_s = time.time()
        times = (now_s, now_s + length_s)
        try:
            os.utime(self._path, times, follow_symlinks=False)
            return
        except FileNotFoundError:
            pass
        except PermissionError:  # another user of a shared directory began the last pause
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        with contextlib.suppress(FileExistsError):  # a neighbour was told too, this very moment
            fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.utime(fd, times)
            finally:
                os.close(fd)
