"""Several densities of a material as the channels of a sample (``density_type: [total, diff]``)."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from tests.support.chgcars import write_chgcar
from tests.support.faultproxy import FaultProxy
from tests.support.readers import make_reader
from tests.support.s3server import S3Server
from tests.support.stores import STRUCTURE, random_density, small_group
from tests.support.training import write_config, zarrcache
from zarrcache import ZarrS3Reader
from zarrcache.cli.warm import estimate_notes
from zarrcache.config import DataConfig
from zarrcache.data import differences, open_reader
from zarrcache.errors import ConfigError, IncompleteArrayError, SchemaError, ZarrCacheError
from zarrcache.ops import (
    audit,
    examine,
    list_entries,
    make_lock,
    measure_split,
    plan_warm,
    read_status,
    verify,
)
from zarrcache.train import (
    Lookahead,
    Probes,
    RandomCrop,
    RhoData,
    ZarrDataset,
    collate,
    collate_in_lists,
)

BOTH = ["total", "diff"]
IDS = [f"mp-{n}" for n in range(6)]
#: Materials without spin: their label has no spin density.
NONMAGNETIC = ["mp-1", "mp-4"]
SHAPE = (6, 5, 4)

Stores = Mapping[tuple[str, str], Mapping[str, NDArray[Any]]]


def write(root: Path, *, lacking: tuple[str, ...] = (), zarr_format: Any = 2) -> Stores:
    """A map, and input and label of six materials: total, diff and elf."""
    arrays = {}
    for number, id_ in enumerate(IDS):
        shape = (*SHAPE[:2], SHAPE[2] + number)
        for role in ("data", "label"):
            seed = 10 * number + 5 * (role == "label")
            of_store = {
                name: random_density(shape, seed=seed + i)
                for i, name in enumerate(("charge_density_total", "charge_density_diff", "elf"))
            }
            if role == "label" and id_ in lacking:
                del of_store["charge_density_diff"]
            path = root / role / f"{id_}.zarr"
            arrays[role, id_] = small_group(path, of_store, zarr_format=zarr_format)
    (root / "map.json").write_text(json.dumps({"GGA": IDS}))
    return arrays


def stacked(stores: Stores, role: str, id_: str, names: list[str]) -> NDArray[Any]:
    of_store = stores[role, id_]
    shape = of_store["charge_density_total"].shape
    zeros = np.zeros(shape, np.float32)
    return np.stack([of_store.get(name, zeros) for name in names])


ARRAYS = ["charge_density_total", "charge_density_diff"]


@pytest.mark.parametrize(("cache", "zarr_format"), [(None, 2), ({}, 2), ({}, 3)])
def test_the_densities_are_the_channels_of_a_sample_in_their_order(
    tmp_path: Path, make_reader: Callable[..., ZarrS3Reader], cache: Any, zarr_format: Any
) -> None:
    stores = write(tmp_path, zarr_format=zarr_format)
    for names, arrays in (
        (BOTH, ARRAYS),
        (["diff", "elf", "total"], [ARRAYS[1], "elf", ARRAYS[0]]),
    ):
        reader = make_reader(cache=cache, density_type=names)
        dataset = ZarrDataset(reader, "all")
        for _ in range(2):  # cold, then warm
            for sample in dataset:
                for role in ("data", "label"):
                    expected = stacked(stores, role, sample["index"], arrays)
                    np.testing.assert_array_equal(sample[role].numpy(), expected)


def test_one_name_in_a_list_is_that_name(
    tmp_path: Path, make_reader: Callable[..., ZarrS3Reader]
) -> None:
    write(tmp_path)
    one, listed = make_reader(cache={}), make_reader(cache={}, density_type=["total"])
    assert listed.density_type == one.density_type == "total"
    for (values, gridsize), (other, same) in zip(
        (one.load(id_, "data") for id_ in IDS),
        (listed.load(id_, "data") for id_ in IDS),
        strict=True,
    ):
        assert (values.ndim, gridsize) == (1, same)
        np.testing.assert_array_equal(values, other)


def test_input_and_label_may_differ(
    tmp_path: Path, make_reader: Callable[..., ZarrS3Reader]
) -> None:
    stores = write(tmp_path)
    reader = make_reader(density_type={"data": "total", "label": ["elf", "diff"]}, cache={})
    for sample in ZarrDataset(reader, "all"):
        id_ = sample["index"]
        for role, arrays in (("data", ARRAYS[:1]), ("label", ["elf", ARRAYS[1]])):
            np.testing.assert_array_equal(sample[role].numpy(), stacked(stores, role, id_, arrays))


@pytest.mark.parametrize("cache", [None, {}])
def test_a_channel_that_materials_lack_is_an_error_before_the_training(
    tmp_path: Path, make_reader: Callable[..., ZarrS3Reader], cache: Any
) -> None:
    write(tmp_path, lacking=tuple(NONMAGNETIC))
    for density_type in (BOTH, "diff", {"data": "total", "label": "diff"}):
        reader = make_reader(cache=cache, density_type=density_type)
        with pytest.raises(
            ConfigError, match=r"2 of 6 materials lack diff \(label\): mp-1, mp-4.*missing: zero"
        ):
            reader.data_split()


@pytest.mark.parametrize("cache", [None, {}])
def test_drop_leaves_these_materials_out_of_the_split(
    tmp_path: Path,
    make_reader: Callable[..., ZarrS3Reader],
    cache: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write(tmp_path, lacking=tuple(NONMAGNETIC))
    reader = make_reader(cache=cache, density_type=BOTH, missing="drop")
    with caplog.at_level(logging.WARNING):
        train, test = reader.split_task_ids()
    assert sorted([*train, *test]) == [id_ for id_ in IDS if id_ not in NONMAGNETIC]
    assert reader.dropped == tuple(NONMAGNETIC)
    assert "2 of 6 materials lack diff (label): mp-1, mp-4" in caplog.text
    # the split is that of a map without them
    (tmp_path / "map.json").write_text(
        json.dumps({"GGA": [id_ for id_ in IDS if id_ not in NONMAGNETIC]})
    )
    assert make_reader(cache=cache).split_task_ids() == (train, test)


@pytest.mark.parametrize("cache", [None, {}])
def test_zero_fills_the_channel(
    tmp_path: Path, make_reader: Callable[..., ZarrS3Reader], cache: Any
) -> None:
    stores = write(tmp_path, lacking=tuple(NONMAGNETIC))
    reader = make_reader(cache=cache, density_type=BOTH, missing="zero")
    for dataset in (ZarrDataset(reader, "all"), ZarrDataset(reader, NONMAGNETIC)):
        for sample in dataset:
            expected = stacked(stores, "label", sample["index"], ARRAYS)
            np.testing.assert_array_equal(sample["label"].numpy(), expected)


@pytest.mark.parametrize("missing", ["error", "drop"])
def test_a_channel_that_one_side_always_lacks_is_said_to_belong_to_the_other(
    tmp_path: Path, make_reader: Callable[..., ZarrS3Reader], missing: str
) -> None:
    write(tmp_path, lacking=tuple(IDS))
    with pytest.raises(ConfigError, match=r"6 of 6 materials lack diff \(label\).*data: \.\.\."):
        make_reader(density_type=BOTH, missing=missing).data_split()


@pytest.mark.parametrize("missing", ["error", "zero", "drop"])
def test_an_array_that_no_material_has_is_an_error_whatever_is_missing(
    tmp_path: Path, make_reader: Callable[..., ZarrS3Reader], missing: str
) -> None:
    """Its name is misspelt; as zeros that would not be noticed."""
    write(tmp_path)
    with pytest.raises(ConfigError, match="has an array 'efl'"):
        make_reader(density_type=["total", "efl"], missing=missing).data_split()


@pytest.mark.parametrize("end", ["zarr", "zarr.zip"])
@pytest.mark.parametrize(("asked", "has"), [("diff", "diff_x"), ("diff_z", "diff")])
def test_spin_of_another_kind_is_an_error_and_not_zero(
    tmp_path: Path, make_reader: Callable[..., ZarrS3Reader], end: str, asked: str, has: str
) -> None:
    arrays = {ARRAYS[0]: random_density(SHAPE), f"charge_density_{has}": random_density(SHAPE)}
    for role in ("data", "label"):
        small_group(tmp_path / role / f"mp-0.{end}", arrays, as_zip=end == "zarr.zip")
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["mp-0"]}))
    for missing in ("error", "zero", "drop"):
        reader = make_reader(density_type=["total", asked], missing=missing, cache={})
        with pytest.raises(SchemaError, match=f"collinear calculation: {has}"):
            reader.load("mp-0", "data")


@pytest.mark.parametrize(
    ("grids", "asked", "error"),
    [(2, "diff_x", "collinear calculation: diff"), (3, "diff", "3 grids"), (5, "diff_y", "cut")],
)
def test_spin_that_a_file_has_is_never_zero(
    tmp_path: Path, make_reader: Callable[..., ZarrS3Reader], grids: int, asked: str, error: str
) -> None:
    """One that was cut between two grids has three."""
    for role in ("data", "label"):
        path = tmp_path / role / "mp-0.CHGCAR"
        write_chgcar(path, SHAPE, 0, diff=True)
        total, diff = path.read_text().rpartition(" ".join(map(str, SHAPE)))[::2]
        grid = " ".join(map(str, SHAPE)) + diff
        path.write_text(total + (grids - 1) * grid)
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["mp-0"]}))
    for missing in ("error", "zero", "drop"):
        reader = make_reader(density_type=["total", asked], missing=missing, cache={})
        with pytest.raises(SchemaError, match=error):
            reader.load("mp-0", "data")
    assert make_reader().load("mp-0", "data")[1] == SHAPE


def test_a_total_density_is_never_zero(
    tmp_path: Path,
    make_reader: Callable[..., ZarrS3Reader],
    config_of: Callable[..., DataConfig],
) -> None:
    write(tmp_path)
    shutil.rmtree(tmp_path / "label" / "mp-2.zarr" / ARRAYS[0])
    for cache in (None, {}):
        reader = make_reader(density_type=BOTH, missing="zero", cache=cache)
        with pytest.raises(ConfigError, match=r"1 of 6 materials have no total density.*: mp-2"):
            reader.data_split()
        with pytest.raises(SchemaError, match="charge_density_total"):
            reader.load("mp-2", "label")
    report = plan_warm(config_of(missing="zero"), workers=1).execute()
    assert [(one.task_id, one.array) for one in report.failed] == [("mp-2", ARRAYS[0])]


def test_a_material_without_any_channel_cannot_be_filled(
    tmp_path: Path, make_reader: Callable[..., ZarrS3Reader]
) -> None:
    write(tmp_path, lacking=tuple(NONMAGNETIC))
    reader = make_reader(density_type={"data": "total", "label": "diff"}, missing="zero")
    with pytest.raises(ConfigError, match=r"2 of 6 materials have no channel at all.*mp-1, mp-4"):
        reader.data_split()


def test_channels_on_different_grids_are_an_error_with_both_shapes(
    tmp_path: Path, make_reader: Callable[..., ZarrS3Reader]
) -> None:
    write(tmp_path)
    arrays = {ARRAYS[0]: random_density((4, 4, 4)), ARRAYS[1]: random_density((4, 4, 6))}
    small_group(tmp_path / "data" / "mp-9.zarr", arrays)
    with pytest.raises(SchemaError, match="total has 4x4x4, diff has 4x4x6"):
        make_reader(density_type=BOTH).load("mp-9", "data")


def test_rho_data_has_the_channels_too(
    tmp_path: Path, make_reader: Callable[..., ZarrS3Reader]
) -> None:
    stores = write(tmp_path)
    (train, _) = make_reader(cache={}, density_type=BOTH).data_split()
    dataset = RhoData(*train, data_augmentation=False)
    for id_, (data, label) in zip(dataset.task_ids, dataset, strict=True):
        np.testing.assert_array_equal(data.numpy(), stacked(stores, "data", id_, ARRAYS))
        np.testing.assert_array_equal(label.numpy(), stacked(stores, "label", id_, ARRAYS))


# -- commands and caches


@pytest.fixture
def config_of(tmp_path: Path) -> Callable[..., DataConfig]:
    """``config_of(missing="zero", ...)``: a config of the stores in ``tmp_path``, with a cache."""

    def make(root: object = tmp_path, cache: Any = None, **changes: Any) -> DataConfig:
        keys = {
            "data_dir": f"{root}/data",
            "label_dir": f"{root}/label",
            "map_dir": tmp_path / "map.json",
            "functional": "GGA",
            "normalize_data": False,
            "train_fraction": 0.5,
            "density_type": BOTH,
        }
        cache = {"dir": tmp_path / "cache", "min_free": 0, **(cache or {})}
        return DataConfig(**{**keys, **changes}, cache=cache)

    return make


def test_warm_fills_every_channel_and_status_counts_them(
    tmp_path: Path, config_of: Callable[..., DataConfig]
) -> None:
    write(tmp_path)
    one = plan_warm(config_of(density_type="total")).execute()
    assert (one.ids, one.warm, one.failed) == (6, 6, ())
    covered = read_status(config_of()).coverage
    assert covered is not None
    assert (covered.ids, covered.warm, covered.half) == (6, 0, 6)
    plan = plan_warm(config_of())
    assert {array for _, _, array in plan.densities} == {ARRAYS[1]}  # entries of total stay valid
    report = plan.execute()
    assert (report.ids, report.warm, report.stats.misses) == (6, 6, 12)
    covered = read_status(config_of()).coverage
    assert covered is not None
    assert (covered.warm, covered.half, covered.is_complete) == (6, 0, True)
    assert len(list_entries(config_of())) == 24
    assert verify(config_of()).corrupt == ()


def test_warm_names_the_materials_that_lack_a_channel(
    tmp_path: Path, config_of: Callable[..., DataConfig]
) -> None:
    write(tmp_path, lacking=tuple(NONMAGNETIC))
    report = plan_warm(config_of(), workers=1).execute()
    assert (report.ids, report.warm, report.is_good) == (6, 4, False)
    assert report.failed_ids == tuple(NONMAGNETIC)
    assert all(ARRAYS[1] in result.error for result in report.failed)
    with pytest.raises(ConfigError, match="2 of 6 materials lack diff"):
        open_reader(config_of()).data_split()


@pytest.mark.parametrize("missing", ["error", "zero", "drop"])
def test_a_dry_run_says_what_warm_says_of_channels_that_materials_lack(
    tmp_path: Path,
    config_of: Callable[..., DataConfig],
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From the listings that it makes anyway; of files that are read whole, it says what it cannot
    know.
    """
    write(tmp_path, lacking=tuple(NONMAGNETIC))
    config = config_of(missing=missing)
    plan = plan_warm(config, workers=1)
    requests = plan.reader.stats.requests
    dry = plan.estimate()
    named = 2 * len(NONMAGNETIC)  # the error names the arrays that are there
    assert plan.reader.stats.requests - requests == len(plan.densities) + named
    report = plan.execute()
    assert (dry.lacking, dry.refusal) == (report.lacking, report.refusal)
    assert dry.lacking == (() if missing == "error" else tuple(NONMAGNETIC))
    assert [one.error for one in dry.failed] == [one.error for one in report.failed]
    assert (dry.to_fetch, dry.unread) == (report.stats.misses, 0)
    assert bool(dry.refusal) == (missing == "error")
    if missing == "zero":
        assert estimate_notes(plan, dry)[0].startswith("2 ids lack a channel of density_type")
        monkeypatch.setattr("zarrcache.ops.warm._COMPARED", 3)
        part = replace(plan.estimate(), lacking=("mp-1",))
        assert estimate_notes(plan, part)[0].startswith("Of 3 densities compared: 1 id lacks a")


@pytest.mark.parametrize(
    ("missing", "ids"), [("zero", 6), pytest.param("drop", 4, marks=pytest.mark.slow)]
)
def test_after_warm_the_split_is_decided_without_the_origin(
    tmp_path: Path,
    bucket: str,
    s3_server: S3Server,
    fault_proxy: FaultProxy,
    config_of: Callable[..., DataConfig],
    missing: str,
    ids: int,
) -> None:
    stores = write(tmp_path, lacking=tuple(NONMAGNETIC))
    for role in ("data", "label"):
        s3_server.put_tree(tmp_path / role, f"s3://{bucket}/{role}")
    kwargs = s3_server.kwargs_at(fault_proxy.endpoint_url)
    config = config_of(f"s3://{bucket}", missing=missing, s3_kwargs=kwargs)
    report = plan_warm(config, workers=1).execute()
    assert (report.ids, report.warm, report.failed) == (ids, ids, ())
    assert report.lacking == tuple(NONMAGNETIC)
    assert report.is_good
    again = plan_warm(config, workers=1)
    assert again.densities == ()
    covered = read_status(config).coverage
    assert covered is not None
    assert (covered.warm, covered.is_complete, covered.to_encode) == (ids, True, 0)
    assert covered.dropped == (2 if missing == "drop" else 0)
    fault_proxy.down()
    reader = open_reader(config)
    dataset = ZarrDataset(reader, "all")
    assert len(dataset) == ids
    for sample in dataset:
        for role in ("data", "label"):
            expected = stacked(stores, role, sample["index"], ARRAYS)
            np.testing.assert_array_equal(sample[role].numpy(), expected)
    assert reader.stats.requests == 0


def test_warm_fails_if_dropping_leaves_no_material(
    tmp_path: Path, config_of: Callable[..., DataConfig]
) -> None:
    write(tmp_path, lacking=tuple(IDS))
    report = plan_warm(config_of(missing="drop"), workers=1).execute()
    assert (report.ids, report.warm, report.is_good) == (0, 0, False)
    assert report.lacking == tuple(IDS)


def test_a_material_that_was_converted_again_has_its_channel_after_warm(
    tmp_path: Path, config_of: Callable[..., DataConfig]
) -> None:
    stores = write(tmp_path, lacking=tuple(NONMAGNETIC))
    assert not plan_warm(config_of(), workers=1).execute().is_good
    zero = config_of(missing="zero")
    assert plan_warm(zero, workers=1).execute().lacking == tuple(NONMAGNETIC)
    for id_ in NONMAGNETIC:
        diff = random_density(stores["label", id_][ARRAYS[0]].shape, seed=99)
        path = tmp_path / "label" / f"{id_}.zarr"
        shutil.rmtree(path)
        small_group(path, {**stores["label", id_], ARRAYS[1]: diff})
    # An absence that is filled is taken for fresh, as entries are.
    assert plan_warm(zero).densities == ()
    assert plan_warm(config_of(), workers=1).execute().is_good
    assert plan_warm(zero, revalidate=True, workers=1).execute().lacking == ()
    values, gridsize = open_reader(zero).load("mp-1", "label")
    shape = stores["label", "mp-1"][ARRAYS[0]].shape
    np.testing.assert_array_equal(values.reshape(2, *gridsize)[1], random_density(shape, seed=99))


@pytest.mark.parametrize(
    ("encoding", "missing"), [("float32", "error"), ("float16", "zero"), ("bits:12", "zero")]
)
def test_crops_and_probes_have_the_channels(
    tmp_path: Path, make_reader: Callable[..., ZarrS3Reader], encoding: str, missing: str
) -> None:
    """Rotated, downsampled, with a channel of zeros: the crop is that of the whole sample."""
    write(tmp_path, lacking=tuple(NONMAGNETIC) if missing == "zero" else ())
    reader = make_reader(
        cache={"arrays": {"encoding": encoding}}, density_type=BOTH, missing=missing
    )
    for transform, augmentation in ((RandomCrop(4), True), (RandomCrop((3, 2, 4)), False)):
        whole = ZarrDataset(reader, "all", augmentation=augmentation, seed=3)
        crops = ZarrDataset(reader, "all", augmentation=augmentation, seed=3, transform=transform)
        for sample, crop in zip(whole, crops, strict=True):
            size = transform.size
            assert crop["data"].shape == crop["label"].shape == (2, *size)
            # the window begins at the value that only this place has
            periodic = np.pad(sample["data"].numpy(), [(0, 0), *[(0, n) for n in size]], "wrap")
            windows = np.lib.stride_tricks.sliding_window_view(periodic[0], size)
            start = np.argwhere((windows == crop["data"][0].numpy()).all(axis=(-3, -2, -1)))[0]
            where = tuple(slice(a, a + n) for a, n in zip(start, size, strict=True))
            np.testing.assert_array_equal(crop["data"].numpy(), periodic[:, *where])
            periodic = np.pad(sample["label"].numpy(), [(0, 0), *[(0, n) for n in size]], "wrap")
            np.testing.assert_array_equal(crop["label"].numpy(), periodic[:, *where])
    for sample, probes in zip(
        ZarrDataset(reader, "all"), ZarrDataset(reader, "all", transform=Probes(20)), strict=True
    ):
        n = np.array(sample["data"].shape[1:])
        index = tuple(np.rint(probes["frac"].numpy() * n).astype(int).T)
        np.testing.assert_array_equal(probes["data"].numpy(), sample["data"].numpy()[:, *index])
        np.testing.assert_array_equal(probes["label"].numpy(), sample["label"].numpy()[:, *index])


@pytest.mark.parametrize("units", ["points", "volume"])
def test_each_channel_is_in_the_units_and_other_arrays_are_not_divided(
    tmp_path: Path, make_reader: Callable[..., ZarrS3Reader], units: str
) -> None:
    stores = write(tmp_path)
    names = [*BOTH, "elf"]
    reader = make_reader(cache={}, density_type=names, normalize=units)
    for _ in range(2):
        values, gridsize = reader.load("mp-2", "data")
        for channel, name in zip(values.reshape(3, *gridsize), names, strict=True):
            alone, _ = make_reader(density_type=name, normalize=units).load("mp-2", "data")
            np.testing.assert_array_equal(channel, alone.reshape(gridsize))
        np.testing.assert_array_equal(values[2], stores["data", "mp-2"]["elf"].ravel())


def test_rotations_and_precision_treat_all_channels_alike(
    tmp_path: Path, make_reader: Callable[..., ZarrS3Reader]
) -> None:
    write(tmp_path)
    options: Any = {"seed": 5, "augmentation": True, "downsample_data": 2, "precision": "bf16"}
    samples = list(ZarrDataset(make_reader(cache={}, density_type=BOTH), "all", **options))
    for number, name in enumerate(BOTH):
        alone = ZarrDataset(make_reader(cache={}, density_type=name), "all", **options)
        for sample, one in zip(samples, alone, strict=True):
            for role in ("data", "label"):
                assert sample[role][number].equal(one[role][0])


def test_a_batch_of_workers_and_of_the_device_is_that_of_the_main_process(
    tmp_path: Path, make_reader: Callable[..., ZarrS3Reader]
) -> None:
    write(tmp_path, lacking=tuple(NONMAGNETIC))
    reader = make_reader(cache={}, density_type=BOTH, missing="zero")
    plain = list(ZarrDataset(reader, IDS))
    for workers in (0, 2):
        loader = DataLoader(
            ZarrDataset(reader, IDS, augment_on="device"),
            num_workers=workers,
            batch_size=2,
            collate_fn=collate_in_lists,
        )
        batches = [loader.dataset.augment(batch) for batch in loader]
        found = [
            (x, y) for batch in batches for x, y in zip(batch["data"], batch["label"], strict=True)
        ]
        for (data, label), sample in zip(found, plain, strict=True):
            assert data.equal(sample["data"])
            assert label.equal(sample["label"])
    loader = DataLoader(ZarrDataset(reader, IDS), num_workers=2, collate_fn=collate)
    for batch, sample in zip(loader, plain, strict=True):
        assert batch["data"][0].equal(sample["data"])
        assert batch["label"][0].equal(sample["label"])


@pytest.mark.parametrize("end", ["zarr", "zarr.zip"])
def test_doctor_fails_for_an_absent_channel_only_where_it_is_an_error(
    tmp_path: Path, config_of: Callable[..., DataConfig], end: str
) -> None:
    for role in ("data", "label"):
        small_group(tmp_path / role / f"mp-0.{end}", as_zip=end == "zarr.zip")
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["mp-0"]}))
    for missing, verdict in (("error", "fail"), ("zero", "ok"), ("drop", "ok")):
        found = [one for one in examine(config_of(missing=missing)) if "not found" in one.found]
        assert [one.verdict for one in found] == [verdict, verdict]


def test_a_lock_has_each_channel(tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    stores = write(tmp_path, lacking=tuple(NONMAGNETIC))
    lock = make_lock(config_of(missing="zero"))
    assert lock.settings["density_type"] == BOTH
    assert list(lock.densities["mp-1"]) == ["data total", "data diff", "label total"]
    lock.save(tmp_path / "data.lock")
    locked = {"lock": tmp_path / "data.lock", "dir": tmp_path / "other"}
    config = config_of(missing="zero", cache=locked)
    assert len(ZarrDataset(open_reader(config), "all")) == 6
    for sample in ZarrDataset(open_reader(config), "all"):
        assert sample["label"].shape[0] == 2
    with pytest.raises(ConfigError, match="missing is 'error'"):
        open_reader(config_of(cache=locked)).data_split()
    with pytest.raises(ConfigError, match="density_type is 'total'"):
        open_reader(config_of(cache=locked, density_type="total")).data_split()
    # a spin density that was zero and is not any more, and one that has changed
    for id_ in ("mp-1", "mp-2"):
        path = tmp_path / "label" / f"{id_}.zarr"
        shutil.rmtree(path)
        shape = stores["label", id_][ARRAYS[0]].shape
        small_group(path, {**stores["label", id_], ARRAYS[1]: random_density(shape, seed=7)})
    assert sorted(
        differences(lock, make_lock(config_of(missing="zero", cache={"dir": tmp_path / "new"})))
    ) == [
        "mp-1 (label diff): only in the second",
        "mp-2 (label diff): other values on the same grid",
    ]
    fresh = config_of(missing="zero", cache={**locked, "dir": tmp_path / "third"})
    for id_ in ("mp-1", "mp-2"):
        with pytest.raises(IncompleteArrayError, match="label diff"):
            open_reader(fresh).load(id_, "label")


def test_audit_looks_at_each_channel(tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    stores = write(tmp_path)
    for id_ in ("mp-2", "mp-3"):  # no spin
        path = tmp_path / "label" / f"{id_}.zarr"
        shutil.rmtree(path)
        total = stores["label", id_][ARRAYS[0]]
        small_group(path, {ARRAYS[0]: total, ARRAYS[1]: np.zeros_like(total)})
    bad = {ARRAYS[0]: random_density((4, 4, 4)), ARRAYS[1]: random_density((4, 4, 6))}
    shutil.rmtree(tmp_path / "label" / "mp-5.zarr")
    small_group(tmp_path / "label" / "mp-5.zarr", bad)
    found = [
        one
        for one in audit(config_of(cache={"missing_chunks": "fill"})).findings
        if one.kind in ("constant", "grids", "duplicate", "unreadable")
    ]
    assert {(one.kind, one.task_id, one.role) for one in found} >= {("grids", "mp-5", "label")}
    assert not [one for one in found if one.task_id in ("mp-2", "mp-3")]


@pytest.mark.parametrize("eviction", [pytest.param("none", marks=pytest.mark.slow), "belady"])
def test_the_look_ahead_fetches_every_channel(
    tmp_path: Path, config_of: Callable[..., DataConfig], eviction: str
) -> None:
    stores = write(tmp_path, lacking=tuple(NONMAGNETIC))
    reader = open_reader(config_of(missing="zero", cache={"eviction": eviction}))
    dataset = ZarrDataset(reader, "all")
    with Lookahead(dataset, [list(range(len(dataset)))] * 2):
        for _ in range(100):
            if all(
                reader.lacks(id_, *one) or reader.cache.lookup(reader.key(id_, *one).digest)
                for id_ in dataset.task_ids
                for one in reader.reads
            ):
                break
            time.sleep(0.1)
        else:
            pytest.fail("the look-ahead has not fetched every channel within 10 s")
        before = reader.stats
        for sample in dataset:
            expected = stacked(stores, "label", sample["index"], ARRAYS)
            np.testing.assert_array_equal(sample["label"].numpy(), expected)
        # Not misses: the look-ahead counts its last one after it has stored the entry.
        assert (reader.stats - before).hits == 4 * len(IDS) - len(NONMAGNETIC)


def test_plan_counts_the_channels(tmp_path: Path, config_of: Callable[..., DataConfig]) -> None:
    write(tmp_path)
    total = measure_split(config_of(density_type="total")).forecast(epochs=2)
    both = measure_split(config_of()).forecast(epochs=2)
    assert (total.densities, both.densities) == (6, 12)
    assert both.disk_bytes == 2 * total.disk_bytes
    assert both.epochs[0].requests > 1.5 * total.epochs[0].requests


def test_channels_on_different_grids_are_named_by_warm_and_before_the_training(
    tmp_path: Path, config_of: Callable[..., DataConfig]
) -> None:
    write(tmp_path)
    arrays = {ARRAYS[0]: random_density((40, 4, 4)), ARRAYS[1]: random_density((40, 40, 40))}
    shutil.rmtree(tmp_path / "label" / "mp-3.zarr")
    small_group(tmp_path / "label" / "mp-3.zarr", arrays)
    report = plan_warm(config_of(), workers=1).execute()
    assert [result.task_id for result in report.failed] == ["mp-3"]
    assert "total has 40x4x4, diff has 40x40x40" in report.failed[0].error
    with pytest.raises(SchemaError, match=r"mp-3.*total has 40x4x4, diff has 40x40x40"):
        open_reader(config_of()).data_split()


def test_input_and_label_in_one_directory_share_what_they_have_in_common(
    tmp_path: Path, config_of: Callable[..., DataConfig]
) -> None:
    stores = write(tmp_path)
    config = config_of(
        data_dir=str(tmp_path / "label"), density_type={"data": "total", "label": BOTH}
    )
    report = plan_warm(config, workers=1).execute()
    assert (report.ids, report.warm, report.stats.misses) == (6, 6, 12)
    covered = read_status(config).coverage
    assert covered is not None
    assert (covered.warm, covered.is_complete) == (6, True)
    reader = open_reader(config)
    for sample in ZarrDataset(reader, "all"):
        expected = stacked(stores, "label", sample["index"], ARRAYS)
        np.testing.assert_array_equal(sample["label"].numpy(), expected)
        np.testing.assert_array_equal(sample["data"].numpy(), expected[:1])
    assert reader.stats.misses == 0
    assert len(make_lock(config).densities["mp-0"]) == 3


class TestFiles:
    """CHGCAR and json.gz files as they lie: the spin density is their second grid."""

    @pytest.fixture
    def files(self, tmp_path: Path) -> Mapping[str, Mapping[str, NDArray[Any]]]:
        """Four materials, the last two without spin density."""
        found = {}
        for number, id_ in enumerate(IDS[:4]):
            for role in ("data", "label"):
                path = tmp_path / role / f"{id_}.CHGCAR"
                found[id_] = write_chgcar(path, (5, 4, 6), number, diff=number < 2)
        (tmp_path / "map.json").write_text(json.dumps({"GGA": IDS[:4]}))
        return found

    @pytest.mark.parametrize("warm", [False, True])
    @pytest.mark.parametrize("missing", ["error", "zero", "drop"])
    def test_which_have_a_spin_density_is_found_out_before_the_split(
        self,
        files: Mapping[str, Mapping[str, NDArray[Any]]],
        config_of: Callable[..., DataConfig],
        missing: str,
        warm: bool,
    ) -> None:
        config = config_of(missing=missing)
        if warm:
            report = plan_warm(config, workers=1).execute()
            assert report.is_good == (missing != "error")
            assert plan_warm(config_of(missing="zero"), workers=1).densities == ()
        reader = open_reader(config)
        if missing == "error":
            with pytest.raises(ConfigError, match="2 of 4 materials lack diff"):
                reader.data_split()
            return
        dataset = ZarrDataset(reader, "all")
        assert sorted(dataset.task_ids) == IDS[: 2 if missing == "drop" else 4]
        for sample in dataset:
            grids = files[sample["index"]]
            expected = [grids["total"], grids.get("diff", np.zeros((5, 4, 6)))]
            for role in ("data", "label"):
                np.testing.assert_allclose(sample[role].numpy(), expected, rtol=1e-6)
        if warm:
            assert reader.stats.requests == 0


def test_only_the_materials_of_a_split_file_or_a_list_of_ids_have_to_have_the_channels(
    tmp_path: Path, make_reader: Callable[..., ZarrS3Reader]
) -> None:
    write(tmp_path, lacking=tuple(NONMAGNETIC))
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": [0, 2], "validation": [3], "test": ["mp-5"]}))
    reader = make_reader(density_type=BOTH, split_file=split)
    assert reader.split_task_ids() == (["mp-0", "mp-2", "mp-3"], ["mp-5"])
    assert ZarrDataset(reader, ["mp-3", "mp-0"]).task_ids == ("mp-3", "mp-0")
    with pytest.raises(ConfigError, match="1 of 2 materials lack diff"):
        ZarrDataset(reader, ["mp-3", "mp-1"])
    split.write_text(json.dumps({"train": [0, 1, 2], "validation": [4], "test": ["mp-5"]}))
    with pytest.raises(ConfigError, match="2 of 5 materials lack diff"):
        reader.split_task_ids()
    reader = make_reader(density_type=BOTH, split_file=split, missing="drop")
    assert reader.split_task_ids() == (["mp-0", "mp-2"], ["mp-5"])
    assert ZarrDataset(reader, ["mp-3", "mp-1"]).task_ids == ("mp-3",)


@pytest.mark.parametrize(
    ("kind", "workers", "encoding"),
    [
        ("CHGCAR", 1, "float16"),
        ("zip", 1, "float32"),
        ("CHGCAR", 2, "float32"),
        pytest.param("zip", 2, "float16", marks=pytest.mark.slow),
    ],
)
def test_a_source_that_is_fetched_whole_is_fetched_once_for_all_channels(
    tmp_path: Path, config_of: Callable[..., DataConfig], kind: str, workers: int, encoding: str
) -> None:
    for number, id_ in enumerate(IDS):
        for role in ("data", "label"):
            if kind == "CHGCAR":
                write_chgcar(tmp_path / role / f"{id_}.CHGCAR", (5, 4, 6), number, diff=True)
            else:
                small_group(tmp_path / role / f"{id_}.zarr.zip", diff=True, as_zip=True)
    (tmp_path / "map.json").write_text(json.dumps({"GGA": IDS}))
    size = sum(path.stat().st_size for path in tmp_path.glob("*/mp-*"))
    for normalize in (False, "volume"):
        arrays = {"arrays": {"encoding": encoding}}
        config = config_of(normalize_data=normalize, cache=arrays)
        report = plan_warm(config, workers=workers).execute()
        assert (report.warm, report.is_good, report.stats.misses) == (6, True, 12)
        # With two processes, one may look for the attributes before the other one has stored them.
        assert size <= report.stats.fetched_bytes <= (size if workers == 1 else 1.5 * size)
        reader = open_reader(config)
        alone = {
            name: make_reader(
                tmp_path,
                density_type=name,
                normalize=normalize,
                cache=arrays | {"dir": tmp_path / name},
            )
            for name in BOTH
        }
        for id_ in IDS:
            values, _ = reader.load(id_, "label")
            for channel, one in zip(values, alone.values(), strict=True):
                np.testing.assert_array_equal(channel, one.load(id_, "label")[0])
        assert reader.stats.requests == 0
        assert verify(config, against_origin=True).is_good


def test_a_grid_that_cannot_be_used_does_not_come_along(
    tmp_path: Path, make_reader: Callable[..., ZarrS3Reader]
) -> None:
    """What is wrong with one array of a zipped store is not stored with another one."""
    total, diff = random_density((6, 6, 6)), random_density((6, 6, 6), seed=1)
    for role in ("data", "label"):
        for id_, arrays, electrons in (
            ("mp-0", {ARRAYS[0]: total, ARRAYS[1]: diff}, 3.5),
            ("mp-1", {ARRAYS[0]: total, ARRAYS[1]: diff[0]}, float(total.mean())),
        ):
            path = tmp_path / role / f"{id_}.zarr.zip"
            small_group(path, arrays, as_zip=True, metadata={"electrons": electrons})
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["mp-0", "mp-1"]}))
    reader = make_reader(cache={}, density_type=["diff", "total"])
    for _ in range(2):
        with pytest.raises(IncompleteArrayError, match="electrons"):
            reader.load("mp-0", "data")
        with pytest.raises(SchemaError, match="3-D"):
            reader.load("mp-1", "data")
    assert [entry.array for entry in list_entries(reader.cache_config)] == [ARRAYS[1]]


@pytest.mark.parametrize("normalize", [False, True, "volume"])
def test_a_density_that_comes_along_with_another_array_has_its_units(
    tmp_path: Path, make_reader: Callable[..., ZarrS3Reader], normalize: Any
) -> None:
    arrays = {ARRAYS[0]: random_density((6, 6, 6)), "elf": random_density((6, 6, 6), seed=1)}
    attrs = {"structure": json.dumps(STRUCTURE), "charge_density_units": "volume"}
    for role in ("data", "label"):
        small_group(tmp_path / role / "mp-0.zarr.zip", arrays, as_zip=True, attrs=attrs)
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["mp-0"]}))
    alone = make_reader(normalize=normalize).load("mp-0", "data")[0]
    for density_type in (["elf", "total"], "total"):
        reader = make_reader(cache={}, density_type=density_type, normalize=normalize)
        total = reader.load("mp-0", "data")[0].reshape(-1, 216)[-1]
        np.testing.assert_array_equal(total, alone)


@pytest.mark.parametrize(
    ("attrs", "error"),
    [
        ({"metadata": {"electrons": 3.5}}, "electrons"),
        ({"metadata": {"electrons": 3.5}, "charge_density_units": "volume"}, "structure"),
    ],
)
def test_a_density_with_other_electrons_does_not_come_along_with_another_array(
    tmp_path: Path, make_reader: Callable[..., ZarrS3Reader], attrs: dict[str, Any], error: str
) -> None:
    arrays = {ARRAYS[0]: random_density((6, 6, 6)), "elf": random_density((6, 6, 6), seed=1)}
    for role in ("data", "label"):
        small_group(tmp_path / role / "mp-0.zarr.zip", arrays, as_zip=True, attrs=attrs)
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["mp-0"]}))
    reader = make_reader(cache={}, density_type=["elf", "total"])
    with pytest.raises(ZarrCacheError, match=error):
        reader.load("mp-0", "data")
    elf = make_reader(cache={}, density_type="elf").load("mp-0", "data")[0]
    np.testing.assert_array_equal(elf, arrays["elf"].ravel())
    assert [entry.array for entry in list_entries(reader.cache_config)] == ["elf"]


@pytest.mark.parametrize("missing", ["zero", "drop"])
@pytest.mark.parametrize("end", ["zarr", "zarr.zip"])
@pytest.mark.parametrize("encoding", ["float32", "float16"])
def test_a_channel_that_a_store_has_no_more_is_not_read_from_the_cache_after_warm(
    tmp_path: Path, config_of: Callable[..., DataConfig], missing: str, end: str, encoding: str
) -> None:
    both = dict(zip(ARRAYS, (random_density(SHAPE), random_density(SHAPE, seed=1)), strict=True))
    again = {ARRAYS[0]: random_density(SHAPE, seed=2)}
    ids = IDS[:2]
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ids}))
    for id_ in ids:
        for role in ("data", "label"):
            small_group(tmp_path / role / f"{id_}.{end}", both, as_zip=end == "zarr.zip")
    config = config_of(missing=missing, cache={"arrays": {"encoding": encoding}})
    assert plan_warm(config, workers=1).execute().is_good
    path = tmp_path / "label" / f"{ids[0]}.{end}"
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    small_group(path, again, as_zip=end == "zarr.zip")
    assert plan_warm(config, revalidate=True, workers=1).execute().lacking == (ids[0],)
    reader = open_reader(config)
    if missing == "drop":
        assert (reader.task_ids, reader.dropped) == ([ids[1]], (ids[0],))
    else:
        values, gridsize = reader.load(ids[0], "label")
        expected = again[ARRAYS[0]].astype(encoding).astype(np.float32)
        np.testing.assert_array_equal(values[0].reshape(gridsize), expected)
        assert not values[1].any()


@pytest.mark.parametrize("end", ["zarr", "zarr.zip"])
@pytest.mark.parametrize("cache", [None, {"revalidate": "epoch"}])
def test_a_channel_that_is_added_is_not_zero_in_the_next_epoch(
    tmp_path: Path, make_reader: Callable[..., ZarrS3Reader], cache: Any, end: str
) -> None:
    """Of the same reader, where each read asks the origin."""
    arrays = dict(zip(ARRAYS, (random_density(SHAPE), random_density(SHAPE, seed=1)), strict=True))
    (tmp_path / "map.json").write_text(json.dumps({"GGA": IDS[:2]}))
    for id_ in IDS[:2]:
        of_store = arrays if id_ == IDS[1] else {ARRAYS[0]: arrays[ARRAYS[0]]}
        for role in ("data", "label"):
            path = tmp_path / role / f"{id_}.{end}"
            small_group(path, of_store, as_zip=end == "zarr.zip")
    reader = make_reader(cache=cache, density_type=BOTH, missing="zero")
    stores = {("label", IDS[0]): {ARRAYS[0]: arrays[ARRAYS[0]]}}
    for _ in range(2):
        values, gridsize = reader.load(IDS[0], "label")
        expected = stacked(stores, "label", IDS[0], ARRAYS)
        np.testing.assert_array_equal(values.reshape(2, *gridsize), expected)
    path = tmp_path / "label" / f"{IDS[0]}.{end}"
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    stores["label", IDS[0]] = {name: 2 * values for name, values in arrays.items()}
    small_group(path, stores["label", IDS[0]], as_zip=end == "zarr.zip")
    values, gridsize = reader.load(IDS[0], "label")
    expected = stacked(stores, "label", IDS[0], ARRAYS)
    np.testing.assert_array_equal(values.reshape(2, *gridsize), expected)


def test_data_modules_take_the_channels(
    tmp_path: Path, config_of: Callable[..., DataConfig]
) -> None:
    stores = write(tmp_path, lacking=tuple(NONMAGNETIC))
    cache = {"dir": tmp_path / "cache", "min_free": 0}
    (tmp_path / "list.txt").write_text("\n".join(IDS) + "\n")
    options: Any = {
        "train_workers": 0,
        "val_workers": 0,
        "density_type": {"data": "total", "label": BOTH},
        "cache": cache,
    }
    from zarrcache.lightning import RhoDataModule, ZarrDataModule

    with pytest.raises(ConfigError, match=r"2 of 6 materials lack diff \(label\)"):
        RhoDataModule(tmp_path / "list.txt", **options).setup()
    module = RhoDataModule(tmp_path / "list.txt", missing="drop", val_frac=0.3, **options)
    module.setup()
    found = [*module.train_set.task_ids, *module.val_set.task_ids]
    assert sorted(found) == [id_ for id_ in IDS if id_ not in NONMAGNETIC]
    config = config_of(density_type=options["density_type"], missing="zero")
    module = ZarrDataModule(
        config, train_workers=0, val_workers=0, augmentation=False, val_frac=0.4
    )
    module.setup()
    for batch in (*module.train_dataloader(), *module.val_dataloader(), *module.test_dataloader()):
        (id_,) = batch["index"]
        np.testing.assert_array_equal(batch["data"][0], stacked(stores, "data", id_, ARRAYS[:1]))
        np.testing.assert_array_equal(batch["label"][0], stacked(stores, "label", id_, ARRAYS))
    module.teardown()


def test_audit_names_the_materials_that_lack_a_channel_unless_they_are_filled_or_dropped(
    tmp_path: Path, config_of: Callable[..., DataConfig]
) -> None:
    write(tmp_path, lacking=tuple(NONMAGNETIC))
    for missing, named, examined in (("error", NONMAGNETIC, 6), ("zero", [], 6), ("drop", [], 4)):
        report = audit(config_of(missing=missing))
        found = [one.task_id for one in report.findings if one.kind == "unreadable"]
        assert (sorted(found), report.materials) == (named, examined)
    write(tmp_path / "none", lacking=tuple(IDS))
    with pytest.raises(ConfigError, match="would leave no material"):
        audit(config_of(tmp_path / "none", missing="drop", cache={"dir": tmp_path / "other"}))


@pytest.mark.parametrize("missing", ["error", "zero", "drop"])
def test_audit_names_a_store_that_cannot_be_read_while_others_lack_a_channel(
    tmp_path: Path, config_of: Callable[..., DataConfig], missing: str
) -> None:
    write(tmp_path, lacking=tuple(NONMAGNETIC))
    damaged = tmp_path / "label/mp-2.zarr"
    shutil.rmtree(damaged)
    damaged.with_suffix(".zarr.zip").write_bytes(b"no zip")
    named = {
        one.task_id: one.what
        for one in audit(config_of(missing=missing)).findings
        if one.kind == "unreadable"
    }
    assert sorted(named) == (["mp-1", "mp-2", "mp-4"] if missing == "error" else ["mp-2"])
    assert "mp-2.zarr.zip" in named["mp-2"]


@pytest.mark.parametrize(
    ("keys", "lacking", "words"),
    [
        (
            {"density_type": {"data": "total", "label": "diff"}, "missing": "zero"},
            NONMAGNETIC,
            "2 of 6 materials have no channel at all",
        ),
        (
            {"density_type": ["total", "spin"], "missing": "zero"},
            [],
            "None of the stores in ",
        ),
        ({"density_type": "spin"}, [], "None of the stores in "),
        ({"density_type": BOTH}, NONMAGNETIC, "2 of 6 materials lack diff (label): mp-1, mp-4."),
        ({"density_type": BOTH, "missing": "drop"}, IDS, "6 of 6 materials lack diff (label)"),
    ],
)
def test_warm_ends_with_the_error_that_the_training_has(
    tmp_path: Path, keys: dict[str, Any], lacking: list[str], words: str
) -> None:
    """Once it has stored what there is; the second run, which asks for nothing, too."""
    write(tmp_path, lacking=tuple(lacking))
    config = write_config(tmp_path)
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), **keys}))
    with pytest.raises(ConfigError) as caught:
        open_reader(DataConfig.from_yaml(config)).data_split()
    assert str(caught.value).startswith(words)
    shutil.rmtree(tmp_path / "cache")
    for more in ([], ["--json"]):
        done = zarrcache("warm", config, "--workers", 1, *more)
        assert done.code == 2
        assert done.err.splitlines()[-1] == f"error: {caught.value}"
        assert "Set missing: zero, which fills a channel" not in done.err
    assert json.loads(done.out)["refusal"] == str(caught.value)
    said = zarrcache("status", config)
    assert f"The training refuses this config: {caught.value}" in said.err.splitlines()
    if "total" in keys["density_type"]:
        assert read_status(DataConfig.from_yaml(config)).array_tier.entries > len(IDS)


def test_plan_and_audit_say_that_the_training_refuses_the_config(tmp_path: Path) -> None:
    """Once it is stored which materials lack the channel; otherwise nothing is known."""
    write(tmp_path, lacking=tuple(NONMAGNETIC))
    config = write_config(tmp_path)
    keys = {"density_type": {"data": "total", "label": "diff"}, "missing": "zero"}
    config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), **keys}))
    said = "The training refuses this config: 2 of 6 materials have no channel at all"
    assert (zarrcache("plan", config).err, (tmp_path / "cache").exists()) == ("", False)
    done = zarrcache("audit", config)
    assert (done.code, said in done.err) == (1, True), done.err
    done = zarrcache("plan", config)
    assert (done.code, said in done.err) == (0, True)


def test_warm_of_a_part_does_not_take_it_for_all(
    tmp_path: Path, config_of: Callable[..., DataConfig]
) -> None:
    """Others may have the array that these lack."""
    write(tmp_path, lacking=tuple(IDS[:5]))
    config = config_of(missing="zero")
    assert plan_warm(config, ids=IDS[:5], workers=1).execute().refusal == ""
    assert plan_warm(config, workers=1).execute().refusal == ""
    only = {"data": "total", "label": "diff"}
    (tmp_path / "cache").rename(tmp_path / "gone")
    refused = plan_warm(config_of(missing="zero", density_type=only), ids=["mp-5"], workers=1)
    assert refused.execute().refusal == ""
    refused = plan_warm(config_of(missing="zero", density_type=only), ids=["mp-1"], workers=1)
    assert refused.execute().refusal.startswith("1 of 6 materials have no channel at all")
