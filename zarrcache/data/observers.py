"""Being told of every read: what look-ahead counts with, and what metrics of your own hook into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from zarrcache._keys import Role
from zarrcache.cache import Outcome

__all__ = ["Read", "ReadObserver"]


@dataclass(frozen=True, slots=True)
class Read:
    """One density that a reader has returned.

    Attributes
    ----------
    task_id : str
    role : {"data", "label"}
    outcome : {"hit", "miss", "bypass"}
        From the array tier; fetched and stored; or fetched and not admitted.
    nbytes : int
        Size of the decoded density.
    seconds : float
        Wall time from the call of ``load`` to its return.
    """

    task_id: str
    role: Role
    outcome: Outcome
    nbytes: int
    seconds: float


class ReadObserver(Protocol):
    """Follows the reads of a :class:`ZarrS3Reader`; given to ``reader.observe``.

    Called in the process that reads, DataLoader workers included, from any of its threads. An
    observer is pickled with the reader when workers are spawned. A read that raises is started and
    never finished. An exception of an observer is raised by ``load``.
    """

    def read_started(self, task_id: str, role: Role) -> None:
        """A density is asked for."""

    def read_finished(self, read: Read) -> None:
        """It was returned."""
