"""A real Dask cluster for tests: a scheduler and worker processes on 127.0.0.1, and the functions
that tests run on it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from zarrcache.parallel.pool import Reserve

__all__ = ["RunningCluster", "die_of_seven", "double", "fail", "note", "running_cluster"]

_ROOT = Path(__file__).resolve().parents[2]
_START_S = 120.0
#: One worker that dies over a task is enough for the scheduler to give it up, so that tests need
#: few deaths; and the others do not ask the dead one for half a minute.
_SETTINGS = {
    "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "5s",
}


class RunningCluster:
    """A scheduler and its workers.

    Attributes
    ----------
    address : str
        ``tcp://127.0.0.1:PORT``.
    file : Path
        The scheduler file.
    """

    def __init__(self, directory: Path, processes: contextlib.ExitStack) -> None:
        self.file = directory / "scheduler.json"
        self._directory, self._processes = directory, processes
        self.scheduler = self._start(
            "scheduler",
            ["--port", "0", "--scheduler-file", str(self.file), "--no-dashboard", "--no-show"],
            {},
        )
        deadline = time.monotonic() + _START_S
        while True:
            with contextlib.suppress(OSError, ValueError):
                self.address: str = json.loads(self.file.read_text())["address"]
                break
            assert time.monotonic() < deadline, "the scheduler did not start"
            time.sleep(0.05)

    def start_worker(
        self, name: str, environment: Mapping[str, str], *options: str
    ) -> subprocess.Popen[bytes]:
        """One more worker, with one thread and a nanny."""
        arguments = [
            self.address,
            "--nthreads",
            "1",
            "--name",
            name,
            "--no-dashboard",
            "--local-directory",
            str(self._directory),
            *options,
        ]
        return self._start("worker", arguments, environment)

    def _start(
        self, what: str, arguments: list[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        log = self._processes.enter_context((self._directory / "log").open("ab"))
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                f"distributed.cli.dask_{what}",
                "--host",
                "127.0.0.1",
                *arguments,
            ],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, "PYTHONPATH": str(_ROOT), **_SETTINGS, **environment},
            start_new_session=True,
        )
        self._processes.callback(_end, process)
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def running_cluster(
    directory: Path, nodes: Mapping[str, Mapping[str, str]]
) -> Iterator[RunningCluster]:
    """A cluster with one worker per node: names and environments. All run on this machine."""
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as processes:
        cluster = RunningCluster(directory, processes)
        for node, environment in nodes.items():
            cluster.start_worker(node, {"SLURMD_NODENAME": node, **environment})
        yield cluster


# -- in a worker


def double(n: int, reserve: Reserve) -> int:
    return 2 * n


def die_of_seven(n: int, reserve: Reserve) -> int:
    """Die at item 7, as a parser that runs out of memory."""
    if n == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * n


def fail(n: int, reserve: Reserve) -> int:
    """Raise instead of returning a failed result."""
    raise ValueError(f"number {n}")


def note(directory: str, reserve: Reserve) -> None:
    """Record the start, wait for a signal file, record the end; after ``see:`` only wait until
    another item has started.
    """
    deadline = time.monotonic() + _START_S
    if directory.startswith("see:"):
        while not list(Path(directory[4:]).glob("*.begun")) and time.monotonic() < deadline:
            time.sleep(0.02)
        return
    begun = Path(directory, f"{os.getpid()}-{time.monotonic_ns()}.begun")
    begun.touch()
    while not Path(directory, "go").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(0.2)  # so that it has not ended by itself when it is looked at
    begun.with_suffix(".ended").touch()
