"""A warm cache that this process cannot write: it is used, one line says that nothing will be
stored, and the commands work on it.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from tests.support.cachedirs import array_of, key_of, payload_files, settings
from tests.support.namespaces import unshared
from tests.support.users import CAROL, as_user, needs_users, open_to_all, without_privileges
from zarrcache import ConfigError, plan_evict, verify
from zarrcache.cache.tiers import ArrayCache
from zarrcache.config import CacheConfig
from zarrcache.ops.doctor import examine
from zarrcache.ops.selection import cache_at
from zarrcache.ops.status import read_status
from zarrcache.stats import Counters

PAIRS = 3
LINE = "is only read: its entries are used, and nothing will be stored"


def denied(directory: Path) -> None:
    """Not even the owner may write. Root could, and is another user in these tests."""
    for path in [*directory.rglob("*"), directory]:
        path.chmod(path.stat().st_mode & ~0o222)


def allowed(directory: Path) -> None:
    for path in [directory, *directory.rglob("*")]:
        path.chmod(path.stat().st_mode | 0o200)


def _start_and_end(directory: Path) -> None:
    child = get_context("fork").Process(target=_write_and_end, args=(directory,))
    child.start()
    child.join(60)


def _write_and_end(directory: Path) -> None:
    """Leaves the log and its shared memory, as most processes do that read."""
    cache = ArrayCache(settings(directory), Counters())
    for number in range(PAIRS):
        assert cache.put(key_of(number), array_of(number), source="s") is not None
    os.kill(os.getpid(), signal.SIGKILL)


def _read(directory: Path) -> tuple[int, int, str]:
    """Numbers of hits and of faults, and what was logged."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("zarrcache").addHandler(handler)
    counters = Counters()
    cache = ArrayCache(settings(directory), counters)
    hits = sum(cache.get(key_of(number)) is not None for number in range(PAIRS))
    for number in range(PAIRS, 2 * PAIRS):  # a miss, as the reader handles it
        with cache.flight.hold(key_of(number).digest):
            assert cache.put(key_of(number), array_of(number), source="s") is None
    return hits, counters.snapshot().cache_errors, "\n".join(lines)


def _commands(directory: Path) -> dict[str, Any]:
    config = cache_at(directory / "cache")
    report = verify(config)
    found = {
        "status": read_status(config).array_tier.entries,
        "verified": (report.entries, report.is_good, report.is_read_only),
        "doctor": next(f for f in examine(config) if f.name == "cache directory").verdict,
    }
    with pytest.raises(ConfigError, match="nothing was evicted"):
        plan_evict(config, everything=True).execute()
    return found


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("left", ["log and shared memory", "log", "nothing"])
def test_a_directory_without_write_permission_is_used(left: str) -> None:
    """SQLite cannot read a log without its shared memory, which it cannot create here: then the
    rows that were still in the log are misses, and nothing is wrong.
    """
    with open_to_all() as place:
        place.chmod(0o777)
        without_privileges(_start_and_end, place)
        root = place / "cache" / "zarrcache-v1"
        assert (root / "cache.db-wal").stat().st_size
        if left == "nothing":
            without_privileges(_checkpoint, place)
        elif left == "log":
            (root / "cache.db-shm").unlink()
        denied(place / "cache")
        before = {path: path.lstat().st_mtime_ns for path in root.rglob("*")}
        try:
            hits, faults, text = without_privileges(_read, place)
            assert hits == (0 if left == "log" else PAIRS)
            if hits:
                assert faults == 0
                assert text.count("\n") == 0
                assert LINE in text
                assert without_privileges(_commands, place) == {
                    "status": PAIRS,
                    "verified": (PAIRS, True, True),
                    "doctor": "warn",
                }
            assert {path: path.lstat().st_mtime_ns for path in root.rglob("*")} == before
        finally:
            allowed(place / "cache")


def _checkpoint(directory: Path) -> None:
    import sqlite3

    connection = sqlite3.connect(directory / "cache" / "zarrcache-v1" / "cache.db")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()


MOUNTED = """
import os, subprocess, sys
from pathlib import Path
from tests.faults.test_read_only import LINE, PAIRS
from tests.support.cachedirs import array_of, key_of
from tests.support.localnode import LocalNode
import logging
directory = Path(sys.argv[1])
cache = directory / "cache"
node = LocalNode(directory, PAIRS)
node.read(node.reader())
subprocess.run(["mount", "--bind", cache, cache], check=True)
subprocess.run(["mount", "-o", "remount,bind,ro", cache], check=True)
logging.basicConfig(level=logging.WARNING)
(directory / "data").rename(directory / "away")
reader = node.reader()
for _ in range(4):
    node.read(reader)
print(reader.stats.hits, reader.stats.misses, reader.stats.requests)
arrays = reader.cache.arrays
assert arrays.put(key_of(1), array_of(1), source="s") is None
subprocess.run(["mount", "-o", "remount,bind,rw", cache], check=True)
assert arrays.put(key_of(1), array_of(1), source="s") is not None
assert arrays.get(key_of(1)) is not None
"""


def test_a_read_only_mount_serves_every_epoch_without_the_origin(tmp_path: Path) -> None:
    """The origin is gone, and one line is logged, not one per read. Once the mount is writable, the
    same reader stores again.
    """
    done = subprocess.run(
        [*unshared("--mount"), sys.executable, "-c", MOUNTED, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{8 * PAIRS} 0 0\n"
    assert done.stderr.count("\n") == 1
    assert LINE in done.stderr


def _commands_of_another(directory: Path) -> list[str]:
    said = []
    config = CacheConfig(dir=directory / "cache", min_free=0)
    for command in (
        lambda: read_status(config),
        lambda: verify(config),
        lambda: plan_evict(config, everything=True),
        lambda: read_status(cache_at(directory / "cache")),
    ):
        with pytest.raises(ConfigError) as raised:
            command()
        said.append(str(raised.value))
    return said


@needs_users
def test_the_cache_of_another_user_is_one_line_and_not_a_traceback() -> None:
    with open_to_all() as place:
        cache = ArrayCache(settings(place), Counters())
        assert cache.put(key_of(1), array_of(1), source="s") is not None
        said = as_user(CAROL, _commands_of_another, place)
        assert all("cannot be used by user 51003 (Permission denied)" in line for line in said)
        assert payload_files(place)
