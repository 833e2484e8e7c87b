"""Decisions without I/O: admission, victims, freshness, and what a file occupies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.training import write_pairs
from zarrcache import ZarrS3Reader
from zarrcache._units import Percent
from zarrcache.disk.policy import (
    Admission,
    admit,
    choose_victims,
    disk_bytes,
    is_fresh,
    min_free_bytes,
)

GIB = 1024**3


@pytest.mark.parametrize(("nbytes", "blocks"), [(0, 0), (1, 1), (4096, 1), (4097, 2), (8192, 2)])
def test_a_file_occupies_whole_blocks(nbytes: int, blocks: int) -> None:
    """The sum has to agree with ``du``."""
    assert disk_bytes(nbytes) == blocks * 4096


def test_min_free_is_bytes_or_a_share() -> None:
    """``5 %`` is of the file system, a number is bytes."""
    assert min_free_bytes(Percent(5), 200 * GIB) == 10 * GIB
    assert min_free_bytes(7, 200 * GIB) == 7


@pytest.mark.parametrize(
    ("size", "volume", "free", "outcome"),
    [
        (100, 0, 1000, Admission.ADMIT),
        (100, 900, 1000, Admission.ADMIT),
        (101, 900, 1000, Admission.OVER_LIMIT),
        (1001, 0, 9999, Admission.TOO_LARGE),
        (100, 0, 149, Admission.DISK_FULL),
        (100, 0, 150, Admission.ADMIT),
    ],
)
def test_admission_keeps_the_limit_and_the_free_space(
    size: int, volume: int, free: int, outcome: Admission
) -> None:
    """The limit may be reached exactly."""
    assert (
        admit(size, volume_bytes=volume, limit_bytes=1000, free_bytes=free, min_free_bytes=50)
        is outcome
    )


@given(st.lists(st.integers(1, 10**6)), st.integers(-5, 10**7))
def test_victims_are_the_first_that_suffice(sizes: list[int], needed: int) -> None:
    """All of them if they do not suffice."""
    entries = [(str(i), size) for i, size in enumerate(sizes)]
    victims = choose_victims(entries, needed)
    assert victims == [name for name, _ in entries[: len(victims)]]
    assert sum(sizes[: len(victims)]) >= needed or len(victims) == len(sizes)
    assert not victims or sum(sizes[: len(victims) - 1]) < needed


def test_an_entry_is_trusted_if_the_origin_was_not_listed() -> None:
    assert is_fresh("a", None)
    assert is_fresh("a", "a")
    assert not is_fresh("a", "b")


# -- a policy of a third party: only public names


class DropNewest:
    """Keeps the oldest entries and always admits the new one."""

    def victims(
        self, digest: str, needed_bytes: int, stored: Callable[..., Sequence[tuple[str, int]]]
    ) -> list[str]:
        chosen, freed_bytes = [], 0
        for name, size_bytes in reversed(stored(kind="array")):
            if freed_bytes >= needed_bytes:
                break
            chosen.append(name)
            freed_bytes += size_bytes
        return chosen


class DropNothing:
    def victims(self, digest: str, needed_bytes: int, stored: object) -> list[str]:
        return []


@pytest.fixture
def reader(tmp_path: Path, make_reader: Callable[..., ZarrS3Reader]) -> ZarrS3Reader:
    """Over six materials, with room for four densities and the two listings."""
    write_pairs(tmp_path, 6)
    reader = make_reader(cache={"limit": 6 * 8192, "eviction": "least-recently-stored"})
    assert len(reader.task_ids) == 6
    return reader


def stored_after_reading_all(reader: ZarrS3Reader) -> list[int]:
    for number in range(6):
        reader.load(f"mp-{number}", "data")
    found = []
    for number in reversed(range(6)):
        hits = reader.stats.hits
        reader.load(f"mp-{number}", "data")
        if reader.stats.hits == hits:
            break
        found.append(number)
    return found


def test_an_eviction_policy_of_a_third_party_takes_the_place_of_the_configured_one(
    reader: ZarrS3Reader,
) -> None:
    reader.cache.set_eviction_policy(DropNewest())
    for number in range(6):
        reader.load(f"mp-{number}", "data")
    before = reader.stats.hits
    for number in (0, 1, 2, 5):
        reader.load(f"mp-{number}", "data")
    assert reader.stats.hits - before == 4


def test_a_policy_that_drops_nothing_makes_new_entries_a_bypass(reader: ZarrS3Reader) -> None:
    reader.cache.set_eviction_policy(DropNothing())
    for _ in range(2):
        for number in range(6):
            reader.load(f"mp-{number}", "data")
    assert (reader.stats.hits, reader.stats.bypasses) == (4, 4)


def test_without_a_policy_the_configured_one_is_back(reader: ZarrS3Reader) -> None:
    reader.cache.set_eviction_policy(DropNewest())
    reader.cache.set_eviction_policy(None)
    assert stored_after_reading_all(reader) == [5, 4, 3, 2]
