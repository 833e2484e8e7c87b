"""Pairs of densities with the grid shapes of the Materials Project, in every layout that users
keep.
"""

from __future__ import annotations

import csv
import functools
import gzip
import json
import math
import multiprocessing
import os
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tests.bench.harness import cores
from zarrcache.convert.writer import encode_store, publish_store, zipped
from zarrcache.demo.synthetic import SyntheticPair, make_pair

__all__ = [
    "FUNCTIONAL",
    "ROLES",
    "Layout",
    "Pairs",
    "Shape",
    "mp_grids",
    "pair_of",
    "values_of",
    "write_pairs",
]

Shape = tuple[int, int, int]
Layout = Literal["v2", "v3", "sharded", "zip"]
Role = Literal["data", "label"]

FUNCTIONAL = "GGA"
#: Role of the reader: directory below that of ``write_pairs``.
ROLES: dict[Role, str] = {"data": "input", "label": "label"}
_DATA = Path(
    os.environ.get("ZARRCACHE_TEST_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data"
)
_COUNTS = _DATA / "mp" / "meta" / "charge3net_probe_counts.csv.gz"
_MOST_BYTES = 64 * 1024**2
# 80 quantiles of the 122,689 densities of the Materials Project by number of points (the CSV of the
# charge3net authors): mean 6.7 MiB as float32 (of all: 6.9), median 5.0 MiB (4.9), 99 % 38 MiB
# (27).
_QUANTILES = """
    40 40 96, 60 56 60, 60 60 64, 64 64 64, 80 64 60, 48 80 96, 72 72 72, 72 72 72, 64 64 96,
    96 96 48, 60 60 140, 80 80 80, 80 80 80, 64 64 128, 60 60 160, 84 84 84, 80 96 80, 72 72 128,
    80 80 108, 72 84 120, 60 112 112, 48 128 128, 80 80 128, 80 84 128, 96 96 96, 96 96 96,
    96 96 96, 96 96 96, 64 120 120, 80 100 120, 72 72 192, 100 100 100, 96 96 112, 56 140 140,
    100 80 140, 108 108 100, 56 120 180, 140 140 64, 108 108 108, 60 96 224, 48 128 216,
    72 120 160, 112 112 112, 108 112 120, 96 96 160, 80 80 240, 100 84 192, 144 144 80,
    120 100 144, 120 120 120, 128 128 108, 60 168 180, 140 80 168, 120 128 128, 72 100 280,
    128 128 128, 128 128 128, 108 108 180, 140 140 112, 168 168 80, 96 112 216, 160 128 120,
    126 126 160, 168 140 112, 140 140 140, 140 140 140, 120 120 196, 96 96 320, 112 144 192,
    84 160 240, 112 160 192, 140 160 160, 80 140 336, 128 80 400, 160 160 160, 140 140 216,
    128 128 280, 168 160 180, 180 180 180, 216 216 216
"""


@dataclass(frozen=True, slots=True)
class Pairs:
    """Stores that ``write_pairs`` wrote, at ``directory/{input,label}/<task_id>.zarr[.zip]``, with
    ``directory/map.json.gz``.

    Attributes
    ----------
    directory : Path
    task_ids : tuple of str
    shapes : tuple of (nx, ny, nz)
    objects : int
        Files, which become objects of S3.
    stored_bytes, decoded_bytes : int
        Of all of them, encoded and as float32.
    seed : int
    """

    directory: Path
    task_ids: tuple[str, ...]
    shapes: tuple[Shape, ...]
    objects: int
    stored_bytes: int
    decoded_bytes: int
    seed: int

    @property
    def map_path(self) -> Path:
        return self.directory / "map.json.gz"

    def facts(self) -> dict[str, object]:
        """What to print with a figure."""
        mib = 4 / 1024**2
        sizes = [math.prod(shape) * mib for shape in self.shapes]
        return {
            "pairs": len(self.task_ids),
            "grids": _in_words(self.shapes),
            "array, MiB": f"{min(sizes):.1f} to {max(sizes):.1f}, mean {np.mean(sizes):.1f}",
            "objects": self.objects,
            "stored, MiB": round(self.stored_bytes / 1024**2, 1),
            "decoded, MiB": round(self.decoded_bytes / 1024**2, 1),
        }


def mp_grids(n: int, seed: int) -> list[Shape]:
    """``n`` grid shapes as the Materials Project has them, drawn at random.

    From the CSV of all 122,689 where it is (below the directory that ZARRCACHE_TEST_DATA names, or
    beside the repository), else from 80 of its quantiles. The one in a thousand above 64 MiB is
    left out, so that a run's size does not hang on one draw.
    """
    known = _all_grids()
    return [
        known[int(i)] for i in np.random.default_rng([seed, 0x6D70]).integers(len(known), size=n)
    ]


@functools.cache
def _all_grids() -> list[Shape]:
    if _COUNTS.exists():
        with gzip.open(_COUNTS, "rt") as file:
            found = [
                (int(row["shape_x"]), int(row["shape_y"]), int(row["shape_z"]))
                for row in csv.DictReader(file)
            ]
    else:
        found = [
            (int(x), int(y), int(z))
            for x, y, z in (grid.split() for grid in _QUANTILES.replace("\n", " ").split(","))
        ]
    return [shape for shape in found if 4 * math.prod(shape) <= _MOST_BYTES]


def pair_of(index: int, shape: Shape, seed: int) -> SyntheticPair:
    """The pair that ``write_pairs`` writes at this position."""
    return make_pair(seed, index, shape=shape)


def values_of(index: int, shape: Shape, seed: int) -> dict[Role, NDArray[np.float32]]:
    """What a reader has to find in the stores of pair ``index``: float32, not normalized."""
    pair = pair_of(index, shape, seed)
    return {
        "data": np.ascontiguousarray(pair.data, dtype="<f4"),
        "label": np.ascontiguousarray(pair.label, dtype="<f4"),
    }


def write_pairs(
    directory: Path,
    shapes: Sequence[Shape],
    *,
    chunks: int | Literal["whole"] = 16,
    layout: Layout = "v2",
    seed: int = 0,
    workers: int | None = None,
) -> Pairs:
    """Write a pair of stores for each shape, and the map. A 96**3 pair takes about half a second of
    one core.

    Parameters
    ----------
    directory : Path
        For a server of ``<root>/<bucket>/<key>`` this is ``<root>/<bucket>``.
    shapes : sequence of (nx, ny, nz)
    chunks : int or "whole"
        Points along each axis; ``whole`` is one chunk an array.
    layout : {"v2", "v3", "sharded", "zip"}
        Zarr format 2 or 3, format 3 with one shard an array, or one zip file a store of format 2.
    seed : int
    workers : int, optional
        Processes; default: one a core.
    """
    jobs = [(directory, index, shape, chunks, layout, seed) for index, shape in enumerate(shapes)]
    workers = min(workers or cores(), len(jobs))
    if workers > 1:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            written = list(pool.map(_write_pair, *zip(*jobs, strict=True), chunksize=4))
    else:
        written = [_write_pair(*job) for job in jobs]
    task_ids = tuple(task_id for task_id, _, _ in written)
    directory.mkdir(parents=True, exist_ok=True)
    with gzip.open(directory / "map.json.gz", "wt") as file:
        json.dump({FUNCTIONAL: task_ids}, file)
    return Pairs(
        directory,
        task_ids,
        tuple(shapes),
        objects=sum(objects for _, objects, _ in written),
        stored_bytes=sum(nbytes for _, _, nbytes in written),
        decoded_bytes=2 * 4 * sum(map(math.prod, shapes)),
        seed=seed,
    )


def _write_pair(
    directory: Path,
    index: int,
    shape: Shape,
    chunks: int | Literal["whole"],
    layout: Layout,
    seed: int,
) -> tuple[str, int, int]:
    """Write one pair; its task id, number of files, bytes."""
    pair = pair_of(index, shape, seed)
    size = shape if chunks == "whole" else tuple(min(chunks, n) for n in shape)
    count = nbytes = 0
    for role, values in (("input", pair.data), ("label", pair.label)):
        if layout == "sharded":
            objects: Mapping[str, bytes] = _sharded(values, pair, size)
        else:
            objects = encode_store(
                values,
                None,
                pair.structure,
                {"functional": FUNCTIONAL},
                chunks=size,
                zarr_format=3 if layout == "v3" else 2,
            )
        if layout == "zip":
            objects = {"": zipped(objects)}
        nbytes += publish_store(
            directory / role / f"{pair.task_id}.zarr{'.zip' if layout == 'zip' else ''}", objects
        )
        count += len(objects)
    return pair.task_id, count, nbytes


def _sharded(values: NDArray[Any], pair: SyntheticPair, chunks: Sequence[int]) -> dict[str, bytes]:
    """As ``encode_store``, whose layouts have no shards."""
    import zarr
    import zarr.storage

    objects: dict[str, Any] = {}
    store = zarr.storage.MemoryStore(store_dict=objects)
    attributes = {
        "structure": json.dumps(pair.structure),
        "metadata": json.dumps({"functional": FUNCTIONAL}),
    }
    group = zarr.create_group(store=store, zarr_format=3, attributes=attributes)
    shards = tuple(-(-n // chunk) * chunk for n, chunk in zip(values.shape, chunks, strict=True))
    group.create_array(
        "charge_density_total",
        data=np.ascontiguousarray(values, dtype="<f4"),
        chunks=tuple(chunks),
        shards=shards,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as in encode_store: consolidated metadata in format 3
        zarr.consolidate_metadata(store)
    return {key: bytes(value.to_bytes()) for key, value in objects.items()}


def _in_words(shapes: Sequence[Shape]) -> str:
    distinct = sorted(set(shapes), key=math.prod)
    if len(distinct) > 3:
        return f"{len(distinct)} shapes of the Materials Project"
    return ", ".join("×".join(map(str, shape)) for shape in distinct)
