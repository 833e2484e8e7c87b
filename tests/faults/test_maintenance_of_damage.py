"""Commands on a cache whose index is damaged or whose entries were tampered with: they repair it,
or say what is wrong.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.cachedirs import array_of, key_of, settings
from zarrcache.cache.tiers import ArrayCache
from zarrcache.disk.index import Index
from zarrcache.stats import Counters

ENTRIES = 120


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A cache of some entries, with its index in one file."""
    cache = ArrayCache(settings(tmp_path), Counters())
    for number in range(ENTRIES):
        assert cache.put(key_of(number), array_of(number, 50), source="s")
    cache.index.reopen()
    connection = sqlite3.connect(cache.index.dir.index)
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    return cache.index.dir.root


LOOKS: dict[str, Callable[[Index], Any]] = {
    "rows": lambda index: len(list(index.rows("array"))),
    "totals": lambda index: index.totals()["array"][0],
    "sizes": lambda index: len(index.entry_sizes(["file\n/data/"], "\ncharge_density_total")[0]),
    "filenames": lambda index: len(index.filenames()),
    "volume": lambda index: index.volume_bytes() // 8192,
}


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_every_command_repairs_a_damaged_page(
    tmp_path: Path, root: Path, look: Callable[[Index], Any]
) -> None:
    """Each page is overwritten once: status, warm, evict and verify all begin by reading the
    index.
    """
    whole = (root / "cache.db").read_bytes()
    for page in range(1, len(whole) // 4096):
        copy = tmp_path / f"{page}"
        shutil.copytree(
            root / "entries", copy / "cache" / root.name / "entries", copy_function=os.link
        )
        (copy / "cache" / root.name / "cache.db").write_bytes(
            whole[: page * 4096] + os.urandom(4096) + whole[(page + 1) * 4096 :]
        )
        assert look(Index(settings(copy))) == ENTRIES, f"page {page}"


def test_a_directory_in_place_of_an_entry_costs_its_own_bytes_and_nothing_else(
    tmp_path: Path, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It cannot be unlinked. The cache still opens, in this process and later ones."""
    victim = next(path for path in sorted((root / "entries").glob("*/*")))
    victim.unlink()
    victim.mkdir()
    cache = ArrayCache(settings(tmp_path), Counters())
    assert sum(cache.get(key_of(number)) is not None for number in range(ENTRIES)) == ENTRIES - 1
    assert "cannot be removed" in caplog.text
    pid = os.fork()  # its intent belongs to this process; a child's dies with it
    if not pid:
        os._exit(0 if Index(settings(tmp_path)).totals()["array"][0] == ENTRIES - 1 else 1)
    assert os.waitpid(pid, 0)[1] == 0
    connection = sqlite3.connect(root / "cache.db")
    with connection:  # as if the process that met it had ended
        (kept,) = connection.execute(
            "SELECT filename FROM Cache WHERE key >= '+' AND key < ','"
        ).fetchall()
    connection.close()
    assert kept[0].endswith(victim.name)
    again = ArrayCache(settings(tmp_path), Counters())
    again.index.open()
    assert again.put(key_of("new"), array_of(1, 50), source="s")
