"""The array tier against a model: after any operations it returns what was put, or nothing."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from numpy.typing import NDArray

from tests.support.cachedirs import (
    array_of,
    array_on_disk,
    key_of,
    on_disk_bytes,
    payload_files,
    settings,
)
from zarrcache.cache.tiers import ArrayCache
from zarrcache.stats import Counters

LIMIT = 6 * 8192
#: A disk that other tests keep busy takes seconds for each of the thousand indexes.
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
KEYS = st.integers(0, 5)
SIZES = st.sampled_from([0, 1, 1000, 4096, 4097, 9000, LIMIT])


class ArrayCacheMachine(RuleBasedStateMachine):
    """Two instances over one directory stand for two processes.

    The model knows the newest value and source of each key and which entries were damaged; it
    shares no helper with the code.
    """

    eviction = "none"

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="zarrcache-test-", dir=MEMORY))
        self.values: dict[int, tuple[NDArray[Any], str]] = {}
        self.damaged: set[int] = set()
        self.version = 0
        self.caches = [self.fresh(), self.fresh()]

    def fresh(self) -> ArrayCache:
        """An instance that has not verified any entry."""
        return ArrayCache(settings(self.directory, limit=LIMIT, eviction=self.eviction), Counters())

    def teardown(self) -> None:
        shutil.rmtree(self.directory)

    @rule(which=st.integers(0, 1), number=KEYS, nbytes=SIZES)
    def put(self, which: int, number: int, nbytes: int) -> None:
        self.version += 1
        value, source = array_of(self.version, nbytes), f"v{self.version}"
        admitted = self.caches[which].put(key_of(number), value, source=source) is not None
        assert admitted <= (array_on_disk(nbytes) <= LIMIT)
        if admitted:
            self.values[number] = value, source
            self.damaged.discard(number)
        else:
            # other entries may have been evicted for it, but not replaced
            assert self.eviction == "none" or array_on_disk(nbytes) > LIMIT

    @rule(which=st.integers(0, 1), number=KEYS)
    def get(self, which: int, number: int) -> None:
        cache = self.caches[which]
        purges = cache._counters.snapshot().purges
        entry = cache.get(key_of(number))
        if number in self.damaged:
            assert entry is None or np.array_equal(entry.array, self.values[number][0])
            assert cache._counters.snapshot().purges - purges in (0, 1)
        elif entry is not None:
            assert np.array_equal(entry.array, self.values[number][0])
            assert entry.header.source == self.values[number][1]

    @rule(which=st.integers(0, 1), number=KEYS)
    def get_of_a_changed_origin(self, which: int, number: int) -> None:
        assert self.caches[which].get(key_of(number), source="what the origin lists now") is None

    @rule(which=st.integers(0, 1), number=KEYS)
    def drop(self, which: int, number: int) -> None:
        freed = self.caches[which].drop(key_of(number))
        assert freed in (
            0,
            *(array_on_disk(len(self.values[number][0])) for _ in range(number in self.values)),
        )
        assert self.caches[1 - which].get(key_of(number)) is None

    @rule(
        number=KEYS,
        how=st.sampled_from(["flip head", "flip tail", "truncate", "grow", "delete", "swap"]),
        where=st.integers(0, 2**20),
        read=st.booleans(),
    )
    def corrupt(self, number: int, how: str, where: int, read: bool) -> None:
        paths = payload_files(self.directory)
        mine = [p for p in paths if p.name.startswith(key_of(number).digest)]
        if not mine:
            return
        path = mine[0]
        raw = bytearray(path.read_bytes())
        path.unlink()  # a new inode: existing maps do not change
        if how == "flip head":
            raw[where % 200] ^= 1 << where % 8
        elif how == "flip tail":
            raw[-1 - where % 200] ^= 1 << where % 8
        elif how == "truncate":
            del raw[where % len(raw) :]
        elif how == "grow":
            raw += b"\0"
        elif how == "swap":
            raw = bytearray(next((p.read_bytes() for p in paths if p not in mine), b""))
        if how != "delete":
            path.write_bytes(raw)
        self.damaged.add(number)
        self.caches = [self.fresh(), self.fresh()]  # verify: first looks once at each entry
        if read:
            self.get(0, number)

    @rule(which=st.integers(0, 1))
    def reopen(self, which: int) -> None:
        self.caches[which] = self.fresh()

    @rule(which=st.integers(0, 1))
    def lose_the_index(self, which: int) -> None:
        for path in (self.directory / "cache" / "zarrcache-v1").glob("cache.db*"):
            path.unlink()
        self.caches = [self.fresh(), self.fresh()]
        self.caches[which].index.open()

    @invariant()
    def volume_is_what_lies_on_disk(self) -> None:
        for cache in self.caches:
            if not self.damaged:
                assert cache.index.volume_bytes() == on_disk_bytes(self.directory)

    @invariant()
    def limit_is_never_exceeded(self) -> None:
        assert all(cache.index.volume_bytes() <= LIMIT for cache in self.caches)
        if not self.damaged:
            assert on_disk_bytes(self.directory) <= LIMIT


class EvictingMachine(ArrayCacheMachine):
    """With eviction of the oldest entry."""

    eviction = "least-recently-stored"


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Silence the warning of each purge."""
    caplog.set_level(logging.CRITICAL)


TestAdmitUntilFull = ArrayCacheMachine.TestCase
TestLeastRecentlyStored = EvictingMachine.TestCase
TestAdmitUntilFull.settings = TestLeastRecentlyStored.settings = hypothesis_settings(
    max_examples=25, stateful_step_count=30, deadline=None
)
