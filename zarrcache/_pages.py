"""Reuse the memory pages of large arrays, and lend them to another process without a copy.

Writing 5 MiB takes 0.5 ms where the pages are in memory, and several times that where the kernel
has to find and clear each page first. So an array of :func:`empty` gets pages of an earlier array
that no reference leads to any more.

In a DataLoader worker, after :func:`share`, the pages belong to a memfd, which the training process
maps copy-on-write. Then a tensor crosses as a position in it. The file has no name, so killed
processes leave nothing behind, and it does not count against the size of ``/dev/shm``.

* A block has one byte in the file. The worker sets it to `_LENT` when it sends the block; the
  receiver resets it when the last reference to its array is gone. Only then, and without a
  reference in the worker, is the block used again. No locks: each transition has one writer.
* A process that forks gives its child a view of the blocks that it holds. Such blocks are never
  used again: the worker goes on with a new file, and the old one lives as long as a map of it.
* A killed receiver or worker takes its maps with it; the kernel frees the file after the last.

docs/explanation/decisions/ has the measurements and the alternatives.
"""

from __future__ import annotations

import bisect
import contextlib
import math
import mmap
import multiprocessing
import os
import secrets
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary, ref

import numpy as np
from numpy.typing import DTypeLike, NDArray

__all__ = ["File", "Lent", "block_of", "empty", "lend", "receive", "share"]

#: Bytes of address space for the arrays of one process. Memory is used as arrays need it. 99 % of
#: the densities of the Materials Project have at most 27 MiB; a worker with the default
#: ``prefetch_factor`` has four pairs on the way.
LIMIT_BYTES = 512 << 20
#: Arrays at a time. The search for room looks at each.
_MOST_BLOCKS = 1024
#: Below it malloc reuses memory itself. Shared blocks have no minimum: sending a small tensor
#: through torch costs a file descriptor.
_LEAST_PRIVATE_BYTES = 128 << 10

_PAGE = mmap.PAGESIZE
_FREE, _LENT, _SEEN_BY_OTHERS = 0, 1, 2
#: A name, at the start of a shared file.
_NAME_BYTES = 16


@dataclass(frozen=True, slots=True)
class File:
    """The path at which other processes of this user find a worker's file, and its name."""

    pid: int
    descriptor: int
    name: bytes


@dataclass(frozen=True, slots=True)
class Lent:
    """A block on its way to another process, which gives it back."""

    file: File
    start: int
    nbytes: int


class _Process:
    """The state of this process. ``forks`` changes at each fork, in the parent and in the child."""

    def __init__(self) -> None:
        self.pid, self.forks = os.getpid(), 0


_process = _Process()


class _Area:
    """A range of memory for arrays.

    Attributes
    ----------
    memory : mmap
    nbytes, address : int
    header : ndarray of uint8
        The start of the range: a name, then from ``_PAGE`` on one byte per page. The byte of a
        block's first page is the state of the block: `_FREE`, `_LENT` or `_SEEN_BY_OTHERS`.
    """

    def __init__(self, memory: mmap.mmap, nbytes: int, header: mmap.mmap | None = None) -> None:
        self.memory, self.nbytes = memory, nbytes
        self._bytes = np.frombuffer(memory, np.uint8)
        self.address = self._bytes.ctypes.data
        self.header = (
            self._bytes[: _header_bytes(nbytes)]
            if header is None
            else np.frombuffer(header, np.uint8)
        )

    @property
    def states(self) -> NDArray[np.uint8]:
        return self.header[_PAGE:]


def _header_bytes(nbytes: int) -> int:
    """Offset of the first block of a shared file."""
    return _up(_PAGE + nbytes // _PAGE)


class _Shared(_Area):
    """The file of this process."""

    def __init__(self) -> None:
        descriptor = os.memfd_create("zarrcache", os.MFD_CLOEXEC)
        try:
            os.ftruncate(descriptor, LIMIT_BYTES)
            super().__init__(_huge(mmap.mmap(descriptor, LIMIT_BYTES)), LIMIT_BYTES)
        except BaseException:
            os.close(descriptor)
            raise
        name = secrets.token_bytes(_NAME_BYTES)
        self.header[:_NAME_BYTES] = np.frombuffer(name, np.uint8)
        self.file = File(_process.pid, descriptor, name)
        self._process, self._forks = _process, _process.forks

    @property
    def is_seen_by_others(self) -> bool:
        """Whether a child of this process may have arrays of it."""
        return self._forks != _process.forks

    def __del__(self, close: Any = os.close) -> None:
        # A forked child may have another file open under this number.
        file: File | None = getattr(self, "file", None)
        if file is not None and self._process.pid == file.pid:
            close(file.descriptor)


class _Private(_Area):
    """Memory of this process. A forked child has a copy."""

    def __init__(self) -> None:
        memory = mmap.mmap(-1, LIMIT_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        super().__init__(_huge(memory), LIMIT_BYTES)


class _Block:
    """Memory of one array; the ``base`` of it, so it lives as long as the array and its views."""

    __slots__ = ("__array_interface__", "__weakref__", "area", "nbytes", "start")

    def __init__(self, area: _Area, start: int, nbytes: int) -> None:
        self.area, self.start, self.nbytes = area, start, nbytes
        self.__array_interface__ = {
            "version": 3,
            "typestr": "|u1",
            "shape": (nbytes,),
            "data": (area.address + start, False),
        }


class _Received(_Block):
    """A block of another process. It is given back when the last reference to it is gone."""

    __slots__ = ("_forks", "_mapped_bytes", "_pid", "_process", "_state")

    def __init__(self, area: _Area, start: int, nbytes: int) -> None:
        super().__init__(area, start, nbytes)
        self._mapped_bytes, self._state = _up(nbytes), _PAGE + start // _PAGE
        self._process, self._pid, self._forks = _process, _process.pid, _process.forks

    def __del__(self, drop: int = getattr(mmap, "MADV_DONTNEED", 0)) -> None:
        process = self._process
        # Not in a forked child, because the block was lent to its parent.
        if process.pid == self._pid:
            try:
                # Pages that this process wrote to are its copies, and would hide the next values.
                self.area.memory.madvise(drop, self.start, self._mapped_bytes)
            finally:  # a Ctrl-C, which would leave the block taken
                self.area.header[self._state] = (
                    _FREE if process.forks == self._forks else _SEEN_BY_OTHERS
                )


class _Pool:
    """The arrays of this process, by their position in an area."""

    def __init__(self, *, is_shared: bool) -> None:
        self.is_shared, self.is_kept_private = is_shared, False
        self._lock = threading.Lock()
        self._area: _Area | None = None
        self._is_impossible = False
        #: First and last byte of each block, and the block, in order.
        self._taken: list[tuple[int, int, ref[_Block]]] = []
        #: Files with blocks that have not arrived yet.
        self._former: list[_Shared] = []

    def take(self, nbytes: int) -> _Block | None:
        """Memory for ``nbytes``, or None if there is no room. Safe from any thread."""
        if self._is_impossible or nbytes > LIMIT_BYTES:
            return None
        # Finalizers, which may run at any place, never take the lock.
        with self._lock:
            area = self._current()
            return None if area is None else self._place(area, nbytes)

    def _current(self) -> _Area | None:
        area = self._area
        if isinstance(area, _Shared):
            states = area.states
            if area.is_seen_by_others or any(
                states[start // _PAGE] == _SEEN_BY_OTHERS for start, _, _ in self._taken
            ):
                self._former.append(area)
                self._area, self._taken = None, []
        if self._former:
            self._former = [area for area in self._former if (area.states == _LENT).any()]
        if self._area is None:
            try:
                self._area = _Shared() if self.is_shared else _Private()
            except (OSError, ValueError):  # no room for the map, or no descriptor left
                self._is_impossible = True
        return self._area

    def _place(self, area: _Area, nbytes: int) -> _Block | None:
        states = area.states
        self._taken = [
            (start, stop, block)
            for start, stop, block in self._taken
            # The order matters: a block is lent before the reference to it goes.
            if block() is not None or (self.is_shared and states[start // _PAGE] != _FREE)
        ]
        if len(self._taken) == _MOST_BLOCKS:
            return None
        # The first gap: its pages were used most recently.
        place = _header_bytes(area.nbytes)
        for start, stop, _ in self._taken:
            if start - place >= nbytes:
                break
            place = stop
        if place + nbytes > area.nbytes:
            return None
        block = _Block(area, place, nbytes)
        bisect.insort(self._taken, (place, place + _up(nbytes), ref(block)), key=lambda t: t[0])
        return block


_pool = _Pool(is_shared=False)
#: Files of other processes, while an array of one exists or the process that has it is a child.
_attached: WeakValueDictionary[bytes, _Area] = WeakValueDictionary()
_kept: WeakKeyDictionary[multiprocessing.process.BaseProcess, _Area] = WeakKeyDictionary()


def share() -> None:
    """From now on, allocate memory that the parent process can map.

    It has no effect the second time, and if the parent may not map it: without memfd or /proc, or
    under another user.
    """
    global _pool
    if _pool.is_shared or _pool.is_kept_private:
        return
    if _can_share():
        _pool = _Pool(is_shared=True)
    else:
        _pool.is_kept_private = True


def _can_share() -> bool:
    if sys.platform != "linux":
        return False
    try:
        descriptor = os.memfd_create("zarrcache", os.MFD_CLOEXEC)
        try:
            # The same permission as the parent needs to open the worker's.
            os.listdir(f"/proc/{os.getppid()}/fd")
            os.close(os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC))
        finally:
            os.close(descriptor)
    except OSError:
        return False
    return True


def empty(shape: Sequence[int], dtype: DTypeLike) -> NDArray[Any]:
    """A writable C-contiguous array of undefined values, like ``numpy.empty``, on used pages.

    Its memory is used again after the last reference to the array, its views and tensors over it is
    gone, in this process and in the one that it was sent to. ``numpy.empty`` itself is called for
    small arrays and where `LIMIT_BYTES` are in use. Safe from any thread.
    """
    dtype = np.dtype(dtype)
    nbytes = math.prod(shape) * dtype.itemsize
    pool = _pool
    block = None
    if nbytes >= (1 if pool.is_shared else _LEAST_PRIVATE_BYTES):
        block = pool.take(nbytes)
    if block is None:
        return np.empty(shape, dtype)
    return np.asarray(block).view(dtype).reshape(shape)


def block_of(array: NDArray[Any]) -> tuple[int, int] | None:
    """Address and bytes of the shared block in which ``array`` lies, or None."""
    block = _block_of(array)
    if block is None or not isinstance(block.area, _Shared):
        return None
    return block.area.address + block.start, block.nbytes


def lend(array: NDArray[Any]) -> Lent | None:
    """Lend the block of ``array``, once at a time; the result has to reach :func:`receive`.

    None if it is not in a shared block of this process, or if the block is lent already.
    """
    block = _block_of(array)
    if block is None or not isinstance(block.area, _Shared):
        return None
    area = block.area
    state = _PAGE + block.start // _PAGE
    if area.file.pid != _process.pid or area.header[state] != _FREE:
        return None
    area.header[state] = _LENT
    return Lent(area.file, block.start, block.nbytes)


def receive(lent: Lent) -> NDArray[np.uint8]:
    """The bytes of a block that another process lent.

    They are given back when the last reference to the array and its views is gone. Changes stay in
    this process.

    Raises
    ------
    OSError
        The other process has ended before this one received anything from it.
    """
    area = _attached.get(lent.file.name) or _attach(lent.file)
    return np.asarray(_Received(area, lent.start, lent.nbytes))


def _attach(file: File) -> _Area:
    # Not by a descriptor over a socket, as torch does it: that takes a thread and a listening
    # socket in each worker, and each descriptor that is sent can be received once.
    path = f"/proc/{file.pid}/fd/{file.descriptor}"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise OSError(
            exc.errno,
            f"a DataLoader worker sent a sample in its memory, {path}, which cannot be opened "
            f"({exc.strerror}). If the worker (pid {file.pid}) has ended, see the system log.",
        ) from exc
    try:
        nbytes = os.fstat(descriptor).st_size
        if os.pread(descriptor, _NAME_BYTES, 0) != file.name:
            raise FileNotFoundError(
                f"{path} is not the memory of the DataLoader worker that sent a sample; the worker "
                "has ended."
            )
        # Private: a receiver that works in place must not change what the worker may have kept.
        values = mmap.mmap(descriptor, nbytes, flags=mmap.MAP_PRIVATE)
        states = mmap.mmap(descriptor, _header_bytes(nbytes))
        area = _Area(_huge(values), nbytes, states)
    finally:
        os.close(descriptor)
    _attached[file.name] = area
    for process in multiprocessing.active_children():
        if process.pid == file.pid:
            # As long as the loader has the process: the next sample needs no new map.
            _kept[process] = area
    return area


def _block_of(array: NDArray[Any]) -> _Block | None:
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return base if isinstance(base, _Block) else None


def _huge(memory: mmap.mmap) -> mmap.mmap:
    """Ask for pages of 2 MiB, where the system gives them."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def _up(nbytes: int) -> int:
    """``nbytes`` rounded up to whole pages."""
    return -(-nbytes // _PAGE) * _PAGE


def _forks() -> None:
    _process.forks += 1


def _is_forked() -> None:
    """In a child: its parent's blocks are not its own."""
    global _pool
    _process.pid, _process.forks = os.getpid(), _process.forks + 1
    _pool = _Pool(is_shared=False)
    _attached.clear()
    _kept.clear()


# Twice in the parent: another thread may receive a block between the first call and the fork.
os.register_at_fork(before=_forks, after_in_parent=_forks, after_in_child=_is_forked)
