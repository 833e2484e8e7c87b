"""Files mapped copy-on-write: mapped, found again beneath an array, mapped a second time by another
process.

A map is private: what a reader writes never reaches the file.  A page that was written is a copy of
the process's own from then on, and ``/proc/self/pagemap`` tells it apart from the file's (Linux:
Documentation/admin-guide/mm/pagemap.rst, bit 61).  So a process knows whether an array still is
what the file holds, however it may have been written: by numpy, by torch, in place, through
``ctypes``.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import stat
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from zarrcache.errors import CorruptEntryError

__all__ = ["Place", "is_mapped", "map_file", "map_place", "open_regular", "place_of", "read_in"]

_FILE_PAGE, _SWAPPED, _PRESENT = (np.uint64(1 << bit) for bit in (61, 62, 63))


@dataclass(frozen=True, slots=True)
class Place:
    """Where the values of an array lie on disk. Small, and pickled instead of them.

    Attributes
    ----------
    path : str
    inode : tuple of int
        Device and inode number: another file of the same name is another place.
    file_bytes, offset, nbytes : int
        Length of the file, and the part of it.
    """

    path: str
    inode: tuple[int, int]
    file_bytes: int
    offset: int
    nbytes: int


def open_regular(
    path: str | os.PathLike[str], *, dir_fd: int | None = None
) -> tuple[int, os.stat_result]:
    """Open a file to read, ``path`` counting from the directory ``dir_fd`` if it is given. The
    caller closes the descriptor.

    Raises
    ------
    CorruptEntryError
        It is not a regular file.
    OSError
        The file is gone or cannot be read; a symbolic link is refused.
    """
    # O_NOFOLLOW: a symbolic link in place of an entry was planted. O_NONBLOCK: a planted FIFO must
    # not hang us.
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=dir_fd)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        os.close(fd)
        raise CorruptEntryError(f"{os.fspath(path)} is not a regular file.")
    return fd, found


def map_file(
    fd: int,
    found: os.stat_result,
    path: str | os.PathLike[str],
    offset: int,
    dtype: str,
    shape: tuple[int, ...],
) -> np.ndarray[Any, Any]:
    """Map a file from its start to its end, and an array over what lies from ``offset`` to the end.

    The array is writable and private. It needs no open file, and stays good while the file is
    unlinked.

    Raises
    ------
    OSError
        It cannot be mapped.
    """
    place = Place(
        os.fspath(path), (found.st_dev, found.st_ino), found.st_size, offset, found.st_size - offset
    )
    return np.asarray(_Mapping(fd, place, dtype, shape))


def map_place(place: Place, dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Map what another process found by :func:`place_of`.

    Raises
    ------
    FileNotFoundError
        It is not there any more; there may be another file of its name.
    OSError
        It cannot be mapped.
    """
    try:
        fd, found = open_regular(place.path)
    except CorruptEntryError as exc:
        raise FileNotFoundError(str(exc)) from exc
    try:
        if ((found.st_dev, found.st_ino), found.st_size) != (place.inode, place.file_bytes):
            raise FileNotFoundError(f"{place.path} is another file now.")
        return np.asarray(_Mapping(fd, place, dtype, shape))
    finally:
        os.close(fd)


def place_of(array: np.ndarray[Any, Any]) -> Place | None:
    """Where a C-contiguous array that was mapped here lies on disk.

    None if it does not, if something has been written to it since (or to its first or last page),
    or if this system cannot tell.
    """
    mapping = _beneath(array)
    if mapping is None or not array.flags.c_contiguous or not array.nbytes:
        return None
    start = array.__array_interface__["data"][0]
    if not _is_untouched(start, array.nbytes):
        return None
    whole = mapping.place
    return Place(whole.path, whole.inode, whole.file_bytes, start - mapping.address, array.nbytes)


def read_in(array: np.ndarray[Any, Any]) -> None:
    """Have the kernel read all pages of a mapped array, so that a disk that cannot is an error and
    not SIGBUS at the first touch.

    On an older kernel (before Linux 5.14) and elsewhere it does nothing.

    Raises
    ------
    OSError
        A page cannot be read.
    """
    if array.nbytes and is_mapped(array) and array.flags.c_contiguous and sys.platform == "linux":
        start = array.__array_interface__["data"][0]
        page = start // mmap.PAGESIZE * mmap.PAGESIZE
        if (
            _libc.madvise(page, start + array.nbytes - page, _POPULATE_READ)
            and ctypes.get_errno() == errno.EFAULT
        ):
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def is_mapped(array: np.ndarray[Any, Any]) -> bool:
    """Whether an array is, or is a view of, one that was mapped here."""
    return _beneath(array) is not None


def _beneath(array: np.ndarray[Any, Any]) -> _Mapping | None:
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, _Mapping) else None


def _is_untouched(address: int, nbytes: int) -> bool:
    """Whether every page of a private map that is in memory is still the file's."""
    first, last = address // mmap.PAGESIZE, (address + nbytes - 1) // mmap.PAGESIZE
    length = 8 * (last - first + 1)
    try:
        # Opened each time: after a fork the parent's descriptor would tell of the parent's pages.
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        raw = os.pread(fd, length, 8 * first)
    except OSError:
        return False
    finally:
        os.close(fd)
    pages = np.frombuffer(raw, np.uint64)
    is_own = ((pages & (_PRESENT | _SWAPPED)) != 0) & ((pages & _FILE_PAGE) == 0)
    return len(raw) == length and not is_own.any()


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
#: MADV_POPULATE_READ, which Python's mmap does not know.
_POPULATE_READ = 22
_MAP_FAILED = ctypes.c_void_p(-1).value


class _Mapping:
    """A private, writable map of one file, as numpy's array interface; unmapped when the last array
    over it is gone.

    Python's ``mmap`` keeps a duplicate of the file descriptor as long as the map lives (until
    3.13's ``trackfd=False``): a user who keeps a list of a few thousand densities, as the original
    reader does, would run out of descriptors.
    """

    __slots__ = ("__array_interface__", "address", "place")

    def __init__(self, fd: int, place: Place, dtype: str, shape: tuple[int, ...]) -> None:
        address = _libc.mmap(
            None, place.file_bytes, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE, fd, 0
        )
        if address == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, f"cannot map an entry: {os.strerror(code)}")
        self.address, self.place = address, place
        self.__array_interface__ = {
            "version": 3,
            "typestr": dtype,
            "shape": shape,
            "data": (address + place.offset, False),
        }

    def __del__(self) -> None:
        address = getattr(self, "address", None)
        if address is not None:
            _libc.munmap(address, self.place.file_bytes)
