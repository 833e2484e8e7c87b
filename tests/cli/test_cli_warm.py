"""``zarrcache warm`` as a command, against an S3 server behind a proxy that counts requests."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.support.faultproxy import FaultProxy, Rule
from tests.support.s3server import S3Server
from tests.support.stores import small_group
from tests.support.training import write_config, write_pairs, zarrcache
from zarrcache import DataConfig, ZarrDataset
from zarrcache._units import parse_bytes
from zarrcache.data.reader import open_reader


@pytest.fixture
def uploaded(tmp_path: Path, s3_server: S3Server, bucket: str) -> str:
    """URL above three pairs on S3, and an id without stores. ``tmp_path`` has the same stores and
    the map.
    """
    write_pairs(tmp_path, 3)
    for role in ("data", "label"):
        s3_server.put_tree(tmp_path / role, f"s3://{bucket}/{role}")
    return f"s3://{bucket}"


@pytest.fixture
def config(tmp_path: Path, uploaded: str, s3_server: S3Server, fault_proxy: FaultProxy) -> Path:
    """The training config; requests go through the proxy."""
    return write_config(
        tmp_path,
        uploaded,
        s3_kwargs=s3_server.kwargs_at(fault_proxy.endpoint_url),
        retry={"attempts": 1},
    )


def test_after_warm_everything_works_with_the_server_switched_off(
    config: Path, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    """A dry run fetches nothing; warm fetches each object once; then split, values, status and
    evict need no server.
    """
    dry = zarrcache("warm", config, "--dry-run")
    assert dry.code == 0, dry.err
    assert dry.out.startswith("Would fetch 6 of 6 densities of 3 ids (")
    assert dry.out.endswith("0 fresh. Dry run: nothing was fetched.\n")
    assert fault_proxy.count("GET") == 0

    done = zarrcache("warm", config)
    assert done.code == 0, done.err
    assert done.out.startswith("Warmed 3 of 3 ids (2.8 KiB decoded, ")
    assert done.out.rstrip().endswith("; 0 failed.")
    assert "1 of 4 task ids of GGA have no store" in done.err
    assert "mp-absent" in done.err
    assert fault_proxy.repeats() == 0

    fault_proxy.down()
    reader = open_reader(DataConfig.from_yaml(config))
    train, test = reader.data_split()
    assert (len(train[0]), len(test[0])) == (1, 2)
    expected = write_pairs(tmp_path / "again", 3)
    for (task_id, role), values in expected.items():
        assert np.array_equal(
            reader.load(task_id, role)[0], values.ravel() / np.float32(values.size)
        )  # type: ignore[arg-type]
    assert reader.stats.requests == 0
    state = zarrcache("status", config, "--json")
    assert (
        state.code,
        state.document["coverage"]["warm"],
        state.document["coverage"]["missing"],
    ) == (0, 3, 1)
    assert zarrcache("evict", config, "--yes").out.startswith(
        "Evicted 8 entries, freed 64.0 KiB in "
    )


def test_warming_again_makes_no_request(
    config: Path, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    """With ``revalidate: never`` and a listing that has every id."""
    (tmp_path / "map.json").write_text('{"GGA": ["mp-0", "mp-1", "mp-2"]}')
    assert zarrcache("warm", config).code == 0
    before = fault_proxy.count()
    again = zarrcache("warm", config)
    assert again.out.startswith("Warmed 3 of 3 ids (")
    assert "3 fresh already" in again.out
    assert (
        "6 densities were in the cache already, and not compared with the origin "
        "(cache.revalidate: never). Pass --revalidate to compare." in again.err
    )
    assert (
        "0 of 6 densities of 3 ids (0 B, 0 requests); 6 fresh."
        in zarrcache("warm", config, "--dry-run").out
    )
    assert fault_proxy.count() == before


def test_revalidate_makes_only_lists(config: Path, fault_proxy: FaultProxy) -> None:
    """One per directory and one per density."""
    assert zarrcache("warm", config).code == 0
    before = fault_proxy.count()
    again = zarrcache("warm", config, "--revalidate", "--json")
    seen = fault_proxy.seen()[before:]
    assert {request.op for request in seen} == {"LIST"}
    assert len(seen) == 2 + 6
    assert (
        again.document["warm"],
        again.document["fresh"],
        again.document["stats"]["fetched_bytes"],
    ) == (3, 3, 0)
    assert again.document["missing"] == ["mp-absent"]


def test_two_processes_fetch_each_object_once(config: Path, fault_proxy: FaultProxy) -> None:
    """The report counts the requests of both."""
    done = zarrcache("warm", config, "--workers", "2", "--json")
    assert (done.code, done.document["warm"]) == (0, 3), done.err
    assert fault_proxy.repeats() == 0
    # without the LISTs of the directories, which plan_warm makes
    assert done.document["stats"]["requests"] == fault_proxy.count() - 2


def test_a_failing_store_is_exit_1_and_the_others_are_warm(
    config: Path, fault_proxy: FaultProxy
) -> None:
    """With URL and cause; the next run fetches the rest."""
    fault_proxy.rules(Rule(op="GET", key=r"label/mp-1\.zarr", then="503"))
    done = zarrcache("warm", config)
    assert done.code == 1
    assert done.out.startswith("Warmed 2 of 3 ids (")
    assert done.out.rstrip().endswith("; 1 failed.")
    assert "failed: mp-1 (label): s3://" in done.err
    assert "503" in done.err
    fault_proxy.rules()
    assert zarrcache("warm", config).out.startswith("Warmed 3 of 3 ids (")


@pytest.mark.parametrize(("gone", "is_said"), [("", True), ("/charge_density_total", False)])
def test_revalidate_is_advised_if_a_store_is_gone_but_not_if_its_array_is(
    tmp_path: Path, gone: str, is_said: bool
) -> None:
    write_pairs(tmp_path, 3)
    config = write_config(tmp_path)
    assert zarrcache("warm", config, "--ids", _ids(tmp_path, "mp-0")).code == 0
    shutil.rmtree(tmp_path / "label" / f"mp-1.zarr{gone}")
    done = zarrcache("warm", config, "--ids", _ids(tmp_path, "mp-0", "mp-1"))
    assert (done.code, "failed: mp-1 (label): " in done.err) == (1, True), done.err
    assert ("pass --revalidate to list them again" in done.err) == is_said


def _ids(directory: Path, *names: str) -> Path:
    (directory / "ids.txt").write_text("\n".join(names))
    return directory / "ids.txt"


def test_an_origin_that_is_down_ends_warm_with_one_error(
    config: Path, fault_proxy: FaultProxy
) -> None:
    """Whether every density fails or the directories cannot be listed."""
    fault_proxy.rules(Rule(op="GET", then="503"))
    done = zarrcache("warm", config, "--workers", "1")
    assert (done.code, done.out) == (1, "")
    assert done.err.count("\nerror: ") == 1
    assert (
        "The origin does not answer, or denies access: 4 densities in a row failed. 0 of 6 "
        "densities are warm; run the same command again to continue." in done.err
    )
    fault_proxy.down()
    done = zarrcache("warm", config)
    assert (done.code, done.err.count("\n")) == (1, 1)
    assert done.err.startswith("error: s3://")


def test_wrong_credentials_are_one_error_without_retry(
    config: Path, fault_proxy: FaultProxy
) -> None:
    fault_proxy.rules(Rule(then="403"))
    done = zarrcache("warm", config)
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert "Traceback" not in done.err
    assert fault_proxy.count() == 1


def test_ids_that_do_not_fit_are_counted_and_a_limit_is_advised(
    config: Path, tmp_path: Path, uploaded: str, s3_server: S3Server
) -> None:
    """Room for the listings and two pairs."""
    small = write_config(
        tmp_path,
        uploaded,
        s3_kwargs=s3_server.s3_kwargs,
        name="small.yaml",
        dir=str(tmp_path / "small"),
        limit=6 * 8192,
    )
    done = zarrcache("warm", small)
    assert done.code == 0
    assert done.out.startswith("Warmed 2 of 3 ids (")
    assert "1 id did not fit: cache.limit (48.0 KiB) or cache.min_free is reached" in done.err
    advice = r"needs about (.*) on disk for all ids: raise cache.limit, or free space with `zarrc"
    found = re.search(advice, done.err)
    assert found is not None
    assert 48 * 1024 < parse_bytes(found[1]) < 80 * 1024


def test_ids_come_from_a_file_and_limit_stops_early(config: Path, tmp_path: Path) -> None:
    """One id per line with comments, or a JSON list."""
    (tmp_path / "ids.txt").write_text("# first try\nmp-2\n\nmp-0  # and this\n")
    done = zarrcache("warm", config, "--ids", tmp_path / "ids.txt", "--limit", "500 B")
    assert done.out.startswith("Warmed 1 of 2 ids (")
    assert "1 id left out: --limit (500 B) is reached." in done.err
    (tmp_path / "ids.json").write_text('["mp-2"]')
    assert (
        zarrcache("warm", config, "--ids", tmp_path / "ids.json", "--json").document["fresh"] == 1
    )


def test_pairs_on_different_grids_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By the run that reads them, by a later one, at the split, and with the first sample."""
    write_pairs(tmp_path, 3)
    small_group(tmp_path / "label" / "mp-1.zarr", shape=(24, 24, 24))
    config = write_config(tmp_path)
    words = "1 id with input and label on different grids: mp-1. If the network needs"
    for _ in range(2):
        done = zarrcache("warm", config)
        assert (done.code, words in done.err) == (0, True), done.err
    reader = open_reader(DataConfig.from_yaml(config))
    dataset = ZarrDataset(reader, "all")
    assert "1 of 3 materials have input and label on different grids: mp-1. If" in caplog.text
    caplog.clear()
    dataset[dataset.task_ids.index("mp-0")]
    assert not caplog.text
    for _ in range(2):
        dataset[dataset.task_ids.index("mp-1")]
    assert caplog.text.count("mp-1: the data is on a grid of") == 1
    assert "the label on one of 24 x 24 x 24" in caplog.text


def test_nothing_warm_is_exit_1(tmp_path: Path) -> None:
    """So that ``warm && train`` stops: no id, no store of any id, or no room for one id."""
    write_pairs(tmp_path, 2)
    ids = json.loads((tmp_path / "map.json").read_text())
    (tmp_path / "map.json").write_text(json.dumps({**ids, "SCAN": []}))
    good = write_config(tmp_path)
    text = good.read_text()
    bad = tmp_path / "bad.yaml"
    for old, new, words in [
        (
            f"{tmp_path}/data",
            f"{tmp_path}/data/mp-0.zarr",
            (
                "error: none of the 3 ids of GGA has a store for both input and label: 0 in "
                f"{tmp_path}/data/mp-0.zarr, 2 in {tmp_path}/label. Check data_dir, label_dir and"
            ),
        ),
        ("functional: GGA", "functional: SCAN", "error: SCAN has no ids. Check functional and map"),
        ("limit: 1 GiB", "limit: 10 KiB", "error: 2 ids did not fit: cache.limit (10.0 KiB) or"),
    ]:
        assert old in text
        bad.write_text(text.replace(old, new))
        done = zarrcache("warm", bad, "--quiet")
        assert (done.code, words in done.err) == (1, True), done.err
        assert done.out.startswith("Warmed 0 of ")
    done = zarrcache("warm", good)
    assert (done.code, f" in {tmp_path}/cache in " in done.out) == (0, True)


def test_a_split_that_training_will_refuse_is_named_while_warming(tmp_path: Path) -> None:
    write_pairs(tmp_path, 2)
    config = write_config(tmp_path)
    text = config.read_text()
    assert "train_fraction: " in text
    config.write_text(re.sub("train_fraction: .*", "train_fraction: 20", text))
    done = zarrcache("warm", config)
    assert (done.code, done.out.startswith("Warmed 2 of 2 ids")) == (0, True)
    assert "train_fraction is 20: it takes 20 of 2 task ids for training" in done.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--limit", "much"), "'much' is not a size. Write for example '200 GiB'"),
        (("--workers", "0"), "'--workers': '0' is not a whole number of at least 1."),
        (("--workers", "1.5"), "'--workers': '1.5' is not a whole number of at least 1."),
        (("--split", "validation"), "'validation' is not one of"),
        (("--ids", "/no/such/file"), "/no/such/file cannot be read (No such file or directory)."),
    ],
)
def test_a_wrong_option_is_exit_2_before_any_request(
    config: Path, arguments: tuple[str, ...], words: str
) -> None:
    done = zarrcache("warm", config, *arguments)
    assert (done.code, done.out) == (2, "")
    assert words in done.err


def test_an_unusable_cache_directory_is_exit_2(config: Path, tmp_path: Path) -> None:
    """Training would continue without a cache. ZARRCACHE_DIR overrides the config."""
    (tmp_path / "file").touch()
    done = zarrcache("warm", config, env={"ZARRCACHE_DIR": str(tmp_path / "file" / "cache")})
    assert done.code == 2
    assert (
        f"error: cache.dir {tmp_path}/file/cache cannot be used (Not a directory). Choose a "
        "directory on a local disk of this node" in done.err
    )


def test_a_config_without_cache_block_is_exit_2(tmp_path: Path) -> None:
    """A misspelt key is named; --verbose prints the traceback."""
    write_pairs(tmp_path, 1)
    path = write_config(tmp_path)
    text = path.read_text()
    path.write_text(text[: text.index("cache:")] + text[text.index("data_dir:") :])
    done = zarrcache("warm", path)
    assert done.code == 2
    assert f"error: {path} has no cache block. Add one (`zarrcache init` writes" in done.err
    path.write_text(text.replace("limit:", "limt:"))
    done = zarrcache("warm", path, "--verbose")
    assert done.code == 2
    assert "train.yaml: cache.limt is not a setting. Did you mean 'limit'?" in done.err
    assert "Traceback" in done.err


@pytest.mark.parametrize("form", ["block", "config"])
def test_every_command_reads_a_hydra_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Its data block, or the config that the block names; variables as Hydra writes them."""
    write_pairs(tmp_path, 2)
    keys = yaml.safe_load(write_config(tmp_path).read_text())
    monkeypatch.setenv("STORES", str(tmp_path))
    keys["data_dir"] = "${oc.env:STORES}/data"
    keys["cache"]["dir"] = "${oc.env:NOT_SET,${oc.env:STORES}}/cache"
    block = keys if form == "block" else {"config": keys, "batch_size": 4}
    target = {"_target_": "zarrcache.lightning.ZarrDataModule"}
    path = tmp_path / "hydra.yaml"
    path.write_text(yaml.safe_dump({"data": target | block, "model": {"_target_": "a.Net"}}))
    for command, words in (
        (("warm",), "Warmed 2 of 2 ids"),
        (("status",), "2 of 2 ids warm"),
        (("verify", "--against-origin"), "Verified 6 entries"),
        (("plan", "--nodes", "1"), "Training split: 1 sample"),
        (("evict", "--dry-run"), "Would evict 6"),
        (("doctor",), str(tmp_path / "cache")),
    ):
        run = zarrcache(command[0], path, *command[1:])
        assert run.code == 0, run.err
        assert words in run.out, (command, run.out)


@pytest.mark.parametrize("command", ["warm", "plan", "lock"])
def test_a_directory_that_does_not_exist_is_a_wrong_setting(tmp_path: Path, command: str) -> None:
    """As it is for ``convert`` and ``map``."""
    write_pairs(tmp_path, 1)
    config = write_config(tmp_path, tmp_path / "nowhere")
    done = zarrcache(command, config, *(("-o", tmp_path / "x.lock") if command == "lock" else ()))
    assert (done.code, done.out) == (2, "")
    assert "nowhere/data is not a directory of this machine" in done.err
