"""``evict``, ``status``, ``verify`` and ``doctor`` as commands, over a local directory."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support.processes import HANG_S, end_all
from tests.support.stores import small_group
from tests.support.training import command, start, write_config, write_pairs, zarrcache
from zarrcache import DataConfig, plan_warm
from zarrcache.cli.cache import entries_by_kind
from zarrcache.disk import ARRAY, Row


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Two pairs, warm: four densities and two listings, each one header page and one data page."""
    write_pairs(tmp_path, 2)
    path = write_config(tmp_path)
    plan_warm(DataConfig.from_yaml(path)).execute()
    return path


def test_evict_prints_its_plan_needs_confirmation_and_drops(config: Path, tmp_path: Path) -> None:
    """Dry run, no terminal, --yes, nothing left: exit 0, 2, 0, 0."""
    what = (
        f"6 entries (48.0 KiB) of {config} from {tmp_path}/cache: 4 densities of total, "
        "normalize_data: true; 2 listings"
    )
    dry = zarrcache("evict", config, "--dry-run")
    assert (dry.code, dry.out) == (0, f"Would evict {what}. Dry run: nothing was evicted.\n")
    alone = zarrcache("evict", config)
    assert (alone.code, alone.out) == (2, "")
    assert (
        alone.err
        == f"error: About to evict {what}, but there is no terminal to ask for confirmation. Pass "
        "--yes to evict, or --dry-run to see what would be evicted.\n"
    )
    assert zarrcache("status", config, "--json").document["array_tier"]["entries"] == 6
    assert zarrcache("evict", config, "--ids", "/dev/null").code == 2
    (tmp_path / "ids.txt").write_text("mp-9999\n")
    typo = zarrcache("evict", config, "--ids", tmp_path / "ids.txt", "--yes")
    assert (typo.code, typo.out) == (0, "Nothing to evict.\n")
    assert typo.err == "not cached: 1 id: mp-9999\n"
    done = zarrcache("evict", config, "--yes", "--json")
    assert done.document == {
        "directory": f"{tmp_path}/cache",
        "entries": 6,
        "disk_bytes": 49152,
        "freed_bytes": 49152,
        "dry_run": False,
    }
    again = zarrcache("evict", "--all", "--dir", tmp_path / "cache", "--yes")
    assert (again.code, again.out) == (0, "Nothing to evict.\n")


@pytest.mark.parametrize(
    ("answer", "code", "left"),
    [(b"n\n", 1, 6), (b"y\n", 0, 0), (b"\x04", 1, 6), (b"\x03", 130, 6)],
    ids=["no", "yes", "end of input", "Ctrl-C"],
)
def test_evict_asks_for_confirmation_at_a_terminal(
    config: Path, answer: bytes, code: int, left: int
) -> None:
    keyboard, terminal = pty.openpty()
    err = b""
    try:
        with subprocess.Popen(
            command("evict", config), stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            if answer == b"\x03":
                assert process.stderr is not None
                while not err.endswith(b"[y/N]:"):  # the signal is for the question
                    err += process.stderr.read(1)
                process.send_signal(signal.SIGINT)
            else:
                os.write(keyboard, answer)
            err += process.communicate(timeout=60)[1]
    finally:
        os.close(keyboard)
        os.close(terminal)
    assert b"About to evict 6 entries (48.0 KiB) of " in err
    assert b"Proceed? [y/N]" in err
    assert process.returncode == code
    assert zarrcache("status", config, "--json").document["array_tier"]["entries"] == left


def test_evict_without_a_selection_is_exit_2(config: Path, tmp_path: Path) -> None:
    for arguments, words in [
        ((), "No cache given. Pass CONFIG or --dir DIR."),
        (
            ("--dir", tmp_path / "cache"),
            "No entries are selected. Pass a training config to select those of its ids, or --all",
        ),
        ((config, "--dir", tmp_path), "CONFIG and --dir exclude each other"),
        ((config, "--older-than", "old"), "'old' is not a duration. Write for example '60 s'"),
    ]:
        done = zarrcache("evict", *arguments)
        assert (done.code, done.out) == (2, "")
        assert words in done.err


def test_status_with_a_limit_without_its_unit_says_so(config: Path) -> None:
    """``limit: 200`` is 200 bytes."""
    config.write_text(config.read_text().replace("1073741824", "200").replace("1 GiB", "200"))
    assert "of 200 B (" in (out := zarrcache("status", config).out)
    assert "write cache.limit with its unit, for example 200 GiB" in out


def test_status_prints_entries_bytes_and_warm_ids(config: Path, tmp_path: Path) -> None:
    """For a config with nothing warm it names the command to run."""
    done = zarrcache("status", config)
    assert done.code == 0
    assert (
        f"cache        {tmp_path}/cache\n"
        "array tier   4 densities, 2 listings, 48.0 KiB\n"
        "byte tier    0 entries, 0 B\n" in done.out
    )
    assert "volume       48.0 KiB of 1.0 GiB (0.0 %)\n" in done.out
    assert "GGA          2 of 2 ids warm (100.0 %); 1 more id in the map has no store\n" in done.out
    assert done.err == ""
    cold = write_config(tmp_path, name="cold.yaml", dir=str(tmp_path / "other"))
    done = zarrcache("status", cold)
    assert "(nothing is cached there yet)" in done.out
    assert done.err == f"Run `zarrcache warm {cold}` to fill the cache.\n"
    full = write_config(tmp_path, name="full.yaml", dir=str(tmp_path / "other"), min_free="900 TiB")
    assert zarrcache("status", full).err.startswith("The disk has less free than cache.min_free")
    done = zarrcache("status", env={"ZARRCACHE_DIR": str(tmp_path / "cache")})
    assert "array tier   4 densities, 2 listings, 48.0 KiB" in done.out


def test_verify_drops_an_entry_with_a_flipped_bit(config: Path, tmp_path: Path) -> None:
    """Exit 1 and the file name; the next warm fetches that one density."""
    victim = next(
        path
        for path in (tmp_path / "cache" / "zarrcache-v1" / "entries").glob("*/*")
        if b"charge_density_total" in path.read_bytes()[:4096]
    )
    raw = bytearray(victim.read_bytes())
    raw[4096] ^= 1
    victim.write_bytes(raw)
    done = zarrcache("verify", "--dir", tmp_path / "cache")
    assert (done.code, done.out) == (1, "Verified 6 entries (48.0 KiB): 1 corrupt.\n")
    assert f"corrupt: entries/{victim.parent.name}/{victim.name} ({tmp_path}/" in done.err
    assert "its checksum does not match" in done.err
    assert not victim.exists()
    assert zarrcache("warm", config, "--json").document["stats"]["misses"] == 1
    done = zarrcache("verify", config, "--against-origin", "--json")
    assert (
        done.code,
        done.document["entries"],
        done.document["corrupt"],
        done.document["stale"],
    ) == (0, 6, [], [])


def test_verify_against_the_origin_names_what_is_stale(config: Path, tmp_path: Path) -> None:
    """It is no error: the next read fetches it."""
    store = tmp_path / "label" / "mp-0.zarr"
    small_group(store, shape=(6, 5, 4), seed=9)
    done = zarrcache("verify", config, "--against-origin")
    assert (done.code, done.out) == (0, "Verified 6 entries (48.0 KiB): 0 corrupt, 1 stale.\n")
    assert f"stale: {store}: the origin has another version" in done.err
    assert "They were dropped. Run `zarrcache warm` to fetch them again." in done.err
    assert zarrcache("warm", config, "--json").document["stats"]["misses"] == 1


def test_verify_against_the_origin_keeps_and_names_what_is_gone_there(
    config: Path, tmp_path: Path
) -> None:
    """The entry may be the last copy, so nothing says that `warm` fetches it."""
    store = tmp_path / "label" / "mp-0.zarr"
    shutil.rmtree(store)
    for _ in range(2):
        done = zarrcache("verify", config, "--against-origin")
        assert done.code == 1
        assert done.out == "Verified 6 entries (48.0 KiB): 0 corrupt, 1 gone at the origin.\n"
        assert done.err == f"gone: {store}: it is gone at the origin; the entry is kept\n"


@pytest.mark.parametrize("name", ["status", "verify", "evict", "doctor"])
def test_directory_without_a_cache_is_exit_2(name: str, tmp_path: Path) -> None:
    """A misspelt directory is not an empty cache, and none is created in it."""
    more = ("--all", "--yes") if name == "evict" else ()
    done = zarrcache(name, "--dir", tmp_path / "nope", *more)
    assert (done.code, done.out) == (2, "")
    assert f"There is no cache in {tmp_path}/nope: it does not exist. Give the" in done.err
    done = zarrcache(name, "--dir", tmp_path, *more)
    assert f"There is no cache in {tmp_path}: it has no zarrcache-v1 in it." in done.err
    assert not list(tmp_path.iterdir())


def test_status_and_evict_name_the_entries_that_the_config_does_not_use(
    config: Path, tmp_path: Path
) -> None:
    """In other units and encodings, of other channels; of the ids of this config alone."""
    write_pairs(tmp_path, 2, diff=True)
    text = config.read_text()
    for keys in ("normalize_data: false\n", "density_type: diff\n"):
        config.write_text(text + keys)
        assert zarrcache("warm", config).code == 0
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["mp-0"]}))
    config.write_text(text.replace("cache:", "cache:\n  arrays: {encoding: float16}", 1))
    assert zarrcache("warm", config).code == 0  # of the other id, float32 stays
    config.write_text(text + "normalize_data: volume\n")
    done = zarrcache("status", config)
    assert "GGA          0 of 1 id warm (0.0 %)" in done.out
    unused = [line.split(": ", 1)[1] for line in done.out.splitlines() if "not used by" in line]
    assert sorted(unused) == [
        "2 densities of diff, normalize_data: true",
        "2 densities of total, normalize_data: false",
        "2 densities of total, normalize_data: true, encoding float16",
    ]
    config.write_text(text)
    assert "2 densities of total, normalize_data: true\n" not in zarrcache("status", config).out
    assert (
        "2 densities of total, normalize_data: true, encoding float16; "
        in zarrcache("evict", config, "--dry-run").out
    )
    everything = zarrcache("evict", "--all", "--dir", tmp_path / "cache", "--dry-run").out
    assert f" of every config from {tmp_path}/cache: " in everything
    assert "4 densities of total, normalize_data: false; 4 densities of diff" in everything


def test_names_in_planted_rows_do_not_reach_the_terminal_as_they_are() -> None:
    row = Row("0" * 32, ARRAY, "entries/00/0", 1, 0.0, "s3\ns3://b/mp-1.zarr\na\x1b[2J as \x1b[1m")
    assert entries_by_kind([row]) == r"'1 density of a\x1b[2J, encoding \x1b[1m'"


def test_several_sources_of_an_id_are_named_once_by_each_command(
    config: Path, tmp_path: Path
) -> None:
    (tmp_path / "data" / "mp-1.CHGCAR").touch()
    (tmp_path / "data" / "mp-1").mkdir()  # not read, so no source
    said = (
        f"1 id has several sources in {tmp_path}/data. Of mp-1, mp-1.zarr is read, not "
        "mp-1.CHGCAR. Set source to the kinds to read, the preferred ones first, or remove the "
        "others.\n"
    )
    for name, *options in (
        ("warm", "--revalidate", "--workers", 2), ("warm",), ("plan",), ("audit",), ("status",),
        ("doctor",),
    ):  # fmt: skip
        done = zarrcache(name, config, *options)
        assert (done.out + done.err).count(said) == 1, name
    config.write_text(config.read_text() + "source: [zarr, CHGCAR]\n")
    for name in ("warm", "plan", "audit", "status", "doctor"):
        done = zarrcache(name, config)
        assert said not in done.out + done.err, name


def test_of_sources_of_one_kind_the_others_have_to_be_removed(config: Path, tmp_path: Path) -> None:
    """``source`` names kinds, and these have the same."""
    for name in ("mp-7.CHGCAR", "mp-7.CHGCAR.gz"):
        (tmp_path / "data" / name).touch()
    done = zarrcache("warm", config, "--revalidate")
    assert (
        "Of mp-7, mp-7.CHGCAR is read, not mp-7.CHGCAR.gz. Remove the others: source cannot "
        "choose among files of one kind, CHGCAR." in done.err
    )


@pytest.mark.parametrize("name", ["warm", "doctor"])
def test_a_loader_whose_name_get_dataset_would_refuse_is_named(config: Path, name: str) -> None:
    config.write_text(config.read_text() + "dataset_name: chgcar\n")
    done = zarrcache(name, config)
    assert "dataset_name is 'chgcar'; did you mean 'chgcar_data'?" in done.err


def test_a_path_that_the_locale_cannot_write_is_an_error_in_words(
    config: Path, tmp_path: Path
) -> None:
    config.write_text(config.read_text().replace("/cache", "/caché"))
    ascii_only = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    refused, done = (
        subprocess.run(
            command("status", config),
            env={**os.environ, **locale},
            capture_output=True,
            check=False,
        )
        for locale in (ascii_only, ascii_only | {"PYTHONUTF8": "1"})
    )
    assert (refused.returncode, done.returncode) == (2, 0)
    path = rf"{tmp_path}/cach\xe9"
    assert refused.stderr.decode() == (
        f"error: '{path}' cannot be written in ascii, the encoding of this locale. Run the command "
        "with PYTHONUTF8=1.\n"
    )


def test_doctor_fails_where_no_store_can_be_found(config: Path, tmp_path: Path) -> None:
    """No store at all, no id in the map; a warning if the first ids alone have none."""
    text = config.read_text()
    (tmp_path / "empty").mkdir()
    (tmp_path / "map.json").write_text(json.dumps({"GGA": ["mp-8", "mp-9"], "SCAN": []}))
    for old, new, verdict, words in [
        (f"{tmp_path}/data", f"{tmp_path}/empty", "fail", "it answers, but holds no store"),
        ("functional: GGA", "functional: SCAN", "fail", "map.json has no ids for SCAN"),
        ("", "", "warn", "holds 2 stores (mp-0.zarr), but none of the first ids of the map: mp-8"),
        ("limit: 1 GiB", "limit: 10 KiB", "warn", "used, more than the limit of 10.0 KiB"),
    ]:
        config.write_text(text.replace(old, new))
        done = zarrcache("doctor", config, "--json")
        found = [one for one in done.document["findings"] if words in one["found"]]
        assert [one["verdict"] for one in found[:1]] == [verdict], done.out
        assert done.code == (1 if verdict == "fail" else 0)


def test_doctor_reports_each_check_and_exits_1_if_one_fails(config: Path, tmp_path: Path) -> None:
    done = zarrcache("doctor", config)
    assert done.code == 0, done.out
    assert (
        f"ok    cache directory: {tmp_path}/cache/zarrcache-v1 is writable; 6 entries\n" in done.out
    )
    assert "ok    file locks: one holder at a time\n" in done.out
    assert "ok    mmap: an entry can be written, mapped and read\n" in done.out
    bad = write_config(
        tmp_path,
        "s3://no-such-bucket",
        s3_kwargs={"endpoint_url": "http://127.0.0.1:9", "anon": True},
        dir="/dev/null/cache",
    )
    done = zarrcache("doctor", bad, "--json")
    assert done.code == 1
    found = {finding["name"]: finding for finding in done.document["findings"]}
    assert done.document["ok"] is False
    assert (
        "cache.dir /dev/null/cache cannot be used (Not a directory)"
        in found["cache directory"]["found"]
    )
    assert found["data at s3://no-such-bucket/data"]["verdict"] == "fail"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("plan", "Interrupted."),
        ("status", "Interrupted."),
        ("warm", "Interrupted. Finished work is kept; run the same command again to continue."),
    ],
)
def test_ctrl_c_mentions_finished_work_only_for_resumable_commands(
    tmp_path: Path, command: str, words: str
) -> None:
    """Interrupted while the config is read from a pipe."""
    pipe = tmp_path / "train.yaml"
    os.mkfifo(pipe)
    process = start(command, pipe)
    writer = None
    try:
        deadline = time.monotonic() + HANG_S
        while writer is None:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            with contextlib.suppress(OSError):  # no reader has opened it yet
                writer = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=HANG_S)
    finally:
        end_all(process)
        if writer is not None:
            os.close(writer)
    assert (process.returncode, out, err) == (130, "", f"{words}\n")
