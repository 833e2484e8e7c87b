"""What the two tiers share: store a file within the limit, check it once, drop it, survive faults.

A fault of the cache (full disk, broken index, deleted directory) ends here. It is counted, logged
once per kind, and becomes a miss when reading and a pass-through when writing: it never stops a
training run.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from io import FileIO

from zarrcache.config import CacheConfig
from zarrcache.disk import (
    CACHE_FAULTS,
    Admission,
    Index,
    Intent,
    SingleFlight,
    disk_bytes,
    publish,
)
from zarrcache.errors import CorruptEntryError
from zarrcache.stats import Counters, SharedSet

__all__ = ["Tier"]

logger = logging.getLogger(__name__)


class Tier:
    """Entries of one cache directory. Safe from any thread or process.

    Parameters
    ----------
    config : CacheConfig
    counters : Counters
    index : Index, optional
        Shared by all tiers of a directory: one limit for all of them. Default: one of its own.
    verified : SharedSet, optional
        Files whose checksum a process of this run has found right. With ``verify: first`` they are
        not read through again.

    Attributes
    ----------
    index : Index
    flight : SingleFlight
        The locks of the cache directory.
    """

    def __init__(
        self,
        config: CacheConfig,
        counters: Counters,
        *,
        index: Index | None = None,
        verified: SharedSet | None = None,
    ) -> None:
        self._config = config
        self._counters = counters
        self._verified = verified or SharedSet()
        #: Whether a read may skip the checksum of a file, which 32 hex digits name.
        self._is_verified = {
            "first": self._verified.__contains__,
            "always": _never,
            "never": _always,
        }[config.verify]
        self.index = index or Index(config)
        self._root = os.fspath(self.index.dir.root)
        self.flight = SingleFlight(
            self.index.dir.locks,
            timeout_s=2 * config.retry.timeout,
            mode=self.index.dir.written_mode,
            log_once=self.index.log_once,
        )

    def _store(
        self,
        digest: str,
        filename: str,
        file_bytes: int,
        write: Callable[[FileIO], object],
        *,
        kind: str,
        note: str,
        url: str,
    ) -> Admission | None:
        """Reserve room, publish a file, make it visible as ``digest``.

        Parameters
        ----------
        digest, filename : str
            Key of the entry, and its path below the cache's root.
        file_bytes : int
            Length of the file.
        write : callable
            Writes the open file.
        kind, note : str
            Kept in the index.
        url : str
            What is stored, for the log.

        Returns
        -------
        Admission or None
            ``ADMIT``: it is stored. Another: why it is not. None: the cache failed.
        """
        size_bytes = disk_bytes(file_bytes)
        intent: Intent | None = None
        try:
            outcome = self.index.begin(filename, size_bytes)
            # An old version under this key, or the row of a lost file, gives its room first.
            if outcome is Admission.OVER_LIMIT and self.index.drop([digest]):
                outcome = self.index.begin(filename, size_bytes)
            if isinstance(outcome, Admission):
                return outcome
            intent = outcome
            self._publish(filename, file_bytes, write)
            self.index.commit(intent, digest, kind, note)
            intent = None
        except CACHE_FAULTS as exc:
            self._fault("write", url, exc)
            return None
        finally:
            if intent is not None:  # after Ctrl-C too: unused room must not stay reserved
                self._abort(intent)
        return Admission.ADMIT

    def _publish(self, filename: str, file_bytes: int, write: Callable[[FileIO], object]) -> None:
        path = self.index.dir.root / filename
        self.index.dir.make(path.parent)
        publish(path, write, expected_bytes=file_bytes, mode=self.index.dir.file_mode)

    def _abort(self, intent: Intent) -> None:
        try:
            self.index.abort(intent)
        except CACHE_FAULTS as exc:  # the next process that opens the index sweeps it
            logger.debug("intent %s is left to the next sweep: %s", intent.key, exc)

    def _read_failed(self, exc: Exception, digest: str, filename: str, url: str) -> None:
        """Turn what went wrong while reading an entry into a miss."""
        if isinstance(exc, CorruptEntryError):
            self._purge(digest, filename, url, str(exc))
        elif not isinstance(exc, FileNotFoundError):  # evicted between the row and the file
            self._fault("read", url, exc)

    def _purge(self, digest: str, filename: str, url: str, why: str) -> None:
        """Drop a bad entry, count it and log it."""
        self._counters.add(purges=1)
        logger.warning("cache entry dropped, reading %s from the origin: %s", url, why)
        self._drop(digest, filename, url)

    def _drop(self, digest: str, filename: str, url: str) -> None:
        """Drop an entry, unless another file has replaced this one."""
        try:
            self.index.drop([digest], filename=filename)
        except CACHE_FAULTS as exc:
            self._fault("drop", url, exc)

    def _fault(self, verb: str, url: str, exc: Exception) -> None:
        self._counters.add(cache_errors=1)
        self.index.reopen(exc)
        self.index.log_once.warning(
            type(exc).__name__,
            logger,
            "cache %s failed, serving %s from the origin: %s",
            verb,
            url,
            exc,
        )


def _always(file_id: str) -> bool:
    return True


def _never(file_id: str) -> bool:
    return False
