"""``RandomCrop`` and ``Probes``, against whole grids and plain numpy."""

from __future__ import annotations

import ctypes
import itertools
import json
import mmap
import multiprocessing
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.support.stores import random_density
from zarrcache import (
    ConfigError,
    Probes,
    RandomCrop,
    RhoData,
    SchemaError,
    ZarrDataset,
    ZarrS3Reader,
    collate,
)
from zarrcache.train import LazyPair, Selection
from zarrcache.train.crops import window

Grid = NDArray[np.float32]
Make = Callable[..., ZarrS3Reader]
PAGE, LIBC = mmap.PAGESIZE, ctypes.CDLL(None)
LATTICE = np.array([[3.0, 0.0, 0.0], [1.0, 4.0, 0.0], [0.5, 0.25, 5.0]])


@pytest.fixture
def make(tmp_path: Path, small_group: Callable[..., Any], make_reader: Make) -> Make:
    """``make((data shape, label shape), ..., cache=...)``: materials ``mp-0``, ``mp-1``, ..."""

    def made(*shapes: tuple[tuple[int, ...], tuple[int, ...]], **options: Any) -> ZarrS3Reader:
        structure = {"lattice": {"matrix": LATTICE.tolist()}, "sites": []}
        for (i, pair), side in itertools.product(enumerate(shapes), (0, 1)):
            small_group(
                f"{('data', 'label')[side]}/mp-{i}.zarr",
                shape=pair[side],
                seed=i + 10 * side,
                attrs={"structure": structure},
            )
        ids = [f"mp-{i}" for i in range(len(shapes))]
        (tmp_path / "map.json").write_text(json.dumps({"GGA": ids}))
        return make_reader(**{"cache": {}, "train_fraction": 1.0, "normalize": False, **options})

    return made


def whole(reader: ZarrS3Reader, i: int = 0) -> list[Grid]:
    """Data and label as the reader loads them."""
    found = [reader.load(f"mp-{i}", role) for role in ("data", "label")]  # type: ignore[arg-type]
    return [values.reshape(sizes) for values, sizes in found]


def turned(grid: Grid) -> list[Grid]:
    """Ten orientations: none, and 1 to 3 quarter turns about each axis."""
    planes = (1, 2), (0, 2), (0, 1)
    return [grid, *(np.rot90(grid, -n, axes) for axes in planes for n in (1, 2, 3))]


def cut(grid: Grid, start: tuple[int, ...], size: tuple[int, ...]) -> Grid:
    """A periodic window, by ``numpy.take``."""
    for axis, (first, length) in enumerate(zip(start, size, strict=True)):
        grid = np.take(grid, range(first, first + length), axis, mode="wrap")
    return grid


def place_of(crop: Grid, orientations: list[Grid]) -> tuple[int, tuple[int, ...]]:
    """Which orientation a crop is from, and where it starts. All values of a grid differ."""
    for number, grid in enumerate(orientations):
        start = tuple(int(n[0]) for n in np.nonzero(grid == crop[0, 0, 0]))
        if np.array_equal(crop, cut(grid, start, crop.shape)):
            return number, start
    raise AssertionError("the crop is from no orientation of the grid")


class TestRandomCrop:
    """Windows of both grids of a pair."""

    @pytest.mark.parametrize("encoding", ["float32", "float16", "bfloat16", "bits:12"])
    @pytest.mark.parametrize("step", [1, 2])
    def test_a_crop_is_that_of_the_rotated_grid(self, make: Make, encoding: str, step: int) -> None:
        shape = (8, 10, 12)
        reader = make((shape, shape), cache={"arrays": {"encoding": encoding}})
        data, label = whole(reader)
        dataset = ZarrDataset(
            reader,
            transform=RandomCrop((3, 2, 4)),
            augmentation=True,
            downsample_data=step,
            downsample_label=step,
            seed=5,
        )
        seen = set()
        for _ in range(60):
            sample = dataset[0]
            assert sample["data"].shape == sample["label"].shape == (1, 3, 2, 4)
            grids = [
                [grid[::step, ::step, ::step] for grid in turned(side)] for side in (data, label)
            ]
            crop = sample["data"].numpy()[0]
            number, start = next(
                (number, start)
                for number, grid in enumerate(grids[0])
                for start in zip(
                    *(n.tolist() for n in np.nonzero(grid == crop[0, 0, 0])), strict=True
                )
                if np.array_equal(crop, cut(grid, start, (3, 2, 4)))
            )
            assert np.array_equal(
                sample["label"].numpy()[0], cut(grids[1][number], start, (3, 2, 4))
            )
            seen.add(number)
        assert len(seen) > 5

    def test_every_place_is_as_likely_as_any_other(self, make: Make) -> None:
        reader = make(((2, 3, 4), (2, 3, 4)))
        grid = whole(reader)[0]
        dataset = ZarrDataset(reader, transform=RandomCrop(2), seed=1)
        starts = Counter(place_of(dataset[0]["data"].numpy()[0], [grid])[1] for _ in range(20 * 24))
        assert len(starts) == 24
        # chi-square with 23 degrees of freedom: above 57 in one of ten thousand fair experiments
        assert sum((n - 20) ** 2 / 20 for n in starts.values()) < 57

    def test_a_crop_of_the_size_of_the_grid_wraps_and_never_writes_to_the_cache(
        self, make: Make
    ) -> None:
        reader = make(((4, 5, 6), (4, 5, 6)))
        before = whole(reader)[0].copy()
        sample = ZarrDataset(reader, transform=RandomCrop((4, 5, 6)), seed=3)[0]
        assert sorted(sample["data"].ravel().tolist()) == sorted(before.ravel().tolist())
        sample["data"].zero_()
        assert np.array_equal(whole(reader)[0], before)

    def test_the_seed_decides_and_rotations_stay_those_without_crops(self, make: Make) -> None:
        reader = make(((5, 5, 5), (5, 5, 5)))
        options: dict[str, Any] = {"augmentation": True, "seed": 7}
        crops = [
            [ZarrDataset(reader, transform=RandomCrop(2), **options)[0] for _ in range(1)],
            [ZarrDataset(reader, transform=RandomCrop(2), **options)[0] for _ in range(1)],
        ]
        assert torch.equal(crops[0][0]["data"], crops[1][0]["data"])
        dataset, plain = (
            ZarrDataset(reader, transform=t, **options) for t in (RandomCrop(2), None)
        )
        orientations = turned(whole(reader)[0])
        drawn = [place_of(dataset[0]["data"].numpy()[0], orientations) for _ in range(20)]
        wanted = [place_of(plain[0]["data"].numpy()[0], orientations)[0] for _ in range(20)]
        assert [number for number, _ in drawn] == wanted
        assert len({start for _, start in drawn}) > 10

    def test_torch_draws_places_if_it_draws_rotations(self, make: Make) -> None:
        reader = make(((9, 9, 9), (9, 9, 9)))
        dataset = ZarrDataset(reader, transform=RandomCrop(2), rng="torch", augmentation=True)
        runs = []
        for _ in range(2):
            torch.manual_seed(4)
            runs.append([dataset[0]["data"] for _ in range(3)])
        assert all(map(torch.equal, *runs))
        assert not torch.equal(runs[0][0], runs[0][1])

    def test_the_window_of_a_finer_label_covers_the_same_part_of_the_cell(self, make: Make) -> None:
        reader = make(((6, 6, 6), (6, 6, 6)))
        dataset = ZarrDataset(reader, transform=RandomCrop(2), downsample_data=2, seed=2)
        data, label = whole(reader)
        for _ in range(20):
            sample = dataset[0]
            crop = sample["data"].numpy()[0]
            _, start = place_of(crop, [data[::2, ::2, ::2]])
            start = tuple(2 * n for n in start)
            assert np.array_equal(sample["label"].numpy()[0], cut(label, start, (4, 4, 4)))

    def test_windows_do_not_wrap_where_downsampling_cuts_the_grid(self, make: Make) -> None:
        reader = make(((7, 6, 6), (7, 6, 6)))
        dataset = ZarrDataset(
            reader, transform=RandomCrop(2), downsample_data=2, downsample_label=2, seed=2
        )
        points = whole(reader)[0][:6:2, ::2, ::2]
        starts = {place_of(dataset[0]["data"].numpy()[0], [points])[1] for _ in range(200)}
        assert {start[0] for start in starts} == {0, 1}
        assert {start[1] for start in starts} == {0, 1, 2}

    @pytest.mark.parametrize("precision", ["f16", "bf16"])
    def test_a_crop_is_cast(self, make: Make, precision: Any) -> None:
        reader = make(((5, 5, 5), (5, 5, 5)))
        options: dict[str, Any] = {"transform": RandomCrop(3), "seed": 1}
        exact, cast = (ZarrDataset(reader, precision=p, **options)[0] for p in ("f32", precision))
        assert torch.equal(cast["data"], exact["data"].to(cast["data"].dtype))
        assert cast["data"].dtype is {"f16": torch.float16, "bf16": torch.bfloat16}[precision]

    def test_other_steps_follow_the_crop(self, make: Make) -> None:
        reader = make(((5, 5, 5), (5, 5, 5)))

        def double(sample: dict[str, Any]) -> dict[str, Any]:
            return {**sample, "data": 2 * sample["data"]}

        plain = ZarrDataset(reader, transform=RandomCrop(3), seed=1)[0]
        both = ZarrDataset(reader, transform=[RandomCrop(3), double, double], seed=1)[0]
        assert torch.equal(both["data"], 4 * plain["data"])
        assert torch.equal(both["label"], plain["label"])

    def test_lists_of_arrays_are_cropped_and_never_changed(self) -> None:
        values = [random_density((4, 5, 6), seed=i).ravel() for i in range(2)]
        before = [one.copy() for one in values]
        pairs = RhoData(
            values, values, [(4, 5, 6)] * 2, [(4, 5, 6)] * 2, transform=RandomCrop(3), seed=1
        )
        data, label = pairs[1]
        assert data.shape == (1, 3, 3, 3)
        assert torch.equal(data, label)
        data.zero_()
        assert all(map(np.array_equal, values, before))

    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_only_the_pages_of_the_window_are_read(self, make: Make) -> None:
        """In a process that dies of the first access to another page."""
        reader = make(((64, 64, 64), (4, 4, 4)), cache={"verify": "never"})
        values, sizes = reader.load("mp-0", "data")
        grid, place = values.reshape(sizes), (60, 10, 61)
        wanted = cut(grid, place, (8, 8, 8))
        pages = {
            grid[(60 + x) % 64, 10 + y, (61 + z) % 64 :].__array_interface__["data"][0] // PAGE
            - grid.__array_interface__["data"][0] // PAGE
            for x, y, z in itertools.product(range(8), repeat=3)
        }
        assert len(pages) < 30  # of 256

        def child() -> None:
            found = reader.open_grid("mp-0", "data")
            first = found.stored.__array_interface__["data"][0]
            for page in {*range(found.stored.nbytes // PAGE)} - pages:
                assert not LIBC.mprotect(ctypes.c_void_p(first + page * PAGE), PAGE, 0)
            assert np.array_equal(window(found, place, (8, 8, 8)), wanted)

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        process.join(60)
        assert process.exitcode == 0

    def test_only_what_is_taken_is_served(self, make: Make) -> None:
        reader = make(((9, 9, 9), (9, 9, 9)))
        whole(reader)
        before = reader.stats
        ZarrDataset(reader, transform=RandomCrop(2))[0]
        assert reader.stats.hits == before.hits + 2
        assert reader.stats.served_bytes == before.served_bytes + 2 * 8 * 4

    def test_a_window_is_decoded_alone(self, make: Make) -> None:
        reader = make(((9, 9, 9), (9, 9, 9)), cache={"arrays": {"encoding": "float16"}})
        wanted = whole(reader)[0]
        served = reader.stats.served_bytes
        grid = reader.open_grid("mp-0", "data")
        assert grid.stored.dtype == np.float16
        assert np.array_equal(grid[2:5, ..., 3], wanted[2:5, ..., 3])
        assert reader.stats.served_bytes - served == 3 * 9 * 4

    def test_a_reader_without_open_grid_will_do(self, make: Make) -> None:
        reader = make(((5, 5, 5), (5, 5, 5)))

        class Plain:
            split_task_ids = reader.split_task_ids
            load = reader.load

        samples = [
            ZarrDataset(one, transform=RandomCrop(3), seed=1)[0]["data"] for one in (reader, Plain)
        ]
        assert torch.equal(*samples)

    def test_without_a_cache_the_values_are_the_same(self, make: Make, make_reader: Make) -> None:
        reader = make(((5, 5, 5), (5, 5, 5)))
        other = make_reader(cache=None, train_fraction=1.0, normalize=False)
        samples = [
            ZarrDataset(one, transform=RandomCrop(3), seed=1)[0]["data"] for one in (reader, other)
        ]
        assert torch.equal(*samples)


class TestProbes:
    """Points of both grids of a pair."""

    def test_values_are_those_at_the_coordinates(self, make: Make) -> None:
        shape = (4, 5, 6)
        reader = make((shape, shape))
        data, label = whole(reader)
        sample: Any = ZarrDataset(reader, transform=Probes(50), seed=1)[0]
        assert sample["data"].shape == sample["label"].shape == (1, 50)
        index = np.rint(sample["frac"].numpy() * shape).astype(int)
        assert len({*map(tuple, index)}) == 50
        assert np.array_equal(sample["data"][0], data[tuple(index.T)])
        assert np.array_equal(sample["label"][0], label[tuple(index.T)])
        assert np.array_equal(sample["frac"], (index / shape).astype(np.float32))
        assert np.array_equal(sample["cart"], (index / shape @ LATTICE).astype(np.float32))
        assert sample["structure"]["lattice"]["matrix"] == LATTICE.tolist()
        assert sample["index"] == "mp-0"

    def test_a_batch_has_stacked_points_and_a_list_of_structures(self, make: Make) -> None:
        reader = make(((4, 5, 6),) * 2, ((7, 5, 6),) * 2)
        dataset = ZarrDataset(reader, transform=Probes(9), seed=1)
        batch = collate([dataset[0], dataset[1]])
        assert batch["data"].shape == (2, 1, 9)
        assert batch["cart"].shape == (2, 9, 3)
        assert [one["lattice"]["matrix"] for one in batch["structure"]] == [LATTICE.tolist()] * 2

    def test_coordinates_are_right_where_downsampling_cuts_the_grid(self, make: Make) -> None:
        reader = make(((7, 6, 6), (7, 6, 6)))
        sample: Any = ZarrDataset(
            reader, transform=Probes(27), downsample_data=2, downsample_label=2, seed=1
        )[0]
        index = np.rint(sample["frac"].numpy() * (7, 6, 6)).astype(int)
        assert {*index[:, 0]} == {0, 2, 4}
        assert np.array_equal(sample["data"][0], whole(reader)[0][tuple(index.T)])

    def test_precision_is_that_of_values_and_not_of_coordinates(self, make: Make) -> None:
        reader = make(((4, 5, 6), (4, 5, 6)))
        sample: Any = ZarrDataset(reader, transform=Probes(5), precision="bf16", seed=1)[0]
        assert sample["data"].dtype is torch.bfloat16
        assert sample["frac"].dtype is sample["cart"].dtype is torch.float32

    def test_without_structures_none_is_needed(self, make: Make, small_group: Any) -> None:
        reader = make(((4, 5, 6), (4, 5, 6)))
        small_group("data/mp-0.zarr", shape=(4, 5, 6), attrs={})
        sample = ZarrDataset(reader, transform=Probes(5, structure=False), seed=1)[0]
        assert sample.keys() == {"data", "label", "frac", "index"}
        with pytest.raises(SchemaError, match=r"mp-0\.zarr.* structure"):
            ZarrDataset(reader, transform=Probes(5), seed=1)[0]


class TestBadInput:
    """What does not fit is an error that names the material, as early as it can be known."""

    @pytest.mark.parametrize("is_warm", [True, False])
    @pytest.mark.parametrize(
        ("shapes", "transform", "options", "message"),
        [
            (((8, 8, 4),) * 2, RandomCrop(5), {}, "window of 5 x 5 x 5 does not fit .* 8 x 8 x 4"),
            # A rotation may put the short axis where the window is long.
            (
                ((8, 8, 4),) * 2,
                RandomCrop((6, 6, 4)),
                {"augmentation": True},
                "6 x 6 x 4 .*turn it",
            ),
            (
                ((8, 8, 8),) * 2,
                RandomCrop(5),
                {"downsample_data": 2},
                "4 x 4 x 4 points .every sec",
            ),
            (((8, 8, 8), (8, 8, 12)), RandomCrop(2), {}, "label on one of 8 x 8 x 12"),
            # As many points of each, in other places
            (((4, 4, 4), (9, 8, 8)), RandomCrop(2), {"downsample_label": 2}, "5 x 4 x 4 points"),
            (((8, 8, 8), (8, 8, 16)), Probes(5), {}, "label on one of 8 x 8 x 16"),
            (((2, 2, 2),) * 2, Probes(9), {}, "2 x 2 x 2 points has fewer than 9 in all"),
        ],
    )
    def test_a_material_that_does_not_fit_is_named(
        self,
        make: Make,
        shapes: Any,
        transform: Any,
        options: dict[str, Any],
        message: str,
        is_warm: bool,
    ) -> None:
        reader = make(((8, 8, 8), (8, 8, 8)), shapes)
        if is_warm:
            for i in range(2):
                whole(reader, i)
            with pytest.raises(ConfigError, match=f"mp-[01]: .*{message}"):
                ZarrDataset(reader, transform=transform, **options)
            return
        dataset = ZarrDataset(reader, transform=transform, **options)
        with pytest.raises(SchemaError, match=f"mp-1: .*{message}"):
            dataset[dataset.task_ids.index("mp-1")]

    def test_points_of_equal_number_at_other_places_are_no_pair(self, make: Make) -> None:
        reader = make(((5, 5, 5), (9, 9, 9)))
        dataset = ZarrDataset(reader, transform=Probes(2), downsample_label=2)
        with pytest.raises(SchemaError, match="no values at the same points"):
            dataset[0]

    @pytest.mark.parametrize(
        ("size", "message"),
        [
            (0, "from 1"),
            (-3, "from 1"),
            (2.5, "2.5"),
            ((3, 3), "three"),
            ("32", "'3"),
            (None, "None"),
        ],
    )
    def test_a_size_that_is_none(self, size: Any, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            RandomCrop(size)

    @pytest.mark.parametrize("k", [0, True, 1.5, "200"])
    def test_a_number_of_probes_that_is_none(self, k: Any) -> None:
        with pytest.raises(ConfigError, match="k of Probes"):
            Probes(k)

    @pytest.mark.parametrize(
        ("transform", "options", "message"),
        [
            (RandomCrop, {}, r"RandomCrop\("),
            ([len, RandomCrop(2)], {}, "has to be the first"),
            ([RandomCrop(2), RandomCrop(2)], {}, "has to be the first"),
            ([RandomCrop(2), 3], {}, "transform is 3"),
            ({"train": RandomCrop(2)}, {}, "has to be a function"),
            (Probes(2), {"augmentation": True}, "cannot be combined with rotations"),
            (RandomCrop(2), {"augment_on": "device"}, "augment_on"),
        ],
    )
    def test_a_transform_that_cannot_be_used(
        self, make: Make, transform: Any, options: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            ZarrDataset(make(((4, 4, 4),) * 2), transform=transform, **options)

    def test_pairs_have_no_room_for_coordinates(self) -> None:
        values = [np.ones(8, np.float32)]
        with pytest.raises(ConfigError, match="ZarrDataset"):
            RhoData(values, values, [(2, 2, 2)], [(2, 2, 2)], transform=Probes(2))


class Plane(Selection):
    """A selection of a user: a random plane."""

    def select(self, pair: LazyPair, rng: np.random.Generator) -> dict[str, Any]:
        z = int(rng.integers(pair.data.shape[-1]))
        return {"data": pair.data[..., z], "label": pair.label[..., z], "z": np.array(z)}


def test_a_user_may_choose_other_parts(make: Make) -> None:
    reader = make(((3, 4, 5), (3, 4, 5)))
    sample: Any = ZarrDataset(reader, transform=Plane(), seed=1)[0]
    assert np.array_equal(sample["data"][0], whole(reader)[0][..., int(sample["z"])])


def test_what_a_user_forgets_is_named(make: Make) -> None:
    class Half(Selection):
        def select(self, pair: LazyPair, rng: np.random.Generator) -> Any:
            return {"data": pair.data[:]}

    with pytest.raises(ConfigError, match=r"mp-0.*'data' and 'label'"):
        ZarrDataset(make(((3, 4, 5),) * 2), transform=Half())[0]


@pytest.mark.parametrize("transform", [RandomCrop(3), Probes(7)])
def test_a_dataset_with_a_selection_is_pickled(make: Make, transform: Selection) -> None:
    dataset = ZarrDataset(make(((4, 5, 6),) * 2), transform=transform, seed=2)
    other = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(dataset[0]["data"], other[0]["data"])
    assert repr(other.transform) == repr(transform)
