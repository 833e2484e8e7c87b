"""The layout of a cache directory, its permissions, and what is refused or left alone."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.users import needs_users
from zarrcache.disk._database import is_entry_name
from zarrcache.disk.directory import CacheDir
from zarrcache.errors import ConfigError


@pytest.fixture(params=[0o022, 0o077, 0o000])
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize(
    ("shared", "dirs", "files", "entries"),
    [(False, 0o700, 0o600, 0o600), (True, 0o2770, 0o660, 0o640)],
)
def test_permissions_are_private_or_of_the_group(
    tmp_path: Path, shared: bool, dirs: int, files: int, entries: int
) -> None:
    """The group can replace and drop entries, but not alter them."""
    directory = CacheDir(tmp_path / "cache", shared)
    directory.ensure()
    directory.make(directory.entries / "ab")
    found = [directory.root, *directory.root.rglob("*")]
    assert {stat.S_IMODE(p.stat().st_mode) for p in found if p.is_dir()} == {dirs}
    assert {stat.S_IMODE(p.stat().st_mode) for p in found if p.is_file()} == {files}
    assert (directory.dir_mode, directory.written_mode, directory.file_mode) == (
        dirs,
        files,
        entries,
    )


def test_only_the_own_subdirectory_is_made(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir(mode=0o755)
    (tmp_path / "cache" / "thesis.tex").write_text("mine")
    CacheDir(tmp_path / "cache").ensure()
    assert sorted(os.listdir(tmp_path / "cache")) == ["thesis.tex", "zarrcache-v1"]
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o755
    assert sorted(os.listdir(tmp_path / "cache" / "zarrcache-v1")) == [
        "CACHEDIR.TAG",
        "bytes",
        "entries",
        "locks",
    ]
    assert (
        (tmp_path / "cache" / "zarrcache-v1" / "CACHEDIR.TAG")
        .read_bytes()
        .startswith(b"Signature: 8a477f597d28d172789f06886806bc55\n")
    )


def test_many_processes_may_make_it_at_once(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: CacheDir(tmp_path / "a" / "b").ensure(), range(64)))


@pytest.mark.parametrize(
    "name", ["zarrcache-v1", "zarrcache-v1/entries", "zarrcache-v1/bytes", "zarrcache-v1/locks"]
)
def test_planted_link_or_file_in_place_of_a_directory_is_refused(tmp_path: Path, name: str) -> None:
    """Behind a link, files of others would be written and deleted."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for plant, words in (
        (lambda p: p.symlink_to(elsewhere), "but a symbolic link"),
        (lambda p: p.write_text("x"), "is not a directory"),
    ):
        path = tmp_path / "cache" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        plant(path)
        with pytest.raises(ConfigError, match=words) as caught:
            CacheDir(tmp_path / "cache").ensure()
        assert str(path) in str(caught.value)
        path.unlink()
    assert os.listdir(elsewhere) == []


@needs_users
def test_a_directory_of_another_user_is_refused_unless_shared(tmp_path: Path) -> None:
    """In /tmp any user can make it first, and plant entries."""
    root = CacheDir(tmp_path).root
    root.mkdir()
    os.chown(root, 4242, 4242)
    with pytest.raises(ConfigError, match=r"belongs to user 4242.*shared: true"):
        CacheDir(tmp_path).ensure()
    CacheDir(tmp_path, shared=True).ensure()


def test_directory_appears_with_the_right_mode_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user may be about to write there, and its maker may be killed at any instant."""
    directory = CacheDir(tmp_path / "cache", shared=True)
    directory.ensure()

    def killed(*args: object, **kwargs: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(os, "chmod", killed)
        with pytest.raises(SystemExit):
            directory.make(directory.entries / "ab")
    assert not (directory.entries / "ab").exists()
    directory.make(directory.entries / "ab")
    assert stat.S_IMODE((directory.entries / "ab").stat().st_mode) == 0o2770
    assert list(directory.files()) == []


def test_a_directory_with_files_is_not_replaced_by_one_that_is_made_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = CacheDir(tmp_path / "cache", shared=True)
    directory.ensure()
    target = directory.entries / "ab"
    directory.make(target)
    (target / "abcd").write_text("mine")
    monkeypatch.setattr(os.path, "lexists", lambda path: False)  # when the second looked
    directory.make(target)
    assert (target / "abcd").read_text() == "mine"
    assert os.listdir(directory.entries) == ["ab"]


@pytest.mark.parametrize(
    "plant",
    [lambda p, v: p.symlink_to(v), lambda p, v: p.mkdir(), lambda p, v: os.mkfifo(p)],
    ids=["link", "directory", "fifo"],
)
def test_an_index_that_is_not_a_file_is_refused_and_its_target_left_alone(
    tmp_path: Path, plant: Callable[[Path, Path], None]
) -> None:
    """SQLite would follow a link and write to its target."""
    victim = tmp_path / "thesis.tex"
    victim.write_text("")
    directory = CacheDir(tmp_path / "cache")
    directory.root.mkdir(parents=True)
    plant(directory.index, victim)
    with pytest.raises(
        ConfigError,
        match=rf"{directory.index} is not a regular file, so zarrcache did not write it",
    ):
        directory.ensure()
    assert victim.read_bytes() == b""


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("entries/ab/abcd0123-12345678", True),
        ("bytes/ab/abcd0123", True),
        ("entries/../../thesis", False),
        ("/etc/passwd", False),
        ("entries", False),
        ("entries/", False),
        ("entries//x", False),
        ("cache.db", False),
        ("locks/flight-000.lock", False),
        ("entries/ab/.abcd.partial", False),
        ("entries/ab/abcd\n", False),
        ("entries/ab/ab\0cd", False),
        ("entries/ab/cd/ef", False),
        ("", False),
        (None, False),
        (b"entries/ab/abcd", False),
        (3, False),
    ],
)
def test_name_of_an_entry_stays_below_its_tier(name: object, ours: bool) -> None:
    """Files that the index names are deleted, and a planted index can name any file."""
    assert is_entry_name(name) is ours
