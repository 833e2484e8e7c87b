"""Who is writing: the identity of a process that outlives its pid, so that the files of a dead one can be told apart."""

from __future__ import annotations

import functools
import os
import socket
from pathlib import Path

__all__ = ["is_dead", "owner_id"]


def owner_id() -> str:
    """Host, boot, pid namespace, pid and start time of this process. Cached per process, right after a fork too."""
    return _owner_of(os.getpid())


@functools.lru_cache(maxsize=1)
def _owner_of(pid: int) -> str:
    return f"{_machine()} {pid} {_start_time(pid)}"


def is_dead(owner: str) -> bool:
    """True only if ``owner`` was a process here and is gone. A process of another machine or container counts as alive."""
    machine, _, rest = owner.rpartition(" ")[0].rpartition(" ")[0], "", owner.split(" ")[-2:]
    if machine != _machine() or len(rest) != 2 or not rest[0].isdigit():
        return False
    return _start_time(int(rest[0])) != rest[1]


@functools.cache
def _machine() -> str:
    # The boot id makes a reboot kill everybody; the pid namespace keeps two containers on one scratch disk from judging each other.
    parts = [socket.gethostname().replace(" ", "_")]
    for path in ("/proc/sys/kernel/random/boot_id",):
        try:
            parts.append(Path(path).read_text().strip())
        except OSError:
            parts.append("-")
    try:
        parts.append(os.readlink("/proc/self/ns/pid"))
    except OSError:
        parts.append("-")
    return ":".join(parts)


def _start_time(pid: int) -> str:
    """Clock ticks since boot at which ``pid`` started; ``gone`` if it does not exist. A reused pid has another start time."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return "gone" if os.path.isdir("/proc/self") else _start_time_elsewhere(pid)
    except OSError:
        return "unknown"
    return stat.rpartition(")")[2].split()[19]


def _start_time_elsewhere(pid: int) -> str:
    """Without /proc (macOS): alive or gone is all that can be told."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "gone"
    except PermissionError:
        pass
    return "alive"
