"""What a DataLoader worker transfers: the location of an entry where possible, and always the right
values.
"""

from __future__ import annotations

import copy
import gc
import itertools
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from tests.support.stores import STRUCTURE
from zarrcache import (
    Probes,
    RandomCrop,
    RhoData,
    ZarrDataset,
    ZarrS3Reader,
    collate,
    plan_warm,
)
from zarrcache.errors import SchemaError
from zarrcache.train.worker_transfer import SentTensor, _collate

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
    pytest.mark.skipif(
        not os.path.exists("/proc/self/pagemap"),
        reason="this system does not tell which pages were written",
    ),
]

IDS = [f"mp-{i}" for i in range(6)]
DEADLINE_S = 100
#: Two materials share a shape, so that some batches can be stacked and others stay lists.
SHAPES = [(8 + i // 2, 9, 10) for i in range(6)]


@pytest.fixture
def reader(
    tmp_path: Path, small_group: Callable[..., Any], make_reader: Callable[..., ZarrS3Reader]
) -> ZarrS3Reader:
    """Six materials, warm."""
    for role, i in itertools.product(("data", "label"), range(6)):
        small_group(f"{role}/{IDS[i]}.zarr", shape=SHAPES[i], seed=i + 10 * (role == "label"))
    (tmp_path / "map.json").write_text(json.dumps({"GGA": IDS}))
    made = make_reader(cache={}, train_fraction=4)
    for task_id, role in itertools.product(IDS, ("data", "label")):
        made.ensure(task_id, role)  # type: ignore[arg-type]
    return made


def mapped_under(tensor: torch.Tensor) -> str:
    """What a tensor's memory in this process maps, by /proc/self/maps."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            fields = line.split()
            start, stop = (int(part, 16) for part in fields[0].split("-"))
            if start <= tensor.data_ptr() < stop:
                return " ".join(fields[5:])
    return ""


def is_over_the_cache(tensor: torch.Tensor) -> bool:
    """Whether a tensor's memory in this process maps a file of the cache."""
    return "/zarrcache-v1/entries/" in mapped_under(tensor)


def loader_of(dataset: Any, **options: Any) -> DataLoader[Any]:
    """With two workers by default."""
    return DataLoader(
        dataset, **{"num_workers": 2, "timeout": DEADLINE_S, "batch_size": None, **options}
    )


def pairs_of(dataset: Any) -> list[Any]:
    """Every sample, read in this process."""
    return [dataset[i] for i in range(len(dataset))]


def assert_same(got: Any, wanted: Any) -> None:
    """Bit for bit, nested as a sample or batch is."""
    if isinstance(wanted, torch.Tensor):
        assert type(got) is torch.Tensor
        assert torch.equal(got, wanted)
    elif isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for name in wanted:
            assert_same(got[name], wanted[name])
    elif isinstance(wanted, (list, tuple)):
        assert len(got) == len(wanted)
        for one, other in zip(got, wanted, strict=True):
            assert_same(one, other)
    else:
        assert got == wanted


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_warm_sample_arrives_as_a_map_of_its_entry(reader: ZarrS3Reader, method: str) -> None:
    """No value goes through a pipe or shared memory; two epochs with persistent workers."""
    dataset = ZarrDataset(reader, "all")
    workers = 2 if method == "fork" else 1
    loader = loader_of(
        dataset, multiprocessing_context=method, num_workers=workers, persistent_workers=True
    )
    for _ in range(2):
        for got, wanted in zip(loader, pairs_of(dataset), strict=True):
            assert_same(got, wanted)
            assert is_over_the_cache(got["data"])
            assert is_over_the_cache(got["label"])


@pytest.mark.parametrize("collate_fn", [None, collate], ids=["default_collate", "collate"])
def test_a_batch_of_one_arrives_as_a_map_of_its_entry(
    reader: ZarrS3Reader, collate_fn: Any
) -> None:
    """With torch's collate function and with ours."""
    dataset = RhoData(*reader.data_split()[0], data_augmentation=False)
    for got, wanted in zip(
        loader_of(dataset, batch_size=1, collate_fn=collate_fn), pairs_of(dataset), strict=True
    ):
        assert_same(list(got), [side[None] for side in wanted])
        assert all(map(is_over_the_cache, got))


def test_a_batch_of_several_is_stacked_in_shared_memory(reader: ZarrS3Reader) -> None:
    """As torch does."""
    dataset = ZarrDataset(reader, "all")
    alike = [[2 * i, 2 * i + 1] for i in range(3)]
    order = [[dataset.task_ids.index(IDS[i]) for i in pair] for pair in alike]
    loader = DataLoader(dataset, batch_sampler=order, num_workers=2, timeout=DEADLINE_S)  # type: ignore[arg-type]
    for positions, got in zip(order, loader, strict=True):
        samples = [dataset[i] for i in positions]
        assert_same(got["data"], torch.stack([s["data"] for s in samples]))
        assert not is_over_the_cache(got["data"])


def test_a_batch_of_mixed_grids_is_a_list_of_maps(reader: ZarrS3Reader) -> None:
    """Nothing is copied."""
    dataset = ZarrDataset(reader, "all")
    (got,) = loader_of(dataset, batch_size=6, collate_fn=collate)
    assert_same(got["label"], [sample["label"] for sample in pairs_of(dataset)])
    assert all(map(is_over_the_cache, got["label"]))


def test_a_batch_of_mixed_grids_that_cannot_be_stacked_names_the_remedy(
    reader: ZarrS3Reader,
) -> None:
    """The message of torch says neither why nor what to do."""
    dataset = ZarrDataset(reader, "all")
    with pytest.raises(SchemaError, match=r"Pass collate_fn=zarrcache\.collate to the DataLoader"):
        next(iter(DataLoader(dataset, batch_size=len(dataset), num_workers=1)))


def test_a_cold_sample_arrives_right(reader: ZarrS3Reader) -> None:
    """The first epoch fetches and stores; its values equal those of the second."""
    dataset = ZarrDataset(reader, "all")
    wanted = copy.deepcopy(pairs_of(dataset))
    for task_id, role in itertools.product(IDS[:3], ("data", "label")):
        assert reader.cache.arrays is not None
        reader.cache.arrays.drop(reader.key(task_id, role))  # type: ignore[arg-type]
    for _ in range(2):
        assert_same(list(loader_of(dataset)), wanted)


@pytest.mark.parametrize(
    "settings",
    [
        {"augmentation": True},
        {"downsample_data": 2, "downsample_label": 2},
        {"precision": "f16"},
        {"precision": "bf16"},
    ],
    ids=str,
)
def test_turned_downsampled_and_cast_samples_arrive_right(
    reader: ZarrS3Reader, settings: dict[str, Any]
) -> None:
    """They differ from the cached values, whatever their shape."""
    dataset = ZarrDataset(reader, "all", seed=5, **settings)
    torch.manual_seed(11)
    through = list(loader_of(dataset, num_workers=1))
    # rotated in the worker with its own seed: some rotation of the right grid
    if "augmentation" in settings:
        plain = ZarrDataset(reader, "all")
        for got, wanted in zip(through, pairs_of(plain), strict=True):
            turned = [
                np.rot90(wanted["data"][0].numpy(), k, axes)
                for k in range(4)
                for axes in ((0, 1), (0, 2), (1, 2))
            ]
            assert any(np.array_equal(got["data"][0].numpy(), grid) for grid in turned)
    else:
        assert_same(through, pairs_of(dataset))


def test_the_training_process_writes_to_its_own_copy(reader: ZarrS3Reader, tmp_path: Path) -> None:
    """In place, as a transform may; the cached entry does not change."""
    dataset = ZarrDataset(reader, "all")
    wanted = copy.deepcopy(pairs_of(dataset))
    for sample in loader_of(dataset):
        sample["data"].mul_(0)
    assert_same(list(loader_of(dataset)), wanted)


class Changed(Dataset[torch.Tensor]):
    """A user's transform in the worker, wrapped around one of our datasets."""

    def __init__(self, dataset: Any, change: str) -> None:
        self.dataset, self.change = dataset, change

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> Any:
        x = self.dataset[i]["data"]
        if self.change == "torch":
            x.mul_(2)
        elif self.change == "view":
            x[0, 0, 0, 0:1].fill_(-1)
        elif self.change == "data":
            x.data[0, -1] = 3
        elif self.change == "numpy":
            x.numpy()[...] += 1
        elif self.change == "transposed":
            x.transpose_(1, 3)
        elif self.change == "grad":
            x.requires_grad_()
        elif self.change == "new":
            return x * 2 + 1
        elif self.change == "part":
            return x[:, 1:3]
        elif self.change == "copied":
            return copy.deepcopy(x)
        elif self.change == "pickled":
            return pickle.loads(pickle.dumps(x))
        return x


CHANGES = [
    "torch",
    "view",
    "data",
    "numpy",
    "transposed",
    "grad",
    "new",
    "part",
    "copied",
    "pickled",
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_transform_in_the_worker_is_in_what_arrives(reader: ZarrS3Reader, change: str) -> None:
    """In place or not: the transformed values arrive, not those of the entry."""
    dataset = Changed(ZarrDataset(reader, "all"), change)
    for got, wanted in zip(loader_of(dataset), pairs_of(dataset), strict=True):
        assert torch.equal(got, wanted)
        assert got.requires_grad == (change == "grad")


def untouched(sample: dict[str, Any]) -> dict[str, Any]:
    return sample


def scaled(sample: dict[str, Any]) -> dict[str, Any]:
    """A new tensor for the data; the label is left alone."""
    return {**sample, "data": sample["data"] * 2}


def scaled_in_place(sample: dict[str, Any]) -> dict[str, Any]:
    sample["data"].mul_(2)
    return sample


def cropped(sample: dict[str, Any]) -> dict[str, Any]:
    """A view of a part of the map."""
    return {**sample, "data": sample["data"][..., 2:5, :]}


def swapped(sample: dict[str, Any]) -> dict[str, Any]:
    return {**sample, "data": sample["label"], "label": sample["data"]}


def extended(sample: dict[str, Any]) -> dict[str, Any]:
    """A field more, computed by numpy over the map."""
    return {**sample, "electrons": float(sample["label"].numpy().mean())}


def squeezed_in_place(sample: dict[str, Any]) -> dict[str, Any]:
    sample["data"].squeeze_(0)
    return sample


#: Each transform, and the fields that still lie in the cache file afterwards.
TRANSFORMS = [
    (untouched, {"data", "label"}),
    (scaled, {"label"}),
    (scaled_in_place, {"label"}),
    (cropped, {"label"}),
    (swapped, {"data", "label"}),
    (extended, {"data", "label"}),
    (squeezed_in_place, {"data", "label"}),
]


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_what_a_transform_leaves_alone_arrives_as_a_map(reader: ZarrS3Reader, method: str) -> None:
    """What it makes, changes or slices arrives as torch sends any tensor, with the right values."""
    datasets = [ZarrDataset(reader, "all", transform=transform) for transform, _ in TRANSFORMS]
    # one worker for all
    dataset: ConcatDataset[Any] = ConcatDataset(datasets)
    loader = loader_of(dataset, num_workers=1, multiprocessing_context=method)
    expected = [transform for transform in TRANSFORMS for _ in IDS]
    for (transform, mapped), got, wanted in zip(expected, loader, pairs_of(dataset), strict=True):
        assert_same(got, wanted)
        found = {name for name in ("data", "label") if is_over_the_cache(got[name])}
        assert found == mapped, transform.__name__


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_crops_and_probes_arrive_in_shared_memory(reader: ZarrS3Reader, method: str) -> None:
    """Other ones in each worker and epoch; of the material that the sample names."""
    dataset = ZarrDataset(reader, "all", transform=Probes(9, structure=False), seed=1)
    loader = loader_of(dataset, num_workers=2 if method == "fork" else 1,
                       multiprocessing_context=method, persistent_workers=True)  # fmt: skip
    drawn = []
    for _ in range(2):
        for sample in loader:
            drawn.append(sample["frac"].numpy().tobytes())
            for role in ("data", "label"):
                values, sizes = reader.load(sample["index"], role)  # type: ignore[arg-type]
                index = np.rint(sample["frac"].numpy() * sizes).astype(int)
                assert np.array_equal(sample[role][0], values.reshape(sizes)[tuple(index.T)])
                assert "memfd:zarrcache" in mapped_under(sample[role])
    assert len(set(drawn)) == 12


def test_a_batch_of_crops_is_stacked_whatever_the_grids(reader: ZarrS3Reader) -> None:
    dataset = ZarrDataset(reader, "all", transform=RandomCrop(4), augmentation=True, seed=1)
    batches = list(loader_of(dataset, batch_size=3, collate_fn=collate))
    assert [tuple(batch["data"].shape) for batch in batches] == [(3, 1, 4, 4, 4)] * 2


def test_a_transform_of_pairs_arrives_in_batches_of_one(reader: ZarrS3Reader) -> None:
    """``RhoData`` under spawn, by torch's own collate function."""
    dataset = RhoData(*reader.data_split()[0], data_augmentation=False, transform=scaled)
    loader = loader_of(dataset, batch_size=1, num_workers=1, multiprocessing_context="spawn")
    for (data, label), wanted in zip(loader, pairs_of(dataset), strict=True):
        assert_same([data, label], [side[None] for side in wanted])
        assert not is_over_the_cache(data)
        assert is_over_the_cache(label)


@pytest.mark.parametrize("transform", [swapped, scaled, squeezed_in_place])
def test_a_transformed_sample_that_is_evicted_on_its_way_is_the_transformed_one(
    reader: ZarrS3Reader, transform: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    dataset = ZarrDataset(reader, "all", transform=transform)
    wanted = copy.deepcopy(pairs_of(dataset))
    assert_same(evicted_on_their_way(reader, loader_of(dataset, prefetch_factor=3), 6), wanted)


def test_torch_still_documents_the_map_of_collate_functions() -> None:
    """``worker_transfer`` imports ``default_collate_fn_map`` from a private path."""
    assert "default_collate_fn_map" in (default_collate.__doc__ or "")
    assert default_collate_fn_map[SentTensor] is _collate


@pytest.mark.parametrize(
    "wrap", [lambda d: d, lambda d: Subset(d, list(range(6)))], ids=["dataset", "subset"]
)
@pytest.mark.parametrize("batch_size", [None, 1])
def test_an_entry_evicted_on_its_way_is_read_again(
    reader: ZarrS3Reader, wrap: Callable[[Any], Any], batch_size: int | None
) -> None:
    """Everything is evicted after the workers have sent and before the training process reads."""
    dataset = ZarrDataset(reader, "all", downsample_data=1)
    wanted = copy.deepcopy(pairs_of(dataset))
    before = reader.stats
    got = evicted_on_their_way(
        reader, loader_of(wrap(dataset), batch_size=batch_size, prefetch_factor=3), 6
    )
    if batch_size:
        assert_same([batch["data"] for batch in got], [sample["data"][None] for sample in wanted])
    else:
        assert_same(got, wanted)
    assert (reader.stats - before).misses > 0  # in this process, because the entries were evicted


def test_a_store_that_changes_on_the_way_of_a_sample_does_not_mix_versions(
    tmp_path: Path, small_group: Callable[..., Any], make_reader: Callable[..., ZarrS3Reader]
) -> None:
    """The structure was sent, and a density that is read again is a newer one."""

    def write(version: int) -> None:
        structure = json.loads(json.dumps(STRUCTURE).replace("3.8", f"{version}.0"))
        values = np.full((4, 4, 4), version, np.float32)
        for id_ in ("mp-1", "mp-2"):
            path = f"data/{id_}.zarr"
            small_group(path, {"charge_density_total": values}, attrs={"structure": structure})

    (tmp_path / "map.json").write_text('{"GGA": ["mp-1", "mp-2"]}')
    write(1)
    reader = make_reader(cache={}, label_dir=tmp_path / "data")
    plan_warm(reader, workers=1).execute()
    dataset = ZarrDataset(reader, "all", augmentation=False, structure=True)
    loader = loader_of(dataset, prefetch_factor=2)
    for sample in evicted_on_their_way(reader, loader, 2, then=lambda: write(2)):
        assert sample["data"].ravel()[0] == sample["structure"]["lattice"]["matrix"][0][0] == 1


def evicted_on_their_way(
    reader: ZarrS3Reader,
    loader: DataLoader[Any],
    n: int,
    then: Callable[[], object] = lambda: None,
) -> list[Any]:
    """All samples of a loader that prefetches, with everything evicted before the first one is
    read, and ``then`` called.
    """
    before = reader.stats
    arriving = iter(loader)
    deadline = time.monotonic() + DEADLINE_S
    while (reader.stats - before).hits < 2 * n:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert reader.cache.arrays is not None
    reader.cache.arrays.index.drop(
        [
            row.digest
            for row in reader.cache.arrays.index.rows("array")
            if not row.note.endswith("\n")
        ]
    )
    then()
    return list(arriving)


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda d: pickle.loads(pickle.dumps(d)),
}


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "thrown away"])
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_changed_copy_of_a_dataset_is_never_read_instead(
    reader: ZarrS3Reader, copied: Callable[[Any], Any], keep: bool
) -> None:
    """A held-out set copied from the training set has other samples at the same positions."""
    dataset = ZarrDataset(reader, "all")
    wanted = copy.deepcopy(pairs_of(dataset))
    other = copied(dataset)
    other.task_ids = dataset.task_ids[::-1]
    if not keep:
        del other
        gc.collect()
    assert_same(
        evicted_on_their_way(reader, loader_of(dataset, num_workers=1, prefetch_factor=6), 6),
        wanted,
    )


class Lazy(Dataset[Any]):
    """Creates its dataset at its first use in the worker, as many wrappers do, or reads a changed
    copy there.
    """

    def __init__(self, reader: ZarrS3Reader, dataset: Any = None) -> None:
        self.reader, self.dataset, self.mine = reader, dataset, None

    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Any:
        if self.mine is None:
            self.mine = (
                copy.copy(self.dataset)
                if self.dataset is not None
                else ZarrDataset(self.reader, "all")
            )
            self.mine.task_ids = self.mine.task_ids[::-1]
        return self.mine[i]


@pytest.mark.parametrize(
    ("method", "known"), [("fork", False), ("fork", True), ("forkserver", True)]
)
def test_a_dataset_that_only_the_worker_knows_sends_its_values(
    reader: ZarrS3Reader, method: str, known: bool
) -> None:
    """The training process could not read them itself."""
    dataset = ZarrDataset(reader, "all")
    wanted = copy.deepcopy(pairs_of(dataset)[::-1])
    loader = loader_of(
        Lazy(reader, dataset if known else None),
        num_workers=1,
        prefetch_factor=6,
        multiprocessing_context=method,
    )
    assert_same(evicted_on_their_way(reader, loader, 6), wanted)


def test_a_store_that_has_another_grid_by_now_is_read_as_it_is(
    reader: ZarrS3Reader, small_group: Callable[..., Any]
) -> None:
    """Evicted in transit, and overwritten meanwhile."""
    dataset = ZarrDataset(reader, "all")
    loader = loader_of(dataset, num_workers=1, prefetch_factor=6, batch_size=1)
    before = reader.stats
    arriving = iter(loader)
    deadline = time.monotonic() + DEADLINE_S
    while (reader.stats - before).hits < 12:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for task_id, role in itertools.product(IDS, ("data", "label")):
        shutil.rmtree(reader.data_dir.parent / role / f"{task_id}.zarr")  # type: ignore[union-attr]
        small_group(f"{role}/{task_id}.zarr", shape=(3, 4, 5), seed=1)
        assert reader.cache.arrays is not None
        reader.cache.arrays.drop(reader.key(task_id, role))  # type: ignore[arg-type]
    assert {tuple(batch["data"].shape) for batch in arriving} == {(1, 1, 3, 4, 5)}


def test_in_this_process_tensors_are_plain(reader: ZarrS3Reader) -> None:
    """Without workers nothing is transferred, and no internal type appears."""
    assert type(ZarrDataset(reader, "all")[0]["data"]) is torch.Tensor


def test_what_is_computed_from_a_mapped_tensor_is_plain() -> None:
    """Only the sample itself is transferred."""
    grid = np.zeros((1, 2, 2, 2), np.float32)
    x = SentTensor.over(torch.from_numpy(grid), grid, ("", 0, 0))
    for y in (
        x + 1,
        x.sum(),
        x[0],
        x.clone(),
        x.detach(),
        x.data,
        x.view(-1),
        torch.stack([x, x]),
        default_collate([x, x]),
        copy.deepcopy(x),
        pickle.loads(pickle.dumps(x)),
    ):
        assert type(y) is torch.Tensor
