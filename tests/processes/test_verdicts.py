"""Planted bottlenecks, each a small training as a user writes it: ``LoaderMonitor`` names each.

Nothing here helps the monitor, and no time is compared: a verdict is a comparison of shares. Where
these are of the CPU, a machine that other tests keep busy can change them: those tests are slow.
Small grids make the loops short, so the training steps do nothing but read the batch.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.support.faultproxy import FaultProxy, Rule
from tests.support.networkmount import can_mount, network_mount
from tests.support.s3server import S3Server
from tests.support.slowlink import slow_link
from tests.support.training import write_config, write_pairs, zarrcache
from zarrcache import ZarrDataset, collate
from zarrcache.config import DataConfig
from zarrcache.data import open_reader
from zarrcache.disk import file_system_of
from zarrcache.peers import EntryServer
from zarrcache.train import LoaderMonitor

PAIRS = 6
SHAPE = (80, 80, 80)  # 2 MB
LATENCY_S = 0.05


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six pairs, each density one chunk."""
    found = tmp_path_factory.mktemp("verdicts")
    write_pairs(found, PAIRS, shape=SHAPE, chunks=SHAPE)
    return found


@pytest.fixture
def make(directory: Path, tmp_path: Path) -> Callable[..., ZarrDataset]:
    """The samples with a cache block of the test's."""

    def make(root: object = None, *, block: dict[str, Any] | None = None, **options: Any) -> Any:
        given = {"dir": str(tmp_path / "cache"), **(block or {})}
        s3_kwargs = given.pop("s3_kwargs", None)
        path = write_config(directory, root, s3_kwargs=s3_kwargs, **given)
        return ZarrDataset(open_reader(DataConfig.from_yaml(path)), "all", **options)

    return make


def touch(batch: Any) -> None:
    """A training step that reads every value."""
    for role in ("data", "label"):
        values = batch[role]
        for one in values if isinstance(values, list) else [values]:
            torch.as_tensor(one).sum()


def train(
    dataset: Any,
    workers: int = 1,
    epochs: int = 3,
    step: Callable[[Any], object] = touch,
    **options: Any,
) -> LoaderMonitor:
    options = {"batch_size": None, "persistent_workers": workers > 0, **options}
    loader = DataLoader(dataset, num_workers=workers, **options)
    with LoaderMonitor(loader) as batches:
        for _ in range(epochs):
            for batch in batches:
                step(batch)
    return batches


class Around(Dataset[Any]):
    """A user's own dataset, with work of its own before it reads ours."""

    def __init__(self, inner: Any) -> None:
        self.wrapped = inner

    def __len__(self) -> int:
        return len(self.wrapped)

    def __getitem__(self, i: int) -> Any:
        time.sleep(LATENCY_S / 2)
        return self.wrapped[i]


def to_numpy(samples: list[Any]) -> dict[str, Any]:
    """Arrays are pickled and sent through a pipe."""
    return {role: [sample[role].numpy() for sample in samples] for role in ("data", "label")}


def sorts(samples: list[Any]) -> Any:
    for sample in samples:
        sample["data"].ravel().sort()
    return collate(samples)


def sorts_sample(sample: dict[str, Any]) -> dict[str, Any]:
    sample["data"].ravel().sort()
    return sample


def computes(batch: Any) -> None:
    """A step that takes far longer than reading the next sample."""
    touch(batch)
    x = torch.ones(900, 900)
    for _ in range(6):
        x = torch.tanh(x @ x)


# -- nothing is wrong


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_training_that_computes_waits_for_nothing(
    make: Callable[..., ZarrDataset], workers: int
) -> None:
    monitor = train(make(), workers, 2, step=computes)
    assert monitor.verdict.cause == "nothing", monitor.epochs


# -- one thing is


@pytest.mark.slow
def test_checksums_of_each_read_are_named(make: Callable[..., ZarrDataset]) -> None:
    monitor = train(make(block={"verify": "always"}), 0)
    assert monitor.verdict.cause == "checksum", monitor.epochs
    assert "verify: first" in monitor.verdict.text


@pytest.mark.slow
def test_rotation_in_one_worker_is_named(make: Callable[..., ZarrDataset]) -> None:
    monitor = train(make(augmentation=True), 1)
    assert monitor.verdict.cause == "rotation", monitor.epochs
    assert "num_workers" in monitor.verdict.text


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_too_few_workers_are_named_where_no_part_is_most_of_the_work(
    make: Callable[..., ZarrDataset], workers: int
) -> None:
    """Decoding is what a cached density needs; only more workers make it faster."""
    monitor = train(make(block={"arrays": {"encoding": "bits:12"}}), workers)
    assert monitor.verdict.cause == "workers", monitor.epochs


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_the_users_own_functions_are_named(make: Callable[..., ZarrDataset], workers: int) -> None:
    assert train(make(transform=sorts_sample), workers).verdict.cause == "transform"
    assert train(make(), workers, batch_size=2, collate_fn=sorts).verdict.cause == "collate"
    assert train(Around(make()), workers).verdict.cause == "dataset"


@pytest.mark.slow
def test_batches_that_are_copied_on_their_way_are_named(
    make: Callable[..., ZarrDataset],
) -> None:
    """Without a GPU nothing is pinned; this is the same copy in the training process."""
    monitor = train(make(), 1, 6, batch_size=2, collate_fn=to_numpy)
    assert monitor.verdict.cause == "copy", monitor.epochs


@pytest.mark.slow
def test_workers_that_start_in_every_epoch_are_named(make: Callable[..., ZarrDataset]) -> None:
    options = {"persistent_workers": False, "multiprocessing_context": "forkserver"}
    monitor = train(make(), 1, 2, **options)
    assert monitor.verdict.cause == "start", monitor.epochs


@pytest.mark.slow
def test_cold_misses_from_slow_s3_are_named(
    make: Callable[..., ZarrDataset],
    directory: Path,
    s3_server: S3Server,
    bucket: str,
    fault_proxy: FaultProxy,
) -> None:
    for role in ("data", "label"):
        s3_server.put_tree(directory / role, f"s3://{bucket}/{role}")
    fault_proxy.rules(Rule(latency_s=LATENCY_S))
    block = {"s3_kwargs": s3_server.kwargs_at(fault_proxy.endpoint_url)}
    monitor = train(make(f"s3://{bucket}", block=block), 2, 1)
    assert monitor.verdict.cause == "S3", monitor.epochs
    assert "zarrcache warm" in monitor.verdict.text
    # the same node, warm: it compares each density with S3 again
    block["revalidate"] = "epoch"
    monitor = train(make(f"s3://{bucket}", block=block), 1, 2)
    assert monitor.verdict.cause == "S3", monitor.epochs
    assert "revalidate" in monitor.verdict.text
    # and a cache that is too small for the data
    for policy in ("none", "least-recently-stored"):
        block |= {"revalidate": "never", "limit": "12 MiB", "eviction": policy}
        block["dir"] = str(directory / f"small-{policy}")
        monitor = train(make(f"s3://{bucket}", block=block), 1, 2)
        assert monitor.verdict.cause == "full cache", monitor.epochs


@pytest.mark.slow
def test_a_slow_peer_is_named(
    make: Callable[..., ZarrDataset], directory: Path, tmp_path: Path
) -> None:
    assert zarrcache("warm", write_config(directory, dir=str(tmp_path / "other"))).code == 0
    with (
        EntryServer(tmp_path / "other") as server,
        slow_link(server.url, LATENCY_S) as url,
    ):
        monitor = train(make(block={"peers": [url]}), 1, 1)
    assert monitor.epochs[0].stats.peer_hits == 2 * PAIRS
    assert monitor.verdict.cause == "peer", monitor.epochs


@pytest.mark.parametrize("workers", [0, 1])
def test_pages_that_have_left_memory_count_as_waiting_for_the_disk(
    make: Callable[..., ZarrDataset], tmp_path: Path, workers: int
) -> None:
    """How long that takes depends on the disk, so the verdict is not compared."""
    if file_system_of(tmp_path) == "tmpfs":
        pytest.skip("tmpfs has no disk")
    loader = DataLoader(make(), batch_size=None, num_workers=workers)
    with LoaderMonitor(loader) as batches:
        for _ in range(2):
            for batch in batches:
                touch(batch)
            del batch
            forget(tmp_path / "cache")
    last = batches.epochs[-1]
    assert last.stats.hits == 2 * PAIRS
    assert last.waits["disk"] > 0, last
    assert last.waited_s > last.waits["disk"]


def forget(directory: Path) -> None:
    """Drop the pages of all files from memory."""
    os.sync()
    for path in directory.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)


@pytest.fixture
def slow_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 30 MB/s at most, whose pages the kernel does not keep."""
    if not can_mount():
        pytest.skip("needs root and FUSE; without them no disk is slow on purpose")
    with network_mount(tmp_path, "slowdisk", read_s=0.004) as found:
        yield found
        gc.collect()  # lock files are closed before it is unmounted


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("augmentation", [False, True])
def test_a_slow_disk_is_named(
    make: Callable[..., ZarrDataset], slow_disk: Path, workers: int, augmentation: bool
) -> None:
    """Also where its pages are first touched by the training step, as those of maps are."""
    dataset = make(
        block={"dir": str(slow_disk), "allow_network_fs": True}, augmentation=augmentation
    )
    monitor = train(dataset, workers, 2)
    assert monitor.verdict.cause == "disk", monitor.epochs
