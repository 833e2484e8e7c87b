"""Publish a file: it appears under its name only when it is whole."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from io import FileIO
from pathlib import Path

from zarrcache.errors import IncompleteArrayError

__all__ = ["PARTIAL_SUFFIX", "publish"]

PARTIAL_SUFFIX = ".partial"


def publish(
    final: Path,
    write: Callable[[FileIO], object],
    *,
    expected_bytes: int | None = None,
    mode: int = 0o600,
) -> int:
    """Write beside ``final``, check, then rename. Safe from any thread or process; the last writer
    of one name wins.

    The partial file lies in the same directory (a rename across file systems is a copy), has a name
    of its own (two writers of one name must not write into each other) and is checked before the
    rename: whatever bears the final name is whole. Nothing is synced: after a power failure the
    checksum in the header finds a torn entry, and a cache may lose entries.

    Parameters
    ----------
    final : Path
        Its parent has to exist.
    write : callable
        Gets the open file, unbuffered.
    expected_bytes : int, optional
        Refuse to publish any other length.
    mode : int
        Permissions, set whatever the umask is.

    Returns
    -------
    int
        Bytes written.

    Raises
    ------
    IncompleteArrayError
        The length is not ``expected_bytes``. Nothing is published.
    OSError
        Disk full, directory gone. The partial file is removed.
    """
    partial = final.with_name(f".{final.name}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    fd = os.open(
        partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
    )
    try:
        with FileIO(fd, "wb") as file:
            os.fchmod(fd, mode)
            write(file)
            written = file.tell()
        if expected_bytes is not None and written != expected_bytes:
            raise IncompleteArrayError(
                f"{final.name}: {written} bytes written where {expected_bytes} were announced; not "
                "published."
            )
        os.replace(partial, final)
    except BaseException:  # KeyboardInterrupt too: nothing of ours may stay behind
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise
    return written


def write_all(file: FileIO, buffer: memoryview) -> None:
    """Write a whole buffer to an unbuffered file; ``FileIO.write`` may stop early (2 GiB at a time
    on Linux).
    """
    while buffer.nbytes:
        buffer = buffer[file.write(buffer) :]
