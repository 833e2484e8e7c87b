"""Bytes that many readers may hold together: who gets some, who waits. Pure; ``workpool`` asks it."""

from __future__ import annotations

__all__ = ["Budget"]


class Budget:
    """A number of bytes, shared by readers that say what they need when they know it.

    A reader knows the size of what it fetches first, and the size of the array only when it has
    read the array's metadata. So it asks twice, and holds the first part while it waits for the
    second. Who asks for more than there is waits until others have finished; when all who hold
    something wait, none ever would, and the one that began first gets what it asks for. Therefore
    never more is held than the budget and one array, and an array that is larger than the budget is
    read when the others are done.

    Parameters
    ----------
    most_bytes : int
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._held: dict[int, int] = {}
        self._waiting: dict[int, int] = {}

    @property
    def held_bytes(self) -> int:
        """What all readers hold."""
        return sum(self._held.values())

    def ask(self, reader: int, nbytes: int) -> list[int]:
        """``reader`` (by number, the first that began is the smallest) needs ``nbytes`` more.
        Returns who may go on, perhaps itself.
        """
        self._waiting[reader] = nbytes
        return self._granted()

    def release(self, reader: int) -> list[int]:
        """``reader`` is done, or dead. Returns who may go on."""
        self._held.pop(reader, None)
        self._waiting.pop(reader, None)
        return self._granted()

    def _granted(self) -> list[int]:
        granted = []
        while (reader := self._next()) is not None:
            self._held[reader] = self._held.get(reader, 0) + self._waiting.pop(reader)
            granted.append(reader)
        return granted

    def _next(self) -> int | None:
        """One that waits and may go on, None if nobody may."""
        free = self._most_bytes - self.held_bytes
        begun = sorted(self._waiting.keys() & self._held.keys())
        for reader in begun:
            if self._waiting[reader] <= free:
                return reader
        # who has begun goes before who has not: a large array would wait for ever behind small ones
        if begun:
            return begun[0] if len(begun) == len(self._held) else None
        first = min(self._waiting, default=None)
        return (
            first
            if first is not None and (self._waiting[first] <= free or not self._held)
            else None
        )
