"""W3: the memory that DataLoader workers add, and what of it is the arrays'.

Each figure is taken in a process of its own: ``python -m tests.bench.memory REQUEST``, which starts
the workers and looks into ``/proc``. File pages are the page cache's: they are shared by all
processes and go when memory is short. What is left, a process's own pages and those of shared
memory, is what a node runs out of.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset

from tests.bench import peers_warm as peers
from tests.bench.grids import Pairs
from tests.bench.harness import Bar, Context, Measured, Round, Table, interleave

__all__ = ["Memory", "memory_of", "run"]

WORKERS = 4
INTERPRETER = "one interpreter with its imports"
_COMPUTES_S = 0.2
_MIB = 1024**2
#: How paths of shared memory start; torch's is in a file without a name, "/dev/shm/torch_…
#: (deleted)".
_SHARED = ("/dev/shm/", "/dev/zero", "/memfd:", "/SYSV")


def run(context: Context) -> list[Table]:
    """Four workers against none, over 200 samples; and those processes during 200 samples against
    before the first.
    """
    if not Path("/proc/self/smaps").exists():
        why = "no /proc/PID/smaps here"
        return [
            Table(
                "W3",
                "memory of DataLoader workers",
                "MiB",
                INTERPRETER,
                {},
                {},
                missing={"all": why},
                of="added_memory_mib",
            )
        ]
    count = 24 if context.quick else 200
    samples = peers.prepare(
        context.workdir, (80, 128, 128), 2 if context.quick else 8, context.seed
    )
    peers.warm_reader(samples, context.workdir)
    peers.np_load(samples, context.workdir)  # writes its files
    request = {"home": str(context.workdir), "pairs": asdict(samples.pairs), "count": count}
    competitors: dict[str, Round] = {INTERPRETER: functools.partial(_interpreter, request)}
    without: dict[str, Any] = {}  # once each: memory does not depend on what else the machine does
    for name, peer, start in (
        ("zarrcache, fork", "zarrcache ZarrDataset", "fork"),
        ("zarrcache, spawn", "zarrcache ZarrDataset", "spawn"),
        ("np.load, fork", "np.load", "fork"),
        ("np.load(mmap_mode=c), fork", "np.load(mmap_mode=c)", "fork"),
    ):
        if context.quick and name not in ("zarrcache, fork", "np.load, fork"):
            continue
        asked = {**request, "peer": peer, "start": start}
        if peer not in without:
            without[peer] = _child({**asked, "workers": 0})
        competitors[name] = functools.partial(_against_none, asked, without[peer])
    rounds = interleave(competitors, 1 if context.quick else min(context.rounds, 3), warmup=0)
    one_pair_mib = 8 * math.prod(samples.shape) / _MIB
    return [
        Table(
            "W3",
            f"memory that each of {WORKERS} DataLoader workers adds, file pages apart",
            "MiB",
            INTERPRETER,
            rounds,
            {
                **samples.pairs.facts(),
                "samples": count,
                "page cache": "warm",
                "loader": f"DataLoader(batch_size=1, num_workers={WORKERS}), default_collate",
                "looked at": f"8 times an epoch, after {_COMPUTES_S} s in which the workers could "
                "fill their queues",
                "added": f"(proportional set size of all processes with {WORKERS} workers, less "
                f"that with none) / {WORKERS}, the highest of the "
                "epoch, without file pages; of file pages: libraries, and entries that are mapped "
                "at that instant",
                "growth": "without file pages, all processes together: the highest of the epoch "
                "less that before the first sample. After a fork "
                "this is mostly the interpreter's pages, which become each process's own when they "
                "are written to",
                "shared memory": "of the growth, shared memory, through which torch sends arrays",
                "worker own": "private pages of one worker that are no file pages, after the last "
                "sample (USS); resident is its RSS",
            },
            [
                *(
                    Bar(f"zarrcache, {start}", INTERPRETER, at_most=1.2, of="added_memory_mib")
                    for start in ("fork", "spawn")
                ),
                # Copies would be of every pair that is on its way: two for each worker.
                Bar("zarrcache, fork", None, at_most=1.0, of="shared_memory_mib"),
                Bar("zarrcache, spawn", None, at_most=one_pair_mib, of="growth_mib"),
            ],
            of="added_memory_mib",
        )
    ]


def _interpreter(request: Mapping[str, Any]) -> Measured:
    found = _child({**request, "peer": None})
    before = Memory(**found["before"])
    return Measured(
        found["seconds"],
        extra={
            "added_memory_mib": before.own_bytes / _MIB,
            "added_file_pages_mib": before.file_bytes / _MIB,
            "worker_resident_mib": before.rss_bytes / _MIB,
            "worker_own_mib": before.private_own_bytes / _MIB,
            "growth_mib": 0.0,
            "shared_memory_mib": 0.0,
        },
    )


def _against_none(request: Mapping[str, Any], none: Mapping[str, Any]) -> Measured:
    some = _child({**request, "workers": WORKERS})
    without, before, highest, worker = (
        Memory(**of) for of in (none["highest"], some["before"], some["highest"], some["worker"])
    )
    return Measured(
        some["seconds"],
        request["count"],
        extra={
            "added_memory_mib": (highest.own_bytes - without.own_bytes) / WORKERS / _MIB,
            "added_file_pages_mib": (highest.file_bytes - without.file_bytes) / WORKERS / _MIB,
            "worker_resident_mib": worker.rss_bytes / _MIB,
            "worker_own_mib": worker.private_own_bytes / _MIB,
            "growth_mib": (highest.own_bytes - before.own_bytes) / _MIB,
            "shared_memory_mib": (highest.shared_bytes - before.shared_bytes) / _MIB,
        },
    )


def _child(request: Mapping[str, Any]) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench.memory", json.dumps(request, default=str)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        timeout=300,
        check=True,
    )
    return json.loads(done.stdout)


# -- what /proc says


@dataclass(frozen=True, slots=True)
class Memory:
    """Of one process or several together.

    Attributes
    ----------
    own_bytes, file_bytes : int
        Proportional set size: anonymous pages (those of private file maps that were written among
        them) and shared memory; file pages.
    shared_bytes : int
        Of ``own_bytes``, shared memory: what torch sends tensors through, on its way or mapped.
    private_own_bytes : int
        What no other process has, file pages apart.
    rss_bytes : int
        Resident set size, where shared pages count in full in each process.
    """

    own_bytes: int = 0
    file_bytes: int = 0
    shared_bytes: int = 0
    private_own_bytes: int = 0
    rss_bytes: int = 0

    def __add__(self, other: Memory) -> Memory:
        return Memory(
            *(
                mine + theirs
                for mine, theirs in zip(asdict(self).values(), asdict(other).values(), strict=True)
            )
        )


def memory_of(pids: Iterable[int]) -> Memory:
    """The sum of these processes; one that has ended counts nothing."""
    total, shared = Memory(), dict[str, int]()
    for pid in pids:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            memory, mapped = parse_smaps(Path(f"/proc/{pid}/smaps").read_text())
            total += memory
            # What a worker has sent and is not yet fetched is mapped nowhere; the worker holds
            # it open.
            shared |= {**_open_shared_memory(pid), **mapped}
    nbytes = sum(shared.values())
    return total + Memory(own_bytes=nbytes, shared_bytes=nbytes)


def _open_shared_memory(pid: int) -> dict[str, int]:
    found = {}
    for link in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.readlink(link).startswith(_SHARED):
                about = link.stat()
                found[str(about.st_ino)] = about.st_blocks * 512
    return found


def parse_smaps(text: str) -> tuple[Memory, dict[str, int]]:
    """From ``/proc/PID/smaps``: memory without that of shared memory, and the bytes of each piece
    of shared memory by inode.
    """
    total, shared = Memory(), dict[str, int]()
    fields: dict[str, int] = {}
    path = inode = ""
    for line in [*text.splitlines(), "end"]:
        name, _, rest = line.partition(":")
        if rest.endswith("kB"):
            fields[name] = int(rest.split()[0]) * 1024
        elif line == "end" or "-" in line.partition(" ")[0]:  # the addresses of the next map
            if fields:
                private = fields["Private_Clean"] + fields["Private_Dirty"]
                # Of a private file map, "Anonymous" are the pages that were written to, and so are
                # no longer the file's.
                is_file = path.startswith("/")
                own = min(fields["Anonymous"], fields["Pss"]) if is_file else fields["Pss"]
                if path.startswith(_SHARED):
                    shared[inode] = max(shared.get(inode, 0), fields["Rss"])
                else:
                    total += Memory(
                        own,
                        fields["Pss"] - own,
                        0,
                        min(fields["Anonymous"], private) if is_file else private,
                        fields["Rss"],
                    )
            words = [*line.split(maxsplit=5), "", "", "", "", "", ""]
            path, inode, fields = words[5], words[4], {}
    return total, shared


# -- the process that is looked into


class _Gated(Dataset[Any]):
    """A dataset whose workers say that they are there, and wait for the word before they read their
    first sample.
    """

    def __init__(self, dataset: Dataset[Any], gate: Any, arrived: Any) -> None:
        self._dataset, self._gate, self._arrived = dataset, gate, arrived
        self._waits = True

    def __getitem__(self, index: int) -> Any:
        if self._waits:
            self._arrived.release()
            self._gate.wait()
            self._waits = False
        return self._dataset[index]


def _look(request: Mapping[str, Any]) -> dict[str, Any]:
    # more workers than cores, on purpose
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    start_s = time.perf_counter()
    own = [multiprocessing.current_process().pid or 0]
    if request["peer"] is None:
        return {"seconds": time.perf_counter() - start_s, "before": asdict(memory_of(own))}
    plain = request["pairs"]
    pairs = Pairs(
        **{
            **plain,
            "directory": Path(plain["directory"]),
            "shapes": tuple(map(tuple, plain["shapes"])),
        }
    )
    dataset = peers.PEERS[request["peer"]](
        peers.Samples(pairs, [()] * len(pairs.task_ids)), Path(request["home"])
    )  # type: ignore[list-item]
    workers, count = request["workers"], request["count"]
    context = multiprocessing.get_context(request["start"])
    gate, arrived = context.Event(), context.Semaphore(0)
    loader = DataLoader(
        _Gated(dataset, gate, arrived) if workers else dataset,
        batch_size=1,
        num_workers=workers,
        sampler=list(peers.cycle(len(pairs.task_ids), count)),
        multiprocessing_context=context if workers else None,
    )
    batches: Any = iter(loader)
    for _ in range(workers):
        arrived.acquire()
    there = [worker.pid for worker in getattr(batches, "_workers", [])]
    before = memory_of([*own, *there])
    gate.set()
    highest = Memory()
    for number in range(1, count + 1):
        peers.touch(next(batches))
        if number % (count // 8) == 0:
            # a network would compute meanwhile, and the workers fill their queues
            time.sleep(_COMPUTES_S)
            now = memory_of([*own, *there])
            highest = Memory(*map(max, asdict(highest).values(), asdict(now).values()))
    return {
        "seconds": time.perf_counter() - start_s,
        "before": asdict(before),
        "highest": asdict(highest),
        "worker": asdict(memory_of(there[:1])),
    }


if __name__ == "__main__":
    print(json.dumps(_look(json.loads(sys.argv[1]))))
