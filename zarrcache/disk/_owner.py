"""Who is writing: the identity of a process that outlives its pid, so that the files of a dead one
can be told apart.
"""

from __future__ import annotations

import functools
import os
import socket
from pathlib import Path

__all__ = ["is_dead", "owner_id"]


def owner_id() -> str:
    """Host, boot, pid namespace, pid and start time of this process. Cached per process, right
    after a fork too.
    """
    return _owner_of(os.getpid())


@functools.lru_cache(maxsize=1)
def _owner_of(pid: int) -> str:
    return f"{_machine()} {pid} {_start_time(pid)}"


def is_dead(owner: str, age_s: float = 0.0) -> bool:
    """Whether ``owner``, which was alive ``age_s`` ago, is gone.

    A process of another machine or container cannot be seen: it counts as alive for a day, and as
    gone at once if it ran here before a reboot.
    """
    machine, _, process = owner.partition(" ")
    pid, _, started = process.partition(" ")
    if machine != _machine():
        then, now = machine.split(":"), _machine().split(":")
        rebooted = (
            then[0] == now[0] and "-" not in (then[1:2] or ["-"]) + now[1:2] and then[1] != now[1]
        )
        return rebooted or age_s > _UNSEEN_S
    if not pid.isdigit() or not started:
        return age_s > _UNSEEN_S
    return _start_time(int(pid)) not in (started, _ALIVE)


_UNSEEN_S = 86400.0
#: Start time of a process that exists and does not show it (no /proc, or another user's where they
#: are hidden).
_ALIVE = "alive"


@functools.cache
def _machine() -> str:
    # The boot id makes a reboot kill everybody; the pid namespace keeps two containers on one
    # scratch disk from judging each other.
    parts = [socket.gethostname().replace(" ", "_")]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(
                os.readlink(path) if os.path.islink(path) else Path(path).read_text().strip()
            )
        except OSError:
            parts.append("-")
    return ":".join(parts)


def _start_time(pid: int) -> str:
    """Clock ticks since boot at which ``pid`` started; ``gone`` if it does not exist. A reused pid
    has another start time.
    """
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return _start_time_elsewhere(pid)
    except OSError:
        return _ALIVE
    return "gone" if state in "ZX" else rest[18]  # a zombie writes no more


def _start_time_elsewhere(pid: int) -> str:
    """Alive or gone is all that can be told."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return "gone"
    except PermissionError:
        pass
    return _ALIVE
