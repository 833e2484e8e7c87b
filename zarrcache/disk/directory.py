"""The layout of a cache directory: paths, permissions, and files.

Only ``<dir>/zarrcache-v1/`` is ever written or deleted::

    <dir>/zarrcache-v1/
        CACHEDIR.TAG      backup programs skip the directory (bford.info/cachedir)
        cache.db          the index (SQLite through diskcache)
        entries/ab/…      array tier: one file per entry, header page + raw array
        bytes/ab/…        byte tier: one file per object or block, exactly the origin's bytes
        locks/…           single flight

With ``shared`` the members of one Unix group use one directory. Files that all of them write in
place (index, locks) have mode 0660. Entries have 0640: other members may read them, and also
replace and drop them, which depends on the directories' permissions. They cannot alter or truncate
them; truncating a mapped entry would kill every process that has it mapped.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import secrets
import stat
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

from zarrcache._keys import FORMAT_VERSION
from zarrcache.disk.mmap import open_regular
from zarrcache.errors import ConfigError, CorruptEntryError

__all__ = ["OPEN_DIRECTORY", "CacheDir", "file_identity", "open_entries"]

_TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# Written by zarrcache. `zarrcache evict --all` empties it; deleting it is safe.\n"
)
_OTHERS_WRITE = 0o002
#: Flags to open a directory. O_NOFOLLOW: a link in its place was planted.
OPEN_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
#: A directory was removed or replaced.
_GONE = (FileNotFoundError, NotADirectoryError)
#: SQLite opens these beside the index.
_SIDE_FILES = ("", "-wal", "-shm", "-journal")


class CacheDir:
    """The directory of one cache.

    Parameters
    ----------
    parent : Path
        ``cache.dir``. It may hold other files; they are never touched.
    shared : bool
        Used by several users of one group: directories 02770. Otherwise 0700 and 0600.

    Attributes
    ----------
    root, entries, bytes, locks, index, tag : Path
    dir_mode : int
    file_mode : int
        Of entries, which are published once and never written again.
    written_mode : int
        Of the index and the locks, which every process opens for writing.
    """

    def __init__(self, parent: Path, shared: bool = False) -> None:
        self.parent, self.shared = parent, shared
        self.root = parent / f"zarrcache-v{FORMAT_VERSION}"
        self.entries = self.root / "entries"
        self.bytes = self.root / "bytes"
        self.locks = self.root / "locks"
        self.index = self.root / "cache.db"
        self.tag = self.root / "CACHEDIR.TAG"
        self.dir_mode = 0o2770 if shared else 0o700
        self.file_mode = 0o640 if shared else 0o600
        self.written_mode = 0o660 if shared else 0o600

    def ensure(self) -> None:
        """Create what is missing. Safe from any process.

        Raises
        ------
        ConfigError
            A directory is a symbolic link or writable by other users, or the index is not a regular
            file, so that entries could be planted or redirected; or this user may not write there.
        OSError
            It cannot be created.
        """
        try:
            self._make_parents()
            for path in (self.root, self.entries, self.bytes, self.locks):
                self.make(path)
            self.touch(self.tag, _TAG)
            self.check_index()
        except PermissionError as exc:
            raise ConfigError(self._denied(Path(exc.filename or self.root))) from exc

    def check(self) -> None:
        """Check what exists, as :meth:`ensure` does, and create nothing. Raises ConfigError."""
        try:
            for path in (self.root, self.entries, self.bytes, self.locks):
                if os.path.lexists(path):
                    self._check(path)
            self.check_index()
        except PermissionError as exc:
            raise ConfigError(self._denied(Path(exc.filename or self.root), "read")) from exc

    def check_index(self) -> None:
        """Refuse an index, or a file that SQLite opens beside it, that is not a regular file.

        SQLite would write to the target of a link, and wait for a writer of a FIFO forever.

        Raises
        ------
        ConfigError
        """
        for suffix in _SIDE_FILES:
            path = f"{self.index}{suffix}"
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISREG(os.lstat(path).st_mode):
                    raise ConfigError(
                        f"{path} is not a regular file, so zarrcache did not write it. "
                        "Remove it, or choose another cache.dir."
                    )

    @property
    def is_read_only(self) -> bool:
        """Whether there is an index that this process may read and not write.

        The file system is mounted read-only, or the permissions forbid it.
        """
        return os.access(self.index, os.R_OK) and not (
            os.access(self.root, os.W_OK) and os.access(self.index, os.W_OK)
        )

    @contextlib.contextmanager
    def opened(self, path: Path) -> Iterator[int]:
        """A descriptor of :attr:`root` or of a directory below it; no link is followed.

        Files are created, renamed and unlinked relative to it: a path would follow a link that
        another member of the group puts in place of a directory after it was checked.

        Raises
        ------
        NotADirectoryError
            A component is a link.
        OSError
        """
        fd = os.open(self.root, OPEN_DIRECTORY)
        try:
            for name in path.relative_to(self.root).parts:
                above, fd = fd, -1
                try:
                    fd = os.open(name, OPEN_DIRECTORY, dir_fd=above)
                finally:
                    os.close(above)
            yield fd
        except OSError as exc:
            if exc.filename is not None:  # relative to a descriptor, which tells a user nothing
                exc.filename = os.fspath(path / exc.filename)
            raise
        finally:
            if fd >= 0:
                os.close(fd)

    def unlink(self, path: Path) -> None:
        """Unlink a file below :attr:`root`. Raises OSError."""
        with self.opened(path.parent) as fd:
            os.unlink(path.name, dir_fd=fd)

    def make(self, path: Path) -> None:
        """Create :attr:`root` or a directory below it with the right mode, or check it."""
        if path == self.root:
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, self.dir_mode & 0o777)
                os.chmod(path, self.dir_mode)
            self._check(path)
            return
        # mkdir applies the umask and drops setgid, and another user may be about to write here. So
        # below root, where temporary names are allowed, the directory is made under one and appears
        # with the right mode. It may replace an empty one that another process has just made.
        with self.opened(path.parent) as fd:
            try:
                self._check(path, fd)
                return
            except FileNotFoundError:
                made = f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}"
            try:
                os.mkdir(made, self.dir_mode & 0o777, dir_fd=fd)
                os.chmod(made, self.dir_mode, dir_fd=fd)
                os.rename(made, path.name, src_dir_fd=fd, dst_dir_fd=fd)
            except OSError as exc:
                with contextlib.suppress(OSError):
                    os.rmdir(made, dir_fd=fd)
                if exc.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                    raise
                self._check(path, fd)

    def touch(self, path: Path, content: str = "") -> None:
        """Create a file with :attr:`written_mode`, if it does not exist."""
        with contextlib.suppress(FileExistsError):
            fd = os.open(
                path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, self.written_mode
            )
            try:
                os.fchmod(fd, self.written_mode)  # open applies the umask
                os.write(fd, content.encode())
            finally:
                os.close(fd)

    def files(self) -> Iterator[Path]:
        """Every file of both tiers.

        Links in place of directories are not followed, because callers delete what they find here.
        """
        for tier in (self.entries, self.bytes):
            for directory in sorted(self._directories(tier)):
                with contextlib.suppress(*_GONE), os.scandir(directory) as files:
                    yield from sorted(
                        Path(f.path) for f in files if not f.is_dir(follow_symlinks=False)
                    )

    def entry_names(self) -> set[str]:
        """Names of all files of the array tier, without directories. Takes 0.4 s for 400,000."""
        return set(itertools.chain.from_iterable(self._entry_lists()))

    def count_entries(self) -> int:
        """Number of files of the array tier. Takes 0.2 s for 400,000."""
        return sum(map(len, self._entry_lists()))

    def _entry_lists(self) -> Iterator[list[str]]:
        for directory in self._directories(self.entries):
            with contextlib.suppress(*_GONE):
                yield os.listdir(directory)

    @staticmethod
    def _directories(tier: Path) -> Iterator[str]:
        with contextlib.suppress(*_GONE), os.scandir(tier) as entries:
            yield from (one.path for one in entries if one.is_dir(follow_symlinks=False))

    def name_of(self, path: Path) -> str:
        """The name of a file in the index: its path below :attr:`root`."""
        return str(path.relative_to(self.root))

    def _make_parents(self) -> None:
        missing = [path for path in (self.parent, *self.parent.parents) if not path.exists()]
        for path in reversed(missing):
            with contextlib.suppress(FileExistsError):
                os.mkdir(
                    path, self.dir_mode & 0o777 if self.shared or path == self.parent else 0o777
                )
                if self.shared:  # the umask keeps the group out
                    os.chmod(path, self.dir_mode)
        found = os.stat(self.parent)
        if found.st_uid not in (os.getuid(), 0) and found.st_mode & _OTHERS_WRITE:
            raise ConfigError(
                f"cache.dir {self.parent} belongs to user {found.st_uid} and is writable by "
                "all users: entries could be planted. Choose a directory of your own."
            )

    def _check(self, path: Path, dir_fd: int | None = None) -> None:
        """Check a directory; ``dir_fd``: the one above it, open."""
        found = os.lstat(path if dir_fd is None else path.name, dir_fd=dir_fd)
        if not stat.S_ISDIR(found.st_mode):
            raise ConfigError(
                f"{path} is not a "
                f"directory{' but a symbolic link' if stat.S_ISLNK(found.st_mode) else ''}. Remove "
                "it or choose another cache.dir."
            )
        if found.st_uid not in (os.getuid(), 0):
            if not self.shared:
                raise ConfigError(
                    f"{path} belongs to user {found.st_uid}. Choose another cache.dir, or set "
                    "cache.shared: true for both users."
                )
            if found.st_mode & _OTHERS_WRITE:
                raise ConfigError(
                    f"{path} belongs to user {found.st_uid} and is writable by all users: entries "
                    "could be planted. Choose another cache.dir."
                )
        elif (
            self.shared
            and found.st_uid == os.getuid()
            and stat.S_IMODE(found.st_mode) & self.dir_mode != self.dir_mode
        ):
            # It was made while the cache was private, or the process that made it was killed.
            with contextlib.suppress(OSError):
                os.chmod(path if dir_fd is None else path.name, self.dir_mode, dir_fd=dir_fd)

    def _denied(self, path: Path, what: str = "written") -> str:
        """The error message for a user who may not access ``path``; it says who may."""
        for place in (path, *path.parents):
            with contextlib.suppress(OSError):
                found = os.stat(place)
                mode = (
                    f"it belongs to user {found.st_uid} and group {found.st_gid}, mode "
                    f"{stat.S_IMODE(found.st_mode):04o}"
                )
                if not self.shared:
                    return (
                        f"cache.dir {self.parent}: {place} cannot be {what} by this user "
                        f"({mode}). Choose a directory of your own."
                    )
                return (
                    f"cache.dir {self.parent}: {place} cannot be {what} by this user ({mode}; "
                    f"this user is {os.getuid()} of groups "
                    f"{sorted({os.getgid(), *os.getgroups()})}). Join that group, have the owner "
                    "run chgrp and chmod 2770, or choose another cache.dir."
                )
        return f"cache.dir {self.parent} cannot be {what} by this user. Choose another."


def open_entries(entries: Path, digest: str) -> Iterator[tuple[FileIO, int, str]]:
    """Open the files of one entry, newest first, by the digest in their names, unchecked.

    This needs neither the index nor a lock and writes nothing, so it also works on a read-only
    directory or a network file system. There is usually one file, and two while one replaces the
    other. Each is closed when the next is requested. Anything that is not a regular file, such as a
    symbolic link, is skipped. A miss lists one of 256 directories: 1 ms for a cache of 400,000
    entries on a local disk.

    Parameters
    ----------
    entries : Path
        ``entries`` of a cache directory. It need not exist.
    digest : str
        Checked by the caller (:func:`zarrcache._keys.is_digest`).

    Yields
    ------
    file : FileIO
    nbytes : int
        Length of the file.
    path : str

    Raises
    ------
    OSError
        The directory cannot be read.
    """
    path = entries / digest[:2]
    try:
        directory = os.open(path, OPEN_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return
    try:
        found = []
        for name in os.listdir(directory):
            if name.startswith(f"{digest}-"):
                with contextlib.suppress(OSError):  # evicted meanwhile
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


def file_identity(path: Path) -> tuple[int, int] | None:
    """Device and inode of a file; None if it is gone or cannot be examined."""
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino
