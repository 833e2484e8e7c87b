"""Memory that is used again: never while an array over it exists, here or where it was lent."""

from __future__ import annotations

import os
import random
import sys

import numpy as np
import pytest

from zarrcache import _pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memfd and /proc are Linux's")

PAGE = 4096


@pytest.fixture(params=[False, True], ids=["private", "shared"])
def pool(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for some arrays only."""
    monkeypatch.setattr(_pages, "LIMIT_BYTES", 64 * PAGE)
    monkeypatch.setattr(_pages, "_LEAST_PRIVATE_BYTES", 1)
    monkeypatch.setattr(_pages, "_pool", _pages._Pool(is_shared=request.param))


def is_from_pool(array: np.ndarray) -> bool:
    return _pages._block_of(array) is not None


@pytest.mark.usefixtures("pool")
def test_arrays_keep_their_values_while_others_come_and_go() -> None:
    """Of random sizes, also more than there is room for; views keep the memory."""
    draw = random.Random(3)
    live: list[tuple[int, np.ndarray]] = []
    from_pool = 0
    for number in range(3000):
        while live and draw.random() < 0.5:
            value, array = live.pop(draw.randrange(len(live)))
            assert (array == value).all()
        array = _pages.empty((draw.randrange(1, 5), draw.randrange(1, 3000)), np.int32)
        assert array.flags.c_contiguous
        assert array.flags.writeable
        array[...] = number
        from_pool += is_from_pool(array)
        live.append((number, array[:, :1] if draw.random() < 0.3 else array))
    assert from_pool > 1500
    for value, array in live:
        assert (array == value).all()


@pytest.mark.usefixtures("pool")
def test_the_same_pages_are_used_again() -> None:
    first = _pages.empty((3, 1000), np.float32)
    address = first.ctypes.data
    del first
    assert _pages.empty((2, 700), np.float64).ctypes.data == address


@pytest.mark.usefixtures("pool")
def test_without_room_it_is_an_ordinary_array() -> None:
    kept = [_pages.empty((10 * PAGE,), np.uint8) for _ in range(8)]
    assert [is_from_pool(array) for array in kept] == [True] * 6 + [False] * 2
    assert not is_from_pool(_pages.empty((65 * PAGE,), np.uint8))
    assert _pages.empty((0, 3), np.float32).shape == (0, 3)


@pytest.fixture
def lending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_pages, "_pool", _pages._Pool(is_shared=True))


@pytest.mark.usefixtures("lending")
def test_a_lent_block_comes_back_when_its_last_view_is_gone() -> None:
    """The receiver is this process; it maps the file a second time."""
    array = _pages.empty((5000,), np.uint8)
    array[:] = 7
    address = array.ctypes.data
    lent = _pages.lend(array)
    assert lent is not None
    assert _pages.lend(array) is None  # once at a time
    del array
    other = _pages.empty((5000,), np.uint8)
    assert other.ctypes.data != address
    received = _pages.receive(lent)
    assert received.ctypes.data != address
    view = received[10:20]
    del received
    assert _pages.empty((5000,), np.uint8).ctypes.data != address
    assert (view == 7).all()
    del view
    assert _pages.empty((5000,), np.uint8).ctypes.data == address


@pytest.mark.usefixtures("lending")
def test_what_a_receiver_writes_is_neither_seen_by_the_lender_nor_by_the_next_receiver() -> None:
    array = _pages.empty((3 * PAGE,), np.uint8)
    array[:] = 1
    for value in (1, 2):
        array[:] = value
        lent = _pages.lend(array)
        assert lent is not None
        received = _pages.receive(lent)
        assert (received == value).all()
        received[:] = 99
        assert (array == value).all()
        del received


@pytest.mark.usefixtures("lending")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork_blocks_that_the_child_sees_are_not_used_again() -> None:
    lent = _pages.lend(array := _pages.empty((PAGE,), np.uint8))
    assert lent is not None
    received = _pages.receive(lent)
    before = {array.ctypes.data}
    if (pid := os.fork()) == 0:
        del received  # must not give back what the parent has
        os._exit(0)
    os.waitpid(pid, 0)
    assert _pages.lend(array) is None
    del received, array
    # another file, in which this is the first block again
    fresh = _pages.empty((PAGE,), np.uint8)
    again = _pages.lend(fresh)
    assert again is not None
    assert again.file != lent.file
    assert fresh.ctypes.data not in before


@pytest.mark.usefixtures("lending")
def test_a_file_that_cannot_be_opened_is_an_error_in_words() -> None:
    lent = _pages.lend(array := _pages.empty((PAGE,), np.uint8))
    assert lent is not None
    gone = _pages.Lent(_pages.File(lent.file.pid, 10**6, b"x" * 16), lent.start, lent.nbytes)
    with pytest.raises(OSError, match=r"/proc/\d+/fd/1000000, which cannot be opened"):
        _pages.receive(gone)
    with open("/dev/zero", "rb") as other:
        wrong = _pages.File(lent.file.pid, other.fileno(), b"x" * 16)
        with pytest.raises(OSError, match=r"/proc/\d+/fd/\d+"):
            _pages.receive(_pages.Lent(wrong, lent.start, lent.nbytes))
    del array
