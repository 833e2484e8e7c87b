"""Two users of one node share a directory: both read and write, and neither breaks the other's job.
And a user outside the group.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.cachedirs import array_of, key_of
from tests.support.readers import make_reader
from tests.support.stores import plain_read
from tests.support.training import write_pairs
from tests.support.users import (
    ALICE,
    BOB,
    CAROL,
    TEAM,
    User,
    as_user,
    needs_users,
    open_to_all,
    start_as,
)
from zarrcache import CacheConfig, ConfigError
from zarrcache.cache.tiers import ArrayCache
from zarrcache.disk.index import Index
from zarrcache.ops.doctor import examine
from zarrcache.ops.evict import plan_evict
from zarrcache.ops.status import read_status
from zarrcache.ops.verify import verify
from zarrcache.stats import Counters

pytestmark = needs_users


@pytest.fixture(scope="module", autouse=True)
def imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Import everything first: other users may not be able to read this interpreter's files."""
    directory = tmp_path_factory.mktemp("imported")
    write_pairs(directory, 2)
    for arrays in (True, False):
        train(
            directory,
            {
                "dir": str(directory / f"cache-{arrays}"),
                "min_free": 0,
                "arrays": {"enabled": arrays},
            },
        )
    list(examine(CacheConfig(dir=directory / "cache-True", min_free=0)))
    verify(CacheConfig(dir=directory / "cache-True", min_free=0))


@pytest.fixture
def place() -> Iterator[Path]:
    """``data``, ``label`` and ``map.json``, readable by all; ``team``, which belongs to the group;
    ``tmp``, writable by all.
    """
    with open_to_all() as path:
        write_pairs(path, 3)
        (path / "team").mkdir()
        os.chown(path / "team", -1, TEAM)
        (path / "team").chmod(0o2770)
        (path / "tmp").mkdir()
        (path / "tmp").chmod(0o1777)
        yield path


def train(place: Path, cache: dict[str, Any]) -> dict[str, int]:
    """Read every density as a training run does, and compare; the counters."""
    reader = make_reader(place, cache=cache)
    for task_id in reader.task_ids:
        for role in ("data", "label"):
            assert np.array_equal(
                reader.load(task_id, role)[0], plain_read(place / role / f"{task_id}.zarr").ravel()
            )  # type: ignore[arg-type]
    stats = reader.stats
    return {
        name: getattr(stats, name)
        for name in (
            "hits",
            "misses",
            "bypasses",
            "byte_hits",
            "byte_misses",
            "purges",
            "cache_errors",
        )
    }


def shared(place: Path, **block: Any) -> dict[str, Any]:
    """Settings of the group's cache."""
    return {"dir": str(place / "team" / "cache"), "min_free": 0, "shared": True, **block}


def root_of(place: Path) -> Path:
    """The cache directory."""
    return place / "team" / "cache" / "zarrcache-v1"


def permissions(place: Path) -> dict[str, set[tuple[str, int]]]:
    """Modes and groups by kind of file."""
    found: dict[str, set[tuple[str, int]]] = {"directory": set(), "entry": set(), "written": set()}
    for path in [place / "team" / "cache", *(place / "team" / "cache").rglob("*")]:
        status = path.lstat()
        kind = (
            "directory"
            if path.is_dir()
            else "entry"
            if path.parent.parent.name in ("entries", "bytes")
            else "written"
        )
        found[kind].add((f"{stat.S_IMODE(status.st_mode):04o}", status.st_gid))
    return found


def put_and_get(config: dict[str, Any], put: range, get: range) -> tuple[int, int]:
    """Store some entries and read others; numbers of hits and of faults."""
    cache = ArrayCache(CacheConfig(**config), Counters())
    for number in put:
        assert cache.put(key_of(number), array_of(number), source="s")
    found = 0
    for number in get:
        entry = cache.get(key_of(number))
        if entry is not None:
            assert np.array_equal(entry.array, array_of(number))
            found += 1
    return found, cache._counters.snapshot().cache_errors


# -- the group's cache


@pytest.mark.parametrize(("first", "second"), [(ALICE, BOB), (BOB, ALICE)])
@pytest.mark.parametrize("arrays", [True, False])
def test_what_one_has_read_is_a_hit_for_the_other(
    place: Path, first: User, second: User, arrays: bool
) -> None:
    """In either order, with umasks 0077 and 0022 and different primary groups, through both
    tiers.
    """
    cache = shared(place, arrays={"enabled": arrays})
    assert as_user(first, train, place, cache)["cache_errors"] == 0
    counted = as_user(second, train, place, cache)
    assert (counted["cache_errors"], counted["purges"]) == (0, 0)
    if arrays:
        assert (counted["hits"], counted["misses"]) == (6, 0)
    else:
        assert counted["byte_hits"] > 0
        assert counted["byte_misses"] == 0
    as_user(second, put_and_get, cache, range(3), range(3))
    assert as_user(first, put_and_get, cache, range(0), range(3)) == (3, 0)
    found = permissions(place)
    assert found["directory"] == {("2770", TEAM)}
    assert found["written"] == {("0660", TEAM)}
    assert found["entry"] == {("0640", TEAM)}


def _log_is_open(config: dict[str, Any]) -> list[str]:
    cache = ArrayCache(CacheConfig(**config), Counters())
    assert cache.put(key_of(1), array_of(1), source="s")
    return sorted(
        path.name for path in cache.index.dir.root.glob("cache.db*") if os.access(path, os.W_OK)
    )


def test_the_log_that_one_makes_can_be_written_by_the_other(place: Path) -> None:
    """SQLite creates the log at each first opening: with the permissions of the index, not of the
    umask.
    """
    for user in (ALICE, BOB, ALICE):
        assert as_user(user, _log_is_open, shared(place)) == [
            "cache.db",
            "cache.db-shm",
            "cache.db-wal",
        ]


def _work(config: dict[str, Any], start: int) -> int:
    cache = ArrayCache(CacheConfig(**config), Counters())
    for i in range(60):
        cache.put(key_of(i % 20), array_of(i % 20), source="s")
        entry = cache.get(key_of((start + i) % 20))
        if entry is not None:
            assert np.array_equal(entry.array, array_of((start + i) % 20))
        if i % 7 == 0:
            cache.drop(key_of((start + i) % 20))
    return cache._counters.snapshot().cache_errors


def test_both_write_replace_and_drop_the_same_entries_at_once(place: Path) -> None:
    """No fault on either side, and the volume equals the bytes on disk."""
    jobs = [
        start_as(user, _work, shared(place), start)
        for user, start in ((ALICE, 0), (BOB, 10), (ALICE, 5), (BOB, 15))
    ]
    assert [job() for job in jobs] == [0, 0, 0, 0]
    index = Index(CacheConfig(**shared(place)))
    files = [path for path in (root_of(place) / "entries").rglob("*") if path.is_file()]
    assert index.volume_bytes() == sum(-(-path.stat().st_size // 4096) * 4096 for path in files)


def _evict_all(config: dict[str, Any]) -> tuple[int, int]:
    plan = plan_evict(CacheConfig(**config), everything=True)
    return len(plan.entries), plan.execute()


def test_one_evicts_and_verifies_what_the_other_has_stored(place: Path) -> None:
    as_user(ALICE, put_and_get, shared(place), range(5), range(0))
    damaged = next(path for path in (root_of(place) / "entries").rglob("*") if path.is_file())
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\0\0")
    report = as_user(BOB, lambda: verify(CacheConfig(**shared(place))))
    assert (report.entries, len(report.corrupt)) == (5, 1)
    assert as_user(BOB, _evict_all, shared(place)) == (4, 4 * 8192)
    assert as_user(ALICE, put_and_get, shared(place), range(5), range(5)) == (5, 0)


def _alter(path: Path) -> str:
    try:
        with path.open("r+b") as file:
            file.truncate(0)
    except OSError as exc:
        return type(exc).__name__
    return "altered"


def test_no_user_can_truncate_an_entry_that_another_has_mapped(place: Path) -> None:
    """Truncation would kill the reader with SIGBUS; entries are replaced or unlinked, and maps stay
    valid.
    """
    as_user(ALICE, put_and_get, shared(place), range(1), range(0))
    (entry,) = (path for path in (root_of(place) / "entries").rglob("*") if path.is_file())
    assert as_user(BOB, _alter, entry) == "PermissionError"


def test_a_broken_index_is_set_aside_by_either_and_both_go_on(place: Path) -> None:
    """It belongs to one user; the other replaces it with its own, with all entries, while the first
    still runs.
    """
    as_user(ALICE, put_and_get, shared(place), range(5), range(0))
    (root_of(place) / "cache.db-wal").unlink()  # with the log, SQLite would repair the damage
    with (root_of(place) / "cache.db").open("r+b") as file:
        file.write(b"no database" * 100)
    assert as_user(BOB, put_and_get, shared(place), range(5, 6), range(6)) == (6, 0)
    assert (root_of(place) / "cache.db").stat().st_uid == BOB.uid
    assert as_user(ALICE, put_and_get, shared(place), range(6, 7), range(7)) == (7, 0)
    assert permissions(place)["written"] == {("0660", TEAM)}


def test_doctor_says_how_a_private_cache_becomes_the_groups(place: Path) -> None:
    """Changing only ``shared`` keeps the others out; the command that doctor prints lets them in
    and keeps the entries.
    """
    as_user(ALICE, train, place, shared(place, shared=False))
    assert as_user(BOB, train, place, shared(place))["hits"] == 0
    assert as_user(ALICE, train, place, shared(place))["hits"] == 6
    (finding,) = as_user(
        ALICE, lambda: [f for f in examine(CacheConfig(**shared(place))) if f.name == "permissions"]
    )
    assert finding.verdict == "warn"
    command = re.search(r"run `(.*)`", finding.advice)
    assert command is not None
    subprocess.run(command[1].replace("GROUP", str(TEAM)), shell=True, check=True)
    counted = as_user(BOB, train, place, shared(place))
    assert (counted["hits"], counted["cache_errors"]) == (6, 0)
    assert as_user(BOB, put_and_get, shared(place), range(3), range(3)) == (3, 0)
    assert {
        f.verdict
        for f in as_user(ALICE, lambda: list(examine(CacheConfig(**shared(place)))))
        if f.name == "permissions"
    } == {"ok"}


def test_a_directory_whose_maker_was_killed_too_early_is_healed_by_its_owner(place: Path) -> None:
    """Between ``mkdir`` and ``chmod``, with umask 0077. Until then the other user reads past it."""
    as_user(ALICE, put_and_get, shared(place), range(1), range(0))
    root_of(place).chmod(0o700)
    assert as_user(BOB, put_and_get, shared(place), range(0), range(1)) == (0, 1)
    as_user(ALICE, put_and_get, shared(place), range(1), range(0))
    assert as_user(BOB, put_and_get, shared(place), range(1), range(1)) == (1, 0)


def _lose_permission(place: Path) -> list[tuple[int, int]]:
    reader = make_reader(place, cache={"dir": str(place / "tmp" / "cache")})
    root, counted = place / "tmp" / "cache" / "zarrcache-v1", []
    for mode in (0o700, 0o000, 0o500, 0o700):
        if root.exists():
            root.chmod(mode)
        for task_id in reader.task_ids:
            for role in ("data", "label"):
                assert np.array_equal(
                    reader.load(task_id, role)[0],
                    plain_read(place / role / f"{task_id}.zarr").ravel(),
                )  # type: ignore[arg-type]
        counted.append((reader.stats.hits, reader.stats.misses))
    return counted


def test_permission_lost_under_a_running_job_costs_hits_and_no_sample(place: Path) -> None:
    """Removed altogether, then for writing, then restored: the same job continues and has hits
    again.
    """
    assert as_user(BOB, _lose_permission, place) == [(0, 6), (0, 12), (6, 12), (12, 12)]


# -- users outside the group


def _refusal(config: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        Index(CacheConfig(**config)).open()
    return str(caught.value)


def _train_with_warnings(place: Path, config: dict[str, Any]) -> tuple[dict[str, int], list[str]]:
    """As :func:`train`, with the warnings."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    logging.getLogger("zarrcache").addHandler(Listener(logging.WARNING))
    return train(place, config), [line for line in said if "are left out" not in line]


def test_without_sharing_other_users_cannot_enter_and_their_jobs_run(place: Path) -> None:
    """0700. The second user's commands name the owner; its training reads past the cache, with one
    log line.
    """
    cache = {"dir": str(place / "tmp" / "cache"), "min_free": 0}
    as_user(ALICE, train, place, cache)
    root = place / "tmp" / "cache" / "zarrcache-v1"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (root.parent, root)] == [0o700, 0o700]
    assert {stat.S_IMODE(p.stat().st_mode) for p in root.rglob("*")} == {0o700, 0o600}
    words = as_user(BOB, _refusal, cache)
    assert f"cache.dir {place}/tmp/cache" in words
    assert (
        f"cannot be written by this user (it belongs to user {ALICE.uid} and group {ALICE.uid}, "
        "mode 0700)" in words
    )
    assert "Choose a directory of your own" in words
    counted, said = as_user(BOB, _train_with_warnings, place, cache)
    assert (counted["hits"], counted["misses"]) == (0, 6)
    assert len(said) == 1
    assert str(ALICE.uid) in said[0]
    assert as_user(ALICE, train, place, cache)["hits"] == 6


def test_a_user_outside_the_group_is_told_which_group_it_is(place: Path) -> None:
    """Its training runs without the cache."""
    as_user(ALICE, train, place, shared(place))
    words = as_user(CAROL, _refusal, shared(place))
    assert f"group {TEAM}, mode 2770; this user is {CAROL.uid} of groups [{CAROL.uid}]" in words
    assert "Join that group" in words
    counted, said = as_user(CAROL, _train_with_warnings, place, shared(place))
    assert (counted["hits"], counted["misses"], len(said)) == (0, 6, 1)


def test_a_user_who_forgets_shared_is_told_and_breaks_nothing(place: Path) -> None:
    """The other user owns the directory: ``shared: true`` is needed in both configs."""
    as_user(ALICE, train, place, shared(place))
    assert "set cache.shared: true for both users" in as_user(
        BOB, _refusal, shared(place, shared=False)
    )
    assert as_user(BOB, train, place, shared(place, shared=False))["hits"] == 0
    assert as_user(ALICE, train, place, shared(place))["hits"] == 6


def _plant(path: Path, mode: int) -> None:
    for part in (path, path / "zarrcache-v1"):
        part.mkdir()
        part.chmod(mode)


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("depth", ["cache.dir", "cache.dir/zarrcache-v1"])
def test_a_directory_of_another_user_that_is_open_to_all_is_refused(
    place: Path, is_shared: bool, depth: str
) -> None:
    """In /tmp any user can create it first, plant entries, or replace it by a link later."""
    directory = place / "tmp" / "cache"
    as_user(CAROL, _plant, directory, 0o777)
    if depth != "cache.dir":
        os.chown(directory, ALICE.uid, TEAM)
    words = as_user(ALICE, _refusal, {"dir": str(directory), "min_free": 0, "shared": is_shared})
    assert f"belongs to user {CAROL.uid}" in words
    counted = as_user(
        ALICE, train, place, {"dir": str(directory), "min_free": 0, "shared": is_shared}
    )
    assert (counted["hits"], counted["misses"]) == (0, 6)
    assert os.listdir(directory / "zarrcache-v1") == []


def test_status_and_doctor_of_the_other_user_work(place: Path) -> None:
    """No advice to change correct permissions."""
    as_user(ALICE, train, place, shared(place))
    state = as_user(BOB, lambda: read_status(CacheConfig(**shared(place))))
    assert state.array_tier.entries == 8  # with two listings
    findings = as_user(
        BOB, lambda: {f.name: f.verdict for f in examine(CacheConfig(**shared(place)))}
    )
    assert (
        findings["permissions"]
        == findings["cache directory"]
        == findings["file locks"]
        == findings["mmap"]
        == "ok"
    )
