"""Look-ahead on a full disk: loans are entries in reserved bytes, each read once and removed."""

from __future__ import annotations

import logging
import secrets
import threading

from zarrcache._units import format_bytes
from zarrcache.disk import LENT, Admission, Index, Intent

__all__ = ["Loans"]

logger = logging.getLogger(__name__)

#: Attempts to reserve room: other threads and processes may take the room that was freed.
_ATTEMPTS = 16


class Loans:
    """Loans of one prefetcher. Safe from any of its threads.

    Room is reserved when the first entry is refused; a full cache drops its oldest entries for it.
    The index records the room as the intent of a file that is never written, so it counts against
    ``cache.limit``, and the loans themselves do not. If this process is killed, the next sweep of
    the index removes its loans and frees the room.

    Parameters
    ----------
    index : Index
    budget_bytes : int
        Total size on disk of all loans.
    """

    def __init__(self, index: Index, budget_bytes: int) -> None:
        self._index = index
        self._budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._room: Intent | Admission | None = None
        self._loans: dict[str, tuple[str, int]] = {}  # by digest: file, bytes on disk

    def __contains__(self, digest: str) -> bool:
        """Whether this process has lent an entry, as of the last :meth:`look`."""
        return digest in self._loans

    def file_of(self, digest: str) -> str | None:
        """File of an entry that this process has lent, as of the last :meth:`look`, or None."""
        loan = self._loans.get(digest)
        return loan[0] if loan is not None else None

    def is_lent(self, digest: str) -> bool:
        """Whether an entry is lent, by this process or by another rank of the node."""
        return digest in self._loans or self._index.lookup(LENT + digest) is not None

    @property
    def is_open(self) -> bool:
        """Whether room is reserved."""
        return isinstance(self._room, Intent)

    @property
    def is_refused(self) -> bool:
        """Whether there was no room to reserve."""
        return isinstance(self._room, Admission)

    @property
    def held_bytes(self) -> int:
        """Size on disk of all loans, as of the last :meth:`look`."""
        with self._lock:
            return self._held_bytes()

    def lend(self, digest: str, filename: str, size_bytes: int) -> bool:
        """Announce a loan whose file is written next.

        False if there is no room for it, or another rank of the node has lent the same entry.
        """
        with self._lock:
            if self._room is None:
                self._room = self._reserve()
            if (old := self._loans.pop(digest, None)) is not None:
                self._index.give_back(digest, old[0])
            if (
                not isinstance(self._room, Intent)
                or self._held_bytes() + size_bytes > self._budget_bytes
                or not self._index.lend(digest, filename)
            ):
                return False
            self._loans[digest] = filename, size_bytes
            return True

    def look(self) -> None:
        """Forget the loans that the training process has read."""
        if self._loans:
            with self._lock:
                there = self._index.loans()
                self._loans = {
                    digest: loan for digest, loan in self._loans.items() if digest in there
                }

    def drop(self, digest: str, filename: str) -> None:
        """Take a loan back, unless another file was lent under the same digest since."""
        with self._lock:
            if self.file_of(digest) == filename:
                del self._loans[digest]
                self._index.give_back(digest, filename)

    def close(self) -> None:
        """Take all loans back and free the room."""
        for digest, (filename, _) in list(self._loans.items()):
            self.drop(digest, filename)
        with self._lock:
            if isinstance(self._room, Intent):
                self._index.abort(self._room)
            self._room = None

    def _held_bytes(self) -> int:
        return sum(size for _, size in self._loans.values())

    def _reserve(self) -> Intent | Admission:
        name = f"entries/loans-{secrets.token_hex(4)}"
        outcome = self._index.begin(name, self._budget_bytes)
        # Once only: other programs fill this disk, and dropping entries does not stop them.
        if outcome is Admission.DISK_FULL and self._index.drop_oldest(self._budget_bytes):
            outcome = self._index.begin(name, self._budget_bytes)
        for _ in range(_ATTEMPTS):
            if outcome is not Admission.OVER_LIMIT:
                break
            self._index.drop_oldest(self._index.shortfall_bytes(self._budget_bytes))
            outcome = self._index.begin(name, self._budget_bytes)
        if isinstance(outcome, Admission):
            logger.warning(
                "no look-ahead: there is no room for its %s (%s)",
                format_bytes(self._budget_bytes),
                outcome.value,
            )
        return outcome
