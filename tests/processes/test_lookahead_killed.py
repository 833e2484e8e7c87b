"""A killed look-ahead does not stop the training, and a killed training leaves no look-ahead; its
loans and reservations are reclaimed.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader

from tests.support.following import ONE, Pairs, is_there, occupied, put_pairs, wait_for
from tests.support.s3server import S3Server
from zarrcache import Lookahead, NodeSampler, ZarrDataset, verify
from zarrcache._keys import ROLES

COUNT = 9
#: Too little for all densities, so look-ahead makes loans.
FULL = {"limit": 8 * ONE + 2 * 8192, "lookahead": 2 * ONE}


@pytest.fixture(scope="module")
def pairs(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """On S3, shared by these tests."""
    return put_pairs(s3_server, tmp_path_factory.mktemp("pairs"), COUNT)


def is_gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.parametrize(
    "block", [{"lookahead": 4 * ONE}, FULL], ids=["with room", "on a full disk"]
)
def test_a_killed_prefetcher_is_reported_at_once_and_the_training_goes_on(
    pairs: Pairs,
    s3_server: S3Server,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    block: dict[str, Any],
) -> None:
    """One warning with advice; every value is right, and its reservations are free again."""
    reader = pairs.reader(tmp_path, s3_server.s3_kwargs, **block)
    dataset = ZarrDataset(reader)
    index, sampler = reader.cache.index, NodeSampler(dataset, seed=2)
    assert index is not None
    with Lookahead(dataset, sampler) as ahead:
        assert ahead.pid is not None
        order = list(sampler)
        for place, number in enumerate(order):
            task_id = dataset.task_ids[number]
            if place == 6:
                wait_for(
                    lambda task_id=task_id: is_there(reader, task_id, "label"),
                    "the prefetcher did not come",
                )  # type: ignore[misc]
                os.kill(ahead.pid, signal.SIGKILL)
                wait_for(
                    lambda: "has ended" in caplog.text, "the prefetcher's death was not logged"
                )
                assert not ahead.check()
            for role in ROLES:
                assert np.array_equal(
                    reader.load(task_id, role)[0], pairs.values[task_id, role].ravel()
                )
        warnings = [
            record for record in caplog.records if record.name == "zarrcache.train.lookahead"
        ]
        assert [(record.levelno, "SIGKILL" in record.getMessage()) for record in warnings] == [
            (logging.WARNING, True)
        ]
    index.sweep()
    assert not index.loans()
    assert occupied(index) <= index.volume_bytes() <= int(block.get("limit", 2**40))
    assert index.volume_bytes() == sum(row.size_bytes for row in index.rows())


def _train(pairs: Pairs, directory: Path, s3_kwargs: dict[str, Any], pipe: Connection) -> None:
    """A training whose look-ahead has made a loan, with a DataLoader worker, and that then
    waits.
    """
    reader = pairs.reader(directory, s3_kwargs, **FULL)
    dataset = ZarrDataset(reader)
    index, sampler = reader.cache.index, NodeSampler(dataset, seed=2)
    assert index is not None
    ahead = Lookahead(dataset, sampler)
    for number in list(sampler)[:4]:
        task_id = dataset.task_ids[number]
        for role in ROLES:
            wait_for(
                lambda task_id=task_id, role=role: is_there(reader, task_id, role),
                "the prefetcher did not come",
            )  # type: ignore[misc]
            reader.load(task_id, role)
    wait_for(lambda: bool(index.loans()), "nothing is lent")
    loader = iter(DataLoader(dataset, num_workers=1, multiprocessing_context="fork"))
    pipe.send(ahead.pid)
    signal.pause()
    next(loader)


@contextlib.contextmanager
def training(pairs: Pairs, directory: Path, server: S3Server) -> Iterator[tuple[int, int]]:
    """Its pid, and that of its look-ahead."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_train, args=(pairs, directory, server.s3_kwargs, theirs))
    process.start()
    theirs.close()
    try:
        ahead = ours.recv()
        assert process.pid is not None
        yield process.pid, ahead
    finally:
        process.kill()
        process.join()


@pytest.mark.parametrize(
    "both", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["the training", "both"]
)
def test_a_killed_training_leaves_no_prefetcher_and_no_loan(
    pairs: Pairs, s3_server: S3Server, tmp_path: Path, both: bool
) -> None:
    """While a DataLoader worker still lives; the next run reclaims what both held."""
    with training(pairs, tmp_path, s3_server) as (pid, ahead):
        if both:
            os.kill(ahead, signal.SIGKILL)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: is_gone(ahead), "the prefetcher lives on")
    reader = pairs.reader(tmp_path, s3_server.s3_kwargs, **FULL)
    index = reader.cache.index
    assert index is not None
    assert not index.loans()
    assert index.volume_bytes() == sum(row.size_bytes for row in index.rows())
    report = verify(reader.cache.config)  # type: ignore[arg-type]
    assert (report.corrupt, report.strays) == ((), ())
    for (task_id, role), values in pairs.values.items():
        assert np.array_equal(reader.load(task_id, role)[0], values.ravel())  # type: ignore[arg-type]
