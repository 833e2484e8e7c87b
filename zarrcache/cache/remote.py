"""Remote sources of entries, tried before the origin: the lower layer (``cache.lower``) and peers.

Any failure here is logged once and costs a request to the origin, never a sample.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from zarrcache._keys import ArrayKey
from zarrcache.cache.tiers import ArrayCache
from zarrcache.config import CacheConfig
from zarrcache.disk import CacheDir, Entry, EntryStream, open_entries
from zarrcache.errors import ConfigError, CorruptEntryError
from zarrcache.origin import reporting_progress
from zarrcache.peers import Peers, Reply
from zarrcache.stats import Counters, LogOnce

__all__ = ["MissLookup", "RemoteSources", "Taken"]

logger = logging.getLogger(__name__)

_OTHERS_WRITE = 0o002


@dataclass(frozen=True, slots=True)
class Taken:
    """A received entry: mapped if the array tier has stored or lent it, else in memory."""

    entry: Entry
    is_stored: bool


class _Offer(NamedTuple):
    """An entry that a remote source sends, not checked yet."""

    stream: Any
    nbytes: int
    url: str
    sender: str
    counter: Literal["lower_hits", "peer_hits"]


class RemoteSources:
    """The lower layer and the peers of one config. Safe from any thread or process.

    Pickles as its configuration, without the token and without the peers that failed.

    Parameters
    ----------
    config : CacheConfig
    arrays : ArrayCache
        Stores what is received.
    counters : Counters
        ``lower_hits``, ``peer_hits``, and ``purges`` for received entries that are bad.
    """

    def __init__(self, config: CacheConfig, arrays: ArrayCache, counters: Counters) -> None:
        self.peers = Peers(config, arrays.index.dir.locks)
        self._config = config
        self._lower = CacheDir(config.lower).entries if config.lower is not None else None
        self._arrays = arrays
        self._counters = counters
        self._log_once = LogOnce()

    def __reduce__(self) -> tuple[type[RemoteSources], tuple[CacheConfig, ArrayCache, Counters]]:
        return type(self), (self._config, self._arrays, self._counters)

    def __bool__(self) -> bool:
        """Whether any remote source is configured."""
        return self._lower is not None or bool(self.peers)

    def check(self) -> None:
        """Check the settings before a run.

        Raises
        ------
        ConfigError
            The token file cannot be used, or every user may write to the lower layer.
        """
        self.peers.check()
        if self._lower is not None:
            for path in (self._lower, self._lower.parent):
                try:
                    mode = path.stat().st_mode
                except OSError:  # not mounted or not filled yet: logged at its first use
                    continue
                if mode & _OTHERS_WRITE:
                    raise ConfigError(
                        f"cache.lower: every user may write to {path}, so entries could be "
                        f"planted. Run: chmod o-w {path}"
                    )

    @contextlib.contextmanager
    def lookup(self, key: ArrayKey, source: str | None) -> Iterator[MissLookup]:
        """Look for one entry. No request is made before :meth:`MissLookup.take`.

        On exit, peers that wait for this node learn whether it has stored the entry. After an
        exception they are not notified, so that one of them tries next; otherwise all of them would
        send requests to the failing origin at once.
        """
        lookup = MissLookup(self, key, source)
        try:
            with reporting_progress(lookup.report_progress):
                yield lookup
        except BaseException:
            if lookup.lease is not None:
                lookup.lease.close()
            raise
        if lookup.lease is not None:
            self.peers.end(lookup.lease, is_stored=lookup.is_stored)

    def _receive(self, offer: _Offer, key: ArrayKey, source: str | None) -> Taken | None:
        """Check an entry, store it, map it; None if it is bad or of another source."""
        try:
            incoming = EntryStream(offer.stream, offer.nbytes, key, offer.url)
            if source not in (None, incoming.header.source):
                return None
            entry, is_stored = self._arrays.take(incoming)
            if entry is None:
                if incoming.is_spent:
                    # Evicted just after it was stored, or the disk failed: the stream is used up.
                    return None
                entry, is_stored = incoming.read(), False
            _ = entry.array  # decoded here: one that cannot be is rejected
        except CorruptEntryError as exc:
            self._reject(offer, exc)
            return None
        is_peer = offer.counter == "peer_hits"
        self._counters.add(**{offer.counter: 1}, peer_bytes=offer.nbytes if is_peer else 0)
        return Taken(entry, is_stored)

    def _reject(self, offer: _Offer, exc: CorruptEntryError) -> None:
        self._counters.add(purges=1)
        self._log_once.warning(
            ("bad entry", offer.sender),
            logger,
            "received entry rejected, trying the next source (logged once for %s): %s",
            offer.sender,
            exc,
        )

    def lower(self, key: ArrayKey, source: str | None) -> Entry | None:
        """An entry of the lower layer, in memory; it is not stored here."""
        for offer in self._lower_offers(key.digest):
            try:
                incoming = EntryStream(offer.stream, offer.nbytes, key, offer.url)
                if source in (None, incoming.header.source):
                    found = incoming.read()
                    _ = found.array  # as in `_receive`
                    self._counters.add(lower_hits=1)
                    return found
            except CorruptEntryError as exc:
                self._reject(offer, exc)
        return None

    def _lower_offers(self, digest: str) -> Iterator[_Offer]:
        if self._lower is None:
            return
        try:
            if not self._lower.is_dir():
                self._log_once.warning(
                    "lower is not there",
                    logger,
                    "cache.lower: there is no cache at %s; continuing without it",
                    self._lower.parent.parent,
                )
            for file, nbytes, path in open_entries(self._lower, digest):
                yield _Offer(file, nbytes, path, "cache.lower", "lower_hits")
        except OSError as exc:
            self._log_once.warning(
                "lower fails",
                logger,
                "cache.lower %s cannot be read; continuing without it: %s",
                self._lower,
                exc,
            )


class MissLookup:
    """Looks for one entry in the remote sources. Used in one thread.

    Attributes
    ----------
    is_stored : bool
        The caller sets it when this node has stored the entry.
    lease : Reply or None
        The right to fetch from the origin, if a peer has granted it to this node.
    """

    def __init__(self, remote: RemoteSources, key: ArrayKey, source: str | None) -> None:
        self._remote, self._key, self._source = remote, key, source
        self.lease: Reply | None = None
        self.is_stored = False

    def report_progress(self, silent_s: float = 0.0) -> None:
        """Report to waiting peers that this node proceeds; see ``Peers.renew``."""
        if self.lease is not None:
            self._remote.peers.renew(self.lease, silent_s)

    def take(self) -> Taken | None:
        """The entry from the first source that has a good one; None: fetch it from the origin."""
        with contextlib.closing(self._offers()) as offers:
            for offer in offers:
                taken = self._remote._receive(offer, self._key, self._source)
                if taken is not None:
                    self.is_stored = taken.is_stored
                    return taken
        return None

    def _offers(self) -> Generator[_Offer]:
        """Offers of the sources in order; each is closed when the next is requested."""
        digest = self._key.digest
        yield from self._remote._lower_offers(digest)
        for reply in self._remote.peers.replies(digest, source=self._source):
            if reply.kind == "lease":
                self.lease = reply
                continue
            try:
                yield _Offer(reply, reply.nbytes, reply.url, reply.peer, "peer_hits")
            finally:
                reply.close()
