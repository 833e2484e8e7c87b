"""S2: many processes reading one warm cache, and whether they wait for each other."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from tests.bench import peers_warm as peers
from tests.bench.grids import ROLES, Pairs
from tests.bench.harness import Bar, Context, Measured, Round, Table, interleave, summarise

__all__ = ["Locks", "locks_of", "run"]

MANY = 8
ZARRCACHE, MMAP, DISKCACHE = "zarrcache", "np.load(mmap_mode=c)", "diskcache, least-recently-used"
COUNTING = "counting to 20,000"
_STARTS_S = 0.05  # from the word to the first read, so that all begin together
_BEGIN, _END = "zarrcache-bench-begin", "zarrcache-bench-end"


def run(context: Context) -> list[Table]:
    """One process and eight, over and over the same pairs."""
    shape = (48, 48, 48) if context.quick else (108, 108, 108)
    samples = peers.prepare(context.workdir, shape, 4 if context.quick else 12, context.seed)
    peers.warm_reader(samples, context.workdir)
    peers.np_mmap(samples, context.workdir)
    _fill_diskcache(samples, context.workdir)
    request = {"home": str(context.workdir), "pairs": asdict(samples.pairs)}
    counts = {
        ZARRCACHE: 50 if context.quick else 600,
        MMAP: 50 if context.quick else 600,
        DISKCACHE: 10 if context.quick else 40,
        COUNTING: 50 if context.quick else 300,
    }
    witness = sqlite3.connect(next((context.workdir / "zarrcache").rglob("cache.db")))
    with Readers(request, MANY) as readers:
        competitors: dict[str, Round] = {}
        for peer, count in counts.items():
            for processes in (1, MANY):
                competitors[_name(peer, processes)] = functools.partial(
                    _round, readers, peer, processes, count, witness
                )
        rounds = interleave(competitors, context.rounds)
    witness.close()
    many = _name(ZARRCACHE, MANY)
    bars = [Bar(many, _name(ZARRCACHE, 1), at_least=1.6), Bar(many, None, at_most=0, of="commits")]
    return [
        Table(
            "S2",
            f"{MANY} processes reading one warm cache",
            "samples/s",
            _name(ZARRCACHE, 1),
            rounds,
            {
                **samples.pairs.facts(),
                "page cache": "warm",
                "consumer": "one value of each 4 KiB page of both arrays",
                f"{MANY} processes to one": ", ".join(
                    f"{peer} {_gain(rounds, peer):.2f}" for peer in counts
                ),
                "cpu": "CPU time a sample of all processes: what it would take if no other process "
                "of the machine ran",
                "commits": "transactions that wrote to the index during the round: PRAGMA "
                "data_version of a connection of its own",
                "locks": _under_strace(request, context.workdir),
            },
            bars,
        )
    ]


def _name(peer: str, processes: int) -> str:
    return f"{peer}, {processes} process{'es' if processes > 1 else ''}"


def _gain(rounds: Mapping[str, list[Measured]], peer: str) -> float:
    one, many = (summarise(rounds[_name(peer, processes)]).median for processes in (1, MANY))
    return one / many


def _round(
    readers: Readers, peer: str, processes: int, count: int, witness: sqlite3.Connection
) -> Measured:
    before = _data_version(witness)
    seconds, cpu_s = readers.read(peer, processes, count)
    commits = _data_version(witness) - before
    cpu_ms = 1000 * cpu_s / (processes * count)
    return Measured(
        seconds,
        processes * count,
        extra={"cpu_ms": cpu_ms, **({"commits": commits} if peer == ZARRCACHE else {})},
    )


def _data_version(connection: sqlite3.Connection) -> int:
    return int(connection.execute("PRAGMA data_version").fetchone()[0])


# -- the readers


class Readers:
    """Processes that have opened everything and read when they are told to."""

    def __init__(self, request: Mapping[str, Any], processes: int) -> None:
        # imports once, and nothing is open when it forks
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.bench.processes"])
        self._pipes: list[Connection] = []
        self._processes = []
        for _ in range(processes):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(dict(request), theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> Readers:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join(30)

    def read(self, peer: str, processes: int, count: int) -> tuple[float, float]:
        """``processes`` of them read ``count`` pairs each, at once; the seconds from the first
        start to the last end, and of CPU time.
        """
        chosen = self._pipes[:processes]
        for pipe in chosen:  # all have opened this peer, and none is at it, before the clock starts
            pipe.send((peer, 1, 0.0))
        for pipe in chosen:
            pipe.recv()
        start_s = time.perf_counter() + _STARTS_S
        for pipe in chosen:
            pipe.send((peer, count, start_s))
        spans = [pipe.recv() for pipe in chosen]
        return max(end for _, end, _ in spans) - min(start for start, _, _ in spans), sum(
            cpu_s for _, _, cpu_s in spans
        )


def _serve(request: dict[str, Any], pipe: Connection) -> None:
    plain = request["pairs"]
    pairs = Pairs(
        **{
            **plain,
            "directory": Path(plain["directory"]),
            "shapes": tuple(map(tuple, plain["shapes"])),
        }
    )
    samples, home = peers.Samples(pairs, [()] * len(pairs.task_ids)), Path(request["home"])  # type: ignore[list-item]
    datasets: dict[str, Any] = {}
    while True:
        try:
            peer, count, start_s = pipe.recv()
        except EOFError:
            return
        if peer not in datasets:
            make = {
                ZARRCACHE: peers.zarr_dataset,
                MMAP: peers.np_mmap,
                DISKCACHE: _diskcache,
                COUNTING: _counting,
            }[peer]
            datasets[peer] = make(samples, home)
        dataset = datasets[peer]
        time.sleep(max(0.0, start_s - time.perf_counter()))
        os.access(_BEGIN, os.F_OK)  # strace sees it
        begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
        for index in peers.cycle(len(dataset), count):
            peers.touch(dataset[index])
        end_s, end_cpu_s = time.perf_counter(), time.process_time()
        os.access(_END, os.F_OK)
        pipe.send((begin_s, end_s, end_cpu_s - begin_cpu_s))


class _Counting(Dataset[Any]):
    """Work without memory or files: what eight processes gain on the cores that are free at this
    moment.
    """

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> tuple[()]:
        sum(range(20_000))
        return ()


def _counting(samples: peers.Samples, home: Path) -> Dataset[Any]:
    return _Counting()


def _fill_diskcache(samples: peers.Samples, home: Path) -> None:
    import diskcache

    with diskcache.Cache(
        str(home / "diskcache"), eviction_policy="least-recently-used", size_limit=2**40
    ) as cache:
        for index, pair in enumerate(samples.arrays):
            for role, values in zip(ROLES.values(), pair, strict=True):
                cache.set(f"{index}-{role}", values)


def _diskcache(samples: peers.Samples, home: Path) -> Dataset[Any]:
    """What is at hand for a cache of arrays on disk with a limit: every hit writes when it was
    used.
    """
    import diskcache

    cache = diskcache.Cache(str(home / "diskcache"))
    return peers.by_role(samples, lambda index, role: cache[f"{index}-{role}"])


# -- locks


class Locks:
    """System calls on the index between the first and the last read of each process.

    Attributes
    ----------
    shared, exclusive : int
        Locks that were asked for.
    refused : int
        Those that another process had: SQLite waits and tries again.
    writes : int
        Calls that wrote to the index or its log.
    """

    def __init__(self) -> None:
        self.shared = self.exclusive = self.refused = self.writes = 0


def locks_of(lines: Iterable[str]) -> Locks:
    """From the lines of ``strace -f -y``."""
    locks, reading = Locks(), set[str]()
    for line in lines:
        pid, _, call = line.strip().partition(" ")
        call = call.strip()
        if _BEGIN in call:
            reading.add(pid)
        elif _END in call:
            reading.discard(pid)
        elif pid in reading and "cache.db" in call:
            locks.writes += call.startswith(
                ("pwrite64(", "write(", "ftruncate(", "fdatasync(", "fsync(")
            )
            if "F_SETLK" in call or "F_OFD_SETLK" in call:
                locks.shared += "F_RDLCK" in call
                locks.exclusive += "F_WRLCK" in call
                locks.refused += bool(re.search(r"= -1 (EAGAIN|EACCES)", call)) or "SETLKW" in call
    return locks


def _under_strace(request: Mapping[str, Any], workdir: Path) -> str:
    """What eight readers ask of the index, in words. Not timed: strace slows them down."""
    strace = shutil.which("strace")
    if strace is None:
        return "not looked at: strace is not installed"
    out, count = workdir / "strace.txt", 50
    calls = "fcntl,flock,pwrite64,write,ftruncate,fdatasync,fsync,access,faccessat,faccessat2"
    command = [strace, "-f", "-y", "-e", f"trace={calls}", "-o", str(out)]
    done = subprocess.run(
        [
            *command,
            sys.executable,
            "-m",
            "tests.bench.processes",
            json.dumps({**request, "count": count}, default=str),
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        return f"not looked at: strace ended with {done.returncode}: {last}"
    with out.open(errors="replace") as file:
        locks = locks_of(file)
    return (
        f"strace of {MANY} processes reading {count} pairs each, the index open: {locks.writes} "
        f"writes to the index or its log, {locks.exclusive} "
        f"exclusive locks, {locks.shared} shared locks, {locks.refused} of them refused or waited "
        "for"
    )


if __name__ == "__main__":
    _request = json.loads(sys.argv[1])
    with Readers(_request, MANY) as _readers:
        _readers.read(ZARRCACHE, MANY, _request["count"])
