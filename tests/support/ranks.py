"""The ranks of a training job under Lightning: real processes, gloo between them, killed and
resumed as a scheduler does.

They are forked from a server that has imported Lightning once, because the import takes longer than
a toy epoch. Not from multiprocessing's fork server, of which a process has one only: where an
earlier test has started it without these imports, each rank makes them by itself (4 s of CPU).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import get_context, set_start_method
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tests.support.services import parse_s3, sharing_loader

__all__ = ["Job", "Killed", "Step", "free_port", "names", "run", "run_ranks"]

#: For hangs only.
DEADLINE_S = 200


class Killed(Exception):
    """A rank did not end as expected."""


@dataclass(frozen=True)
class Step:
    """One training step of one rank, as the rank recorded it."""

    rank: int
    epoch: int
    step: int
    names: list[str]
    loss: str
    datasets: list[int] | None = None


@dataclass(frozen=True)
class Job:
    """A training run.

    Attributes
    ----------
    root : Path
        Checkpoints, and what the ranks wrote down.
    data : dict
        Arguments of ``ZarrDataModule``.
    nodes : tuple of int
        Ranks on each node.
    caches : tuple of Path
        ``ZARRCACHE_DIR`` of each node; empty: as the config says.
    checkpoint : dict, optional
        Arguments of ``ModelCheckpoint``; None: no checkpoints.
    trainer : dict
        Arguments of ``Trainer``.
    die_at : int, optional
        SIGKILL in the middle of the step of this number.
    """

    root: Path
    data: Mapping[str, Any]
    nodes: tuple[int, ...] = (1,)
    caches: tuple[Path, ...] = ()
    epochs: int = 1
    checkpoint: Mapping[str, Any] | None = field(default_factory=lambda: {"every_n_train_steps": 3})
    trainer: Mapping[str, Any] = field(default_factory=dict)
    die_at: int | None = None
    name: str = "first"

    @property
    def steps(self) -> list[Step]:
        """Training steps of all ranks, in the order of each rank."""
        files = sorted(self.root.glob(f"{self.name}.steps.*"))
        return [
            Step(**json.loads(line)) for file in files for line in file.read_text().splitlines()
        ]

    @property
    def resumed_at(self) -> int:
        """The number of the first step."""
        return int((self.root / f"{self.name}.start").read_text())


def fit(job: Job) -> None:
    """One rank: train, from the last checkpoint if there is one."""
    from tests.support.toytraining import train

    train(job)


def run(job: Job) -> None:
    """Train with all ranks to the end, or to their death if the job says so.

    Raises
    ------
    Killed
        A rank ended otherwise; with what it said.
    """
    job.root.mkdir(parents=True, exist_ok=True)
    environments = list(_environments(job, free_port()))
    outputs = [job.root / f"{job.name}.output.{rank}" for rank in range(len(environments))]
    run_ranks(fit, (job,), environments, outputs, ends=0 if job.die_at is None else -signal.SIGKILL)


def run_ranks(
    target: Callable[..., None],
    args: tuple[Any, ...],
    environments: Sequence[Mapping[str, str]],
    outputs: Sequence[Path],
    *,
    ends: int = 0,
) -> None:
    """``target(*args)`` in one process for each environment, all at once.

    Raises
    ------
    Killed
        One ended otherwise than with the exit code ``ends``; with what all said.
    """
    server = _server(os.getpid())
    try:
        server.send((target, args, environments, outputs))
        codes = server.recv()
    except BaseException:
        server.close()
        _server.cache_clear()  # the answer that is still to come is not that of the next job
        raise
    if any(code != ends for code in codes):
        said = "\n".join(output.read_text()[-6000:] for output in outputs)
        raise Killed(f"exit codes {codes}, expected {ends}\n{said}")


@functools.cache
def _server(pid: int) -> Connection:
    """To the server of this process, which ends when the connection closes."""
    ours, theirs = get_context("spawn").Pipe()
    get_context("spawn").Process(target=_serve, args=(theirs,)).start()
    theirs.close()
    atexit.register(ours.close)
    return ours


def _serve(connection: Connection) -> None:
    """Fork the ranks of each job, and send their exit codes when all have ended."""
    import botocore.session

    for name in ("tests.support.toytraining", "s3fs"):
        importlib.import_module(name)
    botocore.session.create_loader = sharing_loader()
    parse_s3()
    gc.freeze()  # a rank's garbage collector need not look through, and copy, all that was imported
    with contextlib.suppress(EOFError):
        while True:
            target, args, environments, outputs = connection.recv()
            connection.send(_fork(target, args, environments, outputs))


def _fork(
    target: Callable[..., None],
    args: tuple[Any, ...],
    environments: Sequence[Mapping[str, str]],
    outputs: Sequence[Path],
) -> list[int | None]:
    processes = [
        get_context("fork").Process(target=_rank, args=(target, args, dict(environment), output))
        for environment, output in zip(environments, outputs, strict=True)
    ]
    for process in processes:
        process.start()
    end_s = time.monotonic() + DEADLINE_S
    # Not join(): it waits for the workers of a killed rank too, which take 5 s to notice.
    while any(process.exitcode is None for process in processes) and time.monotonic() < end_s:
        time.sleep(0.01)
    for process in processes:
        process.kill()
    return [process.exitcode for process in processes]


def _rank(
    target: Callable[..., None], args: tuple[Any, ...], environment: dict[str, str], output: Path
) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    # of a process that a user starts; this one would start another server
    set_start_method("fork", force=True)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    target(*args)


def _environments(job: Job, port: int) -> Iterator[dict[str, str]]:
    """The variables that torchrun sets for each rank."""
    ranks = sum(job.nodes)
    places = [(node, local) for node, count in enumerate(job.nodes) for local in range(count)]
    for rank, (node, local) in enumerate(places):
        cache = {"ZARRCACHE_DIR": str(job.caches[node])} if job.caches else {}
        if ranks == 1:
            yield cache
            continue
        yield cache | {
            "TORCHELASTIC_RUN_ID": "toy",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": "lo",
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(local),
            "LOCAL_WORLD_SIZE": str(job.nodes[node]),
            "GROUP_RANK": str(node),
        }


def free_port() -> int:
    """A free port of 127.0.0.1."""
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def names(steps: Sequence[Step]) -> list[str]:
    """All samples, in the order of the steps."""
    return [name for step in steps for name in step.names]
