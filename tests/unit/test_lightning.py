"""``ZarrDataModule`` without a trainer: its splits, its loaders, its errors. With one:
tests/processes/test_distributed_training.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import yaml
from torch.utils.data import DataLoader, RandomSampler

from tests.support.training import write_config, write_pairs
from zarrcache.errors import ConfigError, SchemaError
from zarrcache.train.datasets import ZarrDataset

if TYPE_CHECKING:  # its import takes seconds, in every process that collects these tests
    from zarrcache.lightning import ZarrDataModule

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*fork.*:DeprecationWarning",
    # 1.4 wants a list of trusted targets, an option that 1.3 does not have
    "ignore:hydra.utils.instantiate:UserWarning",
)


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten materials; half of them are trained on."""
    root = tmp_path_factory.mktemp("stores")
    write_pairs(root, 10)
    return root


@pytest.fixture
def config(stores: Path) -> str:
    """A training config without look-ahead, whose process would start with each loader."""
    return str(write_config(stores, lookahead=0))


def module(config: Any, **changes: Any) -> ZarrDataModule:
    """A data module without workers."""
    from zarrcache.lightning import ZarrDataModule

    made.append(
        ZarrDataModule(
            config, **{"train_workers": 0, "val_workers": 0, "augmentation": False} | changes
        )
    )
    return made[-1]


#: Data modules that have to be torn down without a trainer.
made: list[ZarrDataModule] = []


@pytest.fixture(autouse=True)
def torn_down() -> Iterator[None]:
    """Stop all look-ahead processes before the next test."""
    yield
    while made:
        made.pop().teardown()


def test_a_subclass_may_override_the_hook_teardown(config: str) -> None:
    """With Lightning's own signature; it is called at the end only."""
    from zarrcache.lightning import ZarrDataModule

    class Own(ZarrDataModule):
        ended = 0

        def teardown(self, stage: str) -> None:  # type: ignore[override]
            self.ended += 1
            super().teardown(stage)

    data = Own(config, train_workers=0, val_workers=0, augmentation=False)
    assert len(data.train_dataloader()) == 4
    assert data.ended == 0
    data.teardown("fit")


def sides(data: ZarrDataModule, name: str = "0") -> list[tuple[str, ...]]:
    """Training, validation and test ids."""
    split = data.splits[name]
    return [split.train, split.validation, split.test]


def test_the_users_block_is_a_hydra_target(config: str) -> None:
    """With all keys of their training config."""
    text = f"""
        _target_: zarrcache.lightning.ZarrDataModule
        config: {config}
        batch_size: 1
        train_workers: 8
        val_workers: 2
        pin_memory: true
        precision: f32
        augmentation: true
        split_file: null
        val_frac: 0.005
        random_seed: 42
    """
    hydra = pytest.importorskip("hydra", reason="needs the extra 'test'")
    data = hydra.utils.instantiate(yaml.safe_load(text))
    assert type(data).__name__ == "ZarrDataModule"
    assert [len(ids) for ids in sides(data)] == [4, 1, 5]
    assert (data.train_workers, data.val_workers, data.readers["0"].functional) == (8, 2, "GGA")


def test_hydra_may_hand_over_several_configs_or_their_keys(config: str) -> None:
    """Its lists and mappings are not Python's."""
    hydra, omegaconf = (
        pytest.importorskip("hydra", reason="needs the extra 'test'"),
        pytest.importorskip("omegaconf", reason="needs the extra 'test'"),
    )
    keys = yaml.safe_load(Path(config).read_text())
    for several in ([config, keys], {"pbe": config, "scan": keys}):
        target = omegaconf.OmegaConf.create(
            {"_target_": "zarrcache.lightning.ZarrDataModule", "config": several}
        )
        assert hydra.utils.instantiate(target).dataset_names == (
            ("0", "1") if isinstance(several, list) else ("pbe", "scan")
        )


def test_validation_is_a_share_of_the_training_ids_and_test_ids_are_the_configs(
    config: str,
) -> None:
    """Chosen by the seed alone, disjoint; without a share there is no validation loader."""
    data = module(config, val_frac=0.4)
    train, validation, test = sides(data)
    configs_train, configs_test = data.readers["0"].split_task_ids()
    assert (len(train), len(validation)) == (3, 2)
    assert sorted(train + validation) == sorted(configs_train)
    assert list(test) == configs_test
    assert sides(module(config, val_frac=0.4)) == [train, validation, test]
    assert any(
        sides(module(config, val_frac=0.4, random_seed=seed))[1] != validation for seed in range(5)
    )
    assert sides(module(config, val_frac=np.float32(0.4)))[1] == validation
    assert sides(module(config, val_frac=0.0))[1] == ()
    assert module(config, val_frac=0.0).val_dataloader() == []


def test_a_split_file_has_positions_in_the_map(config: str, tmp_path: Path) -> None:
    """In the file's order; ``val`` means validation."""
    (tmp_path / "split.json").write_text(
        json.dumps({"train": [9, 0, 4], "val": [1], "test": [5, 2]})
    )
    data = module(config, split_file=tmp_path / "split.json", shuffle=False)
    ids = data.readers["0"].task_ids
    assert sides(data) == [(ids[9], ids[0], ids[4]), (ids[1],), (ids[5], ids[2])]
    assert [batch["index"] for batch in data.train_dataloader()] == [[ids[9]], [ids[0]], [ids[4]]]
    assert [batch["index"] for batch in data.test_dataloader()] == [[ids[5]], [ids[2]]]


def test_a_material_that_is_lost_is_named_before_the_training(config: str, tmp_path: Path) -> None:
    """The map has eleven ids and ten stores."""
    (tmp_path / "split.json").write_text(json.dumps({"train": [0, 10], "test": ["mp-3"]}))
    with pytest.raises(ConfigError, match=r"no input or no label: mp-absent \(train\)"):
        module(config, split_file=tmp_path / "split.json").setup("fit")


def test_everything_is_trained_on_without_a_test_set(config: str) -> None:
    """With ``train_fraction: 1.0``."""
    keys = yaml.safe_load(Path(config).read_text())
    data = module({**keys, "train_fraction": 1.0}, val_frac=0.2)
    assert [len(ids) for ids in sides(data)] == [8, 2, 0]
    assert data.test_dataloader() == []


def test_a_file_list_is_a_map_without_functionals(config: str, tmp_path: Path) -> None:
    """In its own order."""
    keys = yaml.safe_load(Path(config).read_text())
    del keys["functional"]
    (tmp_path / "mp_filelist.txt").write_text("mp-4\nmp-2\nmp-7\n")
    data = module({**keys, "map_dir": str(tmp_path / "mp_filelist.txt")})
    assert data.readers["0"].task_ids == ["mp-4", "mp-2", "mp-7"]


LOADER_KEYS = {
    "batch_size": 3,
    "train_workers": 0,
    "val_workers": 0,
    "augmentation": False,
    "precision": "bf16",
    "val_frac": 0.4,
    "random_seed": 11,
    "shuffle": False,
    "downsample_data": 2,
}


def test_keys_of_the_config_file_are_the_defaults_of_the_arguments(
    config: str, tmp_path: Path
) -> None:
    """An argument wins over them."""
    keys = yaml.safe_load(Path(config).read_text()) | LOADER_KEYS | {"random_state": 42}
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(keys))
    from zarrcache.lightning import ZarrDataModule

    made.append(by_file := ZarrDataModule(str(tmp_path / "all.yaml")))
    made.append(by_arguments := ZarrDataModule(config, **LOADER_KEYS))
    assert by_file.splits == by_arguments.splits
    for mine, theirs in zip(
        by_file.train_dataloader(), by_arguments.train_dataloader(), strict=True
    ):
        assert mine["index"] == theirs["index"]
        assert torch.equal(mine["data"], theirs["data"])
    assert (by_file.batch_size, by_file.random_seed) == (3, 11)
    assert mine["data"].dtype is torch.bfloat16
    made.append(other := ZarrDataModule(str(tmp_path / "all.yaml"), batch_size=1, random_seed=2))
    assert (other.batch_size, other.random_seed, other.shuffle) == (1, 2, False)


def test_several_configs_keep_their_splits(config: str, tmp_path: Path) -> None:
    """Each its split file, share and seed; what holds for all has to be the same in all."""
    keys = yaml.safe_load(Path(config).read_text())
    (tmp_path / "split.json").write_text(json.dumps({"train": ["mp-1"], "test": ["mp-2"]}))
    one = {**keys, "split_file": str(tmp_path / "split.json")}
    two = {**keys, "random_state": 3, "random_seed": 3, "val_frac": 0.4}
    data = module([one, two])
    assert sides(data, "0") == [("mp-1",), (), ("mp-2",)]
    assert sides(data, "1") == sides(module(two), "0")
    with pytest.raises(ConfigError, match=r"disagree on batch_size: 1 in '0', 2 in '1'"):
        module([one | {"batch_size": 1}, two | {"batch_size": 2}])
    assert module([one | {"batch_size": 1}, two | {"batch_size": 2}], batch_size=2).batch_size == 2


def test_a_hydra_config_is_its_own_config(config: str, tmp_path: Path) -> None:
    """A data module of the file that commands read."""
    document = {"data": {"_target_": "zarrcache.lightning.ZarrDataModule", "config": config}}
    (tmp_path / "hydra.yaml").write_text(yaml.safe_dump(document))
    assert module(tmp_path / "hydra.yaml").splits == module(config).splits


def test_secrets_do_not_become_hyperparameters(config: str) -> None:
    """Loggers and checkpoints would have them."""
    from zarrcache.lightning import ZarrDataModule

    class Mine(ZarrDataModule):
        def __init__(self, config: Any, note: str, **options: Any) -> None:
            super().__init__(config, **options)
            self.save_hyperparameters()

    keys = yaml.safe_load(Path(config).read_text())
    secret = {**keys, "s3_kwargs": {"key": "AKIA", "secret": "hush"}}
    for given in (secret, [secret], {"pbe": secret}):
        made.append(data := Mine(given, "kept", batch_size=2))
        assert dict(data.hparams) == {"note": "kept", "batch_size": 2}
        assert "hush" not in str(data.hparams_initial)
        data.save_hyperparameters({"config": secret, "note": "kept"})
        assert "hush" not in str(data.hparams)
    made.append(plain := Mine(config, "kept"))
    assert plain.hparams["config"] == config
    made.append(plain := Mine(keys, "kept"))
    assert plain.hparams["config"] == keys


def test_loaders_give_the_samples_of_a_zarrdataset(config: str) -> None:
    """The same tensors, batched; each training sample once, reordered after ``set_epoch``."""
    data = module(config, val_frac=0.2, batch_size=2, precision="bf16")
    loader = data.train_dataloader()
    batches = list(loader)
    assert (len(loader), len(batches)) == (2, 2)
    alone = ZarrDataset(data.readers["0"], data.splits["0"].train, precision="bf16")
    for batch in batches:
        for position, task_id in enumerate(batch["index"]):
            sample = alone[alone.task_ids.index(task_id)]
            torch.testing.assert_close(batch["data"][position], sample["data"], rtol=0, atol=0)
            torch.testing.assert_close(batch["label"][position], sample["label"], rtol=0, atol=0)
    first = [task_id for batch in batches for task_id in batch["index"]]
    assert sorted(first) == sorted(data.splits["0"].train)
    orders = set()
    for epoch in range(5):
        loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
        orders.add(tuple(task_id for batch in loader for task_id in batch["index"]))
    assert len(orders) > 1


def test_samples_of_several_datasets_carry_its_number(config: str, tmp_path: Path) -> None:
    """The same material may be in two datasets; each has its own split."""
    write_pairs(tmp_path, 4, shape=(3, 3, 3))
    (tmp_path / "split.json").write_text(json.dumps({"train": [0, 1, 2, 3]}))
    (tmp_path / "all.json").write_text(json.dumps({"train": list(range(10))}))
    other = write_config(tmp_path)
    data = module(
        {"big": config, "small": other},
        split_file={"small": tmp_path / "split.json", "big": tmp_path / "all.json"},
    )
    batches = list(data.train_dataloader())
    seen = sorted((int(batch["dataset"]), batch["index"][0]) for batch in batches)
    assert seen == sorted(
        [*((0, f"mp-{n}") for n in range(10)), *((1, f"mp-{n}") for n in range(4))]
    )
    assert {(int(batch["dataset"]), tuple(batch["data"].shape)) for batch in batches} == {
        (0, (1, 1, 6, 5, 4)),
        (1, (1, 1, 3, 3, 3)),
    }
    mixed = next(iter(module([config, other], batch_size=7, val_frac=0.0).train_dataloader()))
    assert sorted({tuple(tensor.shape) for tensor in mixed["data"]}) == [(1, 3, 3, 3), (1, 6, 5, 4)]
    assert len(mixed["dataset"]) == 7


def test_a_sampler_that_was_replaced_stops_the_epoch_before_it_begins(config: str) -> None:
    """The order would differ from the plan, and ranks would read the same samples."""
    from zarrcache.lightning.loader import TrainLoader

    dataset = module(config).train_dataloader().dataset
    loader = TrainLoader(dataset, sampler=RandomSampler(dataset))  # type: ignore[arg-type]
    with pytest.raises(
        ConfigError, match=r"replaced by a RandomSampler.*use_distributed_sampler=False"
    ):
        iter(loader)


@pytest.mark.parametrize(
    ("train_workers", "val_workers", "method"),
    [(1, 0, "spawn"), (1, 1, None), (0, 1, "spawn"), (0, 0, None)],
)
def test_a_process_that_reads_from_s3_itself_forks_no_readers(
    config: str, train_workers: int, val_workers: int, method: str | None
) -> None:
    """Children forked from a process that used obstore would read more slowly; where fork is the
    default.
    """
    if torch.multiprocessing.get_start_method() != "fork":
        pytest.skip("this Python does not fork")
    data = module(config, train_workers=train_workers, val_workers=val_workers)
    for loader, workers in (
        (data.train_dataloader(), train_workers),
        (data.test_dataloader(), val_workers),
    ):
        assert isinstance(loader, DataLoader)
        context = loader.multiprocessing_context
        assert (context.get_start_method() if context else None) == (method if workers else None)
        assert loader.persistent_workers == bool(workers)
    other = module(config, train_workers=1, multiprocessing_context="forkserver").train_dataloader()
    assert other.multiprocessing_context.get_start_method() == "forkserver"


def test_a_training_without_a_single_batch_is_refused(config: str) -> None:
    """With drop_last and fewer samples than a batch, Lightning would end at once, with success."""
    with pytest.raises(ConfigError, match=r"drop_last leaves nothing to train on: each rank has"):
        module(config, drop_last=True, batch_size=1000).train_dataloader()
    assert len(module(config, drop_last=True, batch_size=1).train_dataloader()) > 0


def test_ranks_that_are_not_numbered_node_by_node_are_refused() -> None:
    """``srun --distribution=cyclic``: each node would store the other's samples."""
    from zarrcache.lightning.loader import world_of

    class Trainer:
        distributed_sampler_kwargs = {"num_replicas": 4, "rank": 1}  # noqa: RUF012
        world_size, num_nodes, node_rank = 4, 2, 1

    with pytest.raises(ConfigError, match="Rank 1 of 4 is on node 1 of 2, and would be on node 0"):
        world_of(Trainer())
    Trainer.node_rank = 0
    world = world_of(Trainer())
    assert world is not None
    assert (world.node_of_rank, world.rank) == ((0, 0, 1, 1), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"train_workers": -1}, "train_workers is -1"),
        ({"val_workers": 1.5}, r"val_workers is 1\.5"),
        ({"val_frac": 1.0}, r"val_frac is 1\.0"),
        ({"val_frac": 0.99}, "training samples would be held out"),
        ({"val_frac": "a"}, "val_frac is 'a'"),
        ({"random_seed": -1}, "random_seed is -1"),
        (
            {"random_seed": 2**32},
            "random_seed is 4294967296; it has to be a whole number from 0 to 4294967295",
        ),
        ({"split_file": "/nowhere/split.json"}, "split file /nowhere/split.json cannot be read"),
        ({"split_file": {"pbe": "split.json"}}, r"split_file names the datasets \['pbe'\]"),
        ({"precision": "f64"}, "precision is 'f64'"),
        ({"assignment": "rank"}, "assignment is 'rank'"),
    ],
)
def test_an_argument_that_cannot_be_used_is_named(
    config: str, changes: dict[str, Any], message: str
) -> None:
    """Before anything is read."""
    with pytest.raises(ConfigError, match=message):
        module(config, **changes).train_dataloader()


def test_a_split_with_nothing_to_train_on_is_refused(config: str, tmp_path: Path) -> None:
    """Training would end with exit code 0 after no step; testing is allowed."""
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": [], "test": [0, 1]}))
    data = module(config, split_file=split)
    assert len(data.test_dataloader()) == 2
    with pytest.raises(ConfigError, match="There are no training samples"):
        data.train_dataloader()


def test_configs_that_cannot_be_used_are_named(config: str, tmp_path: Path) -> None:
    """One split file for two datasets, no config, files that have to be converted first."""
    with pytest.raises(ConfigError, match=r"there are 2 datasets\. Give one file per dataset"):
        module([config, config], split_file="split.json")
    for nothing in ([], {}, None):
        with pytest.raises(ConfigError, match="config is empty"):
            module(nothing)
    with pytest.raises(ConfigError, match="`zarrcache convert` first"):
        module({**yaml.safe_load(Path(config).read_text()), "dataset_name": "chgcar_data"})
    with pytest.raises(ConfigError, match=r"config file nowhere\.yaml cannot be read"):
        module("nowhere.yaml")
    path = tmp_path / "train.yaml"
    path.write_text(Path(config).read_text() + "random_state: soon\n")
    with pytest.raises(ConfigError, match=rf"^config file {path}: random_state: has to be a whole"):
        module(str(path))


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"downsample_data": 2},
        {"downsample_data": 3, "downsample_label": 2, "precision": "bf16"},
    ],
    ids=str,
)
def test_augmentation_on_the_device_gives_the_batches_of_the_cpu(
    config: str, batch_size: int, options: dict[str, Any]
) -> None:
    """Bit for bit, in the same order; what Lightning calls is called here."""
    options = {"augmentation": True, "batch_size": batch_size, **options}
    batches = []
    for place in ("cpu", "device"):
        torch.manual_seed(7)
        data = module(config, augment_on=place, **options)
        loaders = (data.train_dataloader(), data.train_dataloader(), data.val_dataloader())
        batches.append(
            [data.on_after_batch_transfer(batch, 0) for loader in loaders for batch in loader]
        )
    assert len(batches[0]) == len(batches[1]) > 2
    for cpu, device in zip(*batches, strict=True):
        assert cpu.keys() == device.keys()
        assert cpu["index"] == device["index"]
        for role in ("data", "label"):
            assert type(cpu[role]) is type(device[role])
            for one, other in zip(cpu[role], device[role], strict=True):
                assert one.dtype == other.dtype
                assert other.is_contiguous()
                assert torch.equal(one, other)


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers:UserWarning",
    "ignore:.*have no `validation_step`:UserWarning",
    "ignore:.*LeafSpec.*:FutureWarning",
)
def test_a_trainer_augments_on_its_device(config: str) -> None:
    """On a GPU where there is one; of several configs, with their numbers."""
    import lightning as L

    class Model(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))
            self.batches: list[Any] = []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            self.batches.append(batch)
            return self.weight * sum(x.float().sum() for x in batch["data"])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    data = module([config, config], augment_on="device", augmentation=True, precision="bf16")
    trainer = L.Trainer(
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        devices=1,
    )
    model = Model()
    trainer.fit(model, train_dataloaders=data)
    assert model.batches
    for batch in model.batches:
        assert set(batch) == {"data", "label", "index", "dataset"}
        assert batch["data"].dtype == torch.bfloat16
        assert batch["dataset"].device == batch["data"].device == model.weight.device


def test_what_cannot_be_augmented_on_the_device_is_refused(config: str) -> None:
    data = module(config)
    reader = data.readers["0"]
    for options in ({"transform": dict}, {"layout": "rotated"}):
        with pytest.raises(ConfigError, match="augment_on='cpu'"):
            ZarrDataset(reader, "train", augment_on="device", **options)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="it has to be 'cpu' or 'device'"):
        ZarrDataset(reader, "train", augment_on="gpu")  # type: ignore[arg-type]
    tiny = module(config, augment_on="device", downsample_data=1000)
    with pytest.raises(SchemaError, match="is empty after cropping"):
        next(iter(tiny.train_dataloader()))


def test_a_transform_is_for_all_sides_or_for_those_that_are_named(config: str) -> None:
    """The config's stores have no structure. Rotation is off where points have coordinates."""
    from zarrcache import Probes, RandomCrop

    probes = module(config, transform=Probes(5, structure=False), augmentation=None)
    assert not probes.augmentation
    for loader in (probes.train_dataloader(), probes.val_dataloader(), probes.test_dataloader()):
        assert next(iter(loader))["frac"].shape == (1, 5, 3)
    assert module(config, transform=[RandomCrop(2)], augmentation=None).augmentation
    crops = module(config, transform={"train": RandomCrop(2)})
    assert next(iter(crops.train_dataloader()))["data"].shape == (1, 1, 2, 2, 2)
    assert next(iter(crops.val_dataloader()))["data"].shape[2:] != (2, 2, 2)


def test_hydra_makes_a_transform(config: str) -> None:
    hydra = pytest.importorskip("hydra.utils", reason="needs the extra 'test'")
    crop = {"_target_": "zarrcache.RandomCrop", "size": [2, 1, 2]}
    for transform in (crop, [crop], {"train": crop}):
        made.append(
            hydra.instantiate(
                {
                    "_target_": "zarrcache.lightning.ZarrDataModule",
                    "config": config,
                    "train_workers": 0,
                    "augmentation": False,
                    "transform": transform,
                }
            )
        )
        batch = next(iter(made[-1].train_dataloader()))
        assert batch["data"].shape == (1, 1, 2, 1, 2)


def test_a_transform_that_does_not_fit_stops_before_the_training(config: str) -> None:
    from zarrcache import Probes, RandomCrop

    with pytest.raises(ConfigError, match="names val; known are train, validation, test"):
        module(config, transform={"val": RandomCrop(2)})
    data = module(config, transform=RandomCrop(50))
    data.readers["0"].ensure(data.splits["0"].train[0], "data")
    data.readers["0"].ensure(data.splits["0"].train[0], "label")
    with pytest.raises(ConfigError, match="window of 50 x 50 x 50 does not fit"):
        data.train_dataloader()
    with pytest.raises(ConfigError, match="cannot be combined with rotations"):
        module(config, transform=Probes(5), augmentation=True).train_dataloader()
