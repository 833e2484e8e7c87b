"""Damage at random places of entries and objects: nothing wrong is served, all of it is found and
fetched again.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.cachedirs import array_of, key_of, on_disk_bytes, payload_files, settings
from tests.support.damage import chance_of, damage
from tests.support.localnode import LocalNode
from zarrcache.cache.byte_tier import ByteCache
from zarrcache.cache.tiers import ArrayCache
from zarrcache.disk.index import Index
from zarrcache.origin._local import LocalOrigin
from zarrcache.stats import Counters


def damages(default: int, slow: int) -> Any:
    """Parameters ``count, seed``: hundreds with a fixed seed, thousands with a new one."""
    return pytest.mark.parametrize(
        ("count", "seed"),
        [
            pytest.param(default, 4, id=f"{default}"),
            pytest.param(slow, None, marks=pytest.mark.slow, id=f"{slow}"),
        ],
    )


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Silence the warning of each purge."""
    caplog.set_level(logging.CRITICAL)


@pytest.mark.usefixtures("quiet")
@damages(600, 6000)
def test_every_damaged_array_is_found_purged_and_stored_again(
    tmp_path: Path, count: int, seed: int | None
) -> None:
    """One bit anywhere in the file, header and padding included, or a truncation: one purge each,
    and a hit after the next put.
    """
    chance = chance_of(seed)
    cache = ArrayCache(settings(tmp_path, verify="always"), Counters())
    for name in range(6):
        cache.put(key_of(name), array_of(name, 500 * name), source="s")
    for number in range(count):
        name = chance.randrange(6)
        (path,) = cache.index.dir.entries.glob(f"*/{key_of(name).digest}-*")
        done = damage(path, chance)
        assert cache.get(key_of(name)) is None, done
        assert cache._counters.snapshot().purges == number + 1, done
        assert not path.exists(), done
        assert cache.put(key_of(name), array_of(name, 500 * name), source="s")
        entry = cache.get(key_of(name))
        assert entry is not None
        assert np.array_equal(entry.array, array_of(name, 500 * name))
    assert cache._counters.snapshot().cache_errors == 0
    assert cache.index.volume_bytes() == on_disk_bytes(tmp_path)
    assert len(payload_files(tmp_path)) == 6


@pytest.mark.usefixtures("quiet")
@damages(250, 2500)
def test_every_damaged_object_is_found_purged_and_fetched_again(
    tmp_path: Path, count: int, seed: int | None
) -> None:
    """Whole objects and blocks of large ones; each costs one request, and the reader gets the
    origin's bytes.
    """
    chance = chance_of(seed)
    (tmp_path / "data").mkdir()
    sizes = {"a": 1, "b": 100, "c": 5000, "large": 200_000}
    contents = {name: array_of(size, size).tobytes() for name, size in sizes.items()}
    for name, content in contents.items():
        (tmp_path / "data" / name).write_bytes(content)
    config = settings(tmp_path, verify="always", bytes={"block_size": 64 * 1024})
    origin_counters, counters = Counters(), Counters()
    origin = LocalOrigin(str(tmp_path / "data"), counters=origin_counters)
    cache = ByteCache(origin, config, counters, Index(config))
    objects = {obj.key: obj for obj in origin.list_objects()}

    def read(name: str) -> bytes:
        return b"".join(
            cache.read(objects[name], start, start + 64 * 1024)
            for start in range(0, sizes[name], 64 * 1024)
        )

    assert {name: read(name) for name in sizes} == contents
    files = payload_files(tmp_path)
    assert len(files) == 3 + 4
    for number in range(count):
        requests = origin_counters.snapshot().requests
        done = damage(chance.choice(files), chance)
        assert {name: read(name) for name in sizes} == contents, done
        assert counters.snapshot().purges == number + 1, done
        assert origin_counters.snapshot().requests == requests + 1, done
    assert counters.snapshot().cache_errors == 0
    assert payload_files(tmp_path) == files
    assert cache.index.volume_bytes() == on_disk_bytes(tmp_path)


# -- what a training run sees


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("verify", ["first", "always"])
def test_a_run_over_damaged_entries_reads_what_the_origin_has(tmp_path: Path, verify: str) -> None:
    """Every entry of both tiers is damaged; each is purged and fetched once at its first use, and
    the next run has only hits.
    """
    node, chance = LocalNode(tmp_path), chance_of(5)
    node.read(node.reader())
    for _ in range(4):
        files = payload_files(tmp_path)
        for path in files:
            damage(path, chance)
        reader = node.reader(verify=verify)
        node.read(reader)
        assert reader.stats.purges == len(files)
        assert (reader.stats.misses, reader.stats.hits) == (len(node.values), 0)
        node.read(reader)
        again = node.reader(verify=verify)
        node.read(again)
        for stats in (reader.stats, again.stats):
            assert stats.cache_errors == 0
        assert (again.stats.misses, again.stats.purges, again.stats.requests) == (0, 0, 0)
        node.check_settled()
