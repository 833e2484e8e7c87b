"""Observe the reads of a reader, for look-ahead and for metrics.

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
    """One finished read of a density; of one role, with all its channels.

    Attributes
    ----------
    task_id : str
    role : {"data", "label"}
    outcome : {"hit", "miss", "bypass"}
        From the array tier; fetched and stored; or fetched and not admitted. Of several channels
        the last of these.
    nbytes : int
        Size of the decoded density.
    seconds : float
        Wall time from the call of ``load`` or ``open_grid`` to its return.
    """

    task_id: str
    role: Role
    outcome: Outcome
    nbytes: int
    seconds: float


class ReadObserver(Protocol):
    """Observes the reads of a :class:`ZarrS3Reader`; install it with ``reader.observe(observer)``.

    Its methods run in the process that reads, DataLoader workers included, and in any thread of it.
    Each worker has its own copy: forked, or pickled with the reader if workers are spawned. An
    observer that adds up over workers has to share memory or write to a file. A read that raises is
    started but never finished. An exception of an observer is raised by ``load``.
    """

    def read_started(self, task_id: str, role: Role) -> None:
        """Called before a density is read."""

    def read_finished(self, read: Read) -> None:
        """Called after a density was read."""
