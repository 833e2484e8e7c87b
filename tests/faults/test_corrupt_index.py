"""Damage at random places of the index: no wrong value, no run stops, nothing is fetched again, and
the files on disk are indexed again.
"""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from tests.support.cachedirs import settings
from tests.support.damage import chance_of, damage
from tests.support.localnode import LocalNode
from zarrcache import verify

FORK = get_context("fork")
#: Only a hang takes this long.
HANG_S = 120

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def read_and_die(node: LocalNode) -> None:
    """Fill the cache and die; the index keeps its log."""
    node.read(node.reader())
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def killed(tmp_path: Path) -> LocalNode:
    """A warm node with its index in a file and a log, as a killed process leaves it."""
    node = LocalNode(tmp_path, 2)
    child = FORK.Process(target=read_and_die, args=(node,))
    child.start()
    child.join(HANG_S)
    assert (node.root / "cache.db-wal").stat().st_size > 4096
    return node


@pytest.fixture
def node(killed: LocalNode) -> LocalNode:
    """The same with its index in one file, as the last process to close it leaves it."""
    connection = sqlite3.connect(killed.root / "cache.db")
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    assert not (killed.root / "cache.db-wal").exists()
    return killed


def keep(node: LocalNode) -> Callable[[], None]:
    """Save the cache; the returned function restores it."""
    files = {
        path: path.read_bytes()
        for path in node.root.rglob("*")
        if path.is_file() and path.parent.name != "locks"
    }

    def restore() -> None:
        for path in node.root.rglob("*"):
            if (
                path.is_file()
                and path.parent.name != "locks"
                and (path not in files or path.name.startswith("cache.db"))
            ):
                path.unlink()
        for path, content in files.items():
            if not path.exists():
                path.write_bytes(content)

    return restore


@pytest.mark.parametrize(
    ("mode", "count", "seed"),
    [
        pytest.param("always", 60, 8, id="always-60"),
        pytest.param("first", 40, 9, id="first-40"),
        pytest.param("always", 3000, None, id="always-3000", marks=pytest.mark.slow),
        pytest.param("first", 3000, None, id="first-3000", marks=pytest.mark.slow),
    ],
)
def test_damaged_index_heals_and_no_run_notices(
    node: LocalNode, caplog: pytest.LogCaptureFixture, mode: Any, count: int, seed: int | None
) -> None:
    """One bit anywhere, or a truncation; found by SQLite or only by a row's checksum: set aside
    with one log line, rebuilt from the files.
    """
    chance = chance_of(seed)
    restore, healed = keep(node), 0
    for _ in range(count):
        restore()
        done = damage(node.root / "cache.db", chance)
        caplog.clear()
        for number in range(2):
            reader = node.reader(verify=mode)
            node.read(reader)
            assert reader.stats.purges == 0, done
            # A key that was changed inside SQLite's own lists is found by a look at the whole only,
            # which `first` does not take.
            assert reader.stats.misses == 0 or (mode, number) == ("first", 0), done
        told = [
            record.getMessage()
            for record in caplog.records
            if record.name == "zarrcache.disk._database"
        ]
        assert len(told) <= 1, (done, told)
        healed += len(told)
        if mode == "always":
            node.check_settled()
    assert count / 10 < healed < count


@pytest.mark.parametrize(
    ("count", "seed"),
    [pytest.param(20, 7, id="20"), pytest.param(1000, None, id="1000", marks=pytest.mark.slow)],
)
def test_damaged_log_of_a_killed_process_costs_entries_and_nothing_else(
    killed: LocalNode, count: int, seed: int | None
) -> None:
    """SQLite stops at the first page with a wrong checksum; files without a row are not hits, and
    ``verify`` removes them.
    """
    chance = chance_of(seed)
    restore, lost = keep(killed), 0
    for _ in range(count):
        restore()
        done = damage(killed.root / "cache.db-wal", chance)
        for number in range(2):
            reader = killed.reader()
            killed.read(reader)
            assert reader.stats.purges == 0, done
            assert reader.stats.misses == 0 or number == 0, done
            lost += reader.stats.misses
        assert verify(settings(killed.directory)).corrupt == (), done
        killed.check_settled()
    assert lost


def test_index_that_is_emptied_under_a_reader_is_rebuilt(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """SQLite would wait a minute for its lock at each read."""
    node = LocalNode(tmp_path, 2)
    node.read(node.reader())
    reader = node.reader()
    os.truncate(node.root / "cache.db", 0)
    for one in (reader, node.reader()):
        for task_id, role in node.values:
            one.load(task_id, role)  # type: ignore[arg-type]
        assert (one.stats.misses, one.stats.requests) == (0, 0)
    node.check_settled()
    assert "cache.db was lost and rebuilt from the entries: " in caplog.text


def test_deleted_index_is_rebuilt_with_one_line_and_nothing_is_fetched(
    node: LocalNode, caplog: pytest.LogCaptureFixture
) -> None:
    """Files of the byte tier do not name their object: they are removed, and only those are fetched
    again.
    """
    (node.root / "cache.db").unlink()
    reader = node.reader()
    for task_id, role in node.values:
        reader.load(task_id, role)  # type: ignore[arg-type]
    assert (reader.stats.hits, reader.stats.misses, reader.stats.requests) == (4, 0, 0)
    (line,) = [record.getMessage() for record in caplog.records]
    assert line.endswith(
        "cache.db was lost and rebuilt from the entries: 7 entries kept, 3 files removed"
    )
    node.check_settled()


def test_an_entry_under_the_name_of_another_is_removed_when_the_index_is_rebuilt(
    node: LocalNode, caplog: pytest.LogCaptureFixture
) -> None:
    """Its header names the density of the other file, whose row it would take."""
    files = sorted(node.root.glob("entries/*/*"), key=lambda path: path.stat().st_size)
    one, other = files[-2:]
    one.write_bytes(other.read_bytes())
    (node.root / "cache.db").unlink()
    reader = node.reader()
    node.read(reader)
    assert "6 entries kept, 4 files removed" in caplog.text
    assert (reader.stats.hits, reader.stats.misses, reader.stats.cache_errors) == (3, 1, 0)
    node.check_settled()
