"""The epochs that monitors have recorded in a cache directory (``zarrcache.train.LoaderMonitor``).

Each training process appends one JSON line per epoch to a file of its own in
``<cache.dir>/zarrcache-v1/runs``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from zarrcache.config import CacheConfig
from zarrcache.disk import CacheDir, open_regular
from zarrcache.errors import CorruptEntryError
from zarrcache.stats import Stats
from zarrcache.train import EpochTimes, Verdict, judge

__all__ = ["RecordedRun", "RecordedRuns", "read_runs"]

#: Far beyond the 200 bytes of 10,000 epochs; a larger file was not written by a monitor.
_MOST_BYTES = 16 * 1024**2
#: Parts that every version has recorded.
_PARTS = {"hit", "miss", "bypass", "augment", "transform", "collate"}

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Seconds = Annotated[float, Field(ge=0, le=1e12)]


class _Line(BaseModel):
    """One line of a file: an epoch as `EpochTimes` has it, and more."""

    model_config = ConfigDict(strict=True)

    epoch: _Count
    steps: _Count
    waited_s: _Seconds
    worked_s: _Seconds
    start_s: _Seconds
    parts: dict[str, _Seconds]
    disk_bytes: _Count
    stats: dict[str, Annotated[int, Field(gt=-(2**63), lt=2**63)]]
    waits: dict[str, _Seconds] = {}
    is_full: bool = False
    workers: _Count
    #: Before the year 10000, where dates end.
    ended_s: Annotated[float, Field(ge=0, lt=253402300800)]

    @field_validator("parts")
    @classmethod
    def _has_all(cls, value: dict[str, float]) -> dict[str, float]:
        if not value.keys() >= _PARTS:
            raise ValueError("parts are missing")
        return value

    @property
    def times(self) -> EpochTimes:
        """The epoch. Counters of later versions are ignored."""
        own = self.model_dump(exclude={"stats", "workers", "ended_s"})
        # A gauge may fall; a counter cannot.
        counted = {
            field.name: n if field.name == "ahead_bytes" else max(0, n)
            for field in fields(Stats)
            if (n := self.stats.get(field.name)) is not None
        }
        return EpochTimes(**own, stats=Stats(**counted))


@dataclass(frozen=True)
class RecordedRun:
    """Epochs that one training process has recorded, at least one."""

    epochs: tuple[EpochTimes, ...]
    #: When each epoch ended, in seconds since 1970.
    ended_s: tuple[float, ...]
    #: Of the DataLoader; 0: the training process reads.
    workers: int
    #: ``cache.verify`` and ``cache.revalidate`` of the present config.
    verify: str
    revalidate: str

    @property
    def total(self) -> EpochTimes:
        """All epochs together."""
        return _sum(self.epochs)

    @property
    def verdict(self) -> Verdict:
        """The verdict for the epochs after the first, or for the first if there is no other."""
        return judge(
            _sum(self.epochs[1:] or self.epochs),
            workers=self.workers,
            verify=self.verify,
            revalidate=self.revalidate,
        )


@dataclass(frozen=True)
class RecordedRuns:
    """The records of earlier runs in the directory of a cache."""

    #: From the one whose last epoch ended last to the oldest.
    runs: tuple[RecordedRun, ...]
    #: What could not be read, and why.
    notes: tuple[str, ...]

    @property
    def total(self) -> EpochTimes | None:
        """All epochs of all processes; None without any."""
        return _sum(epoch for run in self.runs for epoch in run.epochs) if self.runs else None


def read_runs(cache: CacheConfig) -> RecordedRuns:
    """Read the recorded runs of a cache. Damaged lines are left out; the notes list them."""
    root = CacheDir(cache.dir).root
    runs, notes = [], []
    try:
        names = sorted(path for path in os.listdir(root / "runs") if path.endswith(".jsonl"))
    except FileNotFoundError:
        names = []
        others = sorted(path.name for path in cache.dir.glob("zarrcache-v*") if path != root)
        if others:
            notes.append(
                f"{cache.dir} holds {', '.join(others)}, made by another version of zarrcache; "
                f"what was recorded there is not shown. This version uses {root.name}."
            )
    except OSError as exc:
        names = []
        notes.append(f"{root / 'runs'} cannot be read ({exc.strerror}).")
    for name in names:
        run, note = _read_run(root / "runs" / name, cache)
        if run is not None:
            runs.append(run)
        if note:
            notes.append(note)
    runs.sort(key=lambda run: run.ended_s[-1], reverse=True)
    return RecordedRuns(tuple(runs), tuple(notes))


def _read_run(path: Path, cache: CacheConfig) -> tuple[RecordedRun | None, str]:
    try:
        fd, found = open_regular(path)
        with open(fd, "rb") as file:
            if found.st_size > _MOST_BYTES:
                return None, f"{path} is left out: no monitor writes {found.st_size:,} bytes."
            lines = file.read(_MOST_BYTES).splitlines()
    except CorruptEntryError as exc:
        return None, str(exc)
    except OSError as exc:
        return None, f"{path} cannot be read ({exc.strerror})."
    epochs, ended_s, workers, damaged = [], [], 0, []
    for number, line in enumerate(lines, start=1):
        try:
            epoch = _Line.model_validate_json(line)
        except ValidationError:
            damaged.append(str(number))
            continue
        epochs.append(epoch.times)
        ended_s.append(epoch.ended_s)
        workers = epoch.workers
    note = ""
    if damaged:
        which = ", ".join(damaged[:5]) + (", ..." if len(damaged) > 5 else "")
        one = len(damaged) == 1
        note = (
            f"{path}: line{'' if one else 's'} {which} {'is' if one else 'are'} damaged and left "
            "out."
        )
    if not epochs:
        return None, note
    run = RecordedRun(tuple(epochs), tuple(ended_s), workers, cache.verify, cache.revalidate)
    return run, note


def _sum(epochs: Iterable[EpochTimes]) -> EpochTimes:
    first, *others = epochs
    for other in others:
        first = first + other
    return first
