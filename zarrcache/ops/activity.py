"""Show the present use of a cache by the processes of this node (``zarrcache top``)."""

from __future__ import annotations

import functools
import operator
import time
from dataclasses import asdict, dataclass
from typing import Any

from zarrcache.config import CacheConfig, DataConfig, cache_of
from zarrcache.disk import Index
from zarrcache.errors import ConfigError
from zarrcache.ops.selection import open_if_present
from zarrcache.stats import Board, Stats, find_boards

__all__ = ["Activity", "Monitor"]


@dataclass(frozen=True)
class Activity:
    """The activity of all processes that use a cache, over an interval of ``seconds``."""

    directory: str
    seconds: float
    #: Trainings, ``zarrcache warm``, ``zarrcache serve`` and others that run now, each with its
    #: processes and counters. Those of other users are not seen, unless this one is root.
    boards: tuple[Board, ...]
    #: Counters of the runs since they began, and of the interval.
    total: Stats
    recent: Stats
    #: On disk, of both tiers.
    volume_bytes: int
    #: None if only the directory is known.
    limit_bytes: int | None

    @property
    def pids(self) -> tuple[int, ...]:
        """All processes."""
        return tuple(sorted({pid for board in self.boards for pid in board.pids}))

    def per_second(self, counter: str) -> float:
        """Rate of one counter over the interval."""
        rate: float = getattr(self.recent, counter) / self.seconds
        return rate

    def as_document(self) -> dict[str, Any]:
        """For JSON: the fields, and the rates of the interval."""
        rates = {name: self.per_second(name) for name in asdict(self.recent)}
        rates.pop("ahead_bytes")
        return {
            "directory": self.directory,
            "seconds": self.seconds,
            "runs": len(self.boards),
            "processes": len(self.pids),
            "pids": list(self.pids),
            "total": asdict(self.total),
            "per_second": rates,
            "hit_ratio": self.recent.hit_ratio,
            "volume_bytes": self.volume_bytes,
            "limit_bytes": self.limit_bytes,
        }


class Monitor:
    """Reads the counters of other processes without interrupting them.

    Without ``has_settings`` only the directory is known, and the limit in ``config`` is only a
    default.
    """

    def __init__(self, config: DataConfig | CacheConfig, *, has_settings: bool = True) -> None:
        self._config = cache_of(config)
        self._limit = self._config.limit if has_settings else None
        self._index = Index(self._config)
        self._last_s = time.monotonic()
        self._last = self._boards()

    def read(self) -> Activity:
        """The activity since the last call, or since the construction."""
        now_s, boards = time.monotonic(), self._boards()
        # A run that began or ended in between changes the sum by all that it has done.
        recent = [
            board.stats - self._last[key].stats if key in self._last else board.stats
            for key, board in boards.items()
        ]
        activity = Activity(
            directory=str(self._config.dir),
            seconds=max(1e-3, now_s - self._last_s),
            boards=tuple(boards.values()),
            total=_sum([board.stats for board in boards.values()]),
            recent=_sum(recent),
            volume_bytes=self._index.volume_bytes() if open_if_present(self._index) else 0,
            limit_bytes=self._limit,
        )
        self._last_s, self._last = now_s, boards
        return activity

    def _boards(self) -> dict[int, Board]:
        try:
            return {board.inode: board for board in find_boards(self._config.dir)}
        except FileNotFoundError as exc:
            raise ConfigError(
                "This system has no /proc, which is needed to find the counters of other "
                "processes. Use reader.stats in the training instead."
            ) from exc


def _sum(stats: list[Stats]) -> Stats:
    return functools.reduce(operator.add, stats, Stats())
