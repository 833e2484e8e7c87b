"""Follow the reads of a reader, for look-ahead and for metrics.

>>> class Seconds:
...     def __init__(self):
...         self.by_outcome = {"hit": 0.0, "miss": 0.0, "bypass": 0.0}
...
...     def read_started(self, task_id, role):
...         pass
...
...     def read_finished(self, read):
...         self.by_outcome[read.outcome] += read.seconds
>>> reader.observe(Seconds())  # doctest: +SKIP
"""

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
    """Follows the reads of a :class:`ZarrS3Reader`, once ``reader.observe(observer)`` is called.

    Its methods run in the process that reads, DataLoader workers included, and in any thread of it.
    Each worker has its own copy: forked, or pickled with the reader where workers are spawned. An
    observer that adds up over workers has to share memory or write to a file. A read that raises is
    started and not finished. An exception of an observer is raised by ``load``.
    """

    def read_started(self, task_id: str, role: Role) -> None:
        """Before a density is read."""

    def read_finished(self, read: Read) -> None:
        """After it was read."""
