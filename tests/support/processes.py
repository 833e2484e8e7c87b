"""Processes as seen from outside: those of a job (one process group, which a batch system starts,
signals and waits for), and the workers of this process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Deadly", "end_all", "interpreters", "members", "until", "wait_for_all"]

#: Only a hang takes this long; it says nothing about speed.
HANG_S = 60.0


def members(group: int) -> list[int]:
    """Running processes of a group."""
    # Not os.killpg(group, 0): it finds dead processes too until they are reaped, which may not
    # happen in a container.
    return [pid for pid, _, its_group in _running() if its_group == group]


def interpreters() -> list[int]:
    """Running processes of ``zarrcache.parallel.process`` that this process has started."""
    found = []
    for pid, parent, _ in _running():
        with suppress(FileNotFoundError, ProcessLookupError):
            if (
                parent == os.getpid()
                and b"zarrcache/parallel/_child.py" in Path(f"/proc/{pid}/cmdline").read_bytes()
            ):
                found.append(pid)
    return found


def _running() -> Iterator[tuple[int, int, int]]:
    """Every running process: its id, its parent's and its group's."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            state, parent, group, *_ = stat.read_text().rpartition(")")[2].split()
            if state not in "ZX":
                yield int(stat.parent.name), int(parent), int(group)


def until(condition: Callable[[], object], process: subprocess.Popen[Any], what: str) -> None:
    """Wait for a condition on a running job."""
    deadline = time.monotonic() + HANG_S
    while not condition():
        assert process.poll() is None, f"the job ended before {what}"
        assert time.monotonic() < deadline, f"no {what} within {HANG_S:.0f} s"
        time.sleep(0.005)


def wait_for_all(process: subprocess.Popen[Any]) -> None:
    """Return when no process of the job is left: a signal is sent at once, but a process takes time
    to die.
    """
    deadline = time.monotonic() + HANG_S
    while left := members(process.pid):
        assert time.monotonic() < deadline, f"processes of the job are still there: {left}"
        time.sleep(0.01)


def end_all(process: subprocess.Popen[Any]) -> None:
    """Kill the rest of a job, and read its remaining output."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=HANG_S)


@dataclass
class Deadly:
    """A converter that kills its process at one file, as running out of memory does."""

    converter: Any
    task_id: str

    def __call__(self, file: tuple[Path, str], reserve: object = None) -> Any:
        if file[1] == self.task_id:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.converter(file)

    def result(self, *args: Any, **fields: Any) -> Any:
        return self.converter.result(*args, **fields)
