"""Mapped files: the place of an array, and whether it was written to."""

from __future__ import annotations

import ctypes
import os
import pickle
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from zarrcache.disk.mmap import Place, is_mapped, map_file, map_place, open_regular, place_of
from zarrcache.errors import CorruptEntryError

OFFSET = 4096
VALUES = np.arange(3000, dtype="<f4")

pytestmark = pytest.mark.skipif(
    not os.path.exists("/proc/self/pagemap"),
    reason="this system does not tell which pages were written",
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """One page of other bytes, then the values."""
    path = tmp_path / "entry"
    path.write_bytes(b"h" * OFFSET + VALUES.tobytes())
    return path


def mapped(path: Path) -> NDArray[np.float32]:
    """The values, mapped."""
    fd, found = open_regular(path)
    try:
        return map_file(fd, found, path, OFFSET, "<f4", VALUES.shape)
    finally:
        os.close(fd)


def place(path: Path, array: NDArray[np.float32]) -> Place:
    found = place_of(array)
    assert found is not None
    assert found.path == str(path)
    return found


def test_another_map_of_the_place_has_the_same_values(file: Path) -> None:
    """The place pickles, in few bytes."""
    found = pickle.loads(pickle.dumps(place(file, mapped(file))))
    assert np.array_equal(map_place(found, "<f4", (30, 100)), VALUES.reshape(30, 100))
    assert len(pickle.dumps(found)) < 500


def test_a_contiguous_view_has_a_place_of_its_own(file: Path) -> None:
    view = mapped(file).reshape(30, 100)[5:7][None]
    found = place(file, view)
    assert (found.offset, found.nbytes) == (OFFSET + 4 * 500, 4 * 200)
    assert np.array_equal(map_place(found, "<f4", (200,)), VALUES[500:700])


@pytest.mark.parametrize(
    "array", [VALUES, VALUES.copy(), np.empty(0, "<f4")], ids=["global", "copy", "empty"]
)
def test_an_array_in_memory_has_no_place(array: NDArray[Any]) -> None:
    assert place_of(array) is None
    assert not is_mapped(array)


@pytest.mark.parametrize(
    "view", [lambda a: a[::2], lambda a: a[::-1], lambda a: a.reshape(30, 100).T, lambda a: a[:0]]
)
def test_a_view_with_gaps_has_no_place(file: Path, view: Callable[[Any], Any]) -> None:
    """A place is one run of bytes."""
    array = view(mapped(file))
    assert is_mapped(array)
    assert place_of(array) is None


def _by_ctypes(array: NDArray[np.float32]) -> None:
    ctypes.memset(array.ctypes.data + 8000, 1, 1)


WRITES: dict[str, Callable[[Any], Any]] = {
    "numpy": lambda a: a.__setitem__(2999, 7.0),
    "numpy in place": lambda a: a.__imul__(2),
    "a view": lambda a: a.reshape(30, 100)[3, 1:2].fill(0),
    "the same value": lambda a: a.__setitem__(0, a[0]),
    "torch": lambda a: torch.from_numpy(a).mul_(2),
    "torch data": lambda a: torch.from_numpy(a).data.__setitem__(5, 1.0),
    "a view of torch": lambda a: torch.from_numpy(a)[1000:1001].zero_(),
    "ctypes": _by_ctypes,
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_an_array_that_was_written_to_has_no_place(file: Path, write: Callable[[Any], Any]) -> None:
    """By whatever means it was written; the file is unchanged."""
    array = mapped(file)
    array.sum()
    assert place_of(array) is not None
    write(array)
    assert place_of(array) is None
    assert file.read_bytes()[OFFSET:] == VALUES.tobytes()


def test_a_forked_child_looks_at_its_own_pages(file: Path) -> None:
    """The parent writes after the fork, the child does not."""
    array = mapped(file)
    array.sum()
    to_child, to_parent = os.pipe(), os.pipe()
    pid = os.fork()
    if not pid:
        os.read(to_child[0], 1)
        os.write(to_parent[1], b"1" if place_of(array) is not None else b"0")
        os._exit(0)
    array[0] = 9
    os.write(to_child[1], b"g")
    answer = os.read(to_parent[0], 1)
    os.waitpid(pid, 0)
    for fd in (*to_child, *to_parent):
        os.close(fd)
    assert answer == b"1"
    assert place_of(array) is None


@pytest.mark.parametrize("change", ["gone", "replaced", "longer", "link", "directory"])
def test_a_file_that_was_removed_or_replaced_is_not_found(file: Path, change: str) -> None:
    found = place(file, mapped(file))
    kept = file.rename(file.with_name("kept"))
    if change == "replaced":
        file.write_bytes(kept.read_bytes())
    elif change == "longer":
        kept.rename(file)
        with open(file, "ab") as f:
            f.write(b"x")
    elif change == "link":
        file.symlink_to(kept)
    elif change == "directory":
        file.mkdir()
    with pytest.raises(OSError):  # noqa: PT011 - a symbolic link is ELOOP, the others are FileNotFoundError
        map_place(found, "<f4", VALUES.shape)


def test_a_map_outlives_its_file_and_holds_no_descriptor(file: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    array = mapped(file)
    # A part of it: what earlier tests left is closed at any time.
    assert set(os.listdir("/proc/self/fd")) <= before
    file.unlink()
    assert np.array_equal(array, VALUES)


def test_a_map_that_the_system_refuses_names_the_limits(file: Path) -> None:
    """A list of 65,000 densities reaches it; here the map would exceed the address space."""
    fd, found = open_regular(file)
    huge = os.stat_result((*found[:6], 1 << 62, *found[7:]))
    with pytest.raises(OSError, match=r"Cannot allocate memory\. .*ulimit -v.*vm\.max_map_count"):
        map_file(fd, huge, file, OFFSET, "<f4", (3000,))
    os.close(fd)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """A planted FIFO must not hang the reader."""
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CorruptEntryError, match="not a regular file"):
        open_regular(tmp_path / "fifo")


def test_an_interruption_while_a_map_ends_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception that a signal handler raises in a ``__del__`` is ignored."""
    values = np.zeros(2**20, "<f4")
    values.tofile(tmp_path / "file")
    fd, found = open_regular(tmp_path / "file")
    ignored: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", ignored.append)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def read_for(seconds: float) -> None:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        while not ignored:
            map_file(fd, found, tmp_path / "file", 0, "<f4", values.shape).sum()

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        for attempt in range(200):
            with pytest.raises(KeyboardInterrupt):
                read_for(0.001 + 1e-5 * attempt)
    finally:
        signal.signal(signal.SIGALRM, before)
        os.close(fd)
    assert ignored == []
