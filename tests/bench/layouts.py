"""What a density costs in each layout: requests, bytes and time, cold through zarrcache and through
zarr over s3fs, and warm.
"""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.bench.grids import ROLES, Layout, Pairs, values_of, write_pairs
from tests.bench.harness import Context, Measured, Round, Table, interleave
from tests.bench.peers_cold import Client, Place, clients
from tests.bench.server import BenchServer, running, serve_from_memory

__all__ = ["run"]

_LATENCY_S = 0.02
_WARMUP = 1
_SHAPE = (108, 108, 108)  # the median of the Materials Project
_READERS = {"layouts": "zarrcache, empty cache", "layouts-zarr": "zarr + s3fs"}


@dataclass(frozen=True, slots=True)
class _Kind:
    """A way to keep densities; its bucket is named after it."""

    bucket: str
    chunks: int | Literal["whole"]
    layout: Layout
    suffix: str = ".zarr"


_KINDS = {
    "16³ chunks, Zarr 2": _Kind("chunks16", 16, "v2"),
    "16³ chunks, Zarr 3": _Kind("chunks16v3", 16, "v3"),
    "32³ chunks, Zarr 2": _Kind("chunks32", 32, "v2"),
    "64³ chunks, Zarr 2": _Kind("chunks64", 64, "v2"),
    "one chunk, Zarr 2": _Kind("whole", "whole", "v2"),
    "one chunk, Zarr 3": _Kind("wholev3", "whole", "v3"),
    "16³ chunks in one shard": _Kind("sharded", 16, "sharded"),
    "zip of 16³ chunks": _Kind("zip16", 16, "zip", ".zarr.zip"),
    "zip of one chunk": _Kind("zipwhole", "whole", "zip", ".zarr.zip"),
}


def run(context: Context) -> list[Table]:
    """Two tables: through zarrcache, and through zarr over s3fs."""
    root = context.workdir / "s3"
    shapes = [_SHAPE] * (context.rounds + _WARMUP)
    pairs = {
        name: write_pairs(
            root / kind.bucket, shapes, chunks=kind.chunks, layout=kind.layout, seed=context.seed
        )
        for name, kind in _KINDS.items()
    }
    with running(root, latency_s=_LATENCY_S) as server:
        for kind in _KINDS.values():
            serve_from_memory(server, kind.bucket, _prefixes(root / kind.bucket / ROLES["data"]))
        return [_table(context, server, pairs, name, peer) for name, peer in _READERS.items()]


def _table(
    context: Context, server: BenchServer, pairs: dict[str, Pairs], name: str, peer: str
) -> Table:
    # zarr has no store for a zip file on S3.
    kinds = {
        layout: kind
        for layout, kind in _KINDS.items()
        if peer.startswith("zarrcache") or kind.layout != "zip"
    }
    counted: dict[str, str] = {}

    def competitor(layout: str, client: Client) -> Round:
        todo = iter(range(context.rounds + _WARMUP))

        def round_() -> Measured:
            index = next(todo)
            measured, counted[layout] = _round(
                server,
                client,
                pairs[layout],
                index,
                _KINDS[layout].suffix,
                read_again=peer.startswith("zarrcache"),
            )
            return measured

        return round_

    places = {
        layout: Place(server.s3_kwargs, kind.bucket, pairs[layout].map_path, context.workdir / name)
        for layout, kind in kinds.items()
    }
    with clients({layout: (peer, place) for layout, place in places.items()}) as started:
        rounds = interleave(
            {layout: competitor(layout, client) for layout, client in started.items()},
            context.rounds,
            warmup=_WARMUP,
        )
    facts = {
        "latency, ms a request": 1000 * _LATENCY_S,
        "grid": "108×108×108 float32, 4.8 MiB; compressors: the defaults of the format, Blosc "
        "(LZ4, shuffle) in 2, Zstandard in 3",
        "requests": counted,
    }
    if peer.startswith("zarrcache"):
        facts["a round"] = (
            "a store that was never read, through an empty cache; warm, ms: the same store again, "
            "from the cache, checked"
        )
    return Table(
        name, f"one density by its layout, cold, {peer}", "ms", next(iter(kinds)), rounds, facts
    )


def _round(
    server: BenchServer, client: Client, pairs: Pairs, index: int, suffix: str, *, read_again: bool
) -> tuple[Measured, str]:
    """One store read; the operations it took in words."""
    store = f"{pairs.task_ids[index]}{suffix}"
    server.reset_log()
    answer = client.read(store)
    log = server.log()
    if index == 0:
        expected = values_of(index, pairs.shapes[index], pairs.seed)["data"]
        if (answer.shape, answer.crc) != (expected.shape, zlib.crc32(expected.data)):
            raise AssertionError(f"other values were read than were written to {store}")
    extra = {"cpu_ms": 1000 * answer.cpu_s}
    if read_again:
        again = client.read(store)
        if again.crc != answer.crc or len(server.log()) != len(log):
            raise AssertionError(f"{store} was not warm after it was read")
        extra["warm_ms"] = 1000 * again.seconds
    operations = sorted(Counter(request.op for request in log).items(), reverse=True)
    return Measured(
        answer.seconds, 1, len(log), sum(request.nbytes for request in log), extra
    ), " + ".join(f"{n} {op}" for op, n in operations)


def _prefixes(directory: Path) -> list[str]:
    """What to have the server read: every store, or all zip files at once."""
    return [f"{directory.name}/{store.name}" for store in directory.iterdir()]
