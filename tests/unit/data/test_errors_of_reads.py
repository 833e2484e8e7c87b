"""Whatever a library raises while a sample is read leaves the reader as an error of this package.

A loop over a dataset takes an ``IndexError`` for its end, and a loop over a DataLoader a
``StopIteration``: a damaged store would then shorten the epoch without a word.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
import pytest
import torch
import zarr
from torch.utils.data import DataLoader, Subset

from tests.support.readers import make_reader
from tests.support.stores import random_density, small_group
from zarrcache import (
    IncompleteArrayError,
    RhoData,
    SchemaError,
    ZarrCacheError,
    ZarrDataset,
    ZarrS3Reader,
)
from zarrcache.cache import open_group
from zarrcache.errors import OriginNotFoundError
from zarrcache.ops.verify import verify

ARRAY = "charge_density_total"
IDS = [f"mp-{i}" for i in range(6)]
RAISED: list[type[Exception]] = [
    IndexError,
    StopIteration,
    StopAsyncIteration,
    KeyError,
    TypeError,
    AttributeError,
    UnicodeDecodeError,
    MemoryError,
    RecursionError,
    BufferError,
    AssertionError,
]


def made(kind: type[Exception]) -> Exception:
    return kind("utf-8", b"", 0, 1, "x") if kind is UnicodeDecodeError else kind("from a library")


@pytest.fixture
def reader(tmp_path: Path) -> ZarrS3Reader:
    """Six materials; no cache."""
    for role in ("data", "label"):
        for i, task_id in enumerate(IDS):
            small_group(
                tmp_path / role / f"{task_id}.zarr",
                shape=(8, 8, 8),
                chunks=(8, 8, 8),
                seed=i,
                compressors=numcodecs.Fletcher32(),
            )
    (tmp_path / "map.json").write_text(json.dumps({"GGA": IDS}))
    return make_reader(tmp_path)


class Raises:
    """An observer that raises at the fourth read, as a library beneath the reader would."""

    def __init__(self, kind: type[Exception]) -> None:
        self.kind, self.count = kind, 0

    def read_started(self, task_id: str, role: str) -> None:
        self.count += 1
        if self.count == 4:
            raise made(self.kind)

    def read_finished(self, read: Any) -> None:
        pass


LOOPS: dict[str, Callable[[ZarrDataset], Any]] = {
    "dataset": lambda dataset: dataset,
    "subset": lambda dataset: Subset(dataset, range(len(dataset))),
    "loader": lambda dataset: DataLoader(dataset, batch_size=2),
}


@pytest.mark.parametrize("kind", RAISED)
@pytest.mark.parametrize("loop", LOOPS)
def test_no_exception_of_a_library_ends_a_loop(
    reader: ZarrS3Reader, kind: type[Exception], loop: str
) -> None:
    """It names the sample, its own cause, and the exception is chained."""
    reader.observe(Raises(kind))
    with pytest.raises(ZarrCacheError, match=rf"mp-[0-9] \(label\).*{kind.__name__}") as caught:
        for _ in LOOPS[loop](ZarrDataset(reader, "all")):
            pass
    assert isinstance(caught.value.__cause__, kind)


def test_no_exception_ends_the_loop_over_lazy_sequences(reader: ZarrS3Reader) -> None:
    reader.observe(Raises(IndexError))
    (data, *_), _ = reader.data_split()
    with pytest.raises(ZarrCacheError, match="IndexError"):
        for _ in [*data, *data]:
            pass


@pytest.mark.parametrize("kind", [IndexError, StopIteration])
@pytest.mark.parametrize("workers", [0, 2])
def test_transform_that_raises_ends_no_loop(
    reader: ZarrS3Reader, kind: type[Exception], workers: int
) -> None:
    """Its own errors pass, except those that loops take for the end."""

    def transform(sample: dict[str, Any]) -> dict[str, Any]:
        if sample["index"] == "mp-3":
            raise kind("mine")
        return sample

    dataset = ZarrDataset(reader, IDS, transform=transform)
    with pytest.raises(ZarrCacheError, match=rf"mp-3 could not be .*{kind.__name__}: mine"):
        for _ in DataLoader(dataset, batch_size=None, num_workers=workers):
            pass


def test_sequence_of_the_user_that_is_shorter_than_it_says_ends_no_loop() -> None:
    class Short(list[Any]):
        def __len__(self) -> int:
            return 3

    values = Short([np.ones(8, np.float32)] * 2)
    sizes = [(2, 2, 2)] * 3
    with pytest.raises(ZarrCacheError, match="sample 2 could not be read"):
        for _ in RhoData(values, values, sizes, sizes):
            pass


@pytest.mark.parametrize("content", [b"", b"x", b"abcd", b"x" * 2052, bytes(2053)])
@pytest.mark.parametrize(
    "codec",
    [
        numcodecs.Fletcher32(),
        numcodecs.JenkinsLookup3(),
        numcodecs.CRC32C(),
        numcodecs.Blosc(),
        numcodecs.Shuffle(4),
        numcodecs.LZ4(),
        None,
    ],
    ids=str,
)
def test_object_of_a_few_bytes_is_an_error_that_names_it(
    tmp_path: Path, codec: Any, content: bytes
) -> None:
    """As a full disk or a power cut leaves it. Some codecs read beyond such a buffer."""
    small_group(
        tmp_path / "data" / "mp-1.zarr", shape=(8, 8, 8), chunks=(8, 8, 8), compressors=codec
    )
    small_group(tmp_path / "label" / "mp-1.zarr", shape=(8, 8, 8))
    (tmp_path / "map.json").write_text('{"GGA": ["mp-1"]}')
    (tmp_path / "data" / "mp-1.zarr" / ARRAY / "0.0.0").write_bytes(content)
    with pytest.raises(IncompleteArrayError, match=r"mp-1\.zarr/charge_density_total/0\.0\.0"):
        make_reader(tmp_path).load("mp-1", "data")


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "c8"},
        {"dtype": "U4"},
        {"dtype": "M8[s]"},
        {"shape": (40_000, 40_000, 40_000), "chunks": (64, 64, 64)},
        {"shape": (1000, 1000, 1000), "chunks": (1, 1, 1), "dtype": "i1"},
    ],
    ids=str,
)
def test_plain_group_that_is_no_density_is_refused(
    tmp_path: Path, reader: ZarrS3Reader, change: dict[str, Any]
) -> None:
    """A group that the user opened with zarr; nothing is read, converted or allocated."""
    group = zarr.create_group(store=zarr.storage.LocalStore(tmp_path / "own.zarr"), zarr_format=2)
    group.create_array(ARRAY, **{"shape": (4, 4, 4), "chunks": (4, 4, 4), "dtype": "f4", **change})
    with pytest.raises(SchemaError, match=r"own\.zarr"):
        reader.read_charge_density(zarr.open_group(tmp_path / "own.zarr", mode="r"))


STRAYS = [
    b"\xff.tmp",
    b"._0.0.0",
    b".DS_Store",
    b"0.0.0~",
    b".0.0.0.swp",
    b"0.0.0 (copy)",
    b"0.0." + b"9" * 200,
    "0.0.\u0663".encode(),
    b"00.0.0",
    b"-1.0.0",
    b"0.0.0.tmp\n",
    b"c",
]


@pytest.mark.parametrize("name", STRAYS, ids=repr)
@pytest.mark.parametrize("as_zip", [False, True])
def test_file_that_is_no_chunk_is_ignored(tmp_path: Path, name: bytes, as_zip: bool) -> None:
    """Whatever its name; it neither changes the values nor makes the entry stale."""
    import zipfile

    suffix = ".zip" if as_zip else ""
    values = small_group(tmp_path / "data" / f"mp-1.zarr{suffix}", shape=(8, 8, 8), as_zip=as_zip)
    small_group(tmp_path / "label" / "mp-1.zarr", shape=(8, 8, 8))
    (tmp_path / "map.json").write_text('{"GGA": ["mp-1"]}')
    reader = make_reader(tmp_path, cache={})
    before = None if as_zip else reader.listing("mp-1", "data")
    if as_zip:
        with zipfile.ZipFile(tmp_path / "data" / "mp-1.zarr.zip", "a") as archive:
            archive.writestr(
                f"{ARRAY}/{os.fsdecode(name).encode('ascii', 'replace').decode()}", b"x"
            )
    else:
        path = os.fsencode(tmp_path / "data" / "mp-1.zarr" / ARRAY) + b"/" + name
        with open(path, "wb") as file:
            file.write(b"\x00\x05\x16\x07" + bytes(80))
    np.testing.assert_array_equal(reader.load("mp-1", "data")[0], values[ARRAY].ravel())
    if before is not None and name != b"c":
        assert reader.listing("mp-1", "data") == before


def test_lock_of_an_editor_is_ignored(tmp_path: Path) -> None:
    """A broken link or a pipe with a dot before its name; a chunk that is one is an error."""
    small_group(tmp_path / "data" / "mp-1.zarr", shape=(8, 8, 8), chunks=(8, 8, 8))
    small_group(tmp_path / "label" / "mp-1.zarr", shape=(8, 8, 8))
    (tmp_path / "map.json").write_text('{"GGA": ["mp-1"]}')
    array = tmp_path / "data" / "mp-1.zarr" / ARRAY
    (array / ".#0.0.0").symlink_to("user@host.123")
    os.mkfifo(array / ".pipe")
    assert make_reader(tmp_path).load("mp-1", "data")[1] == (8, 8, 8)
    (array / "0.0.0").unlink()
    (array / "0.0.0").symlink_to("nowhere")
    with pytest.raises(ZarrCacheError, match="broken symbolic link"):
        make_reader(tmp_path).load("mp-1", "data")


@pytest.mark.parametrize("directory", [b"new\nline", b"caf\xc3\xa9", b"\xe9t\xe9", b"a b%20c#d?e"])
def test_directory_of_any_name_is_read_cached_and_verified(
    tmp_path: Path, directory: bytes
) -> None:
    """Also names that are not UTF-8."""
    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + directory))
    values = small_group(root / "data" / "mp-1.zarr")
    small_group(root / "label" / "mp-1.zarr")
    (tmp_path / "map.json").write_text('{"GGA": ["mp-1"]}')
    for hits in (0, 1):
        reader = make_reader(tmp_path, root, cache={})
        np.testing.assert_array_equal(reader.load("mp-1", "data")[0], values[ARRAY].ravel())
        assert reader.stats.hits == hits
    config = reader.cache_config
    assert config is not None
    report = verify(config)
    assert (report.corrupt, report.entries > 0) == ((), True)


class TestFloat16:
    """Small values that float16 loses are said, once."""

    @staticmethod
    def dataset(values: np.ndarray[Any, Any], **options: Any) -> ZarrDataset:
        class Reader:
            def split_task_ids(self) -> tuple[list[str], list[str]]:
                return ["mp-1", "mp-2"], []

            def load(self, task_id: str, role: str) -> Any:
                return values.ravel().copy(), values.shape

        return ZarrDataset(Reader(), "train", **options)  # type: ignore[arg-type]

    def test_share_that_becomes_zero_is_logged_once_per_side(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        values = random_density((4, 5, 5)) + 1
        values.ravel()[:25] = 1e-9
        dataset = self.dataset(values, precision="f16")
        for _ in range(2):
            for sample in (dataset[0], dataset[1]):
                assert (sample["data"] == 0).sum() == 25
        assert [record.getMessage()[:56] for record in caplog.records] == [
            "data of mp-1: float16 turns 25 % of the values into 0, a",
            "label of mp-1: float16 turns 25 % of the values into 0, ",
        ]

    def test_values_with_fewer_bits_are_logged(self, caplog: pytest.LogCaptureFixture) -> None:
        _ = self.dataset(np.full((4, 4, 4), -1e-5, np.float32), precision="f16")[0]
        assert "into 0, and another 100 % are below 6.1e-05" in caplog.text

    @pytest.mark.parametrize("precision", ["f32", "bf16"])
    def test_other_types_lose_none(self, precision: Any, caplog: pytest.LogCaptureFixture) -> None:
        sample = self.dataset(np.full((4, 4, 4), 1e-30, np.float32), precision=precision)[0]
        assert (sample["data"] > 0).all()
        assert not caplog.records

    def test_zeros_and_values_of_full_precision_are_not_worth_a_warning(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        values = np.ones((4, 4, 4), np.float32)
        values[0] = 0
        _ = self.dataset(values, precision="f16")[0]
        assert not caplog.records


@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (4, 4, 1), (1, 5, 3), (3, 1, 1), (2, 1, 7), (1, 1, 6), (5, 3, 2)]
)
def test_thin_grid_is_rotated_like_any_other(shape: tuple[int, int, int]) -> None:
    """A reversed axis of length one is contiguous for numpy, and refused by torch."""
    values = random_density(shape)
    known = {values.tobytes() + repr(values.shape).encode()} | {
        np.ascontiguousarray(turned).tobytes() + repr(turned.shape).encode()
        for plane in ((1, 2), (0, 2), (0, 1))
        for turned in (np.rot90(values, -turns, plane) for turns in (1, 2, 3))
    }
    dataset = RhoData([values.ravel()], [values.ravel()], [shape], [shape], seed=3)

    class Reader:
        def split_task_ids(self) -> tuple[list[str], list[str]]:
            return ["mp-1"], []

        def load(self, task_id: str, role: str) -> Any:
            return values.ravel().copy(), shape

    other = ZarrDataset(Reader(), "train", augmentation=True, seed=3)  # type: ignore[arg-type]
    for _ in range(60):
        data, label = dataset[0]
        assert torch.equal(data, label)
        assert torch.equal(other[0]["data"], data)
        assert data.is_contiguous()
        assert data[0].numpy().tobytes() + repr(tuple(data.shape[1:])).encode() in known


def test_grid_smaller_than_the_factor_is_named() -> None:
    values = np.ones(15, np.float32)
    dataset = RhoData([values], [values], [(1, 5, 3)], [(1, 5, 3)], downsample_data=2)
    with pytest.raises(SchemaError, match=r"a grid of .* points is empty after cropping"):
        _ = dataset[0]


@pytest.mark.parametrize(
    ("name", "document"),
    [
        (".zmetadata", b'{"metadata": '),
        (".zmetadata", b"[]"),
        (".zattrs", b"{"),
        (".zgroup", b"[]"),
        (".zgroup", None),
    ],
)
def test_store_whose_documents_are_damaged_is_not_opened(
    tmp_path: Path, name: str, document: bytes | None
) -> None:
    path = tmp_path / "mp-1.zarr"
    small_group(path, consolidated=True)
    if document is None:
        (path / ".zmetadata").unlink()
        (path / name).unlink()
    else:
        (path / name).write_bytes(document)
    error = OriginNotFoundError if document is None else SchemaError
    with pytest.raises(error, match=re.escape(str(path))):
        make_reader(tmp_path, tmp_path, cache={}).read_zarr_store(path)
    with pytest.raises(error, match=re.escape(str(path))):
        open_group(path)
