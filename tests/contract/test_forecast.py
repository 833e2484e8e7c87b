"""``zarrcache plan`` against real runs: two nodes, three epochs, requests counted at the server."""

from __future__ import annotations

import functools
import itertools
import json
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.following import is_there, wait_for
from tests.support.requestlog import RequestLog
from tests.support.s3server import S3Server
from tests.support.stores import small_group
from tests.support.training import zarrcache
from zarrcache.config import DataConfig
from zarrcache.data.reader import open_reader
from zarrcache.errors import ConfigError
from zarrcache.ops.forecast import MeasuredSplit, measure_split
from zarrcache.train.lookahead import Lookahead
from zarrcache.train.schedule import Schedule

PAIRS, EPOCHS, NODES = 30, 3, 2
ROLES = ("data", "label")
SETTLED_S = 2.1


@pytest.fixture(scope="module")
def config(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Pairs of three sizes, one in ten zipped."""
    root, bucket = tmp_path_factory.mktemp("forecast"), s3_server.new_bucket()
    for role, number in itertools.product(ROLES, range(PAIRS)):
        zipped = number % 10 == 9
        small_group(
            root / role / f"mp-{number}.zarr{'.zip' * zipped}",
            shape=(10, 12, 14 + number % 3),
            chunks=(10, 12, 8),
            seed=number,
            as_zip=zipped,
        )
    for role in ROLES:
        s3_server.put_tree(root / role, f"s3://{bucket}/{role}")
    (root / "map.json").write_text(json.dumps({"GGA": [f"mp-{number}" for number in range(PAIRS)]}))
    time.sleep(SETTLED_S)
    return {
        "data_dir": f"s3://{bucket}/data",
        "label_dir": f"s3://{bucket}/label",
        "map_dir": str(root / "map.json"),
        "functional": "GGA",
        "train_fraction": 0.8,
        "s3_kwargs": s3_server.s3_kwargs,
    }


@pytest.fixture(scope="module")
def split(config: dict[str, Any]) -> MeasuredSplit:
    """Measured once: 48 densities of 24 samples."""
    return measure_split(DataConfig(**config), capacity_bytes=1)


def trained(
    config: dict[str, Any], directory: Path, limit: int, assignment: Any, eviction: str
) -> list[float]:
    """Hit ratio of each epoch on two nodes that read what their ranks would read."""
    readers = []
    for node in range(NODES):
        cache = {
            "dir": directory / f"node{node}",
            "limit": limit,
            "min_free": 0,
            "eviction": eviction,
            "lookahead": 0,
        }
        readers.append(open_reader({**config, "cache": cache}))
    names, _ = readers[0].split_task_ids()
    schedule = Schedule(tuple(names), assignment=assignment, node_of_rank=(0, 1))
    ratios = []
    with ExitStack() as stack:
        foreseeing = []
        if eviction == "belady":
            for node, reader in enumerate(readers):
                order = [
                    [names[index] for index in schedule.node_order(epoch, node)]
                    for epoch in range(EPOCHS)
                ]
                foreseeing.append(stack.enter_context(Lookahead(reader, order)))
        for epoch in range(EPOCHS):
            before = [reader.stats for reader in readers]
            for ahead in foreseeing:
                ahead.set_epoch(epoch)
            for node, reader in enumerate(readers):
                for index, role in itertools.product(schedule.node_order(epoch, node), ROLES):
                    reader.load(names[index], role)  # type: ignore[arg-type]
            now = [reader.stats - old for reader, old in zip(readers, before, strict=True)]
            ratios.append(
                sum(stats.hits for stats in now) / sum(stats.hits + stats.misses for stats in now)
            )
    return ratios


@pytest.mark.parametrize(
    ("assignment", "eviction", "share"),
    [
        ("global", "none", 0.5),
        pytest.param("global", "least-recently-stored", 0.5, marks=pytest.mark.slow),
        ("global", "belady", 0.4),
        ("node", "none", 0.55),
        pytest.param("global", "none", 1.5, marks=pytest.mark.slow),
    ],
)
def test_a_run_does_what_the_plan_says(
    config: dict[str, Any],
    split: MeasuredSplit,
    s3_server: S3Server,
    tmp_path: Path,
    assignment: Any,
    eviction: Any,
    share: float,
) -> None:
    """Hits within 2 points in every epoch, requests within 5 %."""
    whole = split.forecast()
    assert (whole.samples, whole.densities, whole.measured) == (24, 48, 48)
    limit = int(whole.disk_bytes * share)
    # The two stored listings take 16 KiB: much of this cache, little of 200 GiB.
    plan = split.forecast(
        nodes=NODES,
        capacity_bytes=limit - 2**14,
        assignment=assignment,
        eviction=eviction,
        epochs=EPOCHS,
    )
    log = RequestLog(s3_server, config["data_dir"].split("/")[2])
    ratios = trained(config, tmp_path, limit, assignment, eviction)
    assert [epoch.hit_ratio for epoch in plan.epochs] == pytest.approx(ratios, abs=0.02)
    assert plan.total.requests == pytest.approx(len(log.seen()), rel=0.05)
    if assignment == "node":
        assert ratios[-1] == 1
    assert plan.total.nbytes == sum(epoch.nbytes for epoch in plan.epochs)


def test_the_room_of_the_look_ahead_is_in_the_plan(
    config: dict[str, Any], split: MeasuredSplit, s3_server: S3Server, tmp_path: Path
) -> None:
    """It drops a quarter of a small cache; without it more hits and fewer requests are planned."""
    epochs = 4
    limit = int(split.forecast().disk_bytes * 0.6)
    cache = {"dir": tmp_path / "cache", "limit": limit, "min_free": 0}
    source = DataConfig(**config, cache=cache)
    measured = measure_split(source, capacity_bytes=limit - 2**14)
    plan, without = (measured.forecast(lookahead_bytes=ahead, epochs=epochs) for ahead in (None, 0))
    assert (plan.lookahead_bytes, without.lookahead_bytes) == ((limit - 2**14) // 4, 0)
    log = RequestLog(s3_server, config["data_dir"].split("/")[2])
    reader = open_reader(source)
    names, _ = reader.split_task_ids()
    schedule = Schedule(tuple(names))
    orders = [[names[index] for index in schedule.node_order(epoch, 0)] for epoch in range(epochs)]
    with Lookahead(reader, orders) as ahead:
        for epoch, order in enumerate(orders):
            ahead.set_epoch(epoch)
            for name, role in itertools.product(order, ROLES):
                wait_for(functools.partial(is_there, reader, name, role), f"{name} did not come")
                reader.load(name, role)  # type: ignore[arg-type]
    seen = len(log.seen())
    assert plan.total.requests == pytest.approx(seen, rel=0.05)
    assert without.total.requests < 0.95 * plan.total.requests


def test_longer_runs_and_other_ways_are_extrapolated(
    split: MeasuredSplit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fifty epochs continue like the last simulated ones; a table compares the alternatives."""
    half = split.forecast().disk_bytes // 2
    simulated = split.forecast(nodes=NODES, capacity_bytes=half, ranks_per_node=2).total
    # the share of 24 samples stands for thousands
    monkeypatch.setattr("zarrcache.ops.forecast.SIMULATED", 24 * 25)
    plan = split.forecast(nodes=NODES, capacity_bytes=half, ranks_per_node=2)
    assert (plan.ranks, plan.run_epochs, len(plan.epochs)) == (4, 50, 25)
    assert (plan.total.requests, plan.total.dollars) == pytest.approx(
        (simulated.requests, simulated.dollars), rel=0.06
    )
    ways = {(way.assignment, way.eviction): ratio for way, ratio in plan.others.items()}
    assert (
        ways["node", "none"]
        > ways["global", "belady"]
        > ways["global", "none"]
        > ways["global", "least-recently-used"]
    )


def test_a_global_shuffle_over_many_nodes_takes_many_epochs_to_fill_the_caches(
    split: MeasuredSplit,
) -> None:
    """With room for everything, n nodes still miss ((n - 1) / n)**k of their reads after k
    epochs.
    """
    nodes = 8
    plan = split.forecast(nodes=nodes, capacity_bytes=2**40, epochs=50)
    expected = [1 - (1 - 1 / nodes) ** epoch for epoch in range(50)]
    assert plan.total.hit_ratio == pytest.approx(sum(expected) / 50, abs=0.02)
    assert plan.total.requests == pytest.approx(
        sum(1 - hit for hit in expected) * plan.epochs[0].requests, rel=0.1
    )
    assert min(plan.others.values()) > 0.96
    assert split.forecast(nodes=nodes, capacity_bytes=2**40, epochs=1000).total.hit_ratio > 0.98
    with pytest.raises(ConfigError, match="more than the 24 samples"):
        split.forecast(nodes=25, capacity_bytes=1)


def test_the_command_prints_text_and_json(config: dict[str, Any], tmp_path: Path) -> None:
    """With --probe; nothing is cached or written."""
    path = tmp_path / "train.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                **config,
                "cache": {
                    "dir": str(tmp_path / "cache"),
                    "prices": {"get_per_1000": 1.0, "dated": "2026-11"},
                },
            }
        )
    )
    options = (
        "--nodes",
        2,
        "--capacity",
        "500 KiB",
        "--assignment",
        "node",
        "--epochs",
        5,
        "--probe",
    )
    words = zarrcache("plan", path, *options, "--workers", 1)
    assert words.code == 0, words.err
    assert "24 samples, 48 densities" in words.out
    assert "2 nodes, 2 ranks: each cache holds 500.0 KiB" in words.out
    assert "Prices of 2026-11" in words.out
    assert words.out.count("<- this") == 1
    document = zarrcache("plan", path, *options, "--workers", 2, "--json").document
    assert document["total"]["seconds"] > 0
    assert document["total"]["dollars"] == pytest.approx(
        sum(epoch["dollars"] for epoch in document["epochs"])
    )
    assert len(document["epochs"]) == 5
    assert document["speed"]["densities"] == 8
    assert not (tmp_path / "cache").exists()


def test_numbers_that_cannot_be_are_refused(config: dict[str, Any], split: MeasuredSplit) -> None:
    """With an error; the command line exits with 2."""
    with pytest.raises(ConfigError, match="it has to be a whole number from 1"):
        split.forecast(nodes=0)
    with pytest.raises(ConfigError, match="--capacity"):
        measure_split(DataConfig(**config)).forecast()
