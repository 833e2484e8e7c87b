"""Training configs in all their forms are read alike: flat, Hydra's, electrai's."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from zarrcache.config import CacheConfig, DataConfig, LoaderConfig
from zarrcache.config.files import read_datasets
from zarrcache.errors import ConfigError

KEYS: dict[str, Any] = {
    "data_dir": "/d/input",
    "label_dir": "/d/label",
    "map_dir": "map.json.gz",
    "functional": "GGA",
    "random_state": 7,
    "s3_kwargs": {"anon": True},
    "cache": {"dir": "/scratch/zarrcache"},
}
PLAIN = DataConfig(**KEYS)


def written(tmp_path: Path, document: Any, name: str = "config.yaml") -> Path:
    path = tmp_path / name
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    return path


def read(tmp_path: Path, document: Any) -> DataConfig:
    return DataConfig.from_yaml(written(tmp_path, document))


@pytest.mark.parametrize(
    "document",
    [
        KEYS,
        {"data": KEYS, "model": {"_target_": "a.Network"}, "precision": 32, "epochs": 50},
        {"datamodule": KEYS},
        {"data": {"_target_": "zarrcache.lightning.ZarrDataModule", "config": KEYS}},
        {"data": {"config": [KEYS], "batch_size": 4}},
        {"data": {"config": {"pbe": KEYS}}},
        {"data": {"config": {"data": KEYS}}},
        {"config": KEYS},
    ],
    ids=["flat", "block", "datamodule", "config", "list", "named", "nested", "arguments"],
)
def test_a_block_of_hydra_has_the_keys_of_a_flat_config(tmp_path: Path, document: Any) -> None:
    """In the file and as Python objects; the cache too, for commands without data."""
    assert read(tmp_path, document) == PLAIN
    assert DataConfig.of(document) == PLAIN
    assert DataConfig.of(SimpleNamespace(**document)) == PLAIN
    assert CacheConfig.from_yaml(tmp_path / "config.yaml") == PLAIN.cache


def test_a_block_may_name_the_file_with_the_keys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative to the directory where the training starts, as it is for the training."""
    written(tmp_path, KEYS, "keys.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WHERE", str(tmp_path))
    for path in ("keys.yaml", "${WHERE}/keys.yaml", "${oc.env:WHERE}/keys.yaml"):
        assert read(tmp_path, {"data": {"config": path, "batch_size": 4}}) == PLAIN
    with pytest.raises(ConfigError, match=r"config file none\.yaml cannot be read"):
        read(tmp_path, {"data": {"config": "none.yaml"}})


@pytest.mark.parametrize("is_set", [False, True])
@pytest.mark.parametrize(
    ("text", "unset", "set_"),
    [
        ("${oc.env:SCRATCH,/tmp}/z", "/tmp/z", "/fast/z"),
        ("${oc.env:SCRATCH, '/tmp' }/z", "/tmp/z", "/fast/z"),
        ("${oc.env:SCRATCH,${oc.env:OTHER,/o}}/z", "/o/z", "/fast/z"),
        ("${SCRATCH:-/tmp}/z", "/tmp/z", "/fast/z"),
        (r"\${SCRATCH:-/tmp}/z", "/tmp/z", "/fast/z"),
        ("/a${oc.env:SCRATCH,}/z", "/a/z", "/a/fast/z"),
    ],
)
def test_variables_are_written_as_in_hydra_or_in_the_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, unset: str, set_: str, is_set: bool
) -> None:
    r"""Hydra takes ``${NAME:-default}`` only as ``\${NAME:-default}``."""
    monkeypatch.delenv("OTHER", raising=False)
    monkeypatch.setenv("SCRATCH", "/fast") if is_set else monkeypatch.delenv(
        "SCRATCH", raising=False
    )
    keys = {**KEYS, "data_dir": text, "cache": {"dir": text}, "s3_kwargs": {"profile": text}}
    config = read(tmp_path, {"data": keys})
    assert config.data_dir == (set_ if is_set else unset)
    assert config.cache is not None
    assert str(config.cache.dir) == (set_ if is_set else unset)
    assert config.s3_kwargs == {"profile": set_ if is_set else unset}


def test_an_empty_variable_is_a_value_for_hydra(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is unset for the shell."""
    monkeypatch.setenv("EMPTY", "")
    assert DataConfig.of({**KEYS, "functional": "${oc.env:EMPTY,GGA}"}).functional == ""
    assert DataConfig.of({**KEYS, "functional": "${EMPTY:-GGA}"}).functional == "GGA"
    monkeypatch.delenv("EMPTY")
    config = DataConfig.of({**KEYS, "s3_kwargs": {"profile": "${oc.env:EMPTY,null}"}})
    assert config.s3_kwargs == {"profile": None}


def test_references_to_other_keys_of_the_file_are_followed(tmp_path: Path) -> None:
    """With their types."""
    document = {
        "paths": {"root": "/d", "data": "${paths.root}/input"},
        "seed": 7,
        "data": {
            **KEYS,
            "data_dir": "${paths.data}",
            "label_dir": "${paths.root}/label",
            "random_state": "${seed}",
        },
    }
    assert read(tmp_path, document) == PLAIN
    with pytest.raises(ConfigError, match=r"refers to itself, through data_dir and paths\.data"):
        read(tmp_path, document | {"paths": {"data": "${paths.data}/x"}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data_dir": "${oc.env:NOT_SET}"}, "names the environment variable NOT_SET"),
        ({"data_dir": "${hydra:runtime.cwd}/d"}, "other resolvers of Hydra need Hydra"),
        ({"data_dir": "${oc.decode:x}"}, "other resolvers of Hydra need Hydra"),
        ({"data_dir": "${paths.absent}/d"}, r"\$\{ that is not a variable"),
        ({"data_dir": "???"}, "data_dir is missing"),
        ({"data_path": "/d"}, "has both data_dir and data_path"),
    ],
)
def test_what_only_hydra_can_resolve_is_named(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, {"data": KEYS | change})


def test_hydra_hands_over_the_shells_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """It removes the backslash, and then fails on access."""
    hydra, omegaconf = (
        pytest.importorskip("hydra", reason="needs the extra 'test'"),
        pytest.importorskip("omegaconf", reason="needs the extra 'test'"),
    )
    if hydra.__version__ < "1.4":
        pytest.skip("Hydra before 1.4 resolves every value itself, and knows no such form")
    monkeypatch.delenv("NOT_SET", raising=False)
    keys = {**KEYS, "cache": {"dir": r"\${NOT_SET:-/scratch}/zarrcache"}}
    block = {"_target_": "zarrcache.config.DataConfig.of", "cfg": keys}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert hydra.utils.instantiate(block) == PLAIN
    cfg = omegaconf.OmegaConf.create({"at": "/d/input", "data": {**KEYS, "data_dir": "${at}"}})
    assert DataConfig.of(cfg) == PLAIN


def test_a_secret_in_an_unset_variable_is_not_quoted(tmp_path: Path) -> None:
    keys = {**KEYS, "s3_kwargs": {"secret": "abc${oc.env:NOT_SET}"}}
    with pytest.raises(ConfigError, match="s3_kwargs holds") as caught:
        read(tmp_path, {"data": keys})
    assert "abc" not in str(caught.value)


def test_older_names_are_understood(tmp_path: Path) -> None:
    """Those of electrai's earlier configs."""
    older = {
        "dataset_name": "zarr_s3_data",
        "data_path": "/d/input",
        "label_path": "/d/label",
        "map_path": "map.json.gz",
        "functional": "GGA",
        "random_seed": 7,
        "s3_kwargs": {"anon": True},
        "cache": {"dir": "/scratch/zarrcache"},
    }
    assert read(tmp_path, older) == PLAIN


def test_a_seed_beside_a_random_state_is_the_data_modules() -> None:
    """Also where random_state has its default: one seed must not draw two other test sets."""
    without = {key: value for key, value in KEYS.items() if key != "random_state"}
    assert DataConfig.of({**without, "random_seed": 8}).random_state == 42
    assert DataConfig.of({**KEYS, "random_seed": 8}) == PLAIN
    assert DataConfig.of({"config": KEYS, "random_seed": 8}) == PLAIN


def test_a_file_list_stands_for_its_directories(tmp_path: Path) -> None:
    """As electrai's ``RhoRead`` has them, whatever the ``_target_`` is still called."""
    block = {
        "_target_": "electrai.dataloader.dataset.RhoRead",
        "root": "/scratch/mp/mp_filelist.txt",
        "split_file": None,
        "precision": "f32",
        "batch_size": 1,
        "random_seed": 42,
        "cache": {"dir": "/scratch/zarrcache"},
    }
    (keys,) = read_datasets(written(tmp_path, {"data": block, "model": {}})).values()
    assert (keys["data_dir"], keys["label_dir"]) == ("/scratch/mp/data", "/scratch/mp/label")
    assert (keys["map_dir"], keys["normalize_data"]) == ("/scratch/mp/mp_filelist.txt", "volume")
    assert (keys["cache"], keys["batch_size"]) == (block["cache"], 1)


def test_one_of_several_datasets_is_named_after_the_path(tmp_path: Path) -> None:
    """By the ``dataset_id`` of electrai, or its position."""
    block = {
        "datasets": [
            {"root": "/mp/gga/mp_filelist.txt", "split_file": "gga.json", "dataset_id": 1},
            {"root": "/mp/ggau/mp_filelist.txt", "dataset_id": 2},
        ],
        "default_split_file": "other.json",
        "cache": {"dir": "/scratch/zarrcache"},
    }
    path = written(tmp_path, {"data": block})
    with pytest.raises(ConfigError, match=r"has 2 datasets: '1', '2'\. Name one.*yaml#1\.") as no:
        DataConfig.from_yaml(path)
    assert str(path) in str(no.value)
    (second,) = read_datasets(f"{path}#2").values()
    assert (second["data_dir"], second["split_file"]) == ("/mp/ggau/data", "other.json")
    with pytest.raises(ConfigError, match=r"has no dataset '3'\. It has '1', '2'"):
        DataConfig.from_yaml(f"{path}#3")
    written(tmp_path, KEYS, "a#1.yaml")
    assert DataConfig.from_yaml(tmp_path / "a#1.yaml") == PLAIN  # a file's own name


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"data": {"root": "/a.txt"}, "cache": {"dir": "/c"}}, "has cache beside data:"),
        ({"defaults": ["_self_", {"data": "mp"}], "epochs": 5}, "composed of others"),
        ({"data": {"root": "/a.txt", "datasets": [{"root": "/b.txt"}]}}, "both root and datasets"),
        ({"data": {"datasets": []}}, "datasets has to be a list"),
        ({"data": {"datasets": {"root": "/a.txt"}}}, "datasets has to be a list"),
        ({"data": {"datasets": ["/a.txt"]}}, "dataset 0 has no root"),
        ({"data": {"datasets": [{"root": "/a.txt", "splitfile": 1}]}}, "has the key 'splitfile'"),
        (
            {"data": {"datasets": [{"root": "/a", "dataset_id": 1}, {"root": "/b"}]}},
            "two datasets have the dataset_id 1",
        ),
        ({"data": {"datasets": [{"root": "/a", "dataset_id": "x"}]}}, "dataset_id is 'x'"),
        ({"data": {"root": "/tmp"}}, "root is the directory /tmp"),
        (
            {"data": {**KEYS, "cache": {"dir": "s3://bucket/c"}}},
            "cache.dir: 's3:/bucket/c' is a URL",
        ),
        ({"data": {"config": []}}, "config is empty"),
        ({"data": {"config": {"a": {"config": [KEYS, KEYS]}}}}, "config a has several datasets"),
    ],
)
def test_a_block_that_cannot_be_meant_is_refused(
    tmp_path: Path, document: Any, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, document)


def test_the_trainers_precision_is_not_the_datas() -> None:
    """A flat config has keys of both."""
    assert LoaderConfig(precision=32).precision is None
    assert LoaderConfig(precision="bf16-mixed").precision is None
    assert LoaderConfig(precision="bf16").precision == "bf16"


def test_keys_of_older_loaders_are_named(caplog: pytest.LogCaptureFixture) -> None:
    assert LoaderConfig(nbatch=4, data_augmentation=True).batch_size is None
    assert "has data_augmentation and nbatch, which data modules ignore" in caplog.text
    assert "the key is augmentation and batch_size" in caplog.text


def test_a_loaders_value_of_another_type_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCH", "4")
    assert LoaderConfig(batch_size="${BATCH}").batch_size == 4
    with pytest.raises(ConfigError, match=r"batch_size: has to be a whole number \(got 'four'\)"):
        LoaderConfig(batch_size="four")


@pytest.mark.parametrize(
    ("key", "text", "refusal"),
    [
        ("limit", "12:30:00", "'12:30:00' is not a size"),
        ("limit", "1_000", "'1_000' is not a size"),
        ("lookahead", "1:30.5", "'1:30.5' is not a size"),
        ("min_free", "0b11", "'0b11' is not a size"),
        ("limit", "2026-11-30", "'2026-11-30' is not a size"),
    ],
)
def test_what_yaml_1_1_reads_as_another_number_is_text(
    tmp_path: Path, key: str, text: str, refusal: str
) -> None:
    """``12:30:00`` was 45000 bytes, ``1_000`` was 1000."""
    path = written(tmp_path, f"dir: /scratch\n{key}: {text}\n")
    with pytest.raises(ConfigError, match=f"config.yaml: cache.{key}: {re.escape(refusal)}"):
        CacheConfig.from_yaml(path)


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    """A leading zero is not an octal number, a date is not a date."""
    path = written(
        tmp_path,
        "dir: 2026-11-30\nlimit: 042\nlookahead: 0x10\nprices: {dated: 2025-12-01, "
        "get_per_1000: 1.5e-3, list_per_1000: +2}\nretry: {attempts: +7, timeout: 1.5}\n",
    )
    config = CacheConfig.from_yaml(path)
    assert (config.dir.name, config.limit, config.lookahead) == ("2026-11-30", 42, 16)
    prices = config.prices
    assert (prices.dated, prices.get_per_1000, prices.list_per_1000) == ("2025-12-01", 1.5e-3, 2)
    assert (config.retry.attempts, config.retry.timeout) == (7, 1.5)
    with pytest.raises(ConfigError, match=r"cache.retry.timeout: '1:30' is not a duration"):
        CacheConfig.from_yaml(written(tmp_path, "dir: /s\nretry: {timeout: 1:30}\n"))
    for number in ("0x_", "0x1_0", "9" * 5000, "0x" + "f" * 20_000, "9" * 5000 + " GiB"):
        with pytest.raises(ConfigError, match=r"config\.yaml: cache\.limit: '(0x|9999).* a size"):
            CacheConfig.from_yaml(written(tmp_path, f"dir: /s\nlimit: {number}\n"))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("!!float ''", "line 2 has a value that cannot be read"),
        ("!!bool maybe", "line 2 has a value that cannot be read"),
        ("!!set [a]", "line 2 has a value that cannot be read"),
        ("!!binary 'é'", "is not YAML"),
        ("!!python/object:os.system x", "is not YAML"),
        ("{? [a] : b}", "is not YAML"),
        ("&x [*x]", "is not YAML"),
        ("[" * 2000, "is not YAML|lists or mappings in each other"),
        ("[" * 2000 + "]" * 2000, "lists or mappings in each other"),
        ('"a\\0b"', "line 2 has an escape"),
        ('"\\ud800"', "line 2 has an escape"),
        ("!!int ''", "cache.retry.timeout: '' is not a duration"),
        ("9" * 400 + " s", "cache.retry.timeout: '999.* is not a duration"),
        ("9" * 400, "cache.retry.timeout: '999.* is not a duration"),
        (".inf", "cache.retry.timeout: inf is not a duration"),
        ("9.3e+9", "cache.retry.timeout: 9300000000.0 is not a duration"),
    ],
)
def test_a_value_that_yaml_cannot_mean_is_named_with_its_file(
    tmp_path: Path, value: str, words: str
) -> None:
    path = written(tmp_path, f"dir: /s\nretry: {{timeout: {value}}}\n")
    with pytest.raises(ConfigError, match=words) as caught:
        CacheConfig.from_yaml(path)
    assert str(caught.value).startswith(f"config file {path}")
