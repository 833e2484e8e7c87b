"""Containers that share one cache directory: they see neither each other's processes nor, if a
clock is wrong, each other's time.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import pytest

from tests.support.cachedirs import array_of, key_of, settings
from tests.support.namespaces import containered
from zarrcache.cache.tiers import ArrayCache
from zarrcache.disk import single_flight as _locks
from zarrcache.disk.index import Index, Intent
from zarrcache.disk.policy import Admission
from zarrcache.stats import Counters

#: Only a hang takes this long.
HANG_S = 60
LIMIT = 64 * 4096
RESERVED = 60 * 4096

RESERVE = f"""
import os, sys
from pathlib import Path
from zarrcache.config import CacheConfig
from zarrcache.disk import Index, Intent
index = Index(CacheConfig(dir=sys.argv[1], min_free=0, limit={LIMIT}))
intent = index.begin("entries/ab/abcd-01", {RESERVED})
assert isinstance(intent, Intent), intent
index.dir.make(index.dir.root / "entries" / "ab")
print(os.getpid(), flush=True)
sys.stdin.read()
index.commit(intent, "abcd", "array", "file\\n/d/x\\ntotal")
print("committed", flush=True)
"""


def soon(condition: Callable[[], bool]) -> None:
    """Wait for a process that was killed just now."""
    deadline_s = time.monotonic() + HANG_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@contextmanager
def container(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of another container that has reserved most of the limit."""
    process = subprocess.Popen(
        [*containered(), sys.executable, "-c", RESERVE, str(tmp_path / "cache")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert int(process.stdout.readline()) < 100  # a pid that another process has here
        yield process
    finally:
        process.kill()
        process.wait(HANG_S)
        process.stdin.close()
        process.stdout.close()


def shift(index: Index, age_s: float) -> None:
    """Let all rows look as if the clock that wrote them were wrong by so much."""
    index._file._execute("UPDATE Cache SET store_time = store_time - ?", (age_s,))


@pytest.mark.parametrize("age_s", [0.0, 3 * 86400.0, -3 * 86400.0, 1e9], ids=str)
def test_room_reserved_in_another_container_is_kept_whatever_the_clocks_say(
    tmp_path: Path, age_s: float
) -> None:
    """And freed as soon as that process is killed, not a day later."""
    index = Index(settings(tmp_path, limit=LIMIT))
    with container(tmp_path) as process:
        index.open()
        shift(index, age_s)
        assert index.sweep() == 0
        assert index.begin("entries/cd/cd-01", 8 * 4096) is Admission.OVER_LIMIT
        assert index.volume_bytes() == RESERVED
        process.kill()
        process.wait(HANG_S)
        soon(lambda: isinstance(index.begin("entries/cd/cd-01", 8 * 4096), Intent))
        assert index.volume_bytes() == 8 * 4096


def test_a_container_that_was_not_swept_stores_its_entry(tmp_path: Path) -> None:
    index = Index(settings(tmp_path, limit=LIMIT))
    with container(tmp_path) as process:
        index.open()
        shift(index, 1e9)
        assert index.sweep() == 0
        out, _ = process.communicate("", timeout=HANG_S)
        assert out == "committed\n"
    assert index.lookup("abcd") is not None


def test_a_deleted_lock_file_is_made_again_before_the_next_reservation(tmp_path: Path) -> None:
    """Cleaners of temporary directories remove files that have not changed for days."""
    index = Index(settings(tmp_path))
    owners = index.dir.locks / "owners.lock"
    for _ in range(2):
        assert isinstance(index.begin("entries/ab/abcd-01", 4096), Intent)
        owners.unlink()
    index.begin("entries/ab/abcd-01", 4096)
    assert owners.exists()


def _hold_and_end(directory: Path) -> None:
    cache = ArrayCache(settings(directory), Counters())
    assert cache.put(key_of(1), array_of(1), source="s") is not None


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_does_not_keep_its_parent_alive(tmp_path: Path) -> None:
    """The child inherits the descriptor, and with it the lock, unless it is closed there."""
    index = Index(settings(tmp_path))
    index.open()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:  # reserves, forks a child that stays, and is killed
        mine = Index(settings(tmp_path))
        mine.begin("entries/ab/abcd-01", 4096)
        if os.fork() == 0:
            os.read(read, 1)
            os._exit(0)
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    (row,) = index._file.select("SELECT value FROM Cache WHERE key LIKE '+%'")
    owner = row[0].partition(" ")[2]
    # As another container sees it: only by its lock.
    byte = _locks._lock(fcntl.F_WRLCK, _locks._byte_of(owner))

    def is_free() -> bool:
        with (index.dir.locks / "owners.lock").open("rb") as file:
            answer = fcntl.fcntl(file, fcntl.F_OFD_GETLK, byte)
        return _locks._FLOCK.unpack(answer)[0] == fcntl.F_UNLCK

    try:
        soon(is_free)
    finally:
        os.write(write, b"x")
        os.close(read)
        os.close(write)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_each_process_of_a_pool_is_an_owner_of_its_own(tmp_path: Path) -> None:
    context = get_context("fork")
    cache = ArrayCache(settings(tmp_path), Counters())
    assert cache.put(key_of(0), array_of(0), source="s") is not None
    children = [context.Process(target=_hold_and_end, args=(tmp_path,)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(HANG_S)
    assert [child.exitcode for child in children] == [0] * 3
    assert cache.index.sweep() == 0
