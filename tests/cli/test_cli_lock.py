"""``zarrcache lock`` and ``diff``, and training under ``cache.lock``."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
import zarr
from torch.utils.data import DataLoader

from tests.support.training import write_config, write_pairs, zarrcache
from tests.support.users import needs_users, open_to_all, without_privileges
from zarrcache import ZarrDataset, get_dataset
from zarrcache.data import DataLock
from zarrcache.errors import ConfigError, IncompleteArrayError
from zarrcache.registry import open_reader


@pytest.fixture
def locked(tmp_path: Path) -> Path:
    """A config over four pairs in ``tmp_path``, their lock ``data.lock`` beside it."""
    write_pairs(tmp_path, 4)
    config = write_config(tmp_path)
    done = zarrcache("lock", config, "-o", tmp_path / "data.lock")
    assert (done.code, done.out) == (0, "")
    assert done.err.endswith(f"wrote {tmp_path / 'data.lock'}: 4 materials\n")
    return config


def changed(config: Path, **changes: Any) -> Path:
    """The config under the lock, with other keys; ``cache`` without an entry of before."""
    document = yaml.safe_load(config.read_text())
    document["cache"] |= {"lock": str(config.parent / "data.lock")}
    document |= changes
    path = config.parent / "locked.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def rewrite(directory: Path, task_id: str = "mp-2", role: str = "label") -> None:
    """Change one value of a density."""
    array = zarr.open_array(
        directory / role / f"{task_id}.zarr" / "charge_density_total", mode="r+"
    )
    array[0, 0, 0] = float(array[0, 0, 0]) + 1e-3


def forget(directory: Path) -> None:
    shutil.rmtree(directory / "cache", ignore_errors=True)


def test_the_same_data_has_no_difference_and_trains(locked: Path) -> None:
    done = zarrcache("diff", locked.parent / "data.lock", locked)
    assert (done.code, done.out) == (0, "No difference in 4 materials.\n")
    path = changed(locked)
    assert zarrcache("warm", path).code == 0
    train, test = get_dataset(yaml.safe_load(path.read_text()))
    assert [len(values) for values in train[0]] == [120, 120]
    assert [len(values) for values in test[1]] == [120, 120]


def test_a_copy_of_the_data_elsewhere_is_the_same_data(locked: Path, tmp_path: Path) -> None:
    """Other paths and times, so other sources."""
    copy = tmp_path / "copy"
    for name in ("data", "label"):
        shutil.copytree(tmp_path / name, copy / name)
    path = changed(locked, data_dir=str(copy / "data"), label_dir=str(copy / "label"))
    assert zarrcache("diff", locked.parent / "data.lock", path).code == 0
    dataset = ZarrDataset(open_reader(yaml.safe_load(path.read_text())), "train")
    assert len([sample["index"] for sample in DataLoader(dataset, num_workers=1)]) == 2


def test_one_changed_value_is_named_and_never_trained_on(locked: Path, tmp_path: Path) -> None:
    """In this process, in a spawned one, and by ``warm``; other densities are read."""
    rewrite(tmp_path)
    forget(tmp_path)
    path = changed(locked)
    reader = open_reader(yaml.safe_load(path.read_text()))
    for one in (reader, pickle.loads(pickle.dumps(reader))):
        one.load("mp-2", "data")
        with pytest.raises(IncompleteArrayError, match=r"mp-2 \(label\) has other values than in"):
            one.load("mp-2", "label")
    done = zarrcache("diff", tmp_path / "data.lock", locked)
    assert (done.code, done.out) == (1, "mp-2 (label): other values on the same grid\n")
    done = zarrcache("diff", tmp_path / "data.lock", path, "--json")
    assert done.document["differences"] == ["mp-2 (label): other values on the same grid"]
    forget(tmp_path)
    done = zarrcache("warm", path)
    assert (done.code, "mp-2 (label) has other values" in done.err) == (1, True)


def test_a_value_that_changes_after_the_first_epoch_is_refused_too(
    locked: Path, tmp_path: Path
) -> None:
    reader = open_reader(yaml.safe_load(changed(locked).read_text()))
    reader.load("mp-2", "label")
    rewrite(tmp_path)
    assert zarrcache("evict", locked, "--all", "--yes").code == 0
    with pytest.raises(IncompleteArrayError, match="other values"):
        reader.load("mp-2", "label")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"random_state": 7}, "random_state is 7, but .* is for 42"),
        ({"train_fraction": 0.9}, "train_fraction is 0.9"),
        ({"normalize_data": False}, "normalize_data is False, but .* is for 'points'"),
        ({"density_type": "diff"}, "density_type is 'diff'"),
    ],
)
def test_other_settings_are_refused_before_the_training(
    locked: Path, change: dict[str, Any], message: str
) -> None:
    path = changed(locked, **change)
    with pytest.raises(ConfigError, match=message):
        open_reader(yaml.safe_load(path.read_text())).split_task_ids()
    done = zarrcache("warm", path)
    assert (done.code, "data.lock is for" in done.err) == (2, True)


def test_another_split_file_is_refused_before_the_training(locked: Path, tmp_path: Path) -> None:
    """Also one that is given to the data module; the same split in other words is accepted."""
    split, other, same = (tmp_path / f"{name}.json" for name in ("split", "other", "same"))
    split.write_text('{"train": [0, 1, 2], "test": [3]}')
    other.write_text('{"train": [0, 1, 3], "test": [2]}')
    same.write_text('{"train": ["mp-0", "mp-1", "mp-2"], "val": [], "test": ["mp-3"]}')
    without = changed(locked, split_file=str(other))
    assert len(open_reader(yaml.safe_load(without.read_text())).split_task_ids()[0]) == 3
    config = yaml.safe_load(locked.read_text())
    locked.write_text(yaml.safe_dump(config | {"split_file": str(split)}))
    (tmp_path / "data.lock").unlink()
    assert zarrcache("lock", locked, "-o", tmp_path / "data.lock").code == 0
    assert zarrcache("diff", tmp_path / "data.lock", locked).code == 0
    for path in (split, same):
        reader = open_reader(yaml.safe_load(changed(locked, split_file=str(path)).read_text()))
        assert reader.split_task_ids() == (["mp-0", "mp-1", "mp-2"], ["mp-3"])
    for changes in ({"split_file": str(other)}, {"split_file": None}):
        reader = open_reader(yaml.safe_load(changed(locked, **changes).read_text()))
        with pytest.raises(ConfigError, match=r"data\.lock is for another split file"):
            reader.split_task_ids()
    with pytest.raises(ConfigError, match="for another split file"):
        reader.all_ids()  # which RhoDataModule divides
    from zarrcache.lightning import ZarrDataModule

    module = ZarrDataModule(yaml.safe_load(changed(locked).read_text()), split_file=other)
    with pytest.raises(ConfigError, match="for another split file"):
        module.setup()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["mp-0", "mp-1", "mp-2"], "mp-3 is missing"),
        (["mp-0", "mp-1", "mp-2", "mp-3", "mp-4"], "mp-4 is new"),
        (["mp-0", "mp-2", "mp-1", "mp-3"], "the order differs from place 2 on: mp-1, then mp-2"),
    ],
)
def test_other_materials_are_refused_before_the_training(
    locked: Path, tmp_path: Path, ids: list[str], message: str
) -> None:
    for role in ("data", "label"):
        shutil.copytree(tmp_path / role / "mp-3.zarr", tmp_path / role / "mp-4.zarr")
    forget(tmp_path)
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ids}))
    with pytest.raises(ConfigError, match=message):
        open_reader(yaml.safe_load(changed(locked).read_text())).data_split()
    assert message in zarrcache("diff", tmp_path / "data.lock", locked).out


def test_a_lock_is_compressed_and_the_same_data_gives_the_same_file(
    locked: Path, tmp_path: Path
) -> None:
    one, other = tmp_path / "a.lock.gz", tmp_path / "b.lock.gz"
    for path in (one, other):
        assert zarrcache("lock", locked, "-o", path).code == 0
        forget(tmp_path)
    assert one.read_bytes() == other.read_bytes()
    assert gzip.decompress(one.read_bytes()) == (tmp_path / "data.lock").read_bytes()
    assert zarrcache("diff", one, tmp_path / "data.lock").code == 0


def test_a_config_before_the_lock_is_named(locked: Path, tmp_path: Path) -> None:
    """Its error does not say to write a lock there."""
    for second in (tmp_path / "data.lock", locked):
        done = zarrcache("diff", locked, second)
        assert (done.code, done.out) == (2, "")
        assert "train.yaml is a config. The lock file goes first: LOCK CONFIG." in done.err


def no_json(path: Path) -> None:
    path.write_text(path.read_text()[:-9])


def another_file(path: Path) -> None:
    path.write_text('{"GGA": []}')


def a_later_format(path: Path) -> None:
    path.write_text(path.read_text().replace('"zarrcache_lock": 1', '"zarrcache_lock": 9'))


def without_digests(path: Path) -> None:
    path.write_text(path.read_text().replace('"sha256"', '"sha255"'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (no_json, "is not complete JSON"),
        (another_file, "is not a lock file"),
        (a_later_format, "has format 9; this version reads 1"),
        (without_digests, "lacks 'sha256'"),
        (Path.unlink, "cannot be read (No such file or directory)"),
    ],
)
def test_a_file_that_is_no_lock_is_an_error_before_the_training(
    locked: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(tmp_path / "data.lock")
    for done in (
        zarrcache("diff", tmp_path / "data.lock", locked),
        zarrcache("warm", changed(locked)),
    ):
        assert (done.code, message in done.err) == (2, True), done


def test_a_density_that_cannot_be_read_is_named_and_no_lock_is_written(
    locked: Path, tmp_path: Path
) -> None:
    forget(tmp_path)
    for chunk in (tmp_path / "data" / "mp-1.zarr").rglob("*0*"):
        if chunk.is_file():
            chunk.write_bytes(b"x")
    (tmp_path / "data.lock").unlink()
    done = zarrcache("lock", locked, "-o", tmp_path / "data.lock")
    assert (done.code, "mp-1" in done.err) == (1, True)
    assert not list(tmp_path.glob("*.lock*"))


@needs_users
def test_a_lock_in_a_directory_of_another_user_is_refused_in_words() -> None:
    with open_to_all() as directory:
        (directory / "closed").mkdir(mode=0o700)
        lock = DataLock({}, {})
        with pytest.raises(
            AssertionError,
            match=r"ConfigError: .*data\.lock cannot be written \(Permission denied\)",
        ):
            without_privileges(lock.save, directory / "closed" / "data.lock")
