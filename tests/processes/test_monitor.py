"""``LoaderMonitor`` and ``CacheMonitor``: what a training waits for is named, and nothing else is
changed.
"""

from __future__ import annotations

import logging
import pickle
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tests.support.training import write_config, write_pairs
from zarrcache import RhoData, Stats, ZarrDataset, collate
from zarrcache.config import DataConfig
from zarrcache.data import open_reader
from zarrcache.train import EpochTimes, LoaderMonitor, Verdict, collate_in_lists, judge

STEP_S = 0.01


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pairs."""
    found = tmp_path_factory.mktemp("monitor")
    write_pairs(found, 8, shape=(16, 16, 16))
    return found


def dataset(directory: Path, cache: Path, **options: Any) -> ZarrDataset:
    config = DataConfig.from_yaml(write_config(directory, dir=str(cache)))
    return ZarrDataset(open_reader(config), "all", **options)


def slow(sample: Any) -> Any:
    """A transform of 30 ms."""
    time.sleep(3 * STEP_S)
    return sample


def fails(sample: Any) -> Any:
    raise RuntimeError("on purpose")


def slow_collate(samples: Any) -> Any:
    time.sleep(3 * STEP_S)
    return collate(samples)


def epochs(loader: DataLoader[Any], count: int, step_s: float) -> LoaderMonitor:
    with LoaderMonitor(loader) as batches:
        for _ in range(count):
            for _ in batches:
                time.sleep(step_s)
    return batches


def test_nothing_is_said_to_be_wrong_where_the_training_does_not_wait(
    directory: Path, tmp_path: Path
) -> None:
    loader = DataLoader(dataset(directory, tmp_path), batch_size=None)
    monitor = epochs(loader, 3, 10 * STEP_S)
    assert monitor.verdict.cause == "nothing", monitor.epochs
    assert "Nothing needs a change" in str(monitor.verdict)
    first, second, third = monitor.epochs
    assert (first.stats.misses, second.stats.hits, third.stats.requests) == (16, 16, 0)
    assert [times.steps for times in monitor.epochs] == [8, 8, 8]
    assert second.worked_s > 8 * 10 * STEP_S > second.waited_s


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("options", "loading", "cause"),
    [
        ({"transform": slow}, {}, "transform"),
        ({}, {"collate_fn": slow_collate, "batch_size": 1}, "collate"),
    ],
)
def test_the_users_own_slow_function_is_named(
    directory: Path,
    tmp_path: Path,
    options: dict[str, Any],
    loading: dict[str, Any],
    cause: str,
    workers: int,
) -> None:
    data = dataset(directory, tmp_path, **options)
    loading = {"batch_size": None, **loading}
    loader = DataLoader(data, num_workers=workers, persistent_workers=workers > 0, **loading)
    monitor = epochs(loader, 2, STEP_S)
    verdict = monitor.verdict
    assert verdict.cause == cause, monitor.epochs
    assert verdict.waiting_ratio > 0.3
    assert f"The training waited {verdict.waiting_ratio:.0%} of the time, for " in verdict.text
    assert "Do this:" in verdict.text
    # All is as before: nothing is timed any more.
    assert data._functions == ((options["transform"],) if "transform" in options else ())
    assert loader.collate_fn is loading.get("collate_fn", loader.collate_fn)
    assert type(data._to_tensors).__name__ == "PairToTensors"
    assert "_sample" not in vars(data)
    assert not data.reader._observers
    assert loader.worker_init_fn is None


def test_cold_misses_and_a_full_cache_are_told_apart(directory: Path, tmp_path: Path) -> None:
    """The origin takes 30 ms per density; a full cache has to be read again in every epoch."""
    for name, limit, cause in (("cold", "1 GiB", "S3"), ("full", "40 KiB", "full cache")):
        config = DataConfig.from_yaml(
            write_config(directory, dir=str(tmp_path / name), limit=limit)
        )
        reader = open_reader(config)
        slow_down(reader)
        loader = DataLoader(ZarrDataset(reader, "all"), batch_size=None)
        monitor = epochs(loader, 1, STEP_S / 10)
        assert monitor.verdict.cause == cause, monitor.epochs


def slow_down(reader: Any) -> None:
    """Let each listing of the origin take 30 ms."""
    for role in ("data", "label"):
        origin = reader.origin(role)
        listed: Callable[..., Any] = origin.list_objects

        def list_slowly(*args: Any, listed: Callable[..., Any] = listed, **options: Any) -> Any:
            time.sleep(3 * STEP_S)
            return listed(*args, **options)

        origin.list_objects = list_slowly


def test_the_older_interface_is_measured_too(directory: Path, tmp_path: Path) -> None:
    config = DataConfig.from_yaml(write_config(directory, dir=str(tmp_path)))
    train, _ = open_reader(config).data_split()
    loader = DataLoader(RhoData(*train, transform=slow), batch_size=1)
    monitor = epochs(loader, 2, 0)
    assert monitor.verdict.cause == "transform"
    assert monitor.epochs[1].stats.hits == 8


def test_a_loop_that_is_left_and_a_loader_that_fails_end_their_epoch(
    directory: Path, tmp_path: Path
) -> None:
    data = dataset(directory, tmp_path)
    with LoaderMonitor(DataLoader(data, batch_size=None)) as batches:
        for _ in batches:
            break
    assert [times.steps for times in batches.epochs] == [1]
    broken = dataset(directory, tmp_path / "b", transform=fails)
    with (
        pytest.raises(RuntimeError, match="on purpose"),
        LoaderMonitor(DataLoader(broken, batch_size=None)) as failing,
    ):
        list(failing)
    assert failing.epochs == []


def test_a_monitor_for_each_epoch_sees_workers_that_persist(
    directory: Path, tmp_path: Path
) -> None:
    loader = DataLoader(
        dataset(directory, tmp_path, transform=slow),
        batch_size=None,
        num_workers=1,
        persistent_workers=True,
    )
    for _ in range(3):
        monitor = epochs(loader, 1, STEP_S)
    assert monitor.verdict.cause == "transform", monitor.epochs
    assert monitor.epochs[0].stats.hits == 16


def test_other_loaders_are_measured_too() -> None:
    loader = DataLoader(torch.utils.data.TensorDataset(torch.arange(4)), batch_size=2)
    monitor = epochs(loader, 1, 20 * STEP_S)
    assert monitor.verdict.cause == "nothing"
    assert monitor.epochs[0].steps == 2


def times(**changes: Any) -> EpochTimes:
    """An epoch of 100 s with two workers, in which 50 s were waited for what they were making."""
    parts = {"hit": 0.0, **changes.pop("parts", {})}
    stats = {"hits": 100, "served_bytes": 10**9, **changes.pop("stats", {})}
    waits = {"fetch": 45.0, **changes.pop("waits", {})}
    values = {"epoch": 0, "waited_s": 50.0, "worked_s": 50.0, "start_s": 0.0, **changes}
    return EpochTimes(
        steps=100, parts=parts, disk_bytes=0, stats=Stats(**stats), waits=waits, **values
    )


class Answers(Dataset[Any]):
    """Has an answer to every name, and a property that raises."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args: 1 / 0

    @property
    def reader(self) -> Any:
        raise ValueError("not open yet")

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        return self.inner[index]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [self.inner[index] for index in indices]


class KnowsItsClass(Dataset[Any]):
    """Compares its class, and pickles itself."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> Any:
        assert type(self) is KnowsItsClass
        pickle.dumps(self)
        return self.inner[index]


class IsItsIterator(IterableDataset[Any]):
    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __iter__(self) -> Any:
        self.place = -1
        return self

    def __next__(self) -> Any:
        self.place += 1
        if self.place == len(self.inner):
            raise StopIteration
        return self.inner[self.place]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [Answers, KnowsItsClass, IsItsIterator])
def test_a_dataset_of_any_kind_is_read_as_without_a_monitor(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: Any, workers: int
) -> None:
    inner = dataset(directory, tmp_path)
    loader = DataLoader(kind(inner), batch_size=2, num_workers=workers, collate_fn=collate_in_lists)
    plain = [batch["index"] for batch in loader]
    with LoaderMonitor(loader) as batches:
        watched = [batch["index"] for _ in range(2) for batch in batches]
    assert watched == 2 * plain == 2 * [batch["index"] for batch in loader]
    assert sum(batches.epochs[-1].parts.values()) > 0
    assert "measured" not in caplog.text


class Refuses(dict[str, Any]):
    def values(self) -> Any:
        raise RuntimeError("on purpose")


def test_a_loader_that_cannot_be_measured_is_read_nevertheless(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = dataset(directory, tmp_path)
    found.extra = Refuses()  # type: ignore[attr-defined]
    loader = DataLoader(found, batch_size=None)
    with LoaderMonitor(loader) as batches:
        assert len(list(batches)) == 8
    assert "cannot be measured" in caplog.text
    assert batches.epochs[0].steps == 8


@pytest.mark.parametrize(
    ("changes", "options", "cause"),
    [
        ({"waited_s": 1.0, "worked_s": 99.0}, {}, "nothing"),
        ({"waits": {"start": 46}}, {}, "start"),
        ({"waits": {"receive": 46}}, {}, "copy"),
        ({"waits": {"disk": 46}}, {}, "disk"),
        ({"waits": {"other": 46}}, {}, "unknown"),
        ({"waits": {"fetch": 0, "receive": 0}, "parts": {"miss": 9}}, {}, "S3"),
        ({"parts": {"miss": 190}}, {}, "S3"),
        ({"parts": {"held": 190}, "stats": {"requests": 9}}, {"revalidate": "epoch"}, "S3"),
        ({"parts": {"held": 190}}, {}, "disk"),
        ({"parts": {"peer": 150, "miss": 40}, "stats": {"peer_hits": 90}}, {}, "peer"),
        ({"parts": {"peer": 150, "miss": 40}}, {}, "peer"),
        ({"parts": {"peer": 190}, "stats": {"lower_hits": 90}}, {}, "lower"),
        ({"parts": {"bypass": 150, "miss": 40}}, {}, "full cache"),
        ({"parts": {"miss": 190}, "is_full": True}, {}, "S3"),
        ({"parts": {"miss": 190}, "is_full": True, "epoch": 1}, {}, "full cache"),
        ({"parts": {"disk": 150, "hit": 40}}, {}, "disk"),
        ({"parts": {"disk": 80, "hit": 40, "augment": 70}}, {}, "disk"),
        ({"parts": {"checksum": 150, "hit": 40}}, {"verify": "always"}, "checksum"),
        ({"parts": {"augment": 180, "hit": 10}}, {}, "rotation"),
        ({"parts": {"transform": 180, "hit": 10}}, {}, "transform"),
        ({"parts": {"collate": 180, "hit": 10}}, {}, "collate"),
        ({"parts": {"dataset": 180, "hit": 10}}, {}, "dataset"),
        ({"parts": {"copy": 180, "hit": 10}}, {}, "copy"),
        ({"parts": {"hit": 70, "augment": 60, "collate": 60}}, {}, "workers"),
        ({"parts": {"hit": 190}}, {}, "workers"),
        ({"parts": {"augment": 50, "cores": 140}}, {}, "rotation"),
        ({"parts": {"augment": 50, "cores": 140}}, {"cores": 2}, "cores"),
    ],
)
def test_the_verdict_follows_the_largest_part(
    changes: dict[str, Any], options: dict[str, Any], cause: str
) -> None:
    verdict = judge(times(**changes), workers=2, **{"cores": 4, **options})
    assert verdict.cause == cause
    assert len(verdict.text) < 400


@pytest.mark.parametrize(
    "changes",
    [
        {"parts": {"bypass": 50, "cores": 140}},
        {"waits": {"cores": 46}, "parts": {"bypass": 50}},
        {"parts": {"bypass": 190}},
    ],
)
def test_a_cache_that_stores_nothing_is_named_before_the_cores(
    changes: dict[str, Any], directory: Path, tmp_path: Path
) -> None:
    """Fetching and decoding for every sample is what takes them."""

    def verdict_on(limit: str) -> Verdict:
        config = write_config(directory, dir=str(tmp_path / limit), limit=limit)
        reader = open_reader(DataConfig.from_yaml(config))
        for _ in range(2):  # the second time from the cache, if it holds them
            for task_id in reader.stored_ids:
                reader.load(task_id, "data")
        return judge(times(**changes, stats=asdict(reader.stats)), workers=2, cores=2)

    verdict = verdict_on("4 KiB")
    assert (verdict.cause, "because nothing is cached" in verdict.text) == ("full cache", True)
    assert "nothing is cached" not in verdict_on("1 GiB").text


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_lightning_logs_ratios_and_says_the_verdict_at_the_end(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A logger that fails does not end the training."""
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.loggers import CSVLogger

    from zarrcache.lightning import CacheMonitor, ZarrDataModule

    class Net(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def training_step(self, batch: Any, _: int) -> Any:
            return ((self.scale * batch["data"] - batch["label"]) ** 2).mean()

        def validation_step(self, batch: Any, _: int) -> None:
            pass

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 1e-3)

    class Failing(CSVLogger):
        def log_metrics(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("no network")

    monitor = CacheMonitor()
    data = ZarrDataModule(
        write_config(directory, dir=str(tmp_path / "cache")),
        train_workers=0,
        val_workers=0,
        val_frac=0.25,
    )
    trainer = lightning.Trainer(
        max_epochs=3,
        limit_val_batches=0,
        accelerator="cpu",
        logger=[Failing(tmp_path / "bad"), CSVLogger(tmp_path / "good")],
        callbacks=[monitor],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=2,
    )
    with caplog.at_level(logging.INFO):
        trainer.fit(Net(), datamodule=data)
    assert [times.stats.hit_ratio for times in monitor.epochs] == [0, 1, 1]
    assert all(times.steps == 3 for times in monitor.epochs)
    assert monitor.verdict.text in caplog.text
    assert caplog.text.count("CacheMonitor cannot log to Failing") == 1
    [table] = (tmp_path / "good").rglob("metrics.csv")
    head, *rows = table.read_text().splitlines()
    columns = head.split(",")
    for name in ("waiting_ratio", "hit_ratio_epoch", "requests", "fetched_bytes_epoch"):
        values = [row.split(",")[columns.index(f"zarrcache/{name}")] for row in rows]
        assert any(values), name
    assert list((tmp_path / "cache" / "zarrcache-v1" / "runs").glob("*.jsonl"))


def draws(sample: Any) -> Any:
    """A slow transform with randomness of NumPy, which Lightning seeds in workers."""
    time.sleep(STEP_S)
    return {**sample, "draw": torch.tensor(np.random.rand())}


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_a_monitor_in_lightning_changes_no_seed_and_counts_no_validation(
    directory: Path, tmp_path: Path
) -> None:
    """Of a loader that is given to ``fit``, whose workers start before the first hook."""
    lightning = pytest.importorskip("lightning.pytorch")
    from zarrcache.lightning import CacheMonitor

    class Net(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))
            self.drawn: list[float] = []

        def training_step(self, batch: Any, _: int) -> Any:
            self.drawn.append(batch["draw"].item())
            return ((self.scale * batch["data"] - batch["label"]) ** 2).mean()

        def validation_step(self, batch: Any, _: int) -> None:
            time.sleep(10 * STEP_S)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 1e-3)

    data = dataset(directory, tmp_path, transform=draws)
    drawn, monitor = [], CacheMonitor()
    for callbacks in ([], [monitor]):
        lightning.seed_everything(1, workers=True, verbose=False)
        loader = DataLoader(data, batch_size=None, num_workers=1, persistent_workers=True)
        trainer = lightning.Trainer(
            max_epochs=2,
            val_check_interval=4,
            limit_val_batches=1,
            accelerator="cpu",
            logger=False,
            callbacks=callbacks,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        net = Net()
        trainer.fit(net, loader, DataLoader(data, batch_size=None))
        drawn.append(net.drawn)
        assert "process_dataloader" not in vars(trainer.strategy)
    assert drawn[0] == drawn[1]
    assert monitor.verdict.cause == "transform", monitor.epochs
    last = monitor.epochs[-1]
    assert last.steps == 8
    assert last.waits["other"] < 10 * STEP_S, last  # two validations of that length
