"""A cache directory on a network file system: refused before the run starts, or used without
SQLite's write-ahead log.
"""

from __future__ import annotations

import os
import pickle
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.cachedirs import array_of, key_of
from tests.support.networkmount import can_mount, network_mount
from tests.support.training import write_config, write_pairs, zarrcache
from zarrcache import CacheConfig, DataConfig, RhoData, ZarrS3Reader, get_dataset, open_store
from zarrcache.cache.tiers import ArrayCache
from zarrcache.disk import filesystems as mounts
from zarrcache.disk.index import Index
from zarrcache.errors import ConfigError
from zarrcache.ops.doctor import examine
from zarrcache.ops.selection import cache_at
from zarrcache.stats import Counters

needs_mount = pytest.mark.skipif(not can_mount(), reason="only root can mount, on Linux with FUSE")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A real mount, which the kernel lists as ``fuse.sshfs``."""
    with network_mount(tmp_path) as path:
        yield path


@pytest.fixture(params=[pytest.param("mounted", marks=needs_mount), "listed"])
def network(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The real mount; without permission to mount, a directory that a patched mount table calls
    NFS.
    """
    if request.param == "mounted":
        return request.getfixturevalue("mounted")  # type: ignore[no-any-return]
    table = tmp_path / "mountinfo"
    table.write_text(
        f"1 0 8:1 / / rw - ext4 /dev/sda rw\n2 1 0:9 / {os.path.realpath(tmp_path)}/net rw - nfs4 "
        "server:/net rw\n"
    )
    monkeypatch.setattr(mounts, "_MOUNTINFO", table)
    (tmp_path / "net").mkdir()
    return tmp_path / "net"


def allowed(network: Path, **block: Any) -> CacheConfig:
    """Cache settings that allow it."""
    return CacheConfig(
        **{"dir": network / "cache", "min_free": 0, "allow_network_fs": True, **block}
    )


def index_of(network: Path) -> Path:
    """Path of its index."""
    return network / "cache" / "zarrcache-v1" / "cache.db"


def journal_of(path: Path) -> str:
    """The journal mode in an index's header: 2 means a write-ahead log."""
    return {1: "rollback", 2: "wal"}[path.read_bytes()[18]]


# -- refused


def test_every_way_to_a_cache_refuses_a_network_file_system_and_writes_nothing(
    network: Path, tmp_path: Path
) -> None:
    """When the reader is made, before a request: a configuration error, not a fault that training
    survives.
    """
    write_pairs(tmp_path, 2)
    cache = {"dir": str(network / "cache"), "min_free": 0}
    where = {
        "data_dir": tmp_path / "data",
        "label_dir": tmp_path / "label",
        "map_dir": tmp_path / "map.json",
        "functional": "GGA",
    }
    for use in (
        lambda: ZarrS3Reader(**where, normalize=False, train_fraction=0.5, cache=cache),
        lambda: get_dataset({**where, "cache": cache}),
        lambda: open_store(tmp_path / "data" / "mp-0.zarr", cache=cache),
        lambda: Index(CacheConfig.of(cache)),
        lambda: Index(CacheConfig.of(cache)).open(),
    ):
        with pytest.raises(
            ConfigError,
            match=r"a network file system: locks, SQLite and memory maps .* Choose a disk of this "
            r"node",
        ) as caught:
            use()
        assert f"cache.dir {network / 'cache'} is on " in str(caught.value)
        assert "allow_network_fs: true" in str(caught.value)
    assert os.listdir(network) == []


@needs_mount
def test_commands_refuse_with_exit_code_2(mounted: Path, tmp_path: Path) -> None:
    """``doctor`` reports it as a finding; no traceback."""
    write_pairs(tmp_path, 2)
    config = write_config(tmp_path, dir=str(mounted / "cache"))
    run = zarrcache("warm", config)
    assert run.code == 2
    assert "fuse.sshfs, a network file system" in run.err
    run = zarrcache("doctor", config, "--json")
    assert run.code == 1
    (finding,) = [f for f in run.document["findings"] if f["name"] == "cache directory"]
    assert finding["verdict"] == "fail"
    assert "fuse.sshfs, a network file system" in finding["found"]
    assert os.listdir(mounted) == []
    assert (
        zarrcache(
            "warm",
            write_config(
                tmp_path, name="allowed.yaml", dir=str(mounted / "cache"), allow_network_fs=True
            ),
        ).code
        == 0
    )
    for command in (["status", config], ["evict", config, "--yes"], ["verify", config]):
        run = zarrcache(*command)
        assert run.code == 2
        assert "fuse.sshfs, a network file system" in run.err


# -- allowed


def test_training_runs_there_cold_and_warm_without_a_write_ahead_log(
    network: Path, tmp_path: Path
) -> None:
    """The same values; a second reader has only hits; a log or its shared memory never exists."""
    values = write_pairs(tmp_path, 3)
    config = DataConfig.from_yaml(
        write_config(tmp_path, dir=str(network / "cache"), allow_network_fs=True)
    )
    config = config.model_copy(update={"normalize_data": False})
    for epoch in range(2):
        train, test = get_dataset(config)
        reader = train[0].reader
        for sets, ids in zip((train, test), reader.split_task_ids(), strict=True):
            for i, (data, label) in enumerate(RhoData(*sets, data_augmentation=False)):  # type: ignore[arg-type]
                assert np.array_equal(data.numpy()[0], values[ids[i], "data"])
                assert np.array_equal(label.numpy()[0], values[ids[i], "label"])
                assert not {"cache.db-wal", "cache.db-shm"} & set(
                    os.listdir(index_of(network).parent)
                )
        assert (reader.stats.hits, reader.stats.misses) == ((0, 6) if epoch == 0 else (6, 0))
        assert reader.stats.cache_errors == 0
    assert journal_of(index_of(network)) == "rollback"


def test_on_a_disk_of_the_node_the_key_changes_nothing(tmp_path: Path) -> None:
    """The file system decides: one config works on clusters where only some nodes have a local
    disk.
    """
    index = Index(CacheConfig(dir=tmp_path / "cache", allow_network_fs=True))
    index.open()
    assert journal_of(tmp_path / "cache" / "zarrcache-v1" / "cache.db") == "wal"


@needs_mount
def test_an_index_with_a_write_ahead_log_is_changed_over_and_keeps_its_entries(
    mounted: Path, tmp_path: Path
) -> None:
    """Made by an older version, or copied from a local disk; entries only in the log are kept. And
    back.
    """
    local = ArrayCache(CacheConfig(dir=tmp_path / "disk" / "cache", min_free=0), Counters())
    for number in range(20):
        assert local.put(key_of(number), array_of(number), source="s")
    assert (tmp_path / "disk" / "cache" / "zarrcache-v1" / "cache.db-wal").stat().st_size > 0
    local.index._file.close_before_fork()  # the process that made it ends
    far = ArrayCache(allowed(mounted), Counters())
    for number in range(20):
        entry = far.get(key_of(number))
        assert entry is not None
        assert np.array_equal(entry.array, array_of(number))
    assert journal_of(index_of(mounted)) == "rollback"
    far.index._file.close_before_fork()
    near = ArrayCache(CacheConfig(dir=tmp_path / "disk" / "cache", min_free=0), Counters())
    assert near.get(key_of(3)) is not None
    assert journal_of(tmp_path / "disk" / "cache" / "zarrcache-v1" / "cache.db") == "wal"


def test_the_next_process_rolls_back_a_killed_writer(network: Path) -> None:
    """Its rollback journal remains; a read-only connection could not roll back."""
    cache = ArrayCache(allowed(network), Counters())
    for number in range(3):
        assert cache.put(key_of(number), array_of(number), source="s")
    volume = cache.index.volume_bytes()
    code = (
        "import os, signal, sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        # so that changed pages are written before the end of the transaction
        "c.execute('PRAGMA cache_size = 1')\n"
        "c.execute('BEGIN IMMEDIATE')\n"
        "c.execute('DELETE FROM Cache')\n"
        "insert = 'INSERT INTO Cache (key, raw, tag, size, value) VALUES (?, 1, ?, 1, ?)'\n"
        "c.executemany(insert, ((f'x{i}', 'array', 'x' * 900) for i in range(500)))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code, str(index_of(network))], check=False, timeout=60
        ).returncode
        == -signal.SIGKILL
    )
    assert Path(f"{index_of(network)}-journal").stat().st_size > 0
    assert len(list(cache.index.rows())) == 3
    assert cache.index.volume_bytes() == volume
    for number in range(3):
        assert ArrayCache(allowed(network), Counters()).get(key_of(number)) is not None


def _put_some(config: CacheConfig, start: int) -> None:
    cache = ArrayCache(config, Counters())
    for number in range(start, start + 10):
        assert cache.put(key_of(number), array_of(number), source="s")


@needs_mount
def test_four_processes_write_there_at_once(mounted: Path) -> None:
    """No entry is lost or counted twice, though readers and writers block each other."""
    from multiprocessing import get_context

    context = get_context("fork")
    processes = [
        context.Process(target=_put_some, args=(allowed(mounted), 100 * n)) for n in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    cache = ArrayCache(allowed(mounted, verify="always"), Counters())
    for number in (100 * n + i for n in range(4) for i in range(10)):
        entry = cache.get(key_of(number))
        assert entry is not None
        assert np.array_equal(entry.array, array_of(number))
    assert cache.index.volume_bytes() == 40 * 8192


def test_the_index_opens_beside_a_busy_writer(network: Path) -> None:
    """Readers and writers block each other there; opening must wait instead of failing."""
    Index(allowed(network)).open()
    code = (
        "import sqlite3, sys, time\n"
        "c = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)\n"
        "print(flush=True)\n"
        "while True:\n"
        "    c.execute('BEGIN EXCLUSIVE')\n"
        "    c.execute('UPDATE Settings SET value = value WHERE key = \"count\"')\n"
        "    c.execute('COMMIT')\n"
        "    time.sleep(0.0003)\n"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(index_of(network))], stdout=subprocess.PIPE
    )
    try:
        assert writer.stdout is not None
        writer.stdout.readline()
        for _ in range(30):
            Index(allowed(network)).open()
    finally:
        writer.kill()
        writer.communicate()


def test_doctor_warns_of_an_allowed_one_and_a_directory_given_by_hand_may_be_looked_at(
    network: Path,
) -> None:
    """``zarrcache evict --dir`` does not know the settings, and does not train."""
    _put_some(allowed(network), 0)
    found = {finding.name: finding for finding in examine(allowed(network))}
    assert found["file system"].verdict == "warn"
    assert "a network file system" in found["file system"].found
    assert {
        finding.verdict
        for name, finding in found.items()
        if name in ("cache directory", "file locks", "mmap")
    } == {"ok"}
    assert Index(cache_at(network / "cache")).totals() == {"array": (10, 10 * 8192)}


def test_setting_survives_pickling_to_a_worker(network: Path) -> None:
    """A worker opens its own index from the same config."""
    index = pickle.loads(pickle.dumps(Index(allowed(network))))
    index.open()
    assert journal_of(index_of(network)) == "rollback"
    with sqlite3.connect(index_of(network)) as connection:
        assert connection.execute(
            "SELECT value FROM Settings WHERE key = 'sqlite_journal_mode'"
        ).fetchall() == [("delete",)]
    connection.close()
