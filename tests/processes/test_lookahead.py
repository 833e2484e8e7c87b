"""Look-ahead: the next densities are cached before they are read, every object is fetched once, and
the limit holds.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from tests.support.following import ONE, Pairs, is_there, occupied, put_pairs, wait_for
from tests.support.processes import interpreters
from tests.support.requestlog import RequestLog
from tests.support.s3server import S3Server
from zarrcache import ConfigError, Lookahead, NodeSampler, World, ZarrDataset, ZarrS3Reader
from zarrcache._keys import ROLES

COUNT = 13  # pairs; one of them is the test set
LISTINGS = 2 * 8192  # bytes on disk: which materials there are


@pytest.fixture(scope="module")
def pairs(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """On S3, shared by these tests."""
    return put_pairs(s3_server, tmp_path_factory.mktemp("pairs"), COUNT)


def steps(dataset: ZarrDataset, sampler: NodeSampler) -> Iterator[str]:
    """Task ids in the order of training."""
    return (dataset.task_ids[index] for index in sampler)


def train(dataset: ZarrDataset, sampler: NodeSampler, pairs: Pairs) -> None:
    """An epoch that reads each sample once it is cached, and checks its values."""
    reader = dataset.reader
    assert isinstance(reader, ZarrS3Reader)
    for index in sampler:
        task_id = dataset.task_ids[index]
        for role in ROLES:
            wait_for(
                lambda task_id=task_id, role=role: is_there(reader, task_id, role),
                f"{task_id} ({role}) did not come",
            )  # type: ignore[misc]
        sample = dataset[index]
        for role in ROLES:
            assert np.array_equal(sample[role][0].numpy(), pairs.values[task_id, role]), (
                task_id,
                role,
            )


def gets(log: RequestLog) -> Counter[int]:
    """Numbers of objects by number of fetches."""
    return Counter(log.paths("GET").values())


def test_a_cold_epoch_finds_everything_there_and_asks_for_every_object_once(
    pairs: Pairs, s3_server: S3Server, tmp_path: Path
) -> None:
    """Never more than the budget ahead; also into the next epoch, for which nothing is left to
    fetch.
    """
    reader = pairs.reader(tmp_path, s3_server.s3_kwargs, lookahead=6 * ONE)
    dataset = ZarrDataset(reader)
    sampler, log = NodeSampler(dataset, seed=4), RequestLog(s3_server, pairs.bucket)
    with Lookahead(dataset, sampler) as ahead:
        assert reader.cache.index is not None
        wait_for(lambda: occupied(reader.cache.index) >= 5 * ONE, "the prefetcher did not begin")  # type: ignore[arg-type]
        time.sleep(0.3)  # time in which it would go on
        assert occupied(reader.cache.index) <= 6 * ONE
        first = list(steps(dataset, sampler))[:2]
        assert all(
            is_there(reader, task_id, role) for task_id, role in itertools.product(first, ROLES)
        )
        train(dataset, sampler, pairs)
        assert reader._counters.snapshot().misses == 0  # of this process
        everything = (2 * COUNT - 2, 2 * COUNT - 2)
        # What the prefetcher has stored can be read before it has counted it.
        wait_for(
            lambda: (reader.stats.misses, reader.stats.hits) == everything,
            "other misses and hits than were planned",
        )
        sampler.set_epoch(1)
        ahead.set_epoch(1)
        train(dataset, sampler, pairs)
        assert ahead.check()
    assert gets(log) == {1: pairs.objects * (2 * COUNT - 2)}
    assert reader.stats.cache_errors == 0


def test_a_density_that_is_evicted_before_its_read_is_fetched_again(
    pairs: Pairs, s3_server: S3Server, tmp_path: Path
) -> None:
    """The eviction is that of ``zarrcache evict``, or of the room for the first loan."""
    reader = pairs.reader(tmp_path, s3_server.s3_kwargs, lookahead=6 * ONE)
    dataset = ZarrDataset(reader)
    index, sampler = reader.cache.index, NodeSampler(dataset, seed=4)
    assert index is not None
    first = next(steps(dataset, sampler))
    with Lookahead(dataset, sampler):
        for _ in range(2):  # what came again can be dropped again
            for role in ROLES:
                wait_for(lambda role=role: is_there(reader, first, role), f"{role} did not come")  # type: ignore[misc]
            assert index.drop_oldest(index.volume_bytes())
        train(dataset, sampler, pairs)
    assert reader._counters.snapshot().misses == 0


@pytest.mark.parametrize("eviction", ["none", "belady"])
def test_on_a_full_disk_look_ahead_makes_loans_and_the_limit_holds(
    pairs: Pairs, s3_server: S3Server, tmp_path: Path, eviction: str
) -> None:
    """Room for 16 of 24: four are given up for loans, and each epoch fetches the other eight
    once.
    """
    reader = pairs.reader(
        tmp_path,
        s3_server.s3_kwargs,
        limit=16 * ONE + LISTINGS,
        lookahead=4 * ONE,
        eviction=eviction,
    )
    dataset = ZarrDataset(reader)
    index, sampler = reader.cache.index, NodeSampler(dataset, seed=4)
    assert index is not None
    log = RequestLog(s3_server, pairs.bucket)
    with Lookahead(dataset, sampler) as ahead:
        for epoch in range(3):
            sampler.set_epoch(epoch)
            ahead.set_epoch(epoch)
            for index_ in sampler:
                task_id = dataset.task_ids[index_]
                for role in ROLES:
                    wait_for(
                        lambda task_id=task_id, role=role: is_there(reader, task_id, role),
                        f"{task_id} did not come",
                    )  # type: ignore[misc]
                    assert occupied(index) <= 16 * ONE
                    assert len(index.loans()) <= 4
                    assert np.array_equal(
                        reader.load(task_id, role)[0], pairs.values[task_id, role].ravel()
                    )
        assert reader._counters.snapshot().misses == 0
        fetched = reader.stats.misses
        stays = len(list(reader.cache.arrays.entries()))  # type: ignore[union-attr]
    # with two listings; belady lends only what is needed last
    assert 12 <= stays <= (18 if eviction == "belady" else 16)
    # those that stay are fetched once, the others in each epoch; and what is ahead at the end
    assert fetched <= 24 + 2 * (24 - 12) + 4
    assert sum(log.paths("GET").values()) <= pairs.objects * (fetched + 4)
    assert not index.loans()
    assert index.volume_bytes() <= 16 * ONE + LISTINGS


def test_on_a_full_disk_what_is_read_twice_in_a_row_gets_two_loans(
    pairs: Pairs, s3_server: S3Server, tmp_path: Path
) -> None:
    """As when sampling with replacement: the first read takes the loan that the second would have
    found.
    """
    reader = pairs.reader(
        tmp_path, s3_server.s3_kwargs, limit=16 * ONE + LISTINGS, lookahead=4 * ONE
    )
    dataset = ZarrDataset(reader)
    stays, drawn = (
        dataset.task_ids[:8],
        [dataset.task_ids[number] for number in (8, 8, 9, 8, 10, 10, 10, 11, 9, 9)],
    )
    for task_id, role in itertools.product(stays, ROLES):
        reader.load(task_id, role)
    misses = reader._counters.snapshot().misses
    with Lookahead(dataset, [drawn, drawn[::-1]]) as ahead:
        for epoch, order in enumerate((drawn, drawn[::-1])):
            ahead.set_epoch(epoch)
            for task_id, role in itertools.product(order, ROLES):
                wait_for(
                    lambda task_id=task_id, role=role: is_there(reader, task_id, role),
                    f"{task_id} did not come",
                )  # type: ignore[misc]
                assert np.array_equal(
                    reader.load(task_id, role)[0], pairs.values[task_id, role].ravel()
                )
    assert reader._counters.snapshot().misses == misses


def test_workers_of_a_dataloader_are_followed_too(
    pairs: Pairs, s3_server: S3Server, tmp_path: Path
) -> None:
    """Their reads free budget, or the prefetcher would stop; only one of the two fetches."""
    reader = pairs.reader(tmp_path, s3_server.s3_kwargs, lookahead=6 * ONE)
    dataset = ZarrDataset(reader)
    sampler, log = NodeSampler(dataset, seed=4), RequestLog(s3_server, pairs.bucket)
    with Lookahead(dataset, sampler):
        wait_for(lambda: occupied(reader.cache.index) >= 4 * ONE, "the prefetcher did not begin")  # type: ignore[arg-type, union-attr]
        loader = DataLoader(
            dataset, batch_size=None, sampler=sampler, num_workers=2, multiprocessing_context="fork"
        )
        seen = [sample["index"] for sample in loader]
    assert seen == list(steps(dataset, sampler))
    assert gets(log) == {1: pairs.objects * (2 * COUNT - 2)}


def test_it_ends_at_once_beside_workers_that_stay(
    pairs: Pairs, s3_server: S3Server, tmp_path: Path
) -> None:
    """Forked workers keep its pipe open; it is neither waited for nor killed."""
    reader = pairs.reader(tmp_path, s3_server.s3_kwargs, lookahead=6 * ONE)
    dataset = ZarrDataset(reader)
    sampler = NodeSampler(dataset, seed=4)
    with Lookahead(dataset, sampler) as ahead:
        loader = DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=2,
            multiprocessing_context="fork",
            persistent_workers=True,
        )
        assert len(list(loader)) == COUNT - 1
        assert ahead._prefetcher is not None
        process = ahead._prefetcher._process
    assert process.wait() == 0
    del loader


def test_each_rank_runs_ahead_of_itself(pairs: Pairs, s3_server: S3Server, tmp_path: Path) -> None:
    """With its part of the node's budget; other ranks' reads are left to their look-ahead."""
    reader = pairs.reader(tmp_path, s3_server.s3_kwargs, lookahead=8 * ONE)
    dataset = ZarrDataset(reader)
    sampler = NodeSampler(dataset, seed=4, world=World(1, (0, 0)))
    with Lookahead(dataset, sampler):
        own = list(steps(dataset, sampler))
        wait_for(lambda: is_there(reader, own[0], "label"), "the prefetcher did not begin")
        time.sleep(0.3)
        there = {
            task_id
            for task_id in dataset.task_ids
            if is_there(reader, task_id, "data") or is_there(reader, task_id, "label")
        }
        assert there <= set(own[:2])


def test_a_process_that_cannot_be_started_is_one_warning(
    pairs: Pairs, s3_server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With two file descriptors left; training continues and starts it later."""
    dataset = ZarrDataset(pairs.reader(tmp_path, s3_server.s3_kwargs, lookahead=8 * ONE))
    sampler = NodeSampler(dataset)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(3)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 1, hard))
    os.close(held.pop())
    os.close(held.pop())
    try:
        with Lookahead(dataset, sampler) as ahead:
            assert ahead.pid is None
            assert not ahead.check()
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            assert len([dataset[index] for index in sampler]) == len(sampler)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in held:
            os.close(fd)
    assert [
        record.levelname
        for record in caplog.records
        if "its process cannot be started" in record.getMessage()
    ] == ["WARNING"]


@pytest.mark.parametrize(
    ("owner", "name"),
    [(subprocess, "Popen"), (threading.Thread, "start")],
    ids=["in its start", "after its start"],
)
def test_interrupted_while_it_starts_the_process_ends(
    pairs: Pairs,
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    owner: Any,
    name: str,
) -> None:
    """Also if the exception is kept, as a notebook does: the process would fetch beside the next
    one.
    """
    dataset = ZarrDataset(pairs.reader(tmp_path, s3_server.s3_kwargs, lookahead=8 * ONE))
    reader, sampler, start, before = (
        dataset.reader,
        NodeSampler(dataset),
        getattr(owner, name),
        interpreters(),
    )
    assert isinstance(reader, ZarrS3Reader)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        started = start(*arguments, **options)
        signal.raise_signal(signal.SIGINT)
        return started

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt) as kept:
        Lookahead(dataset, sampler)
    assert interpreters() == before
    assert not reader._observers
    assert kept.value.__traceback__ is not None


def test_where_there_is_nothing_to_do_no_process_is_started(
    pairs: Pairs, s3_server: S3Server, tmp_path: Path
) -> None:
    """With ``lookahead: 0``; a sampler of another type is refused."""
    reader = pairs.reader(tmp_path, s3_server.s3_kwargs, lookahead=0)
    dataset = ZarrDataset(reader)
    with Lookahead(dataset, NodeSampler(dataset)) as ahead:
        assert ahead.pid is None
        assert ahead.check()
    following = ZarrDataset(pairs.reader(tmp_path, s3_server.s3_kwargs))
    with pytest.raises(ConfigError, match="have different samples"):
        Lookahead(following, NodeSampler(["mp-1", "mp-2"]))
    with pytest.raises(ConfigError, match="does not read through zarrcache"):
        Lookahead([1, 2], [[0, 1]])


def test_lists_share_the_budget_of_the_node_and_know_too_little_for_belady(
    pairs: Pairs, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks under torchrun, with half of the budget each; one rank's list does not have the
    reads of the other.
    """
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    dataset = ZarrDataset(pairs.reader(tmp_path, s3_server.s3_kwargs, lookahead=8 * ONE))
    with Lookahead(dataset, [list(range(COUNT - 1))]):
        reader = dataset.reader
        assert isinstance(reader, ZarrS3Reader)
        wait_for(
            lambda: is_there(reader, dataset.task_ids[0], "label"), "the prefetcher did not begin"
        )
        time.sleep(0.3)  # time in which it would go on
        assert occupied(reader.cache.index) <= 4 * ONE  # type: ignore[arg-type]
    foreseeing = ZarrDataset(pairs.reader(tmp_path, s3_server.s3_kwargs, eviction="belady"))
    with pytest.raises(ConfigError, match="this node has 2 ranks"):
        Lookahead(foreseeing, [[0, 1]])


def test_an_order_that_was_drawn_with_replacement_is_followed(
    pairs: Pairs, s3_server: S3Server, tmp_path: Path
) -> None:
    """As positions or names; a sample that occurs twice is fetched once."""
    reader = pairs.reader(tmp_path, s3_server.s3_kwargs, lookahead=20 * ONE)
    dataset = ZarrDataset(reader)
    log = RequestLog(s3_server, pairs.bucket)
    with Lookahead(dataset, [[3, 5, 3, 3], [7]]):
        wait_for(
            lambda: is_there(reader, dataset.task_ids[7], "label"),
            "the prefetcher did not come to the second epoch",
        )
    assert gets(log) == {1: pairs.objects * 6}


@pytest.mark.slow
def test_four_nodes_that_have_room_for_a_quarter_hit_as_often_as_the_future_allows(
    s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A global shuffle through four caches with ``eviction: belady``: 95 % of the hits of offline
    Belady, counted at the server too.
    """
    count, epochs, room = 49, 8, 24
    many = put_pairs(s3_server, tmp_path_factory.mktemp("many"), count)
    hits = best = 0
    for node in range(4):
        reader = many.reader(
            tmp_path_factory.mktemp("node"),
            s3_server.s3_kwargs,
            limit=room * ONE + LISTINGS,
            lookahead=0,
            eviction="belady",
            bytes={"enabled": False},
        )
        dataset = ZarrDataset(reader)
        sampler = NodeSampler(dataset, seed=4, world=World(node, (0, 1, 2, 3)))
        reads: list[tuple[str, str]] = []
        log = RequestLog(s3_server, many.bucket)
        with Lookahead(dataset, sampler) as ahead:
            for epoch in range(epochs):
                sampler.set_epoch(epoch)
                ahead.set_epoch(epoch)
                for index in sampler:
                    dataset[index]
                    reads += [(dataset.task_ids[index], role) for role in ROLES]
        stats = reader.stats
        assert stats.hits + stats.misses == len(reads)
        assert sum(log.paths("GET").values()) == many.objects * stats.misses
        hits += stats.hits
        best += sum(_offline(reads, room))
    assert hits >= 0.95 * best
    assert hits > 0.4 * 2 * (count - 1) * epochs


def _offline(reads: list[tuple[str, str]], room: int) -> Iterator[bool]:
    """Belady's hits, entries of one size."""
    stored: set[tuple[str, str]] = set()
    for position, density in enumerate(reads):
        yield density in stored
        after = {
            one: next((i for i in range(position + 1, len(reads)) if reads[i] == one), len(reads))
            for one in {*stored, density}
        }
        stored = set(sorted(after, key=lambda one: after[one])[:room])


PROGRAM = """
import json, sys, time
from zarrcache import Lookahead, ZarrS3Reader

print("imported", flush=True)

class Reader(ZarrS3Reader):
    pass

def train(cls):
    settings = json.loads(sys.argv[1])
    reader = cls(*settings["where"], s3_kwargs=settings["s3_kwargs"], cache=settings["cache"])
    with Lookahead(reader, [reader.split_task_ids()[0]]) as ahead:
        end_s = time.monotonic() + 60
        while reader.stats.misses < 4 and ahead.check() and time.monotonic() < end_s:
            time.sleep(0.01)
        print("ahead", reader.stats.misses >= 4 and ahead.check())
"""


def _run_program(
    pairs: Pairs, s3_server: S3Server, tmp_path: Path, program: str
) -> subprocess.CompletedProcess[str]:
    (tmp_path / "train.py").write_text(program)
    url = f"s3://{pairs.bucket}"
    where = [f"{url}/data", f"{url}/label", str(pairs.map_path), "GGA", False, COUNT - 1]
    cache = {"dir": str(tmp_path / "cache"), "min_free": 0, "lookahead": 8 * ONE}
    settings = json.dumps({"where": where, "s3_kwargs": s3_server.s3_kwargs, "cache": cache})
    return subprocess.run(
        [sys.executable, tmp_path / "train.py", settings],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("program", "imports"),
    [
        (f"{PROGRAM}\ntrain(ZarrS3Reader)\n", 1),
        (f"{PROGRAM}\nif __name__ == '__main__':\n    train(Reader)\n", 2),
    ],
    ids=["without a guard", "with a class of its own"],
)
def test_a_users_program_is_not_run_once_more(
    pairs: Pairs, s3_server: S3Server, tmp_path: Path, program: str, imports: int
) -> None:
    """A training script needs no main guard, and its imports (Lightning: 5 s) delay nothing, unless
    its classes are needed.
    """
    done = _run_program(pairs, s3_server, tmp_path, program)
    assert done.stderr == ""
    assert done.stdout.split("\n") == [*["imported"] * imports, "ahead True", ""]


def test_a_program_whose_class_is_needed_and_that_has_no_guard_trains_without(
    pairs: Pairs, s3_server: S3Server, tmp_path: Path
) -> None:
    """The process that imports it does not train itself."""
    done = _run_program(pairs, s3_server, tmp_path, f"{PROGRAM}\ntrain(Reader)\n")
    assert done.stdout.split("\n") == ["imported", "imported", "ahead False", ""]
    assert "RuntimeError" in done.stderr
    assert "if __name__ == '__main__':" in done.stderr


LEAVE = f"""
{PROGRAM}
def leave():
    global ahead
    settings = json.loads(sys.argv[1])
    reader = Reader(*settings["where"], s3_kwargs=settings["s3_kwargs"], cache=settings["cache"])
    ahead = Lookahead(reader, [reader.split_task_ids()[0]])
    end_s = time.monotonic() + 60
    while reader.stats.misses < 4 and ahead.check() and time.monotonic() < end_s:
        time.sleep(0.01)
    print("left", reader.stats.misses >= 4 and ahead.check())
"""
SPAWN = """
    import multiprocessing
    rank = multiprocessing.get_context("spawn").Process(target=leave)
    rank.start()
    rank.join()
    print("exit code", rank.exitcode)
"""


@pytest.mark.parametrize(
    ("main", "last"),
    [("    leave()\n", "left True"), (SPAWN, "exit code 0")],
    ids=["a script", "a spawned rank"],
)
def test_a_program_that_does_not_close_it_ends_and_its_process_too(
    pairs: Pairs, s3_server: S3Server, tmp_path: Path, main: str, last: str
) -> None:
    """A process of multiprocessing runs no exit handlers of its own. The reader's class is one of
    the script's; ``subprocess.run`` returns when the look-ahead process has closed its output too.
    """
    done = _run_program(pairs, s3_server, tmp_path, f"{LEAVE}\nif __name__ == '__main__':\n{main}")
    assert done.stderr == ""
    assert "left True" in done.stdout
    assert done.stdout.splitlines()[-1] == last
