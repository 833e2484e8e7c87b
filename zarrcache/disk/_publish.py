"""Publish a file atomically, and clean up after writers that died.

A file is written under a hidden name beside its final one, checked, and renamed. The hidden name
identifies its writer (machine, pid, start time), so a later process can tell whether it is dead::

    .NAME.partial-MACHINE-PID-START-RANDOM      being written
    .NAME.replaced-MACHINE-PID-START-RANDOM     an old store, moved aside for a moment
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
import secrets
import shutil
import socket
import stat
import time
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Literal

from zarrcache.errors import ConfigError, IncompleteArrayError

__all__ = [
    "hidden_path",
    "is_dead",
    "is_same_namespace",
    "is_stopped",
    "owner_id",
    "owner_of",
    "partials_of",
    "publish",
    "published_name",
    "remove_hidden",
    "sweep_hidden",
    "write_all",
    "write_file",
]

_HIDDEN = re.compile(
    r"\.(?P<final>.+)\.(?P<kind>partial|replaced)"
    r"-(?P<machine>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>\w+)-[0-9a-f]{8}"
)
#: Processes of other machines and containers cannot be seen. They count as dead after a day: a file
#: is written in seconds to minutes.
_UNSEEN_S = 86400.0


# -- publish
# --------------------------------------------------------------------------------------------------


def publish(
    final: Path,
    write: Callable[[FileIO], object],
    *,
    expected_bytes: int | None = None,
    mode: int = 0o600,
    dir_fd: int | None = None,
) -> int:
    """Write beside ``final``, check, then rename. Safe from any thread or process.

    The last writer of a name wins. The hidden file is in the same directory (a rename across file
    systems is a copy), has a unique name (two writers must not write into one file) and is checked
    before the rename, so a file with the final name is complete. Nothing is synced: after a power
    failure the checksum in the header reveals a torn entry, and a cache may lose entries.

    Parameters
    ----------
    final : Path
        Its parent has to exist.
    write : callable
        Called with the open file, unbuffered.
    expected_bytes : int, optional
        Refuse to publish any other length.
    mode : int
        Permissions, regardless of the umask.
    dir_fd : int, optional
        The directory of ``final``, open. Default: by its path.

    Returns
    -------
    int
        Bytes that the file occupies on disk, as the file system says. It may say less than the
        length: the blocks of a new file are not always allocated yet.

    Raises
    ------
    IncompleteArrayError
        The length is not ``expected_bytes``. Nothing is published.
    OSError
        Disk full, directory gone. The hidden file is removed.
    """
    partial = hidden_path(final, "partial")
    # Relative to dir_fd only the name counts.
    beside, name = (partial, final) if dir_fd is None else (partial.name, final.name)
    fd = os.open(
        beside,
        os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW,
        0o600,
        dir_fd=dir_fd,
    )
    try:
        with FileIO(fd, "wb") as file:
            os.fchmod(fd, mode)
            write(file)
            written = file.tell()
        if expected_bytes is not None and written != expected_bytes:
            raise IncompleteArrayError(
                f"{final.name}: {written} bytes were written, {expected_bytes} expected; not "
                "published."
            )
        # After the file is closed: some file systems allocate ahead of a writer.
        occupied_bytes = os.stat(beside, dir_fd=dir_fd, follow_symlinks=False).st_blocks * 512
        os.replace(beside, name, src_dir_fd=dir_fd, dst_dir_fd=dir_fd)
    except BaseException:  # also KeyboardInterrupt: leave no file behind
        with contextlib.suppress(OSError):
            os.unlink(beside, dir_fd=dir_fd)
        raise
    return occupied_bytes


def write_all(file: FileIO, buffer: memoryview) -> None:
    """Write a whole buffer to an unbuffered file (Linux writes at most 2 GiB per call)."""
    while buffer.nbytes:
        buffer = buffer[file.write(buffer) :]


def write_file(path: Path, content: bytes) -> None:
    """Write an output file of the user, completely or not at all, or raise with the reason.

    A device or a pipe is written to, not replaced. A link stays, and a file keeps its permissions.
    """
    target = path.resolve() if os.path.isfile(path) else path
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        if os.path.exists(path) and not path.is_file():
            path.write_bytes(content)
        else:
            with beside.open("xb") as file:
                file.write(content)
                if os.path.exists(target):
                    os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
            beside.replace(target)
    except OSError as exc:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise ConfigError(
            f"{path} cannot be written ({exc.strerror}). Give a file in a directory that exists, "
            "that you may write to, and that has room."
        ) from exc


# -- hidden files
# --------------------------------------------------------------------------------------------------


def hidden_path(final: Path, kind: Literal["partial", "replaced"]) -> Path:
    """A new hidden name of this process, in the directory of ``final``."""
    return final.with_name(f".{final.name}.{kind}-{_tag_of(owner_id())}-{secrets.token_hex(4)}")


def published_name(hidden: str) -> str | None:
    """The final name of a file that is being written under a hidden one; None for other files."""
    match = _HIDDEN.fullmatch(hidden)
    return match["final"] if match is not None else None


def partials_of(name: str, owner: str, dir_fd: int) -> list[str]:
    """Files in the directory ``dir_fd`` that ``owner`` wrote for ``name`` and has not published."""
    start = f".{name}.partial-{_tag_of(owner)}-"
    return [
        found
        for found in os.listdir(dir_fd)
        if found.startswith(start) and _HIDDEN.fullmatch(found) is not None
    ]


def sweep_hidden(directory: Path, is_ours: Callable[[str], bool]) -> list[Path]:
    """Remove partial files of dead writers, and put back stores that they had moved aside.

    Parameters
    ----------
    directory : Path
        It may hold other files: only hidden names of the form above are touched, and only if their
        writer is a dead process of this machine or they are older than a day.
    is_ours : callable
        Whether the caller writes files of this final name.

    Returns
    -------
    list of Path
        The hidden paths that are gone.
    """
    swept = []
    try:
        names = [entry.name for entry in os.scandir(directory) if entry.name.startswith(".")]
    except FileNotFoundError:
        return []
    for name in names:
        match = _HIDDEN.fullmatch(name)
        path = directory / name
        if match is None or not is_ours(match["final"]) or not _is_abandoned(match, path):
            continue
        final = directory / match["final"]
        if match["kind"] == "replaced" and not os.path.lexists(final):
            with contextlib.suppress(OSError):  # another process has swept it
                os.rename(path, final)
        else:
            remove_hidden(path)
        swept.append(path)
    return swept


def remove_hidden(path: Path) -> None:
    """Remove a hidden file or directory; errors are left to the next sweep."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _is_abandoned(match: re.Match[str], path: Path) -> bool:
    if match["machine"] == _short(_machine()):
        return is_dead(f"{_machine()} {match['pid']} {match['start']}")
    try:
        return time.time() - path.lstat().st_mtime > _UNSEEN_S
    except FileNotFoundError:
        return False


# -- owners
# --------------------------------------------------------------------------------------------------


def owner_id() -> str:
    """Host, boot, pid namespace, pid and start time: unique even if a pid is reused.

    Cached per process, also after a fork.
    """
    return owner_of(os.getpid())


def is_dead(owner: str, age_s: float = 0.0) -> bool:
    """Whether the process ``owner``, last known to be alive ``age_s`` seconds ago, has ended.

    Processes of another machine or container cannot be seen. They count as alive for a day, unless
    they ran on this machine before its last reboot. (In a cache directory their locks can:
    :class:`~zarrcache.disk.single_flight.Owners`.)
    """
    machine, _, process = owner.partition(" ")
    pid, _, started = process.partition(" ")
    if machine != _machine():
        return _has_rebooted_since(machine) or age_s > _UNSEEN_S
    if not pid.isdigit() or not started:
        return age_s > _UNSEEN_S
    return _start_time(int(pid)) not in (started, _ALIVE)


def _has_rebooted_since(machine: str) -> bool:
    """Whether ``machine`` is this host before its last boot; False if a boot id is unknown."""
    host, _, then = machine.partition(":")
    here, _, now = _machine().partition(":")
    then, now = then.partition(":")[0], now.partition(":")[0]
    return host == here and then != now and not {then, now} & {"", "-"}


def is_same_namespace(owner: str) -> bool:
    """Whether ``owner`` ran in this pid namespace of this machine, so that its pid can be seen."""
    return owner.partition(" ")[0] == _machine()


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal or a debugger. False if that cannot be seen."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


#: Stands for an unknown start time (no /proc, or /proc hides the processes of other users).
_ALIVE = "alive"


@functools.lru_cache(maxsize=1)
def owner_of(pid: int) -> str:
    """:func:`owner_id` of this process, given its pid; a cached look-up."""
    return f"{_machine()} {pid} {_start_time(pid)}"


@functools.cache
def _machine() -> str:
    # After a reboot (another boot id) every process is dead. The pid namespace distinguishes two
    # containers on one scratch disk.
    parts = [socket.gethostname().replace(" ", "_")]
    for path in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        try:
            parts.append(
                os.readlink(path) if os.path.islink(path) else Path(path).read_text().strip()
            )
        except OSError:
            parts.append("-")
    return ":".join(parts)


def _tag_of(owner: str) -> str:
    """The part of a hidden name that identifies its writer."""
    machine, _, process = owner.partition(" ")
    return "-".join((_short(machine), *process.split(" ")))


def _short(machine: str) -> str:
    return hashlib.blake2b(machine.encode(), digest_size=4).hexdigest()


def _start_time(pid: int) -> str:
    """Clock ticks since boot at which ``pid`` started; ``gone`` if it does not exist."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return _start_time_without_proc(pid)
    except OSError:
        return _ALIVE
    return "gone" if state in "ZX" else rest[18]  # a zombie does not write any more


def _start_time_without_proc(pid: int) -> str:
    """Whether the process exists: :data:`_ALIVE` or ``gone``."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return "gone"
    except PermissionError:
        pass
    return _ALIVE
