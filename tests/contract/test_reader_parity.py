"""Promise 1: reads that are cached, uncached, cold, warm, half warm or offline give the bits, the
split and the order of a plain zarr read.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from numpy.typing import NDArray

from tests.support.faultproxy import FaultProxy
from tests.support.readers import make_reader
from tests.support.s3server import S3Server, running_server
from tests.support.stores import plain_read, random_density, small_group
from zarrcache import ZarrS3Reader

ROLES = ("data", "label")


def awkward(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """NaN, infinities, -0.0 and subnormal numbers: the bits are compared, not the numbers."""
    values = random_density(shape, seed=99)
    values.flat[:6] = [np.nan, np.inf, -np.inf, -0.0, 1e-45, np.finfo(np.float32).max]
    return values


#: Every layout that users have. The shapes differ, so that densities cannot be confused.
LAYOUTS: dict[str, dict[str, Any]] = {
    "v2": {"shape": (6, 5, 7)},
    "v3": {"shape": (5, 6, 7), "zarr_format": 3},
    "sharded": {"shape": (5, 6, 8), "zarr_format": 3, "chunks": (2, 2, 2), "shards": (4, 4, 4)},
    "consolidated-v2": {"shape": (5, 7, 6), "consolidated": True},
    "consolidated-v3": {"shape": (5, 7, 8), "consolidated": True, "zarr_format": 3},
    "zip-v2": {"shape": (5, 8, 6), "as_zip": True},
    "zip-v3": {"shape": (5, 8, 7), "as_zip": True, "zarr_format": 3},
    "float64": {"shape": (6, 5, 8), "dtype": "float64"},
    "float64-v3": {"shape": (6, 7, 5), "dtype": "float64", "zarr_format": 3},
    "big-endian": {"shape": (6, 7, 8), "dtype": ">f4"},
    "integers": {"shape": (6, 8, 5), "dtype": "int32", "config": {"write_empty_chunks": True}},
    "f-order": {"shape": (6, 8, 7), "order": "F"},
    "uncompressed": {"shape": (7, 5, 6), "compressors": None},
    "uncompressed-v3": {"shape": (7, 5, 8), "compressors": None, "zarr_format": 3},
    "slashes": {"shape": (7, 6, 5), "chunk_key_encoding": {"name": "v2", "separator": "/"}},
    "transposed-v3": {
        "shape": (7, 6, 8),
        "zarr_format": 3,
        "filters": [zarr.codecs.TransposeCodec(order=(2, 0, 1))],
    },
    "one-chunk": {"shape": (7, 8, 5), "chunks": (7, 8, 5)},
    "awkward": {"arrays": {"charge_density_total": awkward((8, 5, 7))}},
}
IDS = [f"mp-{name}" for name in LAYOUTS]


@dataclass(frozen=True)
class World:
    """Where the stores are, and their contents as zarr reads them."""

    root: Path
    bucket: str
    server: S3Server
    want: dict[tuple[str, str], NDArray[np.float32]]
    endpoint_url: str

    @property
    def ids(self) -> list[str]:
        """In the order of the map."""
        return list(dict.fromkeys(task_id for _, task_id in self.want))

    def reader(self, place: str, cache: dict[str, Any] | None, **changes: Any) -> ZarrS3Reader:
        data, _, label = place.partition(" and ")
        where = {"local": str(self.root)}
        engine = "s3fs" if "s3fs" in place else "obstore" if "obstore" in place else "auto"
        arguments: dict[str, Any] = {
            "data_dir": f"{where.get(data, f's3://{self.bucket}')}/data",
            "label_dir": f"{where.get(label or data, f's3://{self.bucket}')}/label",
            "train_fraction": 0.7,
            "s3_kwargs": self.server.kwargs_at(self.endpoint_url),
        }
        settings = {"fetch": {"engine": engine}, **cache} if cache is not None else None
        return make_reader(self.root, **arguments | changes, cache=settings)


def build(root: Path, server: S3Server, layouts: Collection[str] = tuple(LAYOUTS)) -> World:
    """Write all layouts for both roles, to a directory and to the server."""
    bucket = server.new_bucket()
    want = {}
    for role, (seed, name) in itertools.product(ROLES, enumerate(layouts)):
        layout = LAYOUTS[name]
        path = root / role / f"mp-{name}.zarr{'.zip' if layout.get('as_zip') else ''}"
        small_group(path, **{"seed": seed + 100 * (role == "label"), **layout})
        want[role, f"mp-{name}"] = plain_read(path).astype(np.float32)
    for role in ROLES:
        server.put_tree(root / role, f"s3://{bucket}/{role}")
    (root / "map.json").write_text(json.dumps({"GGA": [f"mp-{name}" for name in layouts]}))
    return World(root, bucket, server, want, server.endpoint_url)


@pytest.fixture(scope="module")
def world(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> World:
    """All layouts, in a directory and on S3; read only."""
    return build(tmp_path_factory.mktemp("world"), s3_server)


def same_bits(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Stricter than ``array_equal``: NaN equals NaN, and -0.0 differs from 0.0."""
    return (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


def assert_parity(world: World, reader: ZarrS3Reader) -> None:
    """The split is scikit-learn's, in its order, and every array is zarr's, with and without
    ``normalize``.
    """
    from sklearn.model_selection import train_test_split

    wanted_split = train_test_split(world.ids, train_size=0.7, random_state=42)
    assert reader.task_ids == world.ids
    assert reader.missing == ()
    for ids, (data, label, gs_data, gs_label) in zip(
        wanted_split, reader.data_split(), strict=True
    ):
        assert len(data) == len(label) == len(gs_data) == len(gs_label) == len(ids)
        for i, task_id in enumerate(ids):
            for role, values, gridsize in (("data", data, gs_data), ("label", label, gs_label)):
                want = world.want[role, task_id].copy()
                assert same_bits(values[i], want.ravel()), (role, task_id)
                assert gridsize[i] == want.shape
    reader.normalize = True
    for (role, task_id), raw in world.want.items():
        if reader.cache.arrays is None and task_id != "mp-v2":
            # division is the last step; once is enough where each read costs requests
            continue
        normalized = raw.copy()
        normalized /= np.prod(raw.shape)
        assert same_bits(reader.load(task_id, role)[0], normalized.ravel()), (role, task_id)  # type: ignore[arg-type]


class TestEveryState:
    """Each layout, from each place, in every state of the cache."""

    @pytest.mark.parametrize("place", ["local", "obstore and local"])
    def test_uncached_reads_are_plain_reads(self, world: World, place: str) -> None:
        """Without a cache, everything from the origin."""
        assert_parity(world, world.reader(place, None))

    @pytest.mark.parametrize("place", ["local", "local and obstore", "s3fs and local"])
    def test_cold_and_warm_reads_are_plain_reads(
        self, world: World, place: str, tmp_path: Path
    ) -> None:
        """The first pass fills the array tier, and a new reader's comes from it. The offline test
        below does it with both densities on S3.
        """
        reader = world.reader(place, {"dir": tmp_path})
        assert_parity(world, reader)
        # plain and divided: one entry each
        assert (reader.stats.misses, reader.stats.hits) == (4 * len(IDS), 0)
        again = world.reader(place, {"dir": tmp_path})
        assert_parity(world, again)
        assert (again.stats.misses, again.stats.requests) == (0, 0)

    def test_half_warm_reads_are_plain_reads(self, world: World, tmp_path: Path) -> None:
        """Some entries are there and some are not, inputs and labels not alike."""
        place = "local and obstore"
        before = world.reader(place, {"dir": tmp_path})
        for i, task_id in enumerate(IDS):
            if i % 3:
                before.load(task_id, ROLES[i % 2])  # type: ignore[arg-type]
        reader = world.reader(place, {"dir": tmp_path})
        assert_parity(world, reader)
        assert 0 < reader.stats.misses < 4 * len(IDS)
        assert reader.stats.hits > 0

    def test_reads_of_a_directory_through_the_byte_tier_are_plain_reads(
        self, world: World, tmp_path: Path
    ) -> None:
        """Without the array tier, densities are decoded from cached objects; cold and warm. The
        offline test below shows the same for S3.
        """
        place, settings = "local", {"dir": tmp_path, "arrays": {"enabled": False}}
        assert_parity(world, world.reader(place, settings))
        warm = world.reader(place, settings)
        assert_parity(world, warm)
        assert (warm.stats.requests, warm.stats.byte_misses) == (0, 0)

    def test_reads_that_are_not_admitted_are_plain_reads(
        self, world: World, tmp_path: Path
    ) -> None:
        """A limit that holds a few of them: the rest comes from the origin each time."""
        place = "obstore and local"
        reader = world.reader(place, {"dir": tmp_path, "limit": "64 KiB"})
        assert_parity(world, reader)
        assert reader.stats.bypasses > 0
        again = world.reader(place, {"dir": tmp_path, "limit": "64 KiB"})
        assert_parity(world, again)
        assert again.stats.bypasses > 0
        assert again.stats.hits > 0


@pytest.mark.parametrize(
    ("engine", "tier"), [("obstore", "arrays"), ("s3fs", "arrays"), ("obstore", "bytes")]
)
def test_offline_reads_are_plain_reads(
    world: World, fault_proxy: FaultProxy, tmp_path: Path, engine: str, tier: str
) -> None:
    """A new reader while connections are refused: split, order and every array, from either
    tier.
    """
    settings = {"dir": tmp_path / "cache", "arrays": {"enabled": tier == "arrays"}}
    online = replace(world, endpoint_url=fault_proxy.endpoint_url)
    cold = online.reader(engine, settings)
    assert_parity(online, cold)
    if tier == "arrays":  # plain and divided: one entry each
        assert (cold.stats.misses, cold.stats.hits) == (4 * len(IDS), 0)
    assert fault_proxy.count() > 100
    fault_proxy.down()
    reader = online.reader(engine, settings)
    assert_parity(online, reader)
    assert reader.stats.requests == 0


def test_offline_reads_are_plain_reads_when_the_server_is_gone(tmp_path: Path) -> None:
    """The server process has ended; two materials."""
    with running_server(tmp_path / "log") as server:
        world = build(tmp_path, server, ("v2", "sharded", "zip-v3"))
        assert_parity(world, world.reader("s3fs", {"dir": tmp_path / "cache"}))
    assert_parity(world, world.reader("s3fs", {"dir": tmp_path / "cache"}))


def test_large_densities_are_divided_as_numpy_divides_them(tmp_path: Path) -> None:
    """The type float32 does not represent every number of points above 2^24; the users' division
    rounds only the quotient.
    """
    values = np.random.default_rng(0).random((255, 257, 257), dtype=np.float32)
    assert values.size > 2**24
    assert int(np.float32(values.size)) != values.size
    group = zarr.create_group(zarr.storage.MemoryStore(), zarr_format=2)
    group.create_array("charge_density_total", data=values, chunks=values.shape, compressors=None)
    reader = ZarrS3Reader(tmp_path, tmp_path, tmp_path / "map.json", "GGA", True, 0.8)
    got, gridsize = reader.read_charge_density(group)
    values /= np.prod(values.shape)
    assert gridsize == values.shape
    assert same_bits(got, values.ravel())


def test_divided_densities_have_numpys_bits_for_any_number_of_points(tmp_path: Path) -> None:
    """Grids from 1 to 30 points an axis, values of every magnitude."""
    rng = np.random.default_rng(1)
    reader = ZarrS3Reader(tmp_path, tmp_path, tmp_path / "map.json", "GGA", True, 0.8)
    for _ in range(60):
        shape = tuple(int(n) for n in rng.integers(1, 31, 3))
        values = (rng.standard_normal(shape) * 10.0 ** rng.integers(-44, 38, shape)).astype(
            np.float32
        )
        group = zarr.create_group(zarr.storage.MemoryStore(), zarr_format=2)
        group.create_array("charge_density_total", data=values, chunks=shape, compressors=None)
        got, _ = reader.read_charge_density(group)
        values /= np.prod(shape)
        assert same_bits(got, values.ravel()), shape
