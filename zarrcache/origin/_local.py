"""Stores in a directory, on a local disk or a network file system."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from zarrcache._keys import ObjectInfo
from zarrcache.config import RetryConfig
from zarrcache.errors import (
    ConfigError,
    IncompleteArrayError,
    OriginAccessError,
    OriginError,
    OriginNotFoundError,
)
from zarrcache.origin._requests import RetryPolicy, report_progress
from zarrcache.origin._s3_errors import TransientError
from zarrcache.stats import Counters

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["LocalOrigin"]

T = TypeVar("T")

#: Largest number of links to directories followed below one store: two in each of 30 nested
#: directories make a billion paths.
_MAX_LINKS = 1000

#: Errors of a network file system that may go away; other errors of a disk do not.
_TRANSIENT = frozenset(
    {
        errno.ESTALE,
        errno.EAGAIN,
        errno.EINTR,
        errno.ETIMEDOUT,
        errno.EIO,
        getattr(errno, "EREMOTEIO", errno.EIO),  # Linux only
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
    }
)


class LocalOrigin:
    """A directory. The version of a file is its modification time and size.

    Parameters
    ----------
    path : str
        Made absolute; ``~`` is expanded.

    See Also
    --------
    Origin : contract of the methods.
    """

    identity = "file"

    def __init__(
        self, path: str, *, retry: RetryConfig = RetryConfig(), counters: Counters | None = None
    ) -> None:
        if not path:
            raise ConfigError(
                "the path of the data is empty. Give a directory, or s3://bucket/prefix."
            )
        self._directory = os.path.abspath(os.path.expanduser(path))
        # Names may be any bytes. The URL is text, for messages, digests and the index.
        self.url = os.fsencode(self._directory).decode("utf-8", "backslashreplace")
        self._retry = retry
        self._counters = counters if counters is not None else Counters()

    def __repr__(self) -> str:
        return f"LocalOrigin({self.url!r})"

    def url_of(self, key: str) -> str:
        """Absolute path of a key, as text."""
        return os.path.join(self.url, os.fsencode(key).decode("utf-8", "backslashreplace"))

    def _path(self, key: str) -> str:
        return os.path.join(self._directory, key)

    def below(self, path: str) -> LocalOrigin:
        """The origin of a directory below this one."""
        return LocalOrigin(self._path(path), retry=self._retry, counters=self._counters)

    def pages(
        self, prefix: str = "", *, recursive: bool = False
    ) -> Iterator[tuple[list[ObjectInfo], list[str]]]:
        """Files and directories below ``prefix``. See ``BrowsableOrigin.pages``."""
        path = self._path(prefix)
        if recursive:
            yield self._with_retries(lambda: sorted(_walk(path, prefix)), path, None), []
        else:
            yield self._with_retries(lambda: _scan(path, prefix), path, None)

    def list_names(self) -> list[str]:
        """Names in the directory, sorted. See ``Origin.list_names``."""
        return self._with_retries(
            lambda: sorted(os.listdir(self._directory)), self._directory, None
        )

    def list_objects(self, prefix: str = "") -> list[ObjectInfo]:
        """Every file below ``prefix``. See ``Origin.list_objects``."""
        path = self._path(prefix)
        found = self._with_retries(lambda: _list(path, prefix), path, None)
        if not found and not os.path.isdir(self._directory):
            raise _not_a_directory(self.url)
        return found

    def fetch(self, objects: Sequence[ObjectInfo]) -> Iterator[tuple[ObjectInfo, Buffer]]:
        """Contents of listed files. See ``Origin.fetch``."""
        for obj in objects:
            yield obj, self.fetch_range(obj, 0, obj.size_bytes)

    def fetch_range(self, obj: ObjectInfo, start: int, stop: int) -> bytes:
        """Bytes of a listed file. See ``Origin.fetch_range``."""
        path = self._path(obj.key)
        data = self._with_retries(lambda: _read(path, obj, start, stop), path, obj)
        self._counters.add(fetched_bytes=len(data))
        return data

    def _with_retries(self, function: Callable[[], T], path: str, obj: ObjectInfo | None) -> T:
        for number, attempt in enumerate(RetryPolicy(self._retry)):
            self._counters.add(requests=1, retries=int(number > 0))
            with attempt:
                try:
                    found = function()
                except OriginError:
                    raise
                except OSError as exc:
                    # In a listing it may be any file.
                    name = exc.filename if isinstance(exc.filename, str) else path
                    raise _error(exc, name, obj) from exc
                report_progress()
                return found
        raise AssertionError


def _list(path: str, prefix: str) -> list[ObjectInfo]:
    try:
        if not prefix or prefix.endswith("/"):
            return sorted(_walk(path, prefix))
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [_info(prefix, status)] if stat.S_ISREG(status.st_mode) else []


def _walk(path: str, prefix: str, links: Iterator[int] | None = None) -> Iterator[ObjectInfo]:
    links = itertools.count(1) if links is None else links
    with os.scandir(path) as entries:
        for entry in entries:
            try:
                if entry.is_dir():
                    if entry.is_symlink() and next(links) > _MAX_LINKS:
                        raise OriginError(
                            f"{path} has more than {_MAX_LINKS} symbolic links to directories "
                            "below it. Remove them."
                        )
                    yield from _walk(entry.path, f"{prefix}{entry.name}/", links)
                    continue
                status = entry.stat()
                if not stat.S_ISREG(status.st_mode):  # opening a FIFO waits for its writer
                    if _is_stray(entry.name):
                        continue
                    raise OriginError(f"{entry.path} is neither a file nor a directory. Remove it.")
                yield _info(prefix + entry.name, status)
            except FileNotFoundError as exc:
                if entry.is_symlink() and not _is_stray(entry.name):
                    raise OriginError(
                        f"{entry.path} is a broken symbolic link. Restore what it points to, or "
                        "remove it."
                    ) from exc
                # Otherwise it was removed after the directory was read, so it is not listed.


def _is_stray(name: str) -> bool:
    """Whether a name belongs to an editor or the system, as the broken links that lock a file."""
    return name.startswith(".") and not name.startswith(".z")


def _scan(path: str, prefix: str) -> tuple[list[ObjectInfo], list[str]]:
    """Regular files and directories directly in a directory. Broken links are left out."""
    files, directories = [], []
    with os.scandir(path) as entries:
        for entry in entries:
            if entry.is_dir():
                directories.append(prefix + entry.name)
            elif entry.is_file():
                with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                    files.append(_info(prefix + entry.name, entry.stat()))
    return sorted(files), sorted(directories)


def _info(key: str, status: os.stat_result) -> ObjectInfo:
    return ObjectInfo(
        key, status.st_size, f"{status.st_mtime_ns:x}-{status.st_size}", status.st_mtime
    )


def _read(path: str, obj: ObjectInfo, start: int, stop: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        data = os.pread(file.fileno(), stop - start, start)
        while len(data) < stop - start and (
            more := os.pread(file.fileno(), stop - start - len(data), start + len(data))
        ):
            data += more  # one pread ends at 2 GiB
        # Compare the version after reading: a concurrent writer changes the modification time.
        if len(data) != stop - start or _info(obj.key, os.fstat(file.fileno())).etag != obj.etag:
            raise IncompleteArrayError(
                f"{path} was changed after it was listed. Read it again when the writer has "
                "finished."
            )
    return data


def _error(exc: OSError, path: str, obj: ObjectInfo | None) -> Exception:
    if exc.errno in (errno.EACCES, errno.EPERM):
        return OriginAccessError(
            f"{path} may not be read by this user ({exc.strerror}). Correct its permissions, or "
            "run as its owner."
        )
    if isinstance(exc, (FileNotFoundError, NotADirectoryError)):
        if obj is not None:
            return IncompleteArrayError(
                f"{path} is listed ({obj.size_bytes} bytes) but is gone. The store is incomplete: "
                "convert it again."
            )
        return _not_a_directory(path)
    if exc.errno == errno.ENOMEM:  # of this process; a file of this size could not be mapped
        return MemoryError(exc.strerror)
    if exc.errno in _TRANSIENT:
        return TransientError(path, f"{exc.strerror} (errno {exc.errno})")
    return OriginError(
        f"{path} could not be read: {exc.strerror} (errno {exc.errno}). Check the file system."
    )


def _not_a_directory(path: str) -> OriginNotFoundError:
    return OriginNotFoundError(
        f"{path} is not a directory of this machine. Check the path, and that its file system is "
        "mounted; a bucket is written s3://bucket/prefix."
    )
