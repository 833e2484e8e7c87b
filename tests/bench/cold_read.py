"""C1: one density that was never read before, from S3, at 0, 20 and 50 ms a request."""

from __future__ import annotations

import zlib
from collections import Counter

from tests.bench.grids import ROLES, Pairs, values_of, write_pairs
from tests.bench.harness import Bar, Context, Measured, Round, Table, interleave
from tests.bench.peers_cold import ARRAY, FLOOR, PEERS, Client, Place, clients, installed
from tests.bench.server import BenchServer, running, serve_from_memory

__all__ = ["run"]

_BUCKET = "densities"
#: The median grid of the Materials Project has 1.29 million points; both have 7 chunks of 16 along
#: each axis, 343 in all.
_SHAPES = [(108, 108, 108), (112, 108, 108), (112, 112, 108), (112, 112, 112)]
_WARMUP = 2
_BARRED_MS = 20


def run(context: Context) -> list[Table]:
    """One table for each latency."""
    stores = context.rounds + _WARMUP
    pairs = write_pairs(
        context.workdir / "s3" / _BUCKET,
        [_SHAPES[i % len(_SHAPES)] for i in range(stores)],
        seed=context.seed,
    )
    names, missing = installed(list(PEERS))
    tables = []
    with running(context.workdir / "s3") as server:
        serve_from_memory(
            server,
            _BUCKET,
            [f"{ROLES['data']}/{task_id}.zarr/{ARRAY}/" for task_id in pairs.task_ids],
        )
        for latency_ms in (0, 20) if context.quick else (0, 20, 50):
            place = Place(server.s3_kwargs, _BUCKET, pairs.map_path, context.workdir / "clients")
            server.set(latency_s=latency_ms / 1000)
            with clients({name: (name, place) for name in names}) as started:
                tables.append(_table(context, server, pairs, started, latency_ms, missing))
    return tables


def _table(
    context: Context,
    server: BenchServer,
    pairs: Pairs,
    started: dict[str, Client],
    latency_ms: int,
    missing: dict[str, str],
) -> Table:
    counted: dict[str, Counter[str]] = {}

    def competitor(name: str) -> Round:
        # another store in every round: none is cached
        todo = iter(enumerate(pairs.task_ids))

        def round_() -> Measured:
            index, task_id = next(todo)
            server.reset_log()
            answer = started[name].read(f"{task_id}.zarr")
            log = server.log()
            if name != FLOOR and (index == 0 or context.quick):
                expected = values_of(index, pairs.shapes[index], pairs.seed)["data"]
                if (answer.shape, answer.crc) != (expected.shape, zlib.crc32(expected.data)):
                    raise AssertionError(f"{name} read other values than were written to {task_id}")
            counted[name] = Counter(request.op for request in log)
            return Measured(
                answer.seconds,
                1,
                len(log),
                sum(request.nbytes for request in log),
                {"cpu_ms": 1000 * answer.cpu_s},
            )

        return round_

    rounds = interleave(
        {name: competitor(name) for name in started}, context.rounds, warmup=_WARMUP
    )
    facts = {
        "latency, ms a request": latency_ms,
        "grids": "108x108x108 to 112x112x112 float32, chunks of 16x16x16, Blosc: 343 chunks and "
        ".zarray",
        "a round": "one store that this client has not read before; the server has it in memory",
        "clients": "a process each, kept for all rounds, its connections open; signed requests, no "
        "TLS",
        "requests": {
            name: " + ".join(f"{n} {op}" for op, n in sorted(ops.items(), reverse=True))
            for name, ops in counted.items()
        },
    }
    ours = ("zarrcache, no cache", "zarrcache, empty cache")
    bars = []
    if latency_ms == _BARRED_MS:
        bars = [Bar(name, "TensorStore", at_most=1.25) for name in ours if "TensorStore" in rounds]
        bars += [Bar(name, "zarr + s3fs", at_most=1 / 6) for name in ours]
        if "TensorStore, 64 in flight" in rounds:
            bars.append(Bar(ours[1], "TensorStore, 64 in flight", at_most=0.75))
    name = "C1" if latency_ms == _BARRED_MS else f"C1-{latency_ms}ms"
    return Table(
        name,
        f"one density of 343 chunks, cold, {latency_ms} ms a request",
        "ms",
        FLOOR,
        rounds,
        facts,
        bars,
        missing,
    )
