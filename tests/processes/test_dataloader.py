"""The reader in torch's DataLoader: for every start method, every prior use in the parent, and when
reads fail.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

from tests.support.faultproxy import FaultProxy
from tests.support.readers import make_reader
from tests.support.requestlog import RequestLog
from tests.support.s3server import S3Server
from tests.support.stores import plain_read, small_group
from zarrcache import OriginUnavailableError, RhoData, SchemaError, ZarrDataset, ZarrS3Reader

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

IDS = [f"mp-{i}" for i in range(6)]
ROLES = ("data", "label")
#: For hangs only; nothing here takes seconds by design.
DEADLINE_S = 200
#: Learning rate.
RATE = 1e-2


@dataclass(frozen=True)
class Job:
    """What a training process needs; picklable."""

    bucket: str
    map_path: Path
    s3_kwargs: dict[str, Any]
    cache_dir: Path

    def reader(self, **cache: Any) -> ZarrS3Reader:
        return make_reader(
            self.map_path.parent,
            f"s3://{self.bucket}",
            normalize=True,
            train_fraction=4,
            s3_kwargs=self.s3_kwargs,
            cache={"dir": self.cache_dir, **cache},
        )


@dataclass(frozen=True)
class Outcome:
    """Result of one job: digests of what each epoch delivered, by position; the counters of the
    node and of the parent.
    """

    epochs: list[dict[int, str]]
    hits: int
    misses: int
    parent_reads: int
    had_obstore: bool
    engine_in_parent: bool


def digest(*tensors: torch.Tensor) -> str:
    """Of shape and bits."""
    h = hashlib.sha256()
    for tensor in tensors:
        h.update(str(tuple(tensor.shape)).encode() + tensor.numpy().tobytes())
    return h.hexdigest()


def train(
    job: Job,
    method: str,
    *,
    used: bool,
    persistent: bool,
    workers: int | None = None,
    engine: str = "auto",
) -> Outcome:
    """Two epochs over the training set with ``workers``: by default two forked ones, or one
    spawned.

    ``used``: the parent reads a sample first, which opens its clients.
    """
    if workers is None:
        workers = 2 if method == "fork" else 1
    reader = job.reader(fetch={"engine": engine})
    if used:
        reader.load(reader.split_task_ids()[1][0], "label")
    had_obstore = "obstore" in sys.modules
    dataset = RhoData(*reader.data_split()[0], data_augmentation=False)
    before = reader.cache.counters.snapshot()
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=method if workers else None,
        persistent_workers=persistent,
        timeout=DEADLINE_S // 2 if workers else 0,
    )
    epochs = [{i: digest(*pair) for i, pair in enumerate(loader)} for _ in range(2)]
    own = reader.cache.counters.snapshot() - before
    del loader  # persistent workers end here
    total = reader.stats - before
    return Outcome(
        epochs,
        total.hits,
        total.misses,
        own.hits + own.misses,
        had_obstore,
        "obstore" in sys.modules,
    )


def train_in_every_way(job: Job) -> dict[tuple[str, bool, bool], Outcome]:
    """All ways in one process; the one that must run before the first use of obstore comes
    first.
    """
    ways = [
        ("fork", False, False),
        ("fork", True, True),
        ("spawn", True, True),
        ("forkserver", True, True),
    ]
    return {
        (method, used, persistent): train(
            replace(job, cache_dir=job.cache_dir / f"{method}-{used}-{persistent}"),
            method,
            used=used,
            persistent=persistent,
        )
        for method, used, persistent in ways
    }


@pytest.fixture(scope="module")
def job(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Job:
    """Six materials on S3, old enough for a stable listing; read only."""
    root, bucket = tmp_path_factory.mktemp("loader"), s3_server.new_bucket()
    for role, i in itertools.product(ROLES, range(len(IDS))):
        small_group(
            root / role / f"{IDS[i]}.zarr", shape=(6, 5, 5 + i), seed=i + 50 * (role == "label")
        )
    for role in ROLES:
        s3_server.put_tree(root / role, f"s3://{bucket}/{role}")
    (root / "map.json").write_text(json.dumps({"GGA": IDS}))
    time.sleep(2.1)  # a store that was just written is listed twice
    return Job(bucket, root / "map.json", s3_server.s3_kwargs, root / "cache")


@pytest.fixture(scope="module")
def wanted(job: Job) -> list[str]:
    """Digests of the training pairs, read by zarr."""
    root = job.map_path.parent
    found = []
    for task_id in job.reader().split_task_ids()[0]:
        grids = [plain_read(root / role / f"{task_id}.zarr") for role in ROLES]
        found.append(
            digest(
                *(
                    torch.from_numpy(grid / torch.tensor(grid.size).float().numpy())[None]
                    for grid in grids
                )
            )
        )
    return found


@pytest.fixture(scope="module")
def process() -> Iterator[concurrent.futures.Executor]:
    """A process that has used no S3 at first: other tests have used obstore in this one."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture(scope="module")
def outcomes(
    job: Job, process: concurrent.futures.Executor
) -> dict[tuple[str, bool, bool], Outcome]:
    """Results of every way, from one process."""
    return process.submit(train_in_every_way, job).result(DEADLINE_S)


@pytest.mark.parametrize("used", [False, True])
def test_forked_workers_deliver_the_plain_tensors(
    outcomes: dict[Any, Outcome], wanted: list[str], used: bool
) -> None:
    """Also if the parent has used obstore, which does not survive a fork; cold and warm epoch;
    persistent in the second case.
    """
    outcome = outcomes["fork", used, used]
    assert outcome.had_obstore == used
    assert outcome.epochs == [dict(enumerate(wanted))] * 2


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_fresh_workers_deliver_the_plain_tensors(
    outcomes: dict[Any, Outcome], wanted: list[str], method: str
) -> None:
    """They get the dataset as a pickle."""
    assert outcomes[method, True, True].epochs == [dict(enumerate(wanted))] * 2


@pytest.mark.parametrize(
    "way",
    [
        ("fork", False, False),
        ("fork", True, True),
        ("spawn", True, True),
        ("forkserver", True, True),
    ],
    ids=str,
)
def test_parents_stats_count_what_the_workers_read(
    outcomes: dict[Any, Outcome], wanted: list[str], way: Any
) -> None:
    """Misses in the first epoch, hits in the second, none in the parent; also after the workers
    have ended.
    """
    outcome = outcomes[way]
    assert (outcome.misses, outcome.hits, outcome.parent_reads) == (
        2 * len(wanted),
        2 * len(wanted),
        0,
    )


WAYS = [
    (method, workers)
    for workers in (0, 2, 8)
    for method in ("fork", "spawn", "forkserver")
    if workers or method == "fork"
]
#: Of each kind one, beside those above and in their process, which has used S3: without workers,
#: and forked from a process in which the engine that it was told to use is open.
SOME = [("s3fs", True, "fork", 0), ("obstore", True, "fork", 2)]
ALL = [
    (engine, used, *way) for engine in ("obstore", "s3fs") for used in (False, True) for way in WAYS
]


@pytest.mark.parametrize(
    "way",
    [
        pytest.param(
            way, marks=() if way in SOME else (pytest.mark.slow,), id="-".join(map(str, way))
        )
        for way in ALL
    ],
)
def test_workers_started_in_any_way_deliver_the_plain_tensors(
    job: Job,
    wanted: list[str],
    tmp_path: Path,
    process: concurrent.futures.Executor,
    way: tuple[str, bool, str, int],
) -> None:
    """Cold and warm, from a process that has used S3 or not, with either engine; none hangs."""
    engine, used, method, workers = way
    with contextlib.ExitStack() as stack:
        pool = process
        if way not in SOME:
            pool = stack.enter_context(
                concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            )
        start_s = time.monotonic()
        outcome = pool.submit(
            train,
            replace(job, cache_dir=tmp_path),
            method,
            used=used,
            persistent=False,
            workers=workers,
            engine=engine,
        ).result(DEADLINE_S)
        print(f"{way}: {time.monotonic() - start_s:.1f} s")
    assert outcome.epochs == [dict(enumerate(wanted))] * 2
    assert (outcome.misses, outcome.hits) == (2 * len(wanted), 2 * len(wanted))


def test_parent_that_only_iterates_never_loads_obstore(outcomes: dict[Any, Outcome]) -> None:
    """Splitting lists through s3fs, so that forked workers may use obstore."""
    assert not outcomes["fork", False, False].engine_in_parent


@dataclass(frozen=True)
class Rank:
    """What one of two ranks saw: the split, the ids of its share in order, its samples, and its
    final weights.
    """

    split: list[str]
    ids: list[str]
    digests: list[str]
    weights: list[float]


def toy() -> torch.nn.Module:
    """A 1x1x1 convolution: two weights, the same in every process."""
    torch.manual_seed(0)
    return torch.nn.Conv3d(1, 1, 1)


def step(model: torch.nn.Module, samples: Sequence[Any]) -> torch.Tensor:
    """The mean loss of some samples, with gradients."""
    model.zero_grad()
    loss = torch.stack(
        [((model(sample["data"][None]) - sample["label"][None]) ** 2).sum() for sample in samples]
    ).mean()
    loss.backward()
    return loss


def run_rank(job: Job, rank: int) -> Rank:
    """One epoch of distributed training over gloo: one step per sample of this rank, with averaged
    gradients.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    wait = timedelta(seconds=DEADLINE_S)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{job.cache_dir}/meeting", rank=rank, world_size=2, timeout=wait
    )
    dataset = ZarrDataset(job.reader(), "all")
    model = torch.nn.parallel.DistributedDataParallel(toy())
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=DistributedSampler(dataset, seed=3),
        num_workers=1,
        timeout=DEADLINE_S // 2,
    )
    torch.distributed.barrier()
    ids, digests = [], []
    for sample in loader:
        step(model, [sample])
        optimizer.step()
        ids.append(sample["index"])
        digests.append(digest(sample["data"], sample["label"]))
    torch.distributed.destroy_process_group()
    return Rank(
        list(dataset.task_ids), ids, digests, [float(p.detach()) for p in model.parameters()]
    )


def run_both_ranks(job: Job) -> list[Rank]:
    """Fork two ranks, so that what they import is imported once."""
    torch.optim.SGD(toy().parameters(), lr=RATE)  # imports torch's compiler: seconds
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(2, context) as pool:
        futures = [pool.submit(run_rank, job, rank) for rank in (0, 1)]
        return [future.result(DEADLINE_S) for future in futures]


def test_two_ranks_train_as_one_and_fetch_every_object_once(
    job: Job, s3_server: S3Server, tmp_path: Path
) -> None:
    """Both start cold on one node: two shares of one split, no object fetched twice, and the
    weights of a single process.
    """
    job = replace(job, cache_dir=tmp_path)
    log = RequestLog(s3_server, job.bucket)
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        one, other = pool.submit(run_both_ranks, job).result(DEADLINE_S)
    assert one.split == other.split
    assert sorted(one.ids + other.ids) == sorted(IDS)
    assert set(log.paths("GET").values()) == {1}
    stored = [
        key
        for r in ROLES
        for i in IDS
        for key in s3_server.keys(f"s3://{job.bucket}/{r}/{i}.zarr/charge_density_total/")
    ]
    # the attributes of the store are fetched with the values, those of the array are not
    n_objects = sum(not key.endswith("/.zattrs") for key in stored)
    assert len(log.paths("GET")) == n_objects + len(ROLES) * len(IDS)
    dataset = ZarrDataset(job.reader(), "all")
    samples = {sample["index"]: sample for sample in map(dataset.__getitem__, range(len(IDS)))}
    for task_id, got in zip(one.ids + other.ids, one.digests + other.digests, strict=True):
        assert got == digest(samples[task_id]["data"], samples[task_id]["label"])
    model = toy()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for pair in zip(one.ids, other.ids, strict=True):
        step(model, [samples[task_id] for task_id in pair])
        optimizer.step()
    assert (
        one.weights
        == other.weights
        == pytest.approx([float(p.detach()) for p in model.parameters()], rel=1e-4)
    )
    assert one.weights != [float(p.detach()) for p in toy().parameters()]


def test_every_sample_of_a_shuffled_epoch_comes_once(job: Job, tmp_path: Path) -> None:
    """Three epochs, in batches of two, with newly forked workers in each."""
    dataset = ZarrDataset(replace(job, cache_dir=tmp_path).reader(), "all")
    loader = DataLoader(
        dataset,
        batch_size=2,
        shuffle=True,
        num_workers=2,
        collate_fn=_ids_of,
        timeout=DEADLINE_S // 2,
    )
    for _ in range(3):
        assert Counter(task_id for batch in loader for task_id in batch) == Counter(IDS)


def _ids_of(batch: list[Any]) -> list[str]:
    return [sample["index"] for sample in batch]


def first_of_a_worker(dataset: Any) -> Any:
    """Read the first sample of a dataset in a worker."""
    return next(iter(DataLoader(dataset, batch_size=None, num_workers=1, timeout=DEADLINE_S // 2)))


def test_a_missing_array_in_a_worker_is_reported_in_the_parent(
    job: Job, bucket: str, put_store: Callable[..., Any], tmp_path: Path
) -> None:
    """With its class and whole message: the array, the store, and the arrays that exist."""
    for role, task_id in itertools.product(ROLES, IDS):
        put_store(
            f"s3://{bucket}/{role}/{task_id}.zarr",
            {"charge_density_diff": torch.ones(2, 2, 2).numpy()},
        )
    dataset = ZarrDataset(replace(job, bucket=bucket, cache_dir=tmp_path).reader(), "all")
    with pytest.raises(SchemaError) as caught:
        first_of_a_worker(dataset)
    url = f"s3://{bucket}/data/{dataset.task_ids[0]}.zarr"
    assert (
        f"'charge_density_total' not found in zarr store {url}. Available arrays: "
        "['charge_density_diff']" in str(caught.value)
    )


def test_an_unreachable_origin_is_reported_in_the_parent(
    job: Job, s3_server: S3Server, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    """An unreadable sample is an error, never skipped; the message has the URL and the attempts."""
    job = replace(job, s3_kwargs=s3_server.kwargs_at(fault_proxy.endpoint_url), cache_dir=tmp_path)
    dataset = ZarrDataset(job.reader(retry={"attempts": 2, "timeout": "20 s"}), "all")
    fault_proxy.down()
    with pytest.raises(OriginUnavailableError) as caught:
        first_of_a_worker(dataset)
    assert f"s3://{job.bucket}/data/{dataset.task_ids[0]}.zarr" in str(caught.value)
    assert "2 attempts" in str(caught.value)
