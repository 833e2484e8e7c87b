"""Training with Lightning over several ranks and nodes: in the planned order, each object fetched
once, killed at any step and resumed.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.ranks import Job, Killed, Step, names, run
from tests.support.requestlog import RequestLog
from tests.support.s3server import S3Server
from tests.support.stores import small_group
from zarrcache.data.splits import split_ids
from zarrcache.train.schedule import Schedule, node_of

ARRAY = "charge_density_total"
ROLES = ("data", "label")
IDS = [f"mp-{number}" for number in range(10)]
#: Eight to train on, two kept for the end.
TRAINED, TESTED = split_ids(IDS, 8, 42)
EPOCHS = 3
EVERY_SECOND = {"every_n_train_steps": 2}
#: A store that was written within two seconds is listed once more after it was read: it may still
#: be being written.
SETTLED_S = 2.1


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten small materials and their map."""
    root = tmp_path_factory.mktemp("stores")
    for role, (number, task_id) in itertools.product(ROLES, enumerate(IDS)):
        shape = (4, 3, 3 + number % 2)
        small_group(
            root / role / f"{task_id}.zarr",
            shape=shape,
            chunks=shape,
            seed=number + 100 * (role == "label"),
        )
    (root / "map.json").write_text(json.dumps({"GGA": IDS}))
    return root


@pytest.fixture(scope="module")
def bucket(stores: Path, s3_server: S3Server) -> str:
    """The same on S3, written a while ago."""
    name = s3_server.new_bucket()
    for role in ROLES:
        s3_server.put_tree(stores / role, f"s3://{name}/{role}")
    time.sleep(SETTLED_S)
    return name


def config(
    path: Path, stores: Path, root: str, *, cache: dict[str, Any] | None = None, **keys: Any
) -> str:
    """A training config file."""
    document = {
        "data_dir": f"{root}/data",
        "label_dir": f"{root}/label",
        "map_dir": str(stores / "map.json"),
        "functional": "GGA",
        **keys,
    }
    path.write_text(yaml.safe_dump({"train_fraction": 8, "cache": cache, **document}))
    return str(path)


def on_s3(
    path: Path, stores: Path, bucket: str, server: S3Server, *, is_cached: bool = True
) -> str:
    """For the stores in the bucket."""
    cache = {"dir": str(path.parent / "cache"), "min_free": 0} if is_cached else None
    return config(path, stores, f"s3://{bucket}", cache=cache, s3_kwargs=server.s3_kwargs)


def options(config: str, **changes: Any) -> dict[str, Any]:
    """Arguments of the data module."""
    return {
        "config": config,
        "train_workers": 1,
        "val_workers": 1,
        "augmentation": False,
        "val_frac": 0.0,
        "random_seed": 3,
    } | changes


def effective(first: Job, second: Job) -> list[Step]:
    """Steps that the weights have seen: those of the killed run up to its last checkpoint, and
    those of the resumed run.
    """
    return [step for step in first.steps if step.step < second.resumed_at] + second.steps


def in_order(job: Job, epoch: int) -> list[list[str]]:
    """What each rank trained on in an epoch."""
    return [
        names([step for step in job.steps if (step.rank, step.epoch) == (rank, epoch)])
        for rank in range(sum(job.nodes))
    ]


def planned(job: Job, epoch: int, ids: list[str] = TRAINED) -> list[list[str]]:
    """What each rank has to read in a whole epoch."""
    node_of_rank = tuple(node for node, count in enumerate(job.nodes) for _ in range(count))
    schedule = Schedule(
        tuple(ids), job.data.get("assignment", "global"), node_of_rank, seed=job.data["random_seed"]
    )
    return [[ids[index] for index in order] for order in schedule.orders(epoch)]


def losses(steps: list[Step]) -> dict[tuple[int, int], str]:
    """By rank and step, bit for bit."""
    return {(step.rank, step.step): step.loss for step in steps}


def objects(server: S3Server, bucket: str, task_id: str) -> list[str]:
    """Keys of the objects that a read of the material's densities requests."""
    keys = (key for role in ROLES for key in server.keys(f"s3://{bucket}/{role}/{task_id}.zarr/"))
    return [
        key
        for key in keys
        if key.endswith(".zarr/.zattrs") or (f"/{ARRAY}/" in key and not key.endswith("/.zattrs"))
    ]


def test_two_nodes_that_own_their_samples_ask_s3_once_killed_and_resumed_or_not(
    stores: Path, bucket: str, s3_server: S3Server, tmp_path: Path
) -> None:
    """Three epochs on two nodes with a cache each, killed after the first epoch and resumed. The
    cluster fetches each object once, later epochs make no request, and the losses equal those
    without a cache bit for bit.
    """
    data = options(on_s3(tmp_path / "train.yaml", stores, bucket, s3_server), assignment="node")
    caches = (tmp_path / "node0", tmp_path / "node1")
    log = RequestLog(s3_server, bucket)
    one_epoch = Job(
        tmp_path / "a", data, nodes=(1, 1), caches=caches, name="one", epochs=1, checkpoint=None
    )
    run(one_epoch)
    assert log.paths("GET") == Counter(
        key for task_id in TRAINED for key in objects(s3_server, bucket, task_id)
    )
    asked = len(log.seen())

    die_at = random.randrange(1, 4 * EPOCHS)
    killed = Job(
        tmp_path / "b",
        data,
        nodes=(1, 1),
        caches=caches,
        epochs=EPOCHS,
        checkpoint=EVERY_SECOND,
        die_at=die_at,
    )
    run(killed)
    resumed = Job(
        killed.root,
        data,
        nodes=(1, 1),
        caches=caches,
        epochs=EPOCHS,
        checkpoint=EVERY_SECOND,
        name="second",
    )
    run(resumed)
    assert len(log.seen()) == asked, log.seen()[asked:]
    assert resumed.resumed_at == die_at // 2 * 2

    plain = options(
        on_s3(tmp_path / "plain.yaml", stores, bucket, s3_server, is_cached=False),
        assignment="node",
    )
    uncached = Job(tmp_path / "c", plain, nodes=(1, 1), epochs=EPOCHS, checkpoint=None)
    run(uncached)
    assert len(losses(uncached.steps)) == 2 * 4 * EPOCHS
    assert losses(effective(killed, resumed)) == losses(uncached.steps)

    owners = dict(zip(TRAINED, node_of(TRAINED, 2), strict=True))
    for epoch in range(EPOCHS):
        assert in_order(uncached, epoch) == planned(uncached, epoch)
        for rank, seen in enumerate(in_order(uncached, epoch)):
            assert {owners[name] for name in seen} == {rank}


def test_a_global_shuffle_fetches_an_object_once_on_each_node_that_reads_it(
    stores: Path, bucket: str, s3_server: S3Server, tmp_path: Path
) -> None:
    """Two nodes with two ranks each: once per node, whichever rank or worker comes first. The
    look-ahead may have begun the epoch after the last one. Lightning keeps the sampler.
    """
    data = options(on_s3(tmp_path / "train.yaml", stores, bucket, s3_server))
    log = RequestLog(s3_server, bucket)
    job = Job(
        tmp_path / "run",
        data,
        nodes=(2, 2),
        caches=(tmp_path / "node0", tmp_path / "node1"),
        epochs=2,
        checkpoint=None,
    )
    run(job)
    assert [in_order(job, epoch) for epoch in range(2)] == [planned(job, 0), planned(job, 1)]

    def once_per_node(epochs: int) -> Counter[str]:
        readers = {
            (name, rank // 2)
            for epoch in range(epochs)
            for rank, order in enumerate(planned(job, epoch))
            for name in order
        }
        return Counter(key for name, _ in readers for key in objects(s3_server, bucket, name))

    assert once_per_node(2) <= log.paths("GET") <= once_per_node(3)
    # The listing of both directories, by one process of each node.
    assert [log.paths("LIST")[f"{role}/"] for role in ROLES] == [2, 2]


#: How a job goes on, and the assignment with which the default suite runs it under Lightning.
#: tests/unit/train/test_sampler.py kills and resumes both assignments with other ranks and nodes.
CHANGED: list[tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any], int | None, str]] = [
    (
        "other workers", (1,), (1,), {"train_workers": 2, "persistent_workers": False}, None,
        "global",
    ),
    ("one of two ranks", (2,), (1,), {"train_workers": 0, "val_workers": 0}, None, "global"),
    ("one of two ranks after the last step of an epoch", (2,), (1,), {}, 4, "node"),
    ("another batch size", (2,), (2,), {"batch_size": 2}, None, "global"),
    ("two nodes instead of one", (1,), (1, 1), {}, None, "node"),
    ("three ranks on one node instead of two nodes", (1, 1), (3,), {}, None, "node"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "after", "changes", "die_at", "assignment"),
    [
        pytest.param(
            *way,
            assignment,
            id=f"{assignment}-{name}",
            marks=() if assignment == quick else pytest.mark.slow,
        )
        for name, *way, quick in CHANGED
        for assignment in ("global", "node")
    ],
)
def test_killed_at_any_step_the_epoch_goes_on_with_other_ranks_and_workers_each_sample_once(
    stores: Path,
    tmp_path: Path,
    before: tuple[int, ...],
    after: tuple[int, ...],
    changes: dict[str, Any],
    die_at: int | None,
    assignment: str,
) -> None:
    """SIGKILL in the middle of a step; only samples after the last checkpoint are trained on
    again.
    """
    data = options(config(tmp_path / "train.yaml", stores, str(stores)), assignment=assignment)
    every = 1 if sum(before) > 1 else 3
    die_at = random.randrange(1, EPOCHS * 8 // sum(before)) if die_at is None else die_at
    killed = Job(
        tmp_path / "run",
        data,
        nodes=before,
        epochs=EPOCHS,
        checkpoint={"every_n_train_steps": every},
        die_at=die_at,
    )
    run(killed)
    resumed = Job(killed.root, data | changes, nodes=after, epochs=EPOCHS, name="second")
    run(resumed)
    assert resumed.resumed_at == die_at - die_at % every
    ranks = sum(after)
    for epoch in range(EPOCHS):
        before_it = names(
            [
                step
                for step in killed.steps
                if step.step < resumed.resumed_at and step.epoch == epoch
            ]
        )
        after_it = names([step for step in resumed.steps if step.epoch == epoch])
        assert len(before_it) == len(set(before_it))
        assert set(before_it) | set(after_it) == set(TRAINED), (die_at, epoch)
        # Where the rest is no multiple of the ranks, the last step repeats as many samples as it
        # takes.
        left = len(TRAINED) - len(before_it)
        assert len(after_it) == -(-left // ranks) * ranks, (die_at, epoch)
        assert not set(before_it) & set(after_it) or left % ranks, (die_at, epoch)
        if not before_it:
            assert in_order(resumed, epoch) == planned(resumed, epoch), (die_at, epoch)


@pytest.mark.parametrize(
    ("checkpoint", "trainer", "data"),
    [
        pytest.param({}, {}, {"val_frac": 0.25}, id="of a validation"),
        pytest.param({}, {}, {}, id="of the end of an epoch"),
        pytest.param(
            {"every_n_train_steps": 1},
            {"limit_train_batches": 5},
            {"batch_size": 1},
            id="of the last step of a limited epoch",
        ),
        pytest.param(
            {"every_n_train_steps": 4},
            {"reload_dataloaders_every_n_epochs": 1},
            {"drop_last": True, "batch_size": 2},
            id="reloaded",
        ),
    ],
)
def test_resumed_from_a_checkpoint_at_the_end_of_an_epoch_the_next_one_is_the_planned_one(
    stores: Path,
    tmp_path: Path,
    checkpoint: dict[str, Any],
    trainer: dict[str, Any],
    data: dict[str, Any],
) -> None:
    """Lightning asks for the first samples before it sets the epoch."""
    settings = options(config(tmp_path / "train.yaml", stores, str(stores)), **data)
    count = 6 if "val_frac" in data else trainer.get("limit_train_batches", 8)
    ended = Job(
        tmp_path / "run", settings, nodes=(1,), epochs=1, checkpoint=checkpoint, trainer=trainer
    )
    run(ended)
    resumed = Job(
        ended.root,
        settings,
        nodes=(1,),
        epochs=EPOCHS,
        checkpoint=checkpoint,
        trainer=trainer,
        name="second",
    )
    run(resumed)
    ids = split_ids(TRAINED, 6, 3)[0] if "val_frac" in data else TRAINED
    for job, epochs in ((ended, [0]), (resumed, [1, 2])):
        assert sorted({step.epoch for step in job.steps}) == epochs
        for epoch in epochs:
            assert in_order(job, epoch) == [planned(job, epoch, ids)[0][:count]]


def test_ranks_that_see_different_samples_all_stop_at_the_start(
    stores: Path, tmp_path: Path
) -> None:
    """One node has an older map file. No rank waits for another."""
    caches = (tmp_path / "node0", tmp_path / "node1")
    for count, cache in zip((10, 9), caches, strict=True):
        cache.mkdir()
        (cache / "map.json").write_text(json.dumps({"GGA": IDS[:count]}))
    settings = options(
        config(
            tmp_path / "train.yaml",
            stores,
            str(stores),
            map_dir="${ZARRCACHE_DIR}/map.json",
            train_fraction=0.8,
        )
    )
    with pytest.raises(Killed) as error:
        run(Job(tmp_path / "run", settings, nodes=(1, 1), caches=caches, checkpoint=None))
    assert str(error.value).startswith("exit codes [1, 1]")
    assert "training samples are {'0': 8} on rank 0 and {'0': 7} on rank 1" in str(error.value)


def test_overfitting_reads_the_first_batches_in_every_epoch(stores: Path, tmp_path: Path) -> None:
    """As ``Trainer(overfit_batches=...)`` is meant; Lightning replaces the sampler and warns."""
    settings = options(config(tmp_path / "train.yaml", stores, str(stores)))
    job = Job(tmp_path / "run", settings, epochs=2, trainer={"overfit_batches": 3})
    run(job)
    assert in_order(job, 0) == in_order(job, 1) == [TRAINED[:3]]
