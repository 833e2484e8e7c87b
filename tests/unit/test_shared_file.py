"""The unnamed file that the processes of a run share."""

from __future__ import annotations

import multiprocessing
import pickle
import threading

import pytest

from zarrcache import stats
from zarrcache.stats import SharedFile, SharedSet


def _append(file: SharedFile, letter: bytes) -> None:
    for _ in range(100):
        file.append(letter * 16)


def _add(shared: SharedSet, digest: str) -> None:
    shared.add(digest)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_appends_of_several_processes_never_mix(method: str) -> None:
    """Each record is whole and each is there, whatever way the children were made."""
    file = SharedFile.new()
    context = multiprocessing.get_context(method)
    children = [context.Process(target=_append, args=(file, bytes([65 + i]))) for i in range(4)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
        assert child.exitcode == 0
    raw = file.read()
    records = [raw[i : i + 16] for i in range(0, len(raw), 16)]
    assert sorted(records) == sorted(bytes([65 + i]) * 16 for i in range(4) for _ in range(100))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_what_one_process_adds_all_have(method: str) -> None:
    """A digest added in a child is in the parent's set, also after the child has ended."""
    shared, digest = SharedSet(), "ab" * 16
    assert digest not in shared
    child = multiprocessing.get_context(method).Process(target=_add, args=(shared, digest))
    child.start()
    child.join(60)
    assert digest in shared
    assert "cd" * 16 not in shared


def test_a_full_set_takes_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks that the byte tier has verified may be tens of millions."""
    monkeypatch.setattr(stats, "_MOST_DIGESTS", 2)
    one, other = SharedSet(), SharedSet()
    other.__setstate__(one.__getstate__())  # as in another process, which has read nothing yet
    one.add("ab" * 16)
    one.add("cd" * 16)
    other.add("ef" * 16)
    for shared in (one, other):
        assert ["ab" * 16 in shared, "cd" * 16 in shared, "ef" * 16 in shared] == [1, 1, 0]
    assert one.__getstate__().nbytes == 2 * 16


def test_a_pickle_that_outlives_the_file_starts_empty() -> None:
    """The address of a file that is gone, or is another one by now, is not followed."""
    file = SharedFile.new()
    file.append(b"x" * 16)
    pickled = pickle.dumps(file)
    assert pickle.loads(pickled).read() == b"x" * 16
    del file
    assert pickle.loads(pickled).read() == b""


def test_a_child_forked_while_a_thread_holds_the_lock_does_not_hang() -> None:
    """The lock of the parent's thread is not the child's."""
    shared = SharedSet()
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with shared._lock_of_this_process():
            held.set()
            release.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(60)
    child = multiprocessing.get_context("fork").Process(target=_add, args=(shared, "ab" * 16))
    child.start()
    child.join(60)
    release.set()
    thread.join()
    assert child.exitcode == 0
    assert "ab" * 16 in shared
