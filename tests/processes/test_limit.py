"""Bytes on disk stay under the limit, sampled all the time, with many writers, large entries, and
killed processes.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import signal
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from tests.support.cachedirs import array_of, array_on_disk, key_of, on_disk_bytes, settings
from tests.support.localnode import LocalNode
from tests.support.smalldisk import cluster_disk, small_disk_at
from zarrcache.cache.cache import Cache
from zarrcache.cache.tiers import ArrayCache
from zarrcache.disk.index import Index
from zarrcache.disk.policy import Admission
from zarrcache.stats import Counters

FORK = get_context("fork")
#: Only a hang takes this long; it says nothing about speed.
HANG_S = 300
MIB = 2**20

#: Mixed sizes, the largest a fortieth of the limit; six take this much on disk.
SIZES = [100, 3000, 5000, 9000, 13_000, 20_000]
SIX_BYTES = 88 * 1024
#: What the index of so few entries, its log and the locks may take beside the limit
#: (docs/explanation/reliability.md).
LOG_BYTES = 4 * 2**20
#: ... and the directories: 256 a tier, the two above them, the locks' and the root; a block each
#: while they hold few names.
DIRECTORIES_BYTES = (2 * 257 + 2) * 4096

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def size_of(number: int) -> int:
    """Of an array or object, by its number."""
    return SIZES[number * 7 % len(SIZES)]


def write(
    directory: Path, limit: int, eviction: str, items: int, seed: int, count: int, is_killed: bool
) -> None:
    """Read and store ``count`` entries of both tiers in a random order."""
    counters = Counters()
    cache = Cache(settings(directory, limit=limit, eviction=eviction), counters)
    origin = cache.origin(str(directory / "data"))
    objects = {int(obj.key): obj for obj in origin.list_objects()}
    arrays, blocks = cache.arrays, cache.bytes(origin)
    assert arrays is not None
    assert blocks is not None
    for number in random.Random(seed).sample(range(items), count):
        if number in objects:
            assert blocks.read(objects[number]) == array_of(number, size_of(number)).tobytes()
            continue
        entry = arrays.get(key_of(number))
        if entry is None:
            arrays.put(key_of(number), array_of(number, size_of(number)), source="s")
        else:
            assert np.array_equal(entry.array, array_of(number, size_of(number)))
    assert (counters.snapshot().purges, counters.snapshot().cache_errors) == (0, 0)
    if is_killed:
        cache.index.begin("entries/ab/abcd", limit // 10)  # type: ignore[union-attr]
        os.kill(os.getpid(), signal.SIGKILL)


class Taken(NamedTuple):
    """Bytes of disk blocks: of the files of both tiers, of the index with its log and locks, of the
    directories.
    """

    cache: int
    log: int
    directories: int


def du(root: Path) -> Taken:
    """Disk usage now.

    Only files that still exist at the end of the walk: a removed file and its replacement never
    coexist.
    """
    cache = log = directories = 0
    for path in [
        os.path.join(parent, name)
        for parent, below, names in os.walk(root)
        for name in (*below, *names)
    ]:
        try:
            found = os.lstat(path)
        except FileNotFoundError:
            continue
        if stat.S_ISDIR(found.st_mode):
            directories += found.st_blocks * 512
        elif os.path.relpath(path, root).split(os.sep)[0] in ("entries", "bytes"):
            cache += found.st_blocks * 512
        else:
            log += found.st_blocks * 512
    return Taken(cache, log, directories)


@contextmanager
def sampled(root: Path) -> Iterator[list[Taken]]:
    """Disk usage every 10 ms."""
    samples, done = [Taken(0, 0, 0)], threading.Event()

    def sample() -> None:
        while not done.wait(0.01):
            samples.append(du(root))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield samples
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize(
    ("items", "restarts"),
    [
        pytest.param(180, 2, id="180"),
        pytest.param(1800, 10, id="1800", marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
@pytest.mark.parametrize("eviction", ["none", "least-recently-stored"])
def test_eight_writers_never_exceed_the_limit_and_fill_it(
    tmp_path: Path, eviction: str, items: int, restarts: int
) -> None:
    """Both tiers, mixed sizes, three times as much as fits; two of eight die with space reserved.
    At the end at least 97 % of the limit is used.
    """
    limit = items // 6 * SIX_BYTES // 3
    (tmp_path / "data").mkdir()
    for number in range(0, items, 3):
        (tmp_path / "data" / str(number)).write_bytes(array_of(number, size_of(number)).tobytes())
    for restart in range(restarts):
        # once it is full: keep everything, or replace everything
        most = items if eviction == "none" else items // 2
        jobs = [(8 * restart + n, most // 8 if n < 2 else most, n < 2) for n in range(8)]
        children = [
            FORK.Process(target=write, args=(tmp_path, limit, eviction, items, *job))
            for job in jobs
        ]
        with sampled(tmp_path / "cache" / "zarrcache-v1") as samples:
            for child in children:
                child.start()
            for child in children:
                child.join(HANG_S)
        assert [child.exitcode for child in children] == [-signal.SIGKILL] * 2 + [0] * 6
        most_taken = Taken(*(max(part) for part in zip(*samples, strict=True)))
        print(f"{len(samples)} samples, each part at most {most_taken}, the limit {limit}")
        assert most_taken.cache <= limit
        assert most_taken.log <= LOG_BYTES
        assert most_taken.directories <= DIRECTORIES_BYTES
        assert (
            Index(settings(tmp_path, limit=limit)).volume_bytes()
            == on_disk_bytes(tmp_path)
            >= 0.97 * limit
        )


def test_the_limit_counts_what_the_file_system_allocates(tmp_path: Path) -> None:
    """Files of a few hundred bytes that occupy 64 KiB each. The limit holds and is filled."""
    limit = 6 * MIB
    (tmp_path / "data").mkdir()
    for number in range(0, 120, 3):
        (tmp_path / "data" / str(number)).write_bytes(array_of(number, size_of(number)).tobytes())
    with cluster_disk(tmp_path / "cache"):
        with sampled(tmp_path / "cache" / "zarrcache-v1") as samples:
            write(tmp_path, limit, "least-recently-stored", 120, 1, 120, is_killed=False)
        taken = du(tmp_path / "cache" / "zarrcache-v1")
        assert max(sample.cache for sample in samples) <= limit
        assert 0.9 * limit <= taken.cache <= limit
        index = Index(settings(tmp_path, limit=limit))
        assert index.volume_bytes() == taken.cache
        assert index.on_disk_bytes(1) == 65536
        index.dir.index.unlink()
        index = Index(settings(tmp_path, limit=limit, verify="always"))
        # A rebuild keeps the arrays only.
        assert 0 < index.volume_bytes() == du(tmp_path / "cache" / "zarrcache-v1").cache


_FALLOC_FL_KEEP_SIZE = 1


def store_with_blocks_ahead(cache: ArrayCache, number: int, nbytes: int, ahead: int) -> object:
    """Store a file to which the file system gives more blocks than its length needs."""

    def write(file: FileIO) -> None:
        file.write(bytes(nbytes))
        assert not ctypes.CDLL(None, use_errno=True).fallocate(
            file.fileno(),
            _FALLOC_FL_KEEP_SIZE,
            ctypes.c_long(0),
            ctypes.c_long(nbytes + ahead),
        ), os.strerror(ctypes.get_errno())

    return cache._store(
        f"ab{number:04x}",
        f"entries/ab/ab{number:04x}-01",
        nbytes,
        write,
        kind="array",
        note=f"file\n/d/{number}\ntotal",
        url=f"/d/{number}",
    )


def test_blocks_that_a_file_system_allocates_ahead_count(tmp_path: Path) -> None:
    """Compression, preallocation and parity are known only after a file is written. Such a file is
    counted in full, or not stored; the next one is reserved with as much.
    """
    limit, ahead = 100 * 4096, 19 * 4096
    cache = ArrayCache(settings(tmp_path, limit=limit), Counters())
    outcomes = []
    for number in range(8):
        outcomes.append(store_with_blocks_ahead(cache, number, 4096, ahead))
        taken = du(tmp_path / "cache" / "zarrcache-v1").cache
        assert taken == cache.index.volume_bytes() <= limit
    assert [outcome is Admission.ADMIT for outcome in outcomes] == [True] * 5 + [False] * 3
    assert outcomes[5] is Admission.OVER_LIMIT
    assert cache.index.on_disk_bytes(4096) == 4096 + ahead
    # What exceeds the limit only once it is written is removed again.
    fresh = ArrayCache(settings(tmp_path, limit=limit + 4096), Counters())
    assert store_with_blocks_ahead(fresh, 9, 4096, ahead) is Admission.OVER_LIMIT
    assert du(tmp_path / "cache" / "zarrcache-v1").cache == fresh.index.volume_bytes() == limit


def test_entries_larger_than_the_limit_pass_through_with_one_log_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """In every epoch; nothing is dropped for it, and nothing is written."""
    node = LocalNode(tmp_path, shape=(14, 10, 8))
    reader = node.reader(limit=8192, eviction="least-recently-stored")
    for epoch in range(1, 3):
        node.read(reader)
        assert reader.stats.bypasses == epoch * len(node.values)
    assert (
        len(
            [
                record
                for record in caplog.records
                if "it is larger than the whole limit" in record.getMessage()
            ]
        )
        == 1
    )
    assert on_disk_bytes(tmp_path) <= 8192
    node.check_settled()


MIN_FREE = 3 * MIB


def fill(ballast: Path, nbytes: int) -> None:
    """Another program that writes to the same disk in small steps."""
    with ballast.open("wb", buffering=0) as file:
        for _ in range(nbytes // 65536):
            if shutil.disk_usage(ballast).free < MIN_FREE // 2:
                break  # it began late: the caches have the rest, and their index needs some
            file.write(bytes(65536))
            time.sleep(0.002)


def put_many(directory: Path, numbers: range) -> int:
    """Store arrays of 20,000 bytes; how many were admitted."""
    counters = Counters()
    cache = ArrayCache(settings(directory, min_free=MIN_FREE), counters)
    stored = sum(cache.put(key_of(n), array_of(n, 20_000), source="s") is not None for n in numbers)
    assert counters.snapshot().cache_errors == 0
    return stored


def test_min_free_is_left_while_another_program_fills_the_disk(tmp_path: Path) -> None:
    """3 of 16 MiB stay free. Each admission left enough space, except for what the other program
    and the index wrote since; freed space is used again.
    """

    def others_bytes() -> int:
        taken = 0
        for path in (ballast, *(Path(f"{index.dir.index}{end}") for end in ("", "-wal", "-shm"))):
            with suppress(FileNotFoundError):
                taken += path.stat().st_blocks * 512
        return taken

    with small_disk_at(tmp_path / "cache", "16m") as disk:
        index, ballast = Index(settings(tmp_path)), disk / "ballast"
        index.open()
        ballast.touch()
        children: list[BaseProcess] = [
            FORK.Process(target=put_many, args=(tmp_path, range(200 * n, 200 * n + 200)))
            for n in range(4)
        ]
        children.append(FORK.Process(target=fill, args=(ballast, 6 * MIB)))
        for child in children:
            child.start()
        before, volume, grown = others_bytes(), index.volume_bytes(), 0
        deadline_s = time.monotonic() + HANG_S
        while any(child.is_alive() for child in children):
            assert time.monotonic() < deadline_s
            others = others_bytes()
            if (now := index.volume_bytes()) > volume:
                free = shutil.disk_usage(disk).free
                assert free + others_bytes() - before > MIN_FREE - MIB // 4
                grown += 1
            before, volume = others, now
            time.sleep(0.001)
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0] * 5
        assert grown > 10
        put_many(tmp_path, range(1000, 1400))
        assert shutil.disk_usage(disk).free < MIN_FREE + array_on_disk(20_000)
        # When SQLite restarts the log there is room for a few more entries, once.
        start = next(
            start
            for start in range(1400, 4000, 10)
            if put_many(tmp_path, range(start, start + 10)) == 0
        )
        ballast.unlink()
        assert put_many(tmp_path, range(start, start + 10)) == 10
