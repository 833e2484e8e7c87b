"""Where things lie on disk, and with which permissions. Only ``<dir>/zarrcache-v1/`` is ever written or deleted.

::

    <dir>/zarrcache-v1/
        CACHEDIR.TAG      backup programs skip the directory (bford.info/cachedir)
        cache.db          the index (SQLite through diskcache)
        entries/ab/…      array tier: one file an entry, header page + raw array
        bytes/ab/…        byte tier: one file an object or block, exactly the origin's bytes
        locks/…           single flight
"""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from zarrcache.errors import ConfigError
from zarrcache.keys import FORMAT_VERSION

__all__ = ["CacheDir"]

_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# Written by zarrcache. `zarrcache evict --all` empties it; deleting it is safe.\n"


@dataclass(frozen=True, slots=True)
class CacheDir:
    """The directory of one cache.

    Parameters
    ----------
    parent : Path
        ``cache.dir``. It may hold other things; they are never looked at.
    shared : bool
        Several users of one group: directories 02770, files 0660. Otherwise 0700 and 0600.
    """

    parent: Path
    shared: bool = False

    @property
    def root(self) -> Path:
        return self.parent / f"zarrcache-v{FORMAT_VERSION}"

    @property
    def entries(self) -> Path:
        return self.root / "entries"

    @property
    def bytes(self) -> Path:
        return self.root / "bytes"

    @property
    def locks(self) -> Path:
        return self.root / "locks"

    @property
    def index(self) -> Path:
        return self.root / "cache.db"

    @property
    def dir_mode(self) -> int:
        return 0o2770 if self.shared else 0o700

    @property
    def file_mode(self) -> int:
        return 0o660 if self.shared else 0o600

    def ensure(self) -> None:
        """Create what is missing. Safe from any process.

        Raises
        ------
        ConfigError
            The directory is a symbolic link or belongs to somebody else: entries could be planted or redirected.
        OSError
            It cannot be created.
        """
        self.parent.mkdir(mode=self.dir_mode & 0o777, parents=True, exist_ok=True)
        for path in (self.root, self.entries, self.bytes, self.locks):
            self.make(path)
        with contextlib.suppress(FileExistsError):
            fd = os.open(self.root / "CACHEDIR.TAG", os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, self.file_mode)
            try:
                os.fchmod(fd, self.file_mode)
                os.write(fd, _TAG)
            finally:
                os.close(fd)

    def make(self, path: Path) -> None:
        """Create one directory below :attr:`root` (or root itself) with the right mode, or check the one that is there."""
        try:
            os.mkdir(path, self.dir_mode & 0o777)
        except FileExistsError:
            self._check(path)
        else:
            os.chmod(path, self.dir_mode)  # mkdir's mode is cut by the umask and drops setgid

    def _check(self, path: Path) -> None:
        found = os.lstat(path)
        if not stat.S_ISDIR(found.st_mode):
            raise ConfigError(
                f"{path} is not a directory{' but a symbolic link' if stat.S_ISLNK(found.st_mode) else ''}. Remove it or choose another cache.dir."
            )
        if found.st_uid not in (os.getuid(), 0) and not self.shared:
            raise ConfigError(f"{path} belongs to user {found.st_uid}. Choose another cache.dir, or set cache.shared: true for both users.")
