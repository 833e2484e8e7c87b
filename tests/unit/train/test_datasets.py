"""``RhoData``, ``ZarrDataset``, ``transform=`` and ``collate``, against plain numpy and torch."""

from __future__ import annotations

import copy
import gc
import itertools
import json
import pickle
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, default_collate

from tests.support.stores import random_density
from zarrcache import ConfigError, RhoData, SchemaError, ZarrDataset, ZarrS3Reader, collate
from zarrcache.train.lookahead import _read_by

Grid = NDArray[np.float32]
#: Grid sizes of data and label. The axes of a grid differ, so a wrong rotation shows in the shape.
SIZES = [((4, 5, 6), (8, 10, 12)), ((7, 4, 9), (7, 4, 9)), ((5, 11, 4), (10, 22, 8))]
#: Chi-square with nine degrees of freedom is above this in one of ten thousand fair experiments.
CHI_SQUARE_LIMIT = 33.7


@pytest.fixture
def lists() -> tuple[list[Grid], list[Grid], list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Three samples as the users' own reader returns them: flat arrays and grid sizes."""
    data = [random_density(a, seed=i).ravel() for i, (a, _) in enumerate(SIZES)]
    label = [random_density(b, seed=10 + i).ravel() for i, (_, b) in enumerate(SIZES)]
    return data, label, [a for a, _ in SIZES], [b for _, b in SIZES]


@pytest.fixture
def reader(
    tmp_path: Path, small_group: Callable[..., Any], make_reader: Callable[..., ZarrS3Reader]
) -> ZarrS3Reader:
    """Six materials of different grids, cached."""
    for role, i in itertools.product(("data", "label"), range(6)):
        small_group(f"{role}/mp-{i}.zarr", shape=(4 + i, 5, 6), seed=i + 10 * (role == "label"))
    (tmp_path / "map.json").write_text(json.dumps({"GGA": [f"mp-{i}" for i in range(6)]}))
    return make_reader(cache={})


def turns_of(grid: Grid) -> dict[bytes, tuple[int, int] | None]:
    """(axis, quarter turns) of every rotation of ``grid``, by its bytes; None for the identity."""
    found: dict[bytes, tuple[int, int] | None] = {grid.tobytes(): None}
    for axis, plane in enumerate(((1, 2), (0, 2), (0, 1))):
        for turns in (1, 2, 3):
            found[np.rot90(grid, k=-turns, axes=plane).tobytes()] = (axis, turns)
    assert len(found) == 10
    return found


def drawn(dataset: Any, n: int) -> list[tuple[int, int] | None]:
    """The rotations in ``n`` reads of sample 0, whose data and label are the same grid."""
    known = turns_of(random_density((3, 4, 5)))
    found = []
    for _ in range(n):
        data, label = dataset[0]
        assert torch.equal(data, label)
        found.append(known[data.numpy().tobytes()])
    return found


def one_sample(**changes: Any) -> RhoData:
    """Sample 0 with data and label alike."""
    values = random_density((3, 4, 5)).ravel()
    return RhoData([values], [values], [(3, 4, 5)], [(3, 4, 5)], **changes)


class TestRhoData:
    """Pairs of tensors from four sequences."""

    def test_pair_is_two_float32_tensors_of_one_channel(self, lists: Any) -> None:
        dataset = RhoData(*lists, data_augmentation=False)
        assert len(dataset) == 3
        for i in range(3):
            data, label = dataset[i]
            assert (data.dtype, label.dtype) == (torch.float32, torch.float32)
            assert (tuple(data.shape), tuple(label.shape)) == ((1, *SIZES[i][0]), (1, *SIZES[i][1]))
            np.testing.assert_array_equal(data.numpy().ravel(), lists[0][i])
            np.testing.assert_array_equal(label.numpy().ravel(), lists[1][i])

    def test_positional_order_of_the_options_is_the_users(self, lists: Any) -> None:
        data, label = RhoData(*lists, 2, 1, False)[0]
        assert (tuple(data.shape), tuple(label.shape)) == ((1, 2, 2, 3), (1, 8, 10, 12))

    @pytest.mark.parametrize(
        ("step", "label_step"), list(itertools.product((1, 2, 3, 4), (1, 2, 3)))
    )
    def test_both_are_cropped_by_the_datas_factor_and_strided_by_their_own(
        self, lists: Any, step: int, label_step: int
    ) -> None:
        dataset = RhoData(
            *lists, downsample_data=step, downsample_label=label_step, data_augmentation=False
        )
        for i in range(3):
            for tensor, flat, size, stride in zip(
                dataset[i], (lists[0][i], lists[1][i]), SIZES[i], (step, label_step), strict=True
            ):
                axes = [[j for j in range(n - n % step) if j % stride == 0] for n in size]
                want = [
                    [[flat[(x * size[1] + y) * size[2] + z] for z in axes[2]] for y in axes[1]]
                    for x in axes[0]
                ]
                np.testing.assert_array_equal(tensor.numpy(), np.array([want], np.float32))

    @pytest.mark.parametrize("step", [1, 2, 3])
    def test_rotation_comes_before_downsampling(self, lists: Any, step: int) -> None:
        """The two do not commute: 7 points are cropped at their end."""
        dataset = RhoData(*lists, downsample_data=step, data_augmentation=True, seed=3)
        grid = lists[0][1].reshape(SIZES[1][0])
        wanted = set()
        for plane, turns in itertools.product(((1, 2), (0, 2), (0, 1)), range(4)):
            turned = np.rot90(grid, k=-turns, axes=plane)
            nx, ny, nz = (n - n % step for n in turned.shape)
            wanted.add(turned[:nx:step, :ny:step, :nz:step].tobytes())
        seen = {dataset[1][0].numpy().tobytes() for _ in range(150)}
        assert seen == wanted

    def test_lazy_sequences_give_what_plain_lists_give(self, reader: ZarrS3Reader) -> None:
        lazy_sets, _ = reader.data_split()
        plain_sets = [list(s) for s in lazy_sets]
        options = {"downsample_data": 2, "downsample_label": 1, "seed": 5}
        lazy, plain = RhoData(*lazy_sets, **options), RhoData(*plain_sets, **options)
        for _, i in itertools.product(range(4), range(len(lazy))):
            for one, other in zip(lazy[i], plain[i], strict=True):
                assert torch.equal(one, other)

    def test_tensors_of_a_list_do_not_share_its_memory(self, lists: Any) -> None:
        before = copy.deepcopy(lists)
        dataset = RhoData(*lists, data_augmentation=False)
        data, label = dataset[0]
        data.mul_(0)
        label.mul_(0)
        for one, other in zip(lists[0] + lists[1], before[0] + before[1], strict=True):
            np.testing.assert_array_equal(one, other)

    def test_work_on_a_tensor_in_place_never_reaches_the_cache(self, reader: ZarrS3Reader) -> None:
        """The tensor is the mapped entry, copy-on-write."""
        sets, _ = reader.data_split()
        dataset = RhoData(*sets, data_augmentation=False)
        want = dataset[0][0].clone()
        for _ in range(3):
            data, _ = dataset[0]
            assert torch.equal(data, want)
            data.fill_(-1)

    @pytest.mark.parametrize("augmentation", [False, True])
    def test_dataset_holds_no_array_of_lazy_sequences(
        self, reader: ZarrS3Reader, augmentation: bool
    ) -> None:
        made: list[weakref.ref[Any]] = []
        sets, _ = reader.data_split()

        class Watched:
            def __init__(self, sequence: Any) -> None:
                self.sequence = sequence

            def __len__(self) -> int:
                return len(self.sequence)

            def __getitem__(self, index: int) -> Any:
                value = self.sequence[index]
                if isinstance(value, np.ndarray):
                    made.append(weakref.ref(value))
                return value

        dataset = RhoData(*map(Watched, sets), data_augmentation=augmentation)
        for _, i in itertools.product(range(2), range(len(dataset))):
            dataset[i]
        gc.collect()
        assert len(made) == 2 * 2 * len(dataset)
        assert all(ref() is None for ref in made)

    def test_sample_is_read_once(self, reader: ZarrS3Reader) -> None:
        """The grid sizes need no read of their own."""
        sets, _ = reader.data_split()
        RhoData(*sets)[0]
        assert reader.stats.misses + reader.stats.hits == 2

    def test_positions_are_those_of_a_list(self, lists: Any) -> None:
        """Negative positions and integers of numpy and torch are accepted."""
        dataset = RhoData(*lists, data_augmentation=False)
        assert torch.equal(dataset[-1][0], dataset[2][0])
        assert torch.equal(dataset[np.int64(1)][0], dataset[torch.tensor(1)][0])
        assert len(list(iter(dataset))) == 3  # type: ignore[call-overload]
        for index in (3, -4):
            with pytest.raises(IndexError, match="of a dataset of 3"):
                dataset[index]

    @pytest.mark.parametrize("index", [slice(2), 1.0, "1", [0, 1], None, torch.tensor([0, 1])])
    def test_another_index_is_refused_in_words(self, lists: Any, index: Any) -> None:
        with pytest.raises(ConfigError, match=r"samples 0 to 2, not .*\.Subset\(dataset,"):
            RhoData(*lists)[index]

    def test_sequences_of_different_lengths_are_refused(self, lists: Any) -> None:
        data, label, gs_data, gs_label = lists
        with pytest.raises(ConfigError, match=r"\(3, 2, 3, 3\)"):
            RhoData(data, label[:2], gs_data, gs_label)

    @pytest.mark.parametrize("name", ["downsample_data", "downsample_label"])
    @pytest.mark.parametrize("factor", [0, -1, 1.5, "2", True, None])
    def test_factor_that_is_not_a_whole_number_from_1_is_refused(
        self, lists: Any, name: str, factor: Any
    ) -> None:
        """``True`` is ``data_augmentation`` at the wrong position."""
        with pytest.raises(ConfigError, match=f"{name} is {factor!r}"):
            RhoData(*lists, **{name: factor})

    def test_grid_that_is_smaller_than_the_factor_is_named(self, lists: Any) -> None:
        with pytest.raises(
            SchemaError, match=r"data of sample 0: a grid of 4 x 5 x 6 points .* downsample_data=5"
        ):
            RhoData(*lists, downsample_data=5, data_augmentation=False)[0]

    def test_values_that_do_not_fill_the_grid_are_named(self, lists: Any) -> None:
        data, label, gs_data, gs_label = lists
        with pytest.raises(
            SchemaError, match="label of sample 0 has 960 values and grid size 8 x 10 x 11"
        ):
            RhoData(data, label, gs_data, [(8, 10, 11), *gs_label[1:]])[0]


class TestAugmentation:
    """Which rotations are drawn, and when a run is repeatable."""

    def test_rotations_have_the_users_probabilities(self) -> None:
        """10 % for the identity and for each combination of axis and number of quarter turns."""
        n = 3000
        counts = Counter(drawn(one_sample(seed=0), n))
        keys = [None, *itertools.product(range(3), (1, 2, 3))]
        assert set(counts) == set(keys)
        assert sum((counts[key] - n / 10) ** 2 / (n / 10) for key in keys) < CHI_SQUARE_LIMIT

    def test_without_augmentation_nothing_rotates(self) -> None:
        assert set(drawn(one_sample(data_augmentation=False), 30)) == {None}

    def test_same_seed_gives_the_same_rotations_and_another_seed_others(self) -> None:
        """Every read draws a new one."""
        first = drawn(one_sample(seed=1), 60)
        assert first == drawn(one_sample(seed=1), 60)
        assert first != drawn(one_sample(seed=2), 60)
        assert first[:30] != first[30:]

    def test_without_a_seed_torchs_seed_decides(self) -> None:
        """Drawing does not advance torch's generator."""
        with torch.random.fork_rng():
            torch.manual_seed(11)
            state = torch.get_rng_state()
            first = drawn(one_sample(), 40)
            assert torch.equal(torch.get_rng_state(), state)
            torch.manual_seed(11)
            assert drawn(one_sample(), 40) == first
            torch.manual_seed(12)
            assert drawn(one_sample(), 40) != first

    def test_numpys_global_generator_is_left_alone(self) -> None:
        state = np.random.get_state()[1].copy()  # type: ignore[index]
        drawn(one_sample(seed=1), 10)
        np.testing.assert_array_equal(np.random.get_state()[1], state)  # type: ignore[index]

    @pytest.mark.parametrize("persistent", [False, True])
    def test_run_with_workers_is_repeatable_with_torchs_seed(self, persistent: bool) -> None:
        """The epochs differ from each other, and so do the workers."""

        def run() -> list[list[tuple[int, int] | None]]:
            values = random_density((3, 4, 5)).ravel()
            n = 24
            dataset = RhoData([values] * n, [values] * n, [(3, 4, 5)] * n, [(3, 4, 5)] * n, seed=7)
            generator = torch.Generator().manual_seed(5)
            loader = DataLoader(
                dataset,
                batch_size=None,
                num_workers=2,
                generator=generator,
                persistent_workers=persistent,
            )
            known = turns_of(values.reshape(3, 4, 5))
            return [[known[data.numpy().tobytes()] for data, _ in loader] for _ in range(2)]

        first, second = run()
        assert [first, second] == run()
        assert first != second
        assert first[::2] != first[1::2]

    @pytest.mark.parametrize("seed", [-1, 1.5, "1", True])
    def test_seed_that_is_not_a_whole_number_is_refused(self, seed: Any) -> None:
        with pytest.raises(ConfigError, match=f"seed is {seed!r}"):
            one_sample(seed=seed)

    def test_dataset_pickles(self, lists: Any, reader: ZarrS3Reader) -> None:
        for sets in (lists, reader.data_split()[0]):
            dataset = RhoData(*sets, downsample_data=2, seed=3)
            again = pickle.loads(pickle.dumps(dataset))
            for one, other in zip(dataset[1], again[1], strict=True):
                assert torch.equal(one, other)


class TestZarrDataset:
    """Dictionaries from a reader."""

    def test_sample_has_data_label_and_task_id(self, reader: ZarrS3Reader) -> None:
        train, test = reader.split_task_ids()
        for split, ids in {"train": train, "test": test, "all": train + test}.items():
            dataset = ZarrDataset(reader, split)  # type: ignore[arg-type]
            assert len(dataset) == len(ids)
            for i, task_id in enumerate(ids):
                sample = dataset[i]
                assert list(sample) == ["data", "label", "index"]
                assert sample["index"] == task_id
                for role in ("data", "label"):
                    values, gridsize = reader.load(task_id, role)  # type: ignore[arg-type]
                    np.testing.assert_array_equal(
                        sample[role].numpy(), values.reshape(1, *gridsize)
                    )  # type: ignore[literal-required]

    def test_nothing_is_read_before_it_is_indexed(self, reader: ZarrS3Reader) -> None:
        dataset = ZarrDataset(reader, "all")
        assert reader.stats.misses == 0
        dataset[0]
        assert reader.stats.misses == 2

    @pytest.mark.parametrize(
        ("precision", "dtype"),
        [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)],
    )
    def test_precision_is_what_torch_makes_of_float32(
        self, reader: ZarrS3Reader, precision: Any, dtype: torch.dtype
    ) -> None:
        exact, sample = ZarrDataset(reader)[0], ZarrDataset(reader, precision=precision)[0]
        for role in ("data", "label"):
            assert sample[role].dtype == dtype  # type: ignore[literal-required]
            assert torch.equal(sample[role], exact[role].to(dtype))  # type: ignore[literal-required]

    def test_value_that_float16_cannot_hold_is_an_error(
        self, tmp_path: Path, reader: ZarrS3Reader, small_group: Callable[..., Any]
    ) -> None:
        """It would become infinite, and the loss NaN."""
        task_id = reader.split_task_ids()[0][0]
        small_group(
            f"label/{task_id}.zarr", {"charge_density_total": np.full((4, 4, 4), 70000, np.float32)}
        )
        assert ZarrDataset(reader, precision="bf16")[0]["label"].isfinite().all()
        with pytest.raises(SchemaError, match=rf"label of {task_id} .*65504.*normalize_data: true"):
            ZarrDataset(reader, precision="f16")[0]

    @pytest.mark.parametrize("wrong", ["no", "false", 2])
    def test_augmentation_that_is_no_truth_value_is_refused(
        self, reader: ZarrS3Reader, wrong: Any
    ) -> None:
        """Any text is true in Python, so that "no" rotated."""
        with pytest.raises(ConfigError, match=rf"augmentation is {wrong!r}; it has to be true or"):
            ZarrDataset(reader, augmentation=wrong)

    def test_a_role_that_does_not_exist_is_named(self, reader: ZarrS3Reader) -> None:
        role: Any = "input"
        with pytest.raises(ConfigError, match=r"role is 'input'; it has to be 'data' or 'label'"):
            reader.load(reader.task_ids[0], role)

    def test_augmentation_and_downsampling_are_those_of_rho_data(
        self, reader: ZarrS3Reader
    ) -> None:
        """The same seed draws the same rotations in both datasets."""
        options: dict[str, Any] = {"downsample_data": 2, "downsample_label": 1, "seed": 9}
        pairs = RhoData(*reader.data_split()[0], **options)
        samples = ZarrDataset(reader, "train", augmentation=True, **options)
        for _, i in itertools.product(range(6), range(len(pairs))):
            data, label = pairs[i]
            sample = samples[i]
            assert torch.equal(data, sample["data"])
            assert torch.equal(label, sample["label"])

    @pytest.mark.parametrize(
        "options", [{"split": "valid"}, {"precision": "f64"}, {"downsample_data": 0}, {"seed": -1}]
    )
    def test_option_that_is_not_one_is_refused_with_its_value(
        self, reader: ZarrS3Reader, options: dict[str, Any]
    ) -> None:
        """No request is made."""
        (name, value), *_ = options.items()
        with pytest.raises(ConfigError, match=f"{name} is {value!r}"):
            ZarrDataset(reader, **options)
        assert reader.stats.requests == 0

    def test_dataset_pickles_with_its_split(self, reader: ZarrS3Reader, tmp_path: Path) -> None:
        """The copy in a spawned worker does not need the map."""
        dataset = ZarrDataset(reader, "test")
        data = dataset[0]["data"]
        (tmp_path / "map.json").unlink()
        again = pickle.loads(pickle.dumps(dataset))
        assert again.task_ids == dataset.task_ids
        assert torch.equal(again[0]["data"], data)


class TestTransform:
    """A function of the sample's dict."""

    def test_it_sees_the_rotated_downsampled_and_cast_sample(self, reader: ZarrS3Reader) -> None:
        options: dict[str, Any] = {
            "augmentation": True,
            "downsample_data": 2,
            "precision": "bf16",
            "seed": 4,
        }
        seen: list[dict[str, Any]] = []

        def keep(sample: dict[str, Any]) -> dict[str, Any]:
            seen.append(dict(sample))
            return {**sample, "data": sample["data"] + 1, "mean": sample["label"].mean()}

        plain, dataset = (ZarrDataset(reader, "all", transform=f, **options) for f in (None, keep))
        for i in range(len(plain)):
            want, got = plain[i], dataset[i]
            assert list(got) == ["data", "label", "index", "mean"]
            assert seen[i]["index"] == got["index"] == want["index"]
            assert torch.equal(seen[i]["data"], want["data"])
            assert torch.equal(got["data"], want["data"] + 1)
            assert torch.equal(got["label"], want["label"])

    def test_rho_data_returns_the_pair_of_what_it_returns(self, lists: Any) -> None:
        def swap(sample: dict[str, Any]) -> dict[str, Any]:
            assert list(sample) == ["data", "label"]
            return {"label": sample["data"], "data": sample["label"], "ignored": 1}

        plain = RhoData(*lists, data_augmentation=False)
        swapped = RhoData(*lists, data_augmentation=False, transform=swap)
        for i in range(len(plain)):
            assert all(map(torch.equal, swapped[i], plain[i][::-1]))

    def test_in_place_work_never_reaches_the_cache(self, reader: ZarrS3Reader) -> None:
        def clear(sample: dict[str, Any]) -> dict[str, Any]:
            sample["data"].zero_()
            return sample

        assert not ZarrDataset(reader, "all", transform=clear)[0]["data"].any()
        assert ZarrDataset(reader, "all")[0]["data"].any()

    @pytest.mark.parametrize(
        ("result", "words"),
        [
            (None, "None"),
            (3, "a int"),
            ({"data": 1}, r"a mapping with the keys \['data'\]"),
            ((1, 2), "a tuple"),
        ],
    )
    def test_what_is_not_a_sample_is_refused(
        self, reader: ZarrS3Reader, lists: Any, result: Any, words: str
    ) -> None:
        """A function without ``return`` is the usual mistake."""
        for dataset in (
            ZarrDataset(reader, "all", transform=lambda sample: result),
            RhoData(*lists, transform=lambda sample: result),
        ):
            with pytest.raises(ConfigError, match=f"transform returned {words} for "):
                dataset[0]

    def test_what_is_not_a_function_is_refused(self, reader: ZarrS3Reader) -> None:
        with pytest.raises(ConfigError, match="transform is 'log'; it has to be a function"):
            ZarrDataset(reader, transform="log")  # type: ignore[arg-type]


class TestCollate:
    """Batches of mixed grids."""

    def test_samples_of_one_shape_are_stacked(self, reader: ZarrS3Reader) -> None:
        dataset = ZarrDataset(reader)
        batch = [dataset[0], dataset[0]]
        got, want = collate(batch), default_collate(batch)
        assert got["data"].shape == (2, *dataset[0]["data"].shape)
        assert torch.equal(got["data"], want["data"])
        assert got["index"] == want["index"]

    def test_samples_of_mixed_shapes_are_lists_in_every_field(self, reader: ZarrS3Reader) -> None:
        dataset = ZarrDataset(reader, "all")
        got = collate([dataset[0], dataset[1]])
        assert list(got) == ["data", "label", "index"]
        assert [tuple(t.shape) for t in got["data"]] == [
            tuple(dataset[i]["data"].shape) for i in (0, 1)
        ]
        assert got["index"] == list(dataset.task_ids[:2])
        pairs = RhoData(*reader.data_split()[0], data_augmentation=False)
        data, label = collate([pairs[0], pairs[1]])
        assert torch.equal(data[1], pairs[1][0])
        assert torch.equal(label[0], pairs[0][1])

    def test_equal_data_with_unequal_labels_are_lists(self) -> None:
        x = torch.zeros(1, 2, 2, 2)
        got = collate(
            [
                {"data": x, "label": x, "index": "a"},
                {"data": x, "label": torch.zeros(1, 4, 4, 4), "index": "b"},
            ]
        )
        assert isinstance(got["data"], list)
        assert isinstance(got["label"], list)

    def test_loader_with_workers_delivers_mixed_batches(self, reader: ZarrS3Reader) -> None:
        dataset = ZarrDataset(reader, "all")
        batches = list(DataLoader(dataset, batch_size=4, num_workers=2, collate_fn=collate))
        assert [task_id for batch in batches for task_id in batch["index"]] == list(
            dataset.task_ids
        )
        for i, tensor in enumerate(t for batch in batches for t in batch["data"]):
            assert torch.equal(tensor, dataset[i]["data"])


def test_the_sides_of_a_split_file_are_datasets_of_their_own(
    tmp_path: Path,
    small_group: Callable[..., Any],
    make_reader: Callable[..., ZarrS3Reader],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No material for validation is trained on."""
    ids = [f"mp-{i}" for i in range(4)]
    for role, id_ in itertools.product(("data", "label"), ids):
        small_group(f"{role}/{id_}.zarr")
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ids}))
    sides = {"train": [2, 0], "validation": [1], "test": [3]}
    (tmp_path / "split.json").write_text(json.dumps(sides))
    reader = make_reader(split_file=tmp_path / "split.json")
    for side, places in sides.items():
        assert ZarrDataset(reader, side).task_ids == tuple(ids[n] for n in places)  # type: ignore[arg-type]
    assert ZarrDataset(reader, "all").task_ids == ("mp-2", "mp-0", "mp-1", "mp-3")
    assert _read_by(reader)[1] == ("mp-2", "mp-0")  # a Lookahead over the reader
    train, test = reader.data_split()
    assert (len(train[0]), len(test[0])) == (2, 1)
    assert "has 1 material for validation" in caplog.text
    with pytest.raises(ConfigError, match="which needs a split file"):
        ZarrDataset(make_reader(), "validation")


def test_pairs_on_different_grids_are_named_with_a_split_file_too(
    tmp_path: Path,
    small_group: Callable[..., Any],
    make_reader: Callable[..., ZarrS3Reader],
    caplog: pytest.LogCaptureFixture,
) -> None:
    ids = ["mp-1", "mp-2"]
    for role, id_ in itertools.product(("data", "label"), ids):
        shape = (20, 20, 20) if (role, id_) == ("label", "mp-2") else (4, 5, 6)
        small_group(f"{role}/{id_}.zarr", shape=shape)
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ids}))
    (tmp_path / "split.json").write_text(json.dumps({"train": [0, 1]}))
    reader = make_reader(cache={}, split_file=tmp_path / "split.json")
    for task_id, role in itertools.product(ids, ("data", "label")):
        reader.ensure(task_id, role)  # type: ignore[arg-type]
    ZarrDataset(reader, "train")
    assert "1 of 2 materials have input and label on different grids: mp-2" in caplog.text
