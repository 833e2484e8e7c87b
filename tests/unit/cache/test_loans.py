"""Entries on loan: read once, within their room and the limit, and gone with their owner."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from tests.support.cachedirs import (
    array_of,
    array_on_disk,
    key_of,
    on_disk_bytes,
    payload_files,
    settings,
)
from zarrcache.cache.loans import Loans
from zarrcache.cache.tiers import ArrayCache
from zarrcache.disk._database import damage_of
from zarrcache.disk.entry import new_entry
from zarrcache.stats import Counters

ONE = array_on_disk(10_000)


def caches(
    directory: Path, entries: int, loans: int, **block: object
) -> tuple[ArrayCache, ArrayCache]:
    """A training's cache with room for ``entries``, all of it taken, and that of a prefetcher."""
    config = settings(directory, limit=entries * ONE, **block)
    training, prefetcher = ArrayCache(config, Counters()), ArrayCache(config, Counters())
    prefetcher.loans = Loans(prefetcher.index, loans * ONE)
    for number in range(entries):
        assert training.put(key_of(number), array_of(number, 10_000), source="s")
    return training, prefetcher


def lend(cache: ArrayCache, number: int) -> None:
    """As a prefetcher does where the cache is full."""
    assert cache.put(key_of(number), array_of(number, 10_000), source="s") is None


def stored(cache: ArrayCache) -> list[int]:
    """Numbers of the entries that stay."""
    return [int(Path(entry.key.url).stem.removeprefix("mp-")) for entry in cache.entries()]


def test_a_loan_is_read_once_and_is_the_readers_own(tmp_path: Path) -> None:
    """It is not listed as an entry, and reading removes its file and its row."""
    training, prefetcher = caches(tmp_path, 10, 3)
    lend(prefetcher, 20)
    assert stored(training) == list(range(3, 10))  # its room was that of the oldest
    files = payload_files(tmp_path)
    entry = training.get(key_of(20), source="s")
    assert entry is not None
    assert np.array_equal(entry.array, array_of(20, 10_000))
    assert training.get(key_of(20), source="s") is None
    assert len(payload_files(tmp_path)) == len(files) - 1
    assert not training.index.loans()


def test_loans_stay_within_their_room_and_everything_within_the_limit(tmp_path: Path) -> None:
    """Further loans are refused until one is taken."""
    training, prefetcher = caches(tmp_path, 10, 3)
    loans = prefetcher.loans
    assert loans is not None
    for number in range(20, 25):
        lend(prefetcher, number)
        assert on_disk_bytes(tmp_path) <= training.index.volume_bytes() <= 10 * ONE
    assert training.index.loans() == {key_of(number).digest for number in (20, 21, 22)}
    # the training's own puts get none of the room
    assert training.put(key_of(30), array_of(30, 10_000), source="s") is None
    assert training.get(key_of(21)) is not None
    loans.look()
    assert loans.held_bytes == 2 * ONE
    lend(prefetcher, 26)
    assert key_of(26).digest in training.index.loans()
    assert training.index.volume_bytes() == 10 * ONE
    assert damage_of(training.index._file.select) is None
    loans.close()
    assert training.index.volume_bytes() == on_disk_bytes(tmp_path) == 7 * ONE


def test_a_stale_or_damaged_loan_is_a_miss_and_goes(tmp_path: Path) -> None:
    training, prefetcher = caches(tmp_path, 10, 3)
    for number in (20, 21):
        lend(prefetcher, number)
    assert training.get(key_of(20), source="another") is None
    path = training.index.dir.root / training.index.lookup("-" + key_of(21).digest).filename  # type: ignore[union-attr]
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.unlink()
    path.write_bytes(damaged)
    assert training.get(key_of(21), source="s") is None
    assert not training.index.loans()
    assert not path.exists()


def test_a_loan_with_damaged_attributes_is_a_miss_and_goes(tmp_path: Path) -> None:
    training, prefetcher = caches(tmp_path, 10, 3)
    key = key_of(20)
    made = new_entry(key, array_of(20, 10_000), "s", attributes=b"packed")
    assert prefetcher.store(made) is None
    path = training.index.dir.root / training.index.lookup("-" + key.digest).filename  # type: ignore[union-attr]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert training.get(key) is None
    assert not training.index.loans()
    assert not path.exists()


def test_a_loan_that_is_announced_and_not_written_yet_is_a_miss(tmp_path: Path) -> None:
    """Its reader then waits for the lock that the prefetcher holds."""
    training, prefetcher = caches(tmp_path, 10, 3)
    assert prefetcher.loans is not None
    assert prefetcher.loans.lend(
        key_of(20).digest, f"entries/{key_of(20).digest[:2]}/{key_of(20).digest}-0000", ONE
    )
    assert training.get(key_of(20)) is None
    assert training.index.loans()


def _lend_and_wait(directory: Path, pipe: object) -> None:
    config = settings(directory, limit=10 * ONE)
    prefetcher = ArrayCache(config, Counters())
    prefetcher.loans = Loans(prefetcher.index, 3 * ONE)
    for number in (20, 21):
        lend(prefetcher, number)
    pipe.send(None)  # type: ignore[attr-defined]
    signal.pause()


def test_loans_and_their_room_are_reclaimed_when_their_owner_was_killed(tmp_path: Path) -> None:
    """By the next process that needs room; until then each can be read once."""
    training, _ = caches(tmp_path, 10, 3)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_lend_and_wait, args=(tmp_path, theirs))
    process.start()
    ours.recv()
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    assert training.get(key_of(20)) is not None
    assert training.index.volume_bytes() == 10 * ONE
    assert training.put(key_of(30), array_of(30, 10_000), source="s")
    assert not training.index.loans()
    assert training.index.volume_bytes() == on_disk_bytes(tmp_path) == 8 * ONE


def test_on_a_disk_that_others_have_filled_nothing_is_lent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged once, and not every entry of the training is dropped for it."""
    training, prefetcher = caches(tmp_path, 10, 3)
    full = prefetcher.index._config.model_copy(update={"min_free": 2**60})
    prefetcher.index._config = full
    lend(prefetcher, 20)
    lend(prefetcher, 21)
    assert stored(training) == list(range(3, 10))
    assert not training.index.loans()
    assert caplog.text.count("no look-ahead") == 1


def test_two_prefetchers_of_a_node_never_lend_the_same(tmp_path: Path) -> None:
    """The second is refused: in place of the first one's row it would leave an unknown file."""
    training, first = caches(tmp_path, 10, 3)
    second = ArrayCache(settings(tmp_path, limit=10 * ONE), Counters())
    second.loans = Loans(second.index, 3 * ONE)
    lend(first, 20)
    lend(second, 20)
    lend(second, 21)
    assert first.index.loans() == {key_of(20).digest, key_of(21).digest}
    assert len(payload_files(tmp_path)) == len(stored(training)) + 2
    for number in (20, 21):
        entry = training.get(key_of(number), source="s")
        assert entry is not None
        assert np.array_equal(entry.array, array_of(number, 10_000))
    for loans in (first.loans, second.loans):
        assert loans is not None
        loans.look()
        loans.close()
    assert len(payload_files(tmp_path)) == len(stored(training))


def test_room_is_made_of_as_many_small_entries_as_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of more than one page of rows, and of no more than is needed."""
    monkeypatch.setattr("zarrcache.disk.policy._PAGES", (2, 3, -1))
    training, prefetcher = caches(tmp_path, 10, 6)
    training.index.drop([key_of(9).digest])
    # there is room for half of it
    assert prefetcher.put(key_of(20), array_of(20, 20_000), source="s") is None
    assert prefetcher.loans is not None
    assert prefetcher.loans.is_open
    assert stored(training) == list(range(5, 9))


def test_room_that_others_take_while_it_is_made_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the run would go on without look-ahead."""
    training, prefetcher = caches(tmp_path, 10, 3)
    drop, others = prefetcher.index.drop_oldest, iter((30, 31))

    def drop_and_be_overtaken(needed_bytes: int) -> int:
        freed = drop(needed_bytes)
        for number in others:
            assert training.put(key_of(number), array_of(number, 10_000), source="s")
            break
        return freed

    monkeypatch.setattr(prefetcher.index, "drop_oldest", drop_and_be_overtaken)
    lend(prefetcher, 20)
    assert training.index.loans() == {key_of(20).digest}
    assert stored(training) == [5, 6, 7, 8, 9, 30, 31]
    assert training.index.volume_bytes() == 10 * ONE
