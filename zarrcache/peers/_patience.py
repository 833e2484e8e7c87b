"""Seconds that this node may lose to each peer, shared by its processes.

Each peer has a budget of :data:`BUDGET_S`. A request may take a moment (:data:`_FREE_S`); what it
takes longer without giving an entry is charged, whether it fails, hangs, or is merely slow. A peer
whose budget is used up is left out until some of it has come back, a second per hour. So a peer
costs a node at most five seconds in an hour, however many densities there are and however it fails.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from pathlib import Path

from zarrcache._marks import set_mark

__all__ = ["BUDGET_S", "Patience"]

#: Seconds that a peer may cost a node.
BUDGET_S = 4.0
#: Seconds on the clock in which a second of the budget comes back.
_BACK_S = 3600.0
#: A peer with less than this, in seconds, is left out: a healthy one might not answer in time.
_LEAST_S = 0.25
#: Seconds that each request may take without being charged: a loaded machine, not a loaded peer.
_FREE_S = 0.1
#: Seconds more for one that brings an entry, and its slowest transfer that is not charged.
_FREE_ENTRY_S = 0.1
_FREE_BYTES_PER_S = 4 * 2**20
#: After a failure the peer is left out for this many times the seconds lost, within these bounds.
_LEFT_OUT_RATIO = 30.0
_LEFT_OUT_S = (1.0, 60.0)
#: The budget of a peer may be overdrawn by a wait that could not be cut short (a name server that
#: hangs). A time further ahead was not written by this code, or the clock was set.
_FURTHEST_S = 2 * BUDGET_S * _BACK_S


class Patience:
    """The budgets of all peers. Safe from any thread or process, and on both sides of a fork.

    Parameters
    ----------
    directory : Path, optional
        An existing directory that the node's processes share. A budget is an empty file in it: the
        modification time is when all of it will be back, the access time until when the peer is
        left out, and the change time when both were set. Without it, or if it cannot be written,
        the budgets are those of this process.
    """

    def __init__(self, directory: Path | None = None) -> None:
        self._directory = directory
        self._own: dict[str, tuple[float, float, float]] = {}

    def left_s(self, peer: str) -> float:
        """Seconds that a request to ``peer`` may lose now; 0.0 if it is left out."""
        now_s = time.time()
        whole_at_s, out_until_s, _ = self._state(peer, now_s)
        left_s = BUDGET_S - max(0.0, whole_at_s - now_s) / _BACK_S
        return left_s if now_s >= out_until_s and left_s >= _LEAST_S else 0.0

    def limit_s(self, peer: str, most_s: float) -> float:
        """Seconds until a request to ``peer`` is given up: at most ``most_s`` and a moment."""
        return min(self.left_s(peer), most_s) + _FREE_S

    @staticmethod
    def transfer_s(nbytes: int) -> float:
        """Seconds in which an entry may arrive without being charged."""
        return _FREE_ENTRY_S + nbytes / _FREE_BYTES_PER_S

    def charge(
        self, peer: str, seconds: float, *, entry_bytes: int | None = None, failed: bool = False
    ) -> float:
        """Charge the seconds that a request took, which ends now.

        Parameters
        ----------
        peer : str
        seconds : float
        entry_bytes : int, optional
            It has given an entry of this size. One that was quick gives back what it saved.
        failed : bool
            Leave the peer out for a while, also if the failure was quick.

        Returns
        -------
        float
            Seconds for which the peer is left out.
        """
        now_s = time.time()
        whole_at_s, out_until_s, set_at_s = self._state(peer, now_s)
        # Threads and processes that wait for the same peer at the same time lose that time once.
        # A file system whose clock is ahead gives no such time.
        since_s = now_s - set_at_s
        lost_s = (min(seconds, since_s) if since_s >= 0.0 else seconds) - _FREE_S
        if entry_bytes is not None:
            lost_s -= self.transfer_s(entry_bytes)
        if failed or entry_bytes is None:
            lost_s = max(0.0, lost_s)
        before_s = max(now_s, whole_at_s)
        whole_at_s = max(now_s, before_s + lost_s * _BACK_S)
        if whole_at_s == before_s and not failed:
            return 0.0
        if failed:
            shortest_s, longest_s = _LEFT_OUT_S
            out_until_s = now_s + min(max(_LEFT_OUT_RATIO * lost_s, shortest_s), longest_s)
        self._set(peer, whole_at_s, out_until_s, now_s)
        left_s = BUDGET_S - (whole_at_s - now_s) / _BACK_S
        return max(out_until_s - now_s, (_LEAST_S - left_s) * _BACK_S, 0.0)

    def _path(self, peer: str) -> Path | None:
        if self._directory is None:
            return None
        return self._directory / f"peer-{hashlib.sha256(peer.encode()).hexdigest()[:16]}"

    def _state(self, peer: str, now_s: float) -> tuple[float, float, float]:
        """When the budget is whole, until when the peer is left out, when both were set."""
        states = [self._own.get(peer, (0.0, 0.0, 0.0))]
        path = self._path(peer)
        if path is not None:
            with contextlib.suppress(OSError):
                status = os.lstat(path)
                states.append((status.st_mtime, status.st_atime, status.st_ctime))
        return max(
            (s for s in states if max(s[:2]) <= now_s + _FURTHEST_S), default=(0.0, 0.0, 0.0)
        )

    def _set(self, peer: str, whole_at_s: float, out_until_s: float, now_s: float) -> None:
        whole_at_s = min(whole_at_s, now_s + _FURTHEST_S)
        path = self._path(peer)
        if path is not None:
            try:
                set_mark(path, accessed_s=out_until_s, modified_s=whole_at_s)
            except OSError:  # full disk, read-only, or the directory is gone
                pass
            else:
                self._own.pop(peer, None)
                return
        self._own[peer] = (whole_at_s, out_until_s, now_s)
