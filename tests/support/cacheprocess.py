"""A process that uses a cache on commands over a pipe, with its own clock, and that can be killed
before any file system call.
"""

from __future__ import annotations

import asyncio
import io
import os
import signal
import sqlite3
import sys
import threading
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from zarr.core.sync import sync

from tests.support.cachedirs import settings
from tests.support.readers import make_reader
from zarrcache import IncompleteArrayError, plan_evict, verify

__all__ = ["STEPS", "CacheProcess", "Killed", "die_at_step"]

_FORK = get_context("fork")
_HANG_S = 120
#: What changes a directory, or looks into one; named as the audit events of it.
STEPS = frozenset(
    {
        "open",
        "os.rename",
        "os.remove",
        "os.mkdir",
        "os.chmod",
        "os.link",
        "os.listdir",
        "os.scandir",
        "sqlite3.connect",
    }
)
#: What changes a file or a directory; named as the functions of ``os``.
_CHANGES = frozenset(
    {
        "open",
        "pwrite",
        "ftruncate",
        "replace",
        "rename",
        "link",
        "unlink",
        "remove",
        "mkdir",
        "rmdir",
        "chmod",
        "fchmod",
    }
)
_WRITES = frozenset({"write", "writev"})


class Killed(Exception):
    """The process died instead of answering."""


def die_at_step(number: int, *, writes: bool = False) -> None:
    """Have this process killed before its ``number``-th step: a call that changes a file, or a
    statement to SQLite, in any thread.

    Not by audit events (`STEPS`): these tell of files that are opened, not of what is written into
    them, and nearly all that a crash can leave half done lies between the first write into a file
    and the statement that makes it known. With ``writes`` only the writes count: then there is
    something left.
    """
    left, names = [number], _WRITES if writes else _WRITES | _CHANGES

    def count(_: object, event: str, function: Any) -> None:
        if event != "c_call":
            return
        owner = getattr(function, "__self__", None)
        if isinstance(owner, sqlite3.Connection | sqlite3.Cursor):
            step = not writes
        else:
            step = function.__name__ in names and (
                function.__module__ == "posix" or isinstance(owner, io.FileIO)
            )
        left[0] -= step
        if step and left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile_all_threads(count) if sys.version_info >= (
        3,
        12,
    ) else threading.setprofile(count)
    sys.setprofile(count)


class CacheProcess:
    """``process.do("load", "mp-1", "data")`` calls `_User.load` in it; after a kill a new process
    answers.
    """

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        self._pipe, theirs = _FORK.Pipe()
        self._process = _FORK.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()

    def do(self, name: str, *args: Any) -> Any:
        """The result; raises the error of the process."""
        try:
            self._pipe.send((name, args))
            if not self._pipe.poll(_HANG_S):
                raise TimeoutError(f"no answer to {name}{args}")
            error, answer = self._pipe.recv()
        except EOFError:
            self.kill()
            raise Killed(name) from None
        except BaseException:
            # also when a test is stopped from outside: the answer that is still to come must not be
            # taken for the next one's
            self.kill()
            raise
        if error is not None:
            raise error
        return answer

    def kill(self) -> None:
        """SIGKILL; the next call is answered by a new process."""
        self.end()
        self._start()

    def end(self) -> None:
        """SIGKILL, without a new process."""
        self._process.kill()
        self._process.join(_HANG_S)
        self._pipe.close()


async def _others() -> None:
    """Wait for zarr's other requests after one failed: they go on and change the cache that the
    test inspects.
    """
    if others := asyncio.all_tasks() - {asyncio.current_task()}:
        _, late = await asyncio.wait(others, timeout=_HANG_S)
        assert not late


class _User:
    """The commands."""

    _real_time = staticmethod(time.time)
    dies_at = 0

    def open(self, directory: Path, block: dict[str, Any]) -> None:
        """A new run over ``directory``."""
        self.directory = directory
        self.config = settings(directory, **block)
        self.reader = make_reader(directory, cache=self.config)

    def clock(self, offset_s: float) -> None:
        """Shift the time by an offset."""
        time.time = lambda: _User._real_time() + offset_s

    def die(self, step: int) -> None:
        """Die later, before the ``step``-th step after this call."""
        self.dies_at = step

    def load(self, task_id: str, role: Any) -> np.ndarray[Any, Any]:
        return np.array(self.reader.load(task_id, role)[0])

    def ensure(self, task_id: str, role: Any) -> str:
        return self.reader.ensure(task_id, role)[0]

    def crop(self, task_id: str, role: str) -> np.ndarray[Any, Any] | None:
        """Through the byte tier; None if the store has changed since it was listed."""
        try:
            group = self.reader.read_zarr_store(self.directory / role / f"{task_id}.zarr")
            return np.asarray(group["charge_density_total"][1:5, 1:3, :3])  # type: ignore[index]
        except IncompleteArrayError:
            sync(_others())
            return None

    def drop(self, task_id: str, role: Any) -> None:
        self.reader.cache.arrays.drop(self.reader.key(task_id, role))  # type: ignore[union-attr]

    def evict(self, how: dict[str, Any]) -> None:
        plan_evict(self.config, everything=True, **how).execute()

    def verify(self) -> None:
        verify(self.config)

    def stored(self) -> set[tuple[str, str]]:
        """Densities with a row."""
        notes = [row.note.split("\n") for row in self.reader.cache.index.rows("array")]  # type: ignore[union-attr]
        return {(Path(url).stem, Path(url).parent.name) for _, url, array in notes if array}

    def index(self) -> tuple[int, set[str]]:
        """Its volume, and its files."""
        index = self.reader.cache.index
        assert index is not None
        return index.volume_bytes(), index.filenames()

    def faults(self) -> tuple[int, int]:
        return self.reader.stats.cache_errors, self.reader.stats.purges


def _serve(pipe: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    user = _User()
    while True:
        try:
            name, args = pipe.recv()
        except EOFError:
            return
        try:
            answer = (None, getattr(user, name)(*args))
        except Exception as exc:  # noqa: BLE001 - the tests' process raises it
            answer = (exc, None)
        pipe.send(answer)
        if user.dies_at:
            die_at_step(user.dies_at)
            user.dies_at = 0
