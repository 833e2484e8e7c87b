"""Look-ahead on a full disk: entries that are lent to the training, each to be read once, in room
that is reserved for them.
"""

from __future__ import annotations

import logging
import secrets
import threading

from zarrcache._units import format_bytes
from zarrcache.disk import Admission, Index, Intent

__all__ = ["Loans"]

logger = logging.getLogger(__name__)

#: How often room is made for the loans: others, the lanes beside this one first, may store
#: something in it before it is reserved.
_TRIES = 16


class Loans:
    """Loans of one prefetcher. Safe from any thread of it.

    The room is taken when the first entry is refused: if the cache is full, by dropping what was
    stored first. It is announced in the index as one file that never comes, so it counts against
    ``cache.limit``, and loans themselves count nothing. Whatever becomes of this process, the index
    knows what to remove.

    Parameters
    ----------
    index : Index
    most_bytes : int
        On disk, of all loans together.
    """

    def __init__(self, index: Index, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self._index = index
        self._lock = threading.Lock()
        self._room: Intent | Admission | None = None
        self._loans: dict[str, tuple[str, int]] = {}  # by digest: file, bytes

    def __contains__(self, digest: str) -> bool:
        """Whether it is lent, as far as :meth:`look` saw."""
        return digest in self._loans

    def file_of(self, digest: str) -> str | None:
        """Name of the file that is lent, as far as :meth:`look` saw."""
        loan = self._loans.get(digest)
        return loan[0] if loan is not None else None

    @property
    def is_open(self) -> bool:
        """Whether it has its room."""
        return isinstance(self._room, Intent)

    @property
    def is_refused(self) -> bool:
        """Whether there is no room for it."""
        return isinstance(self._room, Admission)

    @property
    def held_bytes(self) -> int:
        """Of the loans that :meth:`look` saw."""
        with self._lock:
            return sum(size for _, size in self._loans.values())

    def lend(self, digest: str, filename: str, size_bytes: int) -> bool:
        """Announce a loan, whose file is to be written next. False if there is no room for it, or
        another rank has lent the same.
        """
        with self._lock:
            if self._room is None:
                self._room = self._reserve()
            if (old := self._loans.pop(digest, None)) is not None:
                self._index.give_back(digest, old[0])
            if (
                not isinstance(self._room, Intent)
                or sum(size for _, size in self._loans.values()) + size_bytes > self.most_bytes
            ):
                return False
            if not self._index.lend(digest, filename):
                return False
            self._loans[digest] = filename, size_bytes
            return True

    def look(self) -> None:
        """See what was taken."""
        if self._loans:
            with self._lock:
                there = self._index.loans()
                self._loans = {
                    digest: loan for digest, loan in self._loans.items() if digest in there
                }

    def drop(self, digest: str, filename: str) -> None:
        """Take a loan back that nobody will ask for; not one that has followed it under the same
        name.
        """
        with self._lock:
            if self.file_of(digest) == filename:
                del self._loans[digest]
                self._index.give_back(digest, filename)

    def close(self) -> None:
        """Take everything back."""
        for digest, (filename, _) in list(self._loans.items()):
            self.drop(digest, filename)
        with self._lock:
            if isinstance(self._room, Intent):
                self._index.abort(self._room)
            self._room = None

    def _reserve(self) -> Intent | Admission:
        name = f"entries/ring-{secrets.token_hex(4)}"
        outcome = self._index.begin(name, self.most_bytes)
        # once: it is others who fill this disk
        if outcome is Admission.DISK_FULL and self._index.drop_oldest(self.most_bytes):
            outcome = self._index.begin(name, self.most_bytes)
        for _ in range(_TRIES):
            if outcome is not Admission.OVER_LIMIT:
                break
            self._index.drop_oldest(self._index.shortfall_bytes(self.most_bytes))
            outcome = self._index.begin(name, self.most_bytes)
        if isinstance(outcome, Admission):
            logger.warning(
                "no look-ahead, as there is no room for %s of it: %s",
                format_bytes(self.most_bytes),
                outcome.value,
            )
        return outcome
