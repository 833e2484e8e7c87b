"""C2: ``zarrcache warm`` against bare GETs of the same objects, and the memory that it takes.

Every competitor is a command, measured from the start of its process to its end: ``python -m
zarrcache warm CONFIG``, or ``python -m tests.bench.bare_gets REQUEST``, which only fetches.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.bare_gets import IN_FLIGHT
from tests.bench.grids import FUNCTIONAL, ROLES, Pairs, mp_grids, values_of, write_pairs
from tests.bench.harness import Bar, Context, Measured, Round, Table, cores, interleave
from tests.bench.peers_cold import ARRAY, FLOOR
from tests.bench.server import BenchServer, running, serve_from_memory
from zarrcache import ZarrS3Reader

__all__ = ["run"]

_BUCKET = "densities"
_LATENCY_S = 0.02
_WARM = "zarrcache warm"
_TWICE = "bare GETs, a process a core"
_MIB = 1024**2
_HANG_S = 900.0
_MOST_ROUNDS = 3  # half a minute each
_LOOK_S = 0.25  # a look costs 5 ms a process
_BUDGETS_MIB = (128, 512)  # 512 is the default


@dataclass(frozen=True, slots=True)
class _Origin:
    """What there is to fetch, and where the caches go."""

    server: BenchServer
    pairs: Pairs
    keys: tuple[str, ...]
    workdir: Path

    def first(self, count: int) -> tuple[str, ...]:
        """The largest pair and others: one array may exceed the byte budget, so it is in the peak
        of few pairs as of many.
        """
        largest = max(
            zip(self.pairs.shapes, self.pairs.task_ids, strict=True),
            key=lambda pair: math.prod(pair[0]),
        )[1]
        return (largest, *(task_id for task_id in self.pairs.task_ids if task_id != largest))[
            :count
        ]


def run(context: Context) -> list[Table]:
    """The rate of filling, and the memory for few and for many pairs under two budgets."""
    many, few = (6, 2) if context.quick else (100, 25)
    pairs = write_pairs(
        context.workdir / "s3" / _BUCKET, mp_grids(many, context.seed), seed=context.seed
    )
    with running(context.workdir / "s3", latency_s=_LATENCY_S) as server:
        prefixes = [
            f"{directory}/{task_id}.zarr/{ARRAY}/"
            for task_id in pairs.task_ids
            for directory in ROLES.values()
        ]
        serve_from_memory(server, _BUCKET, prefixes)
        root = context.workdir / "s3" / _BUCKET
        keys = tuple(
            f"{prefix}{path.name}"
            for prefix in prefixes
            for path in sorted((root / prefix).iterdir())
            if path.name != ".zattrs"
        )
        origin = _Origin(server, pairs, keys, context.workdir)
        return [_rates(context, origin), _memory(context, origin, few, many)]


def _rates(context: Context, origin: _Origin) -> Table:
    counted: dict[str, Counter[str]] = {}
    pairs = origin.pairs

    def measured(name: str, command: Sequence[str], items: int) -> Measured:
        origin.server.reset_log()
        before_s = origin.server.cpu_s()
        done = _run(command)
        served_s = origin.server.cpu_s() - before_s
        log = origin.server.log()
        counted[name] = Counter(request.op for request in log)
        extra = {
            "client_cpu_ms": 1000 * done.cpu_s / items,
            "server_cpu_ms": 1000 * served_s / items,
        }
        return Measured(
            done.seconds, items, len(log), sum(request.nbytes for request in log), extra
        )

    def bare(name: str, processes: int) -> Measured:
        return measured(name, _bare_command(origin, processes), len(origin.keys))

    def warm() -> Measured:
        config, cache = _config(origin, pairs.task_ids)
        found = measured(_WARM, _warm_command(config), len(origin.keys))
        _check(origin, config)
        shutil.rmtree(cache)
        return found

    competitors: dict[str, Round] = {
        FLOOR: functools.partial(bare, FLOOR, 1),
        _TWICE: functools.partial(bare, _TWICE, cores()),
        _WARM: warm,
    }
    rounds = interleave(competitors, min(context.rounds, _MOST_ROUNDS), warmup=0)
    facts = pairs.facts() | {
        "latency, ms a request": 1000 * _LATENCY_S,
        "a round": "a command from its start to its end, an empty cache; the server has all "
        "objects in memory",
        FLOOR: f"obstore, {IN_FLIGHT} coroutines in one process; the keys are known beforehand, "
        "nothing is decoded, checked or written",
        _TWICE: f"the same in {cores()} processes at once, {IN_FLIGHT} coroutines each: more than "
        f"the {cores()} cores can serve",
        _WARM: "every density listed, fetched, checked (MD5), decoded, divided, summed up "
        "(CRC-32C) and written; the workers started",
        "cpu": "time a GET: the client's processes together, the server's one process; all of them "
        "share the cores",
        "requests": {
            name: " + ".join(f"{n} {op}" for op, n in sorted(ops.items(), reverse=True))
            for name, ops in counted.items()
        },
    }
    bar = Bar(_WARM, FLOOR, at_least=0.8)
    return Table(
        "C2",
        f"filling the cache with {len(pairs.task_ids)} pairs",
        "objects/s",
        FLOOR,
        rounds,
        facts,
        [bar],
    )


def _memory(context: Context, origin: _Origin, few: int, many: int) -> Table:
    def measured(count: int, budget_mib: int) -> Measured:
        config, cache = _config(origin, origin.first(count), memory=budget_mib * _MIB)
        watched = _Watched()
        done = _run(_warm_command(config), watched)
        shutil.rmtree(cache)
        extra = {
            "peak_pss_mib": watched.pss / _MIB,
            "peak_own_mib": watched.own / _MIB,
            "peak_resident_mib": watched.rss / _MIB,
        }
        return Measured(done.seconds, count, extra=extra)

    def name(count: int, budget_mib: int) -> str:
        return f"{_WARM}, {count} pairs, fetch.memory {budget_mib} MiB"

    wanted = [(count, budget_mib) for budget_mib in _BUDGETS_MIB for count in (few, many)]
    competitors: dict[str, Round] = {
        name(*one): functools.partial(measured, *one) for one in wanted
    }
    # once each: memory does not depend on what else the machine does
    rounds = interleave(competitors, 1, warmup=0)
    facts = origin.pairs.facts() | {
        "peak": f"of all processes of the command together, looked at every {_LOOK_S} s: "
        "proportional set size; own are its pages that no file "
        "has, resident is RSS, where shared pages count in each process",
        "interpreters": f"of each peak about {1 + cores()} times 60 MiB are Python and its "
        "libraries",
        "fetch.memory": "bytes of objects and arrays that are held at a time, all processes "
        "together; the default is 512 MiB",
        "largest array, MiB": round(
            max(4 * x * y * z for x, y, z in origin.pairs.shapes) / _MIB, 1
        ),
    }
    bars = [
        Bar(name(many, budget), name(few, budget), at_most=1.2, of="peak_own_mib")
        for budget in _BUDGETS_MIB
    ]
    title = f"memory of filling: {few} pairs and {many}, under two budgets"
    return Table(
        "C2-memory",
        title,
        "MiB",
        name(few, _BUDGETS_MIB[-1]),
        rounds,
        facts,
        bars,
        of="peak_own_mib",
    )


# -- commands


def _config(origin: _Origin, task_ids: Sequence[str], **fetch: int) -> tuple[Path, Path]:
    """A config file for these ids, and its cache, which is not there yet."""
    home = origin.workdir / "warm"
    home.mkdir(exist_ok=True)
    (home / "map.json").write_text(json.dumps({FUNCTIONAL: task_ids}))
    config = {
        "data_dir": f"s3://{_BUCKET}/{ROLES['data']}",
        "label_dir": f"s3://{_BUCKET}/{ROLES['label']}",
        "map_dir": str(home / "map.json"),
        "functional": FUNCTIONAL,
        "s3_kwargs": origin.server.s3_kwargs,
        "cache": {"dir": str(home / "cache"), "min_free": 0, "fetch": fetch},
    }
    (home / "config.yaml").write_text(json.dumps(config))  # JSON is YAML
    return home / "config.yaml", home / "cache"


def _warm_command(config: Path) -> list[str]:
    return [sys.executable, "-m", "zarrcache", "warm", str(config)]


def _bare_command(origin: _Origin, processes: int) -> list[str]:
    file = origin.workdir / "keys.json"
    file.write_text(json.dumps(origin.keys))
    request = {
        "s3_kwargs": origin.server.s3_kwargs,
        "bucket": _BUCKET,
        "keys": str(file),
        "processes": processes,
    }
    return [sys.executable, "-m", "tests.bench.bare_gets", json.dumps(request)]


@dataclass(frozen=True, slots=True)
class _Done:
    """What a command took; CPU time with that of its children."""

    seconds: float
    cpu_s: float


@dataclass(slots=True)
class _Watched:
    """The highest of what was seen, bytes."""

    pss: int = 0
    own: int = 0
    rss: int = 0
    _ended: threading.Event = field(default_factory=threading.Event)

    @contextlib.contextmanager
    def of(self, pid: int) -> Iterator[None]:
        watcher = threading.Thread(target=self._watch, args=(pid,), daemon=True)
        watcher.start()
        try:
            yield
        finally:
            self._ended.set()
            watcher.join()

    def _watch(self, pid: int) -> None:
        while not self._ended.wait(_LOOK_S):
            fields = Counter[str]()
            for one in _family(pid):
                with contextlib.suppress(OSError):  # it has ended
                    for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()[1:]:
                        name, _, value = line.partition(":")
                        fields[name] += int(value.split()[0]) * 1024
            self.pss, self.rss = max(self.pss, fields["Pss"]), max(self.rss, fields["Rss"])
            self.own = max(self.own, fields["Pss_Anon"] + fields["Pss_Shmem"])


def _family(pid: int) -> list[int]:
    """A process and all that it has started."""
    found = [pid]
    for one in found:
        for task in _tasks(one):
            with contextlib.suppress(OSError):
                found += map(int, (task / "children").read_text().split())
    return found


def _tasks(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/task").iterdir())
    except OSError:
        return []


def _run(command: Sequence[str], watched: _Watched | None = None) -> _Done:
    """Run a command to its end.

    Raises
    ------
    RuntimeError
        It failed; with what it said.
    """
    before = os.times()
    start_s = time.perf_counter()
    with (
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process,
        watched.of(process.pid) if watched is not None else contextlib.nullcontext(),
    ):
        said, _ = process.communicate(timeout=_HANG_S)
    seconds, after = time.perf_counter() - start_s, os.times()
    if process.returncode:
        raise RuntimeError(
            f"{' '.join(command[:5])} ended with {process.returncode}: {said[-2000:]}"
        )
    return _Done(
        seconds,
        after.children_user + after.children_system - before.children_user - before.children_system,
    )


def _check(origin: _Origin, config: Path) -> None:
    """Everything is in the cache, and the first and the last pair are what was written."""
    given = json.loads(config.read_text())
    wanted = ("data_dir", "label_dir", "map_dir", "functional", "s3_kwargs", "cache")
    reader = ZarrS3Reader(
        normalize=True, train_fraction=0.8, **{name: given[name] for name in wanted}
    )
    if (found := sum(map(len, reader.stored().values()))) != 2 * len(origin.pairs.task_ids):
        raise AssertionError(
            f"zarrcache warm stored {found} densities of {2 * len(origin.pairs.task_ids)}"
        )
    for index in (0, len(origin.pairs.task_ids) - 1):
        expected = values_of(index, origin.pairs.shapes[index], origin.pairs.seed)
        for role, values in expected.items():
            if not (
                reader.load(origin.pairs.task_ids[index], role)[0]
                == values.reshape(-1) / values.size
            ).all():
                raise AssertionError(
                    "zarrcache warm stored other values than were written to "
                    f"{origin.pairs.task_ids[index]} ({role})"
                )
    if reader.stats.misses:
        raise AssertionError("a density that was warm was read from the origin")
