"""Entries of a cache that is only read, found by their digest in the names of the files: no index,
no SQLite, no lock, nothing written.

A miss lists one of 256 directories: 1 ms for a cache of 400,000 entries on a local disk. Such a
cache may lie on a network file system.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from zarrcache.disk.mmap import open_regular
from zarrcache.errors import CorruptEntryError

__all__ = ["open_entries"]


def open_entries(entries: Path, digest: str) -> Iterator[tuple[FileIO, int, str]]:
    """The files that bear the name of one entry, newest first: open, with their length and path.
    What is in them has not been looked at.

    There is one, as a rule; two while one replaces the other. Each is closed when the next is asked
    for. Symbolic links and what is no file are passed over.

    Parameters
    ----------
    entries : Path
        ``entries`` of a cache directory. It need not exist.
    digest : str
        Checked by the caller (:func:`zarrcache._keys.is_digest`).

    Raises
    ------
    OSError
        The directory cannot be read.
    """
    path = entries / digest[:2]
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        found = []
        for name in os.listdir(directory):
            if name.startswith(f"{digest}-"):
                with contextlib.suppress(OSError):  # gone meanwhile
                    found.append(
                        (os.stat(name, dir_fd=directory, follow_symlinks=False).st_mtime_ns, name)
                    )
        for _, name in sorted(found, reverse=True):
            try:
                fd, status = open_regular(name, dir_fd=directory)
            except (OSError, CorruptEntryError):  # evicted meanwhile, or planted
                continue
            with FileIO(fd, "rb") as file:
                yield file, status.st_size, f"{path}/{name}"
    finally:
        os.close(directory)
