"""A running training whose disk fills up, runs out of inodes or quota, fails, or loses the cache:
every batch is right, one log line each, and it recovers.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

from tests.support.cachedirs import array_of, key_of, payload_files, settings
from tests.support.localnode import LocalNode
from tests.support.smalldisk import Disk, failing_disk, full_disk, no_inodes_disk, quota_disk
from tests.support.users import as_user
from zarrcache import ZarrDataset, ZarrS3Reader, verify
from zarrcache.cache.tiers import ArrayCache
from zarrcache.stats import Counters

PAIRS = 6


@contextmanager
def deleted_directory(mount: Path) -> Iterator[Disk]:
    """The directory is deleted, and a file has its name until the fault is over."""
    mount.mkdir()

    def delete() -> None:
        shutil.rmtree(mount)
        mount.touch()

    yield Disk(delete, mount.unlink)


class Training:
    """A run over a node: epochs of batches, each compared with a plain zarr read."""

    def __init__(self, node: LocalNode) -> None:
        self.node = node
        self.reader = node.reader()

    def epoch(self, reader: ZarrS3Reader | None = None) -> None:
        """Read every sample, in this run or a new one."""
        dataset = ZarrDataset(reader or self.reader, "all")
        assert len(dataset) == PAIRS
        for number, task_id in enumerate(dataset.task_ids):
            sample = dataset[number]
            for role in ("data", "label"):
                assert torch.equal(
                    sample[role], torch.from_numpy(self.node.values[task_id, role])[None]
                ), (task_id, role)

    def store_half(self) -> None:
        """Read half of the samples before the fault begins."""
        dataset = ZarrDataset(self.reader, "all")
        for number in range(PAIRS // 2):
            dataset[number]


FAULTS = [full_disk, no_inodes_disk, quota_disk, failing_disk, deleted_directory]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_training_goes_on_with_the_same_bits_and_the_cache_comes_back(
    tmp_path: Path,
    fault: Callable[[Path], AbstractContextManager[Disk]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Two epochs during the fault: nothing is stored, one log line. Afterwards everything is
    stored, and the next epoch has only hits.
    """
    node = LocalNode(tmp_path, PAIRS, shape=(14, 10, 8))
    with fault(tmp_path / "cache") as disk:
        training = Training(node)
        training.store_half()
        before = training.reader.stats
        assert before.misses == PAIRS
        disk.begin()
        caplog.clear()
        training.epoch()
        first = told(caplog)
        training.epoch()
        assert told(caplog) == first
        assert 1 <= len(first) <= 3
        during = training.reader.stats - before
        assert (
            during.misses >= PAIRS
        )  # densities that were not stored are read from the origin twice
        assert during.cache_errors + during.bypasses > 0
        disk.end()
        training.epoch()
        healed = training.reader.stats
        training.epoch()
        after = training.reader.stats - healed
        assert (after.hits, after.misses, after.cache_errors) == (2 * PAIRS, 0, 0)
        # A new run verifies the entry.
        training.epoch(node.reader(verify="always"))
        verify(node.reader().cache.config)  # type: ignore[arg-type]
        node.check_settled()
        assert [path for path in payload_files(tmp_path) if ".partial-" in path.name] == []


def hits_and_faults(directory: Path, disk: Disk) -> list[tuple[bool, int]]:
    """Of one process: before a sector fails, while it fails, and after."""
    counters = Counters()
    cache = ArrayCache(settings(directory, verify="always"), counters)
    assert cache.put(key_of(1), array_of(1, 4 * 2**20), source="s")
    found = []
    for happens in (lambda: None, lambda: disk.begin("zarrcache-v1/entries", 4096), disk.end):
        happens()
        found.append((cache.get(key_of(1)) is not None, counters.snapshot().cache_errors))
    return found


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_bad_sector_under_an_entry_is_a_miss_and_not_a_bus_error(tmp_path: Path) -> None:
    """Its header is readable and its values are not: found by the checksum, before the values are
    used.
    """
    with failing_disk(tmp_path / "cache") as disk:
        assert as_user(None, hits_and_faults, tmp_path, disk) == [(True, 0), (False, 1), (True, 1)]


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Log lines of level warning or above since the log was cleared."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
