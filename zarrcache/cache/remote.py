"""Where else in the cluster an entry may be had, before the origin is asked: the lower layer, then
the nodes of ``cache.peers``.

Whatever goes wrong here is logged once and costs a request to the origin, never a sample.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from zarrcache._keys import ArrayKey
from zarrcache.cache.array_tier import ArrayCache
from zarrcache.config import CacheConfig
from zarrcache.disk import CacheDir, EntryStream, is_fresh, open_entries
from zarrcache.errors import ConfigError, CorruptEntryError
from zarrcache.peers import Peers, Reply
from zarrcache.stats import Counters, LogOnce

__all__ = ["MissLookup", "RemoteSources", "Taken"]

logger = logging.getLogger(__name__)

_OTHERS_WRITE = 0o002


@dataclass(frozen=True, slots=True)
class Taken:
    """An entry that was had from elsewhere: mapped, if the array tier has stored or lent it, in
    memory otherwise.
    """

    array: np.ndarray[Any, np.dtype[Any]]
    is_stored: bool


class RemoteSources:
    """The other places of one config. Safe from any thread or process; pickles as its
    configuration.

    Parameters
    ----------
    config : CacheConfig
    arrays : ArrayCache
        Takes what is found.
    counters : Counters
        ``lower_hits``, ``peer_hits``, and ``purges`` for what was received and is bad.
    """

    def __init__(self, config: CacheConfig, arrays: ArrayCache, counters: Counters) -> None:
        self._config = config
        self._lower = CacheDir(config.lower).entries if config.lower is not None else None
        self.peers = Peers(config)
        self._arrays = arrays
        self._counters = counters
        self._log_once = LogOnce()

    def __reduce__(self) -> tuple[type[RemoteSources], tuple[CacheConfig, ArrayCache, Counters]]:
        # not the token, nor who was left out
        return type(self), (self._config, self._arrays, self._counters)

    def __bool__(self) -> bool:
        return self._lower is not None or bool(self.peers)

    def check(self) -> None:
        """Say before a run what is wrong with its settings.

        Raises
        ------
        ConfigError
            The token file cannot be used, or anybody may write to the lower layer.
        """
        self.peers.check()
        if self._lower is not None:
            for path in (self._lower, self._lower.parent):
                try:
                    mode = path.stat().st_mode
                except OSError:  # it is not mounted yet, or not filled: said when it is asked
                    continue
                if mode & _OTHERS_WRITE:
                    raise ConfigError(
                        f"cache.lower: anybody may write to {path}, entries could be planted. Run: "
                        f"chmod o-w {path}"
                    )

    @contextlib.contextmanager
    def lookup(self, key: ArrayKey, source: str | None) -> Iterator[MissLookup]:
        """One miss. Nothing is asked before :meth:`MissLookup.take`; at the end the others are told
        how it went.

        After an exception they are told nothing, and the next of them has the turn: if all were
        sent to an origin that fails, all would go at once.
        """
        lookup = MissLookup(self, key, source)
        try:
            yield lookup
        except BaseException:
            lookup.hang_up()
            raise
        lookup.close()

    def lower_offers(self, digest: str) -> Iterator[tuple[Any, int, str]]:
        """Entries of the lower layer, as :func:`open_entries`."""
        if self._lower is None:
            return
        try:
            if not self._lower.is_dir():
                self._log_once.warning(
                    "lower is not there",
                    logger,
                    "cache.lower: there is no cache at %s; going on without it",
                    self._lower.parent.parent,
                )
            yield from open_entries(self._lower, digest)
        except OSError as exc:
            self._log_once.warning(
                "lower fails",
                logger,
                "cache.lower %s cannot be read, going on without it: %s",
                self._lower,
                exc,
            )

    def take(
        self, stream: Any, nbytes: int, where: str, key: ArrayKey, source: str | None
    ) -> Taken | None:
        """Check an entry, store it, map it. None if it is of another source, or has come and is not
        here: evicted at once, or the disk failed.

        Raises
        ------
        CorruptEntryError
            It is bad; nothing is stored.
        """
        incoming = EntryStream(stream, nbytes, key, where)
        if not is_fresh(incoming.header.source, source):
            return None
        entry, is_stored = self._arrays.take(incoming)
        if entry is not None:
            return Taken(entry.array, is_stored=is_stored)
        # What was read into a file that is gone cannot be read again; its sender is not to blame.
        return None if incoming.is_spent else Taken(incoming.read(), is_stored=False)

    def refuse(self, peer: str, exc: CorruptEntryError) -> None:
        """Count a bad entry, and say so once a peer."""
        self._counters.add(purges=1)
        self._log_once.warning(
            ("bad entry", peer),
            logger,
            "an entry from elsewhere was not taken, looking further (said once for %s): %s",
            peer,
            exc,
        )

    def count(self, **increments: int) -> None:
        """As `Counters.add`."""
        self._counters.add(**increments)


class MissLookup:
    """One miss: what others have, and what they are told when it is over. Used in one thread.

    Attributes
    ----------
    is_stored : bool
        To be set when this node has the entry.
    """

    def __init__(self, remote: RemoteSources, key: ArrayKey, source: str | None) -> None:
        self._neighbours, self._key, self._source = remote, key, source
        self._lease: Reply | None = None
        self.is_stored = False

    def take(self) -> Taken | None:
        """The entry, from the first place that has a good one; None if the origin is to be asked."""
        remote, digest = self._neighbours, self._key.digest
        for file, nbytes, path in remote.lower_offers(digest):
            if (taken := self._try(file, nbytes, path, "cache.lower")) is not None:
                remote.count(lower_hits=1)
                return taken
        for reply in remote.peers.replies(digest, source=self._source):
            if reply.kind == "lease":
                self._lease = reply
                continue
            try:
                taken = self._try(
                    reply, reply.nbytes, f"{reply.peer}/v1/entries/{digest}", reply.peer
                )
            finally:
                reply.close()
            if taken is not None:
                remote.count(peer_hits=1)
                return taken
        return None

    def _try(self, stream: Any, nbytes: int, where: str, peer: str) -> Taken | None:
        try:
            taken = self._neighbours.take(stream, nbytes, where, self._key, self._source)
        except CorruptEntryError as exc:
            self._neighbours.refuse(peer, exc)
            return None
        self.is_stored = taken is not None and taken.is_stored
        return taken

    def close(self) -> None:
        """Give the lease back, if there is one, and say whether the entry is stored here."""
        if self._lease is not None:
            self._neighbours.peers.end(self._lease, is_stored=self.is_stored)

    def hang_up(self) -> None:
        """Give the lease back, if there is one, as if this process had died."""
        if self._lease is not None:
            self._lease.close()
