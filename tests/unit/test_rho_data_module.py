"""``RhoDataModule`` against a loader written here from electrai's documented behaviour.

The reference shares nothing with the package: its own parser, split, rotations and collation.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, default_collate

from tests.support.chgcars import write_chgcar
from tests.support.faultproxy import FaultProxy
from tests.support.s3server import S3Server
from tests.support.stores import small_group
from tests.support.training import zarrcache
from zarrcache.errors import ConfigError, ZarrCacheError

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*fork.*:DeprecationWarning", "ignore:hydra.utils.instantiate:UserWarning"
)

SHAPES = ((6, 5, 4), (4, 4, 4), (6, 5, 4), (3, 4, 8))


def read_chgcar(path: Path) -> NDArray[np.float64]:
    """Electrons per cubic angstrom."""
    lines = path.read_text().splitlines()
    a, b, c = (np.array(line.split(), float) for line in lines[2:5])
    shape = [int(n) for n in lines[11].split()]
    total = np.array(" ".join(lines[12:]).split(), float).reshape(shape, order="F")
    return np.ascontiguousarray(total) / abs(np.dot(np.cross(a, b), c))


class Reference(Dataset[Any]):
    """Samples of a file list."""

    def __init__(self, root: Path, augmentation: bool, dtype: torch.dtype) -> None:
        self.root, self.augmentation, self.dtype = root, augmentation, dtype
        self.ids = root.read_text().splitlines()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self.ids[index]
        pair = [
            torch.tensor(read_chgcar(self.root.parent / role / f"{name}.CHGCAR"), dtype=self.dtype)
            for role in ("data", "label")
        ]
        if self.augmentation:
            axis = int(torch.randint(0, 3, ()))
            r = float(torch.rand(()))
            one, other = ((-1, -2), (-1, -3), (-2, -3))[axis]
            for _ in range(0 if r < 0.1 else 1 if r < 0.4 else 2 if r < 0.7 else 3):
                pair = [grid.transpose(one, other).flip(max(one, other)) for grid in pair]
        return {"data": pair[0][None], "label": pair[1][None], "index": name}


class Numbered(Dataset[Any]):
    def __init__(self, base: Any, number: int) -> None:
        self.base, self.number = base, number

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.base[index], "Dataset_ID": self.number}


def either(batch: list[dict[str, Any]]) -> dict[str, Any]:
    """Tensors, or lists where a batch has several grids."""
    try:
        return dict(default_collate(batch))
    except RuntimeError:
        return {key: [sample[key] for sample in batch] for key in batch[0]}


def divided(
    base: Any, val_frac: float = 0.005, split_file: Path | None = None, seed: int = 42
) -> dict[str, Any]:
    if split_file is not None:
        parts = json.loads(split_file.read_text())
    else:
        order = torch.randperm(len(base), generator=torch.Generator().manual_seed(seed)).tolist()
        held = int(len(base) * val_frac)
        parts = {"train": order[held:], "validation": order[:held]}
    return {side: Subset(base, places) for side, places in parts.items()}


def loaders(sides: dict[str, Any], batch_size: int, workers: int, drop_last: bool) -> list[Any]:
    """Training, validation and test as electrai loads them."""
    rest: dict[str, Any] = {
        "num_workers": workers, "collate_fn": either, "drop_last": drop_last
    }  # fmt: skip
    return [
        DataLoader(sides["train"], batch_size, shuffle=True, **rest),
        DataLoader(sides["validation"], batch_size, **rest),
        *([DataLoader(sides["test"], 1, **rest)] if "test" in sides else []),
    ]


@pytest.fixture(scope="module")
def densities(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two file lists with their densities and split files."""
    home = tmp_path_factory.mktemp("mp")
    for name, count in (("gga", 9), ("ggau", 4)):
        order = np.random.default_rng(count).permutation(count)
        for number in range(count):
            for role in ("data", "label"):
                seed = number + (100 if role == "label" else 0) + count * 1000
                path = home / name / role / f"mp-{number}.CHGCAR"
                write_chgcar(path, SHAPES[number % len(SHAPES)], seed)
        (home / name / "mp_filelist.txt").write_text("".join(f"mp-{n}\n" for n in order))
        half = count // 2
        (home / name / "split.json").write_text(
            json.dumps(
                {
                    "train": [*range(half)],
                    "validation": [half],
                    "test": [*range(count - 1, half, -1)],
                }
            )
        )
    return home


def equal(mine: Any, theirs: Any) -> bool:
    """The same values, types, and order in memory, which sums depend on."""
    if isinstance(theirs, list):
        return len(mine) == len(theirs) and all(map(equal, mine, theirs))
    if isinstance(theirs, torch.Tensor):
        return (
            mine.dtype == theirs.dtype
            and torch.equal(mine, theirs)
            and mine.stride()[1:] == theirs.stride()[1:]  # the first axis has length one
        )
    return bool(mine == theirs)


def compare(mine: list[Any], theirs: list[Any], epochs: int = 2) -> int:
    """Draw all batches of several epochs, from the same state of torch's generator; their
    number.
    """
    drawn = []
    for several in (mine, theirs):
        torch.manual_seed(5)
        drawn.append([batch for _ in range(epochs) for loader in several for batch in loader])
    for one, other in zip(*drawn, strict=True):
        assert one.keys() == other.keys()
        for key, value in other.items():
            assert equal(one[key], value), (key, one["index"], other["index"])
    return len(drawn[0])


def module(*args: Any, **options: Any) -> Any:
    from zarrcache.lightning import RhoDataModule

    return RhoDataModule(*args, **{"train_workers": 0, "val_workers": 0} | options)


def loaders_of(data: Any, tests: bool) -> list[Any]:
    return [
        data.train_dataloader(),
        data.val_dataloader(),
        *([data.test_dataloader()] if tests else []),
    ]


@pytest.mark.parametrize(
    ("batch_size", "workers", "drop_last", "augmentation"),
    [
        (1, 0, False, False),
        (1, 2, False, True),
        (2, 0, True, True),
        (3, 0, False, False),
        (3, 0, False, True),
    ],
)
def test_batches_are_those_of_electrai(
    densities: Path,
    tmp_path: Path,
    batch_size: int,
    workers: int,
    drop_last: bool,
    augmentation: bool,
) -> None:
    """Cold, then warm: samples, split, order, rotations, bit for bit; also lists of unequal
    grids.
    """
    root = densities / "gga" / "mp_filelist.txt"
    theirs = loaders(
        divided(Reference(root, augmentation, torch.float32), 0.3), batch_size, workers, drop_last
    )
    for _ in range(2):
        data = module(
            str(root),
            "f32",
            batch_size,
            train_workers=workers,
            val_workers=workers,
            val_frac=0.3,
            drop_last=drop_last,
            augmentation=augmentation,
            cache={"dir": tmp_path, "min_free": 0},
        )
        data.setup("fit")
        assert compare(loaders_of(data, False), theirs) >= 4
    stats = data.readers["0"].stats  # of the second loop, with its workers
    assert (stats.misses, stats.bypasses, stats.hits > 0) == (0, 0, True)


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)],
)
def test_a_split_file_and_every_precision(
    densities: Path, precision: str, dtype: torch.dtype
) -> None:
    """The test loader has batches of one. Without a cache, too."""
    root, split = densities / "gga" / "mp_filelist.txt", densities / "gga" / "split.json"
    theirs = loaders(divided(Reference(root, True, dtype), split_file=split), 2, 0, False)
    data = module(root, precision, augmentation=True, split_file=split, val_frac=0.5)
    data.setup("test")
    assert compare(loaders_of(data, True), theirs) == 2 * (2 + 1 + 4)


def test_several_lists_and_their_numbers(densities: Path) -> None:
    """The present form of electrai's configs: each list has its split."""
    gga, ggau = densities / "gga", densities / "ggau"
    theirs: dict[str, list[Any]] = {"train": [], "validation": []}
    for number, home, arguments in (
        (1, gga, {"split_file": gga / "split.json"}),
        (7, ggau, {"val_frac": 0.5, "seed": 3}),
    ):
        sides = divided(Reference(home / "mp_filelist.txt", True, torch.float32), **arguments)
        for side, parts in theirs.items():
            parts.append(Numbered(sides[side], number))
    joined = {side: ConcatDataset(parts) for side, parts in theirs.items()}
    data = module(
        datasets=[
            {
                "root": str(gga / "mp_filelist.txt"),
                "split_file": gga / "split.json",
                "dataset_id": 1,
            },
            {"root": str(ggau / "mp_filelist.txt"), "dataset_id": 7},
        ],
        default_val_frac=0.5,
        augmentation=True,
        random_seed=3,
    )
    data.setup("fit")
    assert compare(loaders_of(data, False), loaders(joined, 2, 0, False)) == 2 * (3 + 2)
    assert len(data.test_set) == 4
    one = module(datasets=[{"root": str(ggau / "mp_filelist.txt")}])
    assert one.train_set[0]["Dataset_ID"] == 0


def test_a_chgcar_is_preferred_to_a_json_file_of_the_same_material(
    densities: Path, tmp_path: Path
) -> None:
    """Their loader reads no json.gz."""
    root = lines_of(densities, tmp_path)
    for role in ("data", "label"):
        (root.parent / role / "mp-1.json.gz").write_bytes(b"not read")
    assert len(list(module(root).train_dataloader())) == 2
    with pytest.raises(ZarrCacheError, match="mp-1"):
        list(module(root, source="auto").train_dataloader())


def test_stores_are_read_where_there_are_some(tmp_path: Path) -> None:
    """Within one unit in the last place of float64 over volume, from a store of float32."""
    values = {}
    for role in ("data", "label"):
        arrays = small_group(tmp_path / role / "mp-1.zarr", shape=(4, 5, 6), seed=len(role))
        values[role] = arrays["charge_density_total"].astype(np.float64) / 3.8**3
    (tmp_path / "mp_filelist.txt").write_text("mp-1\n")
    sample = module(tmp_path / "mp_filelist.txt").train_set[0]
    for role, expected in values.items():
        np.testing.assert_allclose(sample[role][0].numpy(), expected, rtol=1.2e-7)


def test_their_config_changes_only_its_target(densities: Path, tmp_path: Path) -> None:
    """Hydra gets all keys of electrai's config; the command reads the same file, and then the
    training needs no density file any more.
    """
    hydra = pytest.importorskip("hydra", reason="needs the extra 'test'")
    shutil.copytree(densities / "gga", tmp_path / "gga")
    block = {
        "_target_": "zarrcache.lightning.RhoDataModule",
        "root": str(tmp_path / "gga" / "mp_filelist.txt"),
        "split_file": None,
        "precision": "f32",
        "batch_size": 1,
        "train_workers": 0,
        "val_workers": 0,
        "pin_memory": False,
        "val_frac": 0.3,
        "drop_last": False,
        "augmentation": True,
        "random_seed": 42,
        "cache": {"dir": str(tmp_path / "cache"), "min_free": 0},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"data": block, "model": {"_target_": "a.Net"}, "epochs": 2}))
    warmed = zarrcache("warm", config)
    assert warmed.code == 0, warmed.err
    assert warmed.out.startswith("Warmed 9 of 9 ids")
    reference = Reference(densities / "gga" / "mp_filelist.txt", True, torch.float32)
    shutil.rmtree(tmp_path / "gga" / "data")
    shutil.rmtree(tmp_path / "gga" / "label")
    data = hydra.utils.instantiate(block)
    data.setup("fit")
    assert compare(loaders_of(data, False), loaders(divided(reference, 0.3), 1, 0, False)) == 18
    assert zarrcache("status", config, "--json").document["coverage"]["warm"] == 9


def test_of_a_split_file_only_what_it_lists_is_warmed(densities: Path, tmp_path: Path) -> None:
    """A sweep that trains on a tenth reads a tenth."""
    (tmp_path / "split.json").write_text(json.dumps({"train": [4, 0], "validation": [2]}))
    block = {
        "root": str(densities / "gga" / "mp_filelist.txt"),
        "split_file": str(tmp_path / "split.json"),
        "cache": {"dir": str(tmp_path / "cache"), "min_free": 0},
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"data": block}))
    assert zarrcache("warm", config).out.startswith("Warmed 3 of 3 ids")


def test_hyperparameters_are_saved_without_secrets(densities: Path) -> None:
    root = str(densities / "gga" / "mp_filelist.txt")
    data = module(root, batch_size=4, s3_kwargs={"secret": "hush", "key": "AKIA"})
    assert (data.hparams["root"], data.hparams["batch_size"]) == (root, 4)
    assert "hush" not in str(data.hparams) + str(data.hparams_initial)


def test_defaults_are_those_of_electrai(densities: Path) -> None:
    data = module(densities / "gga" / "mp_filelist.txt", train_workers=8, val_workers=2)
    assert (data.batch_size, data.train_workers, data.val_workers) == (2, 8, 2)
    assert (data.pin_memory, data.drop_last, data.augmentation) == (False, False, False)
    assert (len(data.train_set), len(data.val_set)) == (9, 0)  # int(9 * 0.005) is 0
    assert list(data.val_dataloader()) == []


def test_what_electrai_ignores_is_named(densities: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = densities / "gga" / "mp_filelist.txt"
    module(root, downsample_data=2, elf=True)
    assert "RhoDataModule ignores elf, as electrai does." in caplog.text
    assert "ignores downsample_data=2 and downsample_label=1" in caplog.text
    caplog.clear()
    module(root, downsample_data=0, downsample_label=0)  # as its configs have in a comment
    assert not caplog.text


def lines_of(densities: Path, tmp_path: Path, *more: str) -> Path:
    shutil.copytree(densities / "ggau", tmp_path / "ggau")
    root = tmp_path / "ggau" / "mp_filelist.txt"
    root.write_text(root.read_text() + "".join(f"{line}\n" for line in more))
    return root


def test_densities_that_are_not_there_are_named_with_their_lines(
    densities: Path, tmp_path: Path
) -> None:
    """Before the training; electrai fails when it reads them. An input without label is missing
    too.
    """
    root = lines_of(densities, tmp_path, "mp-77", "mp-88")
    write_chgcar(root.parent / "data" / "mp-88.CHGCAR", (4, 4, 4), 1)
    with pytest.raises(
        ConfigError, match=r"2 of 6 materials have no .*: mp-77 \(line 5\), mp-88 \(line 6\)\. Put"
    ):
        module(root).setup("fit")
    (tmp_path / "split.json").write_text(json.dumps({"train": [0, 1], "validation": [5]}))
    with pytest.raises(ConfigError, match=r"1 of 3 materials .*: mp-88 \(validation\)"):
        module(root, split_file=tmp_path / "split.json").setup("fit")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "neither root nor datasets"),
        ({"root": "/nowhere/mp_filelist.txt"}, r"file list /nowhere/mp_filelist\.txt cannot be"),
        ({"root": "s3://bucket/mp_filelist.txt"}, "a file list is read from this machine"),
        ({"datasets": []}, "datasets has to be a list"),
        ({"datasets": [{"split_file": "a.json"}]}, "dataset 0 has no root"),
        ({"precision": "f64"}, "precision is 'f64'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"val_frac": 1.0}, r"val_frac is 1\.0"),
        ({"val_frac": -0.1}, "val_frac is -0.1"),
        ({"cache": {"dri": "/c"}}, r"cache\.dri is not a setting|cache\.dir is missing"),
        ({"source": "npz"}, "source is 'npz'"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(
    densities: Path, options: dict[str, Any], message: str
) -> None:
    if options and not options.keys() & {"root", "datasets"}:
        options["root"] = str(densities / "ggau" / "mp_filelist.txt")
    with pytest.raises(ConfigError, match=message):
        module(**options).train_dataloader()


def test_there_is_no_test_set_without_a_split_file(densities: Path) -> None:
    with pytest.raises(ConfigError, match="There is no test set"):
        module(densities / "gga" / "mp_filelist.txt").test_dataloader()


def test_a_cell_without_volume_is_an_error_of_its_material(densities: Path, tmp_path: Path) -> None:
    """``warm`` names it before the training starts."""
    root = lines_of(densities, tmp_path)
    path = root.parent / "label" / "mp-1.CHGCAR"
    lines = path.read_text().splitlines()
    lines[4] = lines[3]
    path.write_text("\n".join(lines) + "\n")
    data = module(root)
    with pytest.raises(ZarrCacheError, match=r"mp-1.*volume"):
        list(data.train_dataloader())


def test_densities_may_be_on_s3(
    densities: Path, tmp_path: Path, s3_server: S3Server, bucket: str, fault_proxy: FaultProxy
) -> None:
    """The list is on this machine; after ``warm`` there are no requests."""
    for role in ("data", "label"):
        s3_server.put_tree(densities / "ggau" / role, f"s3://{bucket}/{role}")
    root = densities / "ggau" / "mp_filelist.txt"
    block = {
        "root": str(root),
        "data_dir": f"s3://{bucket}/data",
        "label_dir": f"s3://{bucket}/label",
        "val_frac": 0.3,
        "augmentation": True,
        "batch_size": 1,
        "s3_kwargs": s3_server.kwargs_at(fault_proxy.endpoint_url),
        "cache": {"dir": str(tmp_path / "cache"), "min_free": 0},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"data": block}))
    warmed = zarrcache("warm", tmp_path / "config.yaml")
    assert warmed.out.startswith("Warmed 4 of 4 ids"), warmed.err
    sent = fault_proxy.count("GET") + fault_proxy.count("HEAD")
    data = module(**block)
    data.setup("fit")
    theirs = loaders(divided(Reference(root, True, torch.float32), 0.3), 1, 0, False)
    assert compare(loaders_of(data, False), theirs) == 8
    assert fault_proxy.count("GET") + fault_proxy.count("HEAD") == sent > 0
    assert dict(data.hparams["cache"]) == block["cache"]
    assert "s3_kwargs" not in data.hparams
