"""Files planted by a user who can write to the cache directory: none is executed, nothing outside
is touched, no job stops.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import re
import socket
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.cachedirs import array_of, key_of, settings
from zarrcache.cache.tiers import ArrayCache
from zarrcache.disk._database import CACHE_FAULTS, EntryDisk, Stored
from zarrcache.disk._publish import owner_id
from zarrcache.disk.index import Index, Intent
from zarrcache.disk.single_flight import SingleFlight
from zarrcache.errors import ConfigError
from zarrcache.ops.evict import plan_evict
from zarrcache.ops.status import read_status
from zarrcache.ops.verify import verify
from zarrcache.stats import Counters

NUMBERS = range(4)


class Mark:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A directory with an unrelated file; unchanged at the end of the test."""
    directory = tmp_path / "home"
    directory.mkdir()
    thesis = directory / "thesis"
    thesis.write_text("years of work")
    before = sorted(os.listdir(tmp_path))
    yield directory
    assert thesis.read_text() == "years of work"
    assert os.listdir(directory) == ["thesis"]
    assert set(os.listdir(tmp_path)) <= {*before, "cache"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A cache with a few entries."""
    use(tmp_path)
    return tmp_path / "cache" / "zarrcache-v1"


def use(tmp_path: Path, **block: Any) -> int:
    """What a job does: look up, store, drop. Returns the number of entries found first."""
    cache = ArrayCache(settings(tmp_path, **block), Counters())
    found = 0
    for number in NUMBERS:
        entry = cache.get(key_of(number))
        if entry is None:
            cache.put(key_of(number), array_of(number), source="s")
        else:
            assert np.array_equal(entry.array, array_of(number))
            found += 1
    cache.put(key_of("other"), array_of(9), source="s")
    # the reader counts a fault and goes on
    with contextlib.suppress(*CACHE_FAULTS):
        cache.drop(key_of("other"))
    cache.index._file.close_before_fork()
    return found


def everything(tmp_path: Path) -> None:
    """A job with each eviction policy; then each command, and the job again."""
    use(tmp_path)
    use(tmp_path, eviction="least-recently-stored", limit=5 * 8192)
    config = settings(tmp_path)
    read_status(config)
    verify(config)
    read_status(config)
    plan_evict(config, everything=True).execute()
    Index(config).sweep()
    use(tmp_path)
    assert use(tmp_path) == len(NUMBERS)


@contextlib.contextmanager
def index_of(root: Path) -> Iterator[sqlite3.Connection]:
    """The index, opened without the package."""
    connection = sqlite3.connect(root / "cache.db")
    try:
        yield connection
        connection.commit()
    finally:
        connection.close()


def insert(
    root: Path,
    key: object,
    tag: object,
    row: tuple[Any, ...],
    *,
    raw: int = 1,
    stored_s: object = 0.0,
) -> None:
    """Insert a row (size, mode, filename, value)."""
    with index_of(root) as connection:
        connection.execute(
            "INSERT OR REPLACE INTO Cache (key, raw, store_time, tag, size, mode, filename, value) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (key, raw, stored_s, tag, *row),
        )


def row_of(root: Path, filename: str, note: str) -> tuple[Any, ...]:
    """As the package would write it; only the name is wrong."""
    return EntryDisk(str(root)).store(Stored(filename, 4096, note), read=False)


@pytest.mark.parametrize("mode", range(6))
def test_a_pickle_in_the_index_is_never_loaded(
    tmp_path: Path, root: Path, victim: Path, mode: int
) -> None:
    """As a value in every mode of diskcache, as the key of a row, and as the file of one."""
    bomb = pickle.dumps(Mark(tmp_path / "executed"))
    digest = key_of(1).digest
    with index_of(root) as connection:
        connection.execute(
            "UPDATE Cache SET mode = ?, value = ? WHERE key = ?", (mode, bomb, digest)
        )
    insert(root, bomb, "array", (1, mode, None, bomb), raw=0)
    (root / "entries" / "ab").mkdir(exist_ok=True)
    (root / "entries" / "ab" / "abcd.val").write_bytes(bomb)
    insert(root, key_of("file").digest, "array", (1, mode, "entries/ab/abcd.val", None))
    everything(tmp_path)
    assert not (tmp_path / "executed").exists()
    pickle.loads(bomb)
    assert (tmp_path / "executed").is_dir()  # loading it elsewhere does execute it
    (tmp_path / "executed").rmdir()


NAMES = [
    "../../home/thesis",
    "entries/../../../home/thesis",
    "{victim}/thesis",
    "entries/ab/../../../../home/thesis",
    "link/thesis",
    "cache.db",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["entry", "intent of the dead", "replaced entry"])
def test_a_row_that_names_a_file_elsewhere_deletes_nothing(
    tmp_path: Path, root: Path, victim: Path, name: str, kind: str
) -> None:
    """Cleaning up, evicting, replacing and verifying all unlink files named in the index."""
    (root / "link").symlink_to(victim)
    filename = name.format(victim=victim)
    if kind == "intent of the dead":
        insert(
            root,
            "+0123",
            "intent",
            row_of(root, filename, owner_id().rpartition(" ")[0] + " 1"),
            stored_s=0.0,
        )
    else:
        insert(
            root,
            key_of("other" if kind == "replaced entry" else "x").digest,
            "array",
            row_of(root, filename, "file\n/data/x.zarr\na"),
        )
    everything(tmp_path)
    assert (root / "cache.db").exists()


STRANGE: list[tuple[Any, ...]] = [
    ("array", (None, 16, None, None), 0.0),
    ("array", ("many", 16, "entries/ab/ab", "many x\ny\nz"), 0.0),
    ("array", (4096, 16, b"entries/ab/ab", b"4096 x\ny\nz"), b"yesterday"),
    ("array", (4096, 16, "entries/ab/ab", "-1 x\ny\nz"), "never"),
    ("array", (4096, 16, "entries/ab/ab", "4096"), 0.0),
    ("array", (4096, 16, "entries/ab/ab", "9" * 5000 + " x\ny\nz"), 0.0),
    ("object", (4096, 16, "bytes/ab/ab", "4096 \n"), 1e300),
    (b"array", (2**62, 16, "entries/ab/ab", "1 x"), -1.0),
    (None, (1.5, "16", "", ""), None),
    ("intent", (4096, 16, None, None), None),
    ("intent", (4096, 16, "entries/ab/ab", b"\xff"), "x"),
]


@pytest.mark.parametrize("row", STRANGE, ids=range(len(STRANGE)))
@pytest.mark.parametrize("is_known", [True, False])
def test_a_row_of_the_wrong_types_stops_no_job(
    tmp_path: Path, root: Path, victim: Path, row: tuple[Any, ...], is_known: bool
) -> None:
    """SQLite accepts any type in any column. Under the key of an entry, and in extra rows."""
    tag, values, stored_s = row
    key = (
        ("+0123" if tag == "intent" else key_of(1).digest)
        if is_known
        else ("+" if tag == "intent" else "zz")
    )
    insert(root, key, tag, values, stored_s=stored_s)
    everything(tmp_path)


SETTINGS = [
    ("_directory", "{victim}"),
    ("disk_evil", 1),
    ("get", "not a method"),
    ("sqlite_temp_store_directory", "'{victim}'"),
    ("sqlite_journal_mode", "off"),
    ("sqlite_locking_mode", "exclusive"),
    ("sqlite_mmap_size", "1; DROP TABLE Cache"),
    ("size", "many"),
    ("eviction_policy", "no such policy"),
    ("cull_limit", None),
]


@pytest.mark.parametrize(("key", "value"), SETTINGS, ids=[key for key, _ in SETTINGS])
def test_settings_that_were_planted_are_set_aside_with_their_index(
    tmp_path: Path, root: Path, victim: Path, key: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Diskcache would turn them into attributes, arguments and pragmas. The entries are kept."""
    with index_of(root) as connection:
        text = value.format(victim=victim) if isinstance(value, str) else value
        connection.execute("INSERT OR REPLACE INTO Settings VALUES (?, ?)", (key, text))
    with caplog.at_level(logging.WARNING):
        assert use(tmp_path) == len(NUMBERS)
    assert "it is set aside as cache.db.broken-" in caplog.text
    everything(tmp_path)


@pytest.mark.parametrize("tier", ["entries", "bytes"])
def test_a_link_in_place_of_a_directory_is_not_followed(
    tmp_path: Path, root: Path, victim: Path, tier: str
) -> None:
    """``verify`` and an index rebuild remove files without a row, but not behind a link."""
    for name in ("00", "ab", "zz"):
        with contextlib.suppress(FileExistsError):
            (root / tier / name).symlink_to(victim)
    everything(tmp_path)
    (root / "cache.db").unlink()
    everything(tmp_path)


def test_a_link_in_place_of_an_entry_is_dropped_and_its_target_kept(
    tmp_path: Path, root: Path, victim: Path
) -> None:
    """It is not followed, even if its target is readable."""
    (victim / "thesis").chmod(0o644)
    for path in [path for path in (root / "entries").rglob("*") if path.is_file()]:
        path.unlink()
        path.symlink_to(victim / "thesis")
    everything(tmp_path)


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
def test_a_link_in_place_of_the_log_is_not_written_through(
    tmp_path: Path, root: Path, victim: Path, suffix: str
) -> None:
    """SQLite would open it for writing. Training continues, with or without a cache."""
    path = root / f"cache.db{suffix}"
    path.unlink(missing_ok=True)
    path.symlink_to(victim / "thesis")
    use(tmp_path)
    use(tmp_path)


def _hard_link(path: Path, to: Path) -> None:
    os.link(to, path)


def _device(path: Path, to: Path) -> None:
    """One that never ends, or (without root) a socket."""
    try:
        os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))
    except PermissionError:
        directory = os.open(path.parent, os.O_RDONLY)
        with socket.socket(socket.AF_UNIX) as bound:
            bound.bind(f"/proc/self/fd/{directory}/{path.name}")  # the path itself may be too long
        os.close(directory)


PLANTS: dict[str, Callable[[Path, Path], None]] = {
    "link": lambda path, to: path.symlink_to(to),
    "dangling link": lambda path, to: path.symlink_to(to.with_name("new")),
    "hard link": _hard_link,
    "directory": lambda path, to: path.mkdir(),
    "pipe": lambda path, to: os.mkfifo(path),
    "device": _device,
}
plants = pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS.keys())


@plants
def test_a_lock_that_is_not_a_file_costs_only_single_flight(
    tmp_path: Path, root: Path, victim: Path, plant: Callable[[Path, Path], None]
) -> None:
    """The lock for opening the index, those of densities, and the one of owners.

    Nothing is created, truncated or written elsewhere, and no open waits for a writer.
    """
    digest = "0123456789abcdef" * 2
    with SingleFlight(root / "locks", timeout_s=1).hold(digest):
        pass
    names = os.listdir(root / "locks")
    assert {name.partition("-")[0] for name in names} == {"open", "flight", "owners.lock"}
    for name in names:
        (root / "locks" / name).unlink()
        plant(root / "locks" / name, victim / "thesis")
    assert use(tmp_path) == len(NUMBERS)
    with SingleFlight(root / "locks", timeout_s=1).hold(digest) as is_held:
        assert not is_held


@pytest.mark.parametrize("directory", ["locks", "entries", "bytes", "."])
def test_a_link_that_replaces_a_directory_after_it_was_checked_is_not_followed(
    tmp_path: Path, root: Path, victim: Path, directory: str
) -> None:
    """By a member of the group, under an open cache. Paths are resolved again at each use."""
    cache = ArrayCache(settings(tmp_path), Counters())
    assert cache.put(key_of("a"), array_of(1), source="s") is not None
    cache.index._file.close_before_fork()
    path = root if directory == "." else root / directory
    path.rename(tmp_path / "cache" / "moved")
    path.symlink_to(victim)
    cache.put(key_of("b"), array_of(2), source="s")
    with SingleFlight(root / "locks", timeout_s=1).hold("0" * 32):
        pass
    with contextlib.suppress(*CACHE_FAULTS):
        cache.drop(key_of("a"))
    use(tmp_path)


def test_no_file_is_unlinked_behind_a_link(tmp_path: Path, root: Path, victim: Path) -> None:
    """A row with a name of our pattern, in a directory that is a link by the time it is dropped."""
    (root / "entries" / "zz").symlink_to(victim)
    for number, name in enumerate(("thesis", "thesis")):
        filename = f"entries/zz/{name}"
        owner = owner_id().rpartition(" ")[0] + " 1"
        insert(root, f"+{number}", "intent", row_of(root, filename, owner), stored_s=0.0)
    insert(root, "thesis", "array", row_of(root, "entries/zz/thesis", "file\n/data/x.zarr\na"))
    everything(tmp_path)


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal"])
@pytest.mark.parametrize("plant", [PLANTS["pipe"], PLANTS["device"], PLANTS["directory"]])
def test_an_index_that_is_not_a_file_never_hangs(
    tmp_path: Path, root: Path, victim: Path, suffix: str, plant: Callable[[Path, Path], None]
) -> None:
    """SQLite opens the file, its log, the log's shared memory and a journal."""
    path = root / f"cache.db{suffix}"
    path.unlink(missing_ok=True)
    plant(path, victim / "thesis")
    assert use(tmp_path) == 0
    with pytest.raises(ConfigError, match=re.escape(f"{path} is not a regular file")):
        read_status(settings(tmp_path))


@plants
def test_verify_neither_follows_nor_waits_for_a_planted_object(
    tmp_path: Path, root: Path, victim: Path, plant: Callable[[Path, Path], None]
) -> None:
    """Of the byte tier, whose files have no header."""
    index = Index(settings(tmp_path))
    path = root / "bytes" / "ab" / "abcd"
    index.dir.make(path.parent)
    intent = index.begin("bytes/ab/abcd", 4096)
    assert isinstance(intent, Intent)
    plant(path, victim / "thesis")
    assert index.commit(intent, "abcd", "object", "0\nfile\n/data/x")
    report = verify(settings(tmp_path))
    assert [problem.file for problem in report.corrupt + report.unreadable] == ["bytes/ab/abcd"]


def test_a_link_in_place_of_the_index_costs_the_cache_and_no_sample(
    tmp_path: Path, root: Path, victim: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Commands refuse; a run reads from the origin and logs the reason once."""
    for path in root.glob("cache.db*"):
        path.unlink()
    (root / "cache.db").symlink_to(victim / "database")
    assert use(tmp_path) == 0
    assert caplog.text.count("is not a regular file") == 1
    with pytest.raises(ConfigError, match="is not a regular file"):
        Index(settings(tmp_path)).open()
