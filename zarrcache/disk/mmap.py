"""Map files copy-on-write, find the file of a mapped array, and map it in another process.

A map is private: writes never reach the file. A written page becomes a copy that belongs to the
process, and ``/proc/self/pagemap`` distinguishes it from a page of the file (Linux:
Documentation/admin-guide/mm/pagemap.rst, bit 61). So a process can tell whether an array still
equals the file, however it was written: by NumPy, by torch, in place, through ``ctypes``.
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

__all__ = [
    "Place",
    "is_mapped",
    "is_resident",
    "map_file",
    "map_place",
    "open_regular",
    "place_of",
    "populate",
    "read_in",
]

_FILE_PAGE, _SWAPPED, _PRESENT = (np.uint64(1 << bit) for bit in (61, 62, 63))


@dataclass(frozen=True, slots=True)
class Place:
    """The place of an array's values on disk. It is pickled instead of the values.

    Attributes
    ----------
    path : str
    inode : tuple of int
        Device and inode number, to detect another file of the same name.
    file_bytes, offset, nbytes : int
        Length of the file, and the part of it that holds the values.
    """

    path: str
    inode: tuple[int, int]
    file_bytes: int
    offset: int
    nbytes: int


def open_regular(
    path: str | os.PathLike[str], *, dir_fd: int | None = None
) -> tuple[int, os.stat_result]:
    """Open a file for reading, relative to ``dir_fd`` if given. The caller closes it.

    Raises
    ------
    CorruptEntryError
        It is not a regular file.
    OSError
        The file is gone or cannot be read; a symbolic link is refused.
    """
    # O_NOFOLLOW: a symbolic link in place of an entry was planted. O_NONBLOCK: opening a planted
    # FIFO must not hang.
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
    """Map a whole file, and return an array over the bytes from ``offset`` to its end.

    The array is writable and private. It needs no open file, and stays valid when the file is
    unlinked.

    Raises
    ------
    OSError
        It cannot be mapped.
    """
    place = Place(
        os.fspath(path), (found.st_dev, found.st_ino), found.st_size, offset, found.st_size - offset
    )
    return _mapped(fd, place, dtype, shape)


def map_place(place: Place, dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Map a place that another process got from :func:`place_of`.

    Raises
    ------
    FileNotFoundError
        The file is gone, or another file has its name.
    OSError
        It cannot be mapped.
    """
    try:
        fd, found = open_regular(place.path)
    except CorruptEntryError as exc:
        raise FileNotFoundError(str(exc)) from exc
    try:
        if ((found.st_dev, found.st_ino), found.st_size) != (place.inode, place.file_bytes):
            raise FileNotFoundError(f"{place.path} has been replaced by another file.")
        return _mapped(fd, place, dtype, shape)
    finally:
        os.close(fd)


def place_of(array: np.ndarray[Any, Any]) -> Place | None:
    """The place on disk of a C-contiguous array that this module mapped, if it is unchanged.

    None if it is not mapped, if it (or another part of its first or last page) was written to, or
    if this system cannot tell.
    """
    mapping = _mapping_of(array)
    if mapping is None or not array.flags.c_contiguous or not array.nbytes:
        return None
    start = array.__array_interface__["data"][0]
    if not _is_untouched(start, array.nbytes):
        return None
    whole = mapping.place
    return Place(whole.path, whole.inode, whole.file_bytes, start - mapping.address, array.nbytes)


def read_in(array: np.ndarray[Any, Any]) -> None:
    """Read all pages of a mapped array from disk.

    A read error of the disk is then an exception instead of SIGBUS at the first access. Does
    nothing before Linux 5.14 and on other systems.

    Raises
    ------
    OSError
        A page cannot be read.
    """
    if array.nbytes and is_mapped(array) and array.flags.c_contiguous and sys.platform == "linux":
        if not populate(array.__array_interface__["data"][0], array.nbytes):
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def populate(address: int, nbytes: int) -> bool:
    """Map all pages of a range of memory, reading them from disk. False if one cannot be read."""
    page = address // mmap.PAGESIZE * mmap.PAGESIZE
    return not (
        _libc.madvise(page, address + nbytes - page, _POPULATE_READ)
        and ctypes.get_errno() == errno.EFAULT
    )


def is_resident(address: int, nbytes: int) -> bool:
    """Whether a range of memory can be read without the disk.

    True where this system does not tell, as of another user's files.
    """
    if sys.platform != "linux" or not nbytes:
        return True
    page = address // mmap.PAGESIZE * mmap.PAGESIZE
    length = address + nbytes - page
    states = np.empty(-(-length // mmap.PAGESIZE), np.uint8)
    failed = _libc.mincore(page, length, states.ctypes.data)
    return bool(failed or (states & 1).all())


def is_mapped(array: np.ndarray[Any, Any]) -> bool:
    """Whether this module mapped the array, or the array that it is a view of."""
    return _mapping_of(array) is not None


def _mapping_of(array: np.ndarray[Any, Any]) -> _Mapping | None:
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, _Mapping) else None


def _is_untouched(address: int, nbytes: int) -> bool:
    """Whether every resident page of a private map is still a page of the file."""
    first, last = address // mmap.PAGESIZE, (address + nbytes - 1) // mmap.PAGESIZE
    length = 8 * (last - first + 1)
    try:
        # Opened each time: after a fork, the parent's descriptor still shows the parent's pages.
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
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
#: MADV_POPULATE_READ, which Python's mmap does not define.
_POPULATE_READ = 22
_MAP_FAILED = ctypes.c_void_p(-1).value
_MAP_FIXED = 0x10
_HUGE_PAGE = 2**21


class _Mapping(mmap.mmap):
    """A private, writable map of one file, unmapped when the last array over it is gone.

    It is an anonymous map of Python, over which the file is mapped. Python's map of a file keeps a
    duplicate of the descriptor (``trackfd`` of Python 3.13 changes that): a user who keeps a list
    of a few thousand densities, as the original reader does, would run out of descriptors. A class
    that unmaps in ``__del__`` would lose the KeyboardInterrupt of a Ctrl-C that arrives there, and
    a loop that only reads spends much of its time in unmapping.
    """

    place: Place
    address: int


def _whole(nbytes: int) -> int:
    """The size of a map, for which the kernel chooses an address as it does for the file.

    At a multiple of a huge page a file is mapped in larger parts: 370 us instead of 430 to read
    one of 5 MB. Linux aligns memory of no file since 6.7, if its size is such a multiple.
    """
    return nbytes if nbytes < _HUGE_PAGE else -(-nbytes // _HUGE_PAGE) * _HUGE_PAGE


def _mapped(fd: int, place: Place, dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """An array over a new map of a file. Raises OSError."""
    try:
        mapping = _Mapping(-1, _whole(place.file_bytes), flags=mmap.MAP_PRIVATE)
        array: np.ndarray[Any, Any] = np.ndarray(shape, dtype, mapping, place.offset)
        mapping.place = place
        mapping.address = array.__array_interface__["data"][0] - place.offset
        if (
            _libc.mmap(
                mapping.address,
                place.file_bytes,
                mmap.PROT_READ | mmap.PROT_WRITE,
                mmap.MAP_PRIVATE | _MAP_FIXED,
                fd,
                0,
            )
            == _MAP_FAILED
        ):
            raise OSError(ctypes.get_errno(), "")
    except OSError as exc:
        # Linux allows a process 65530 maps. A writable map counts as memory of the process.
        hint = (
            ". The memory of this process may be limited (ulimit -v, vm.overcommit_memory). If it "
            "holds tens of thousands of densities, keep fewer, or raise vm.max_map_count"
            if exc.errno == errno.ENOMEM
            else ""
        )
        reason = os.strerror(exc.errno or 0)
        raise OSError(exc.errno, f"cannot map {place.path}: {reason}{hint}") from None
    return array
