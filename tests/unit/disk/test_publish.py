"""Publishing: a file is there whole or not at all."""

from __future__ import annotations

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

import pytest

from zarrcache.disk._publish import publish, write_all
from zarrcache.errors import IncompleteArrayError


def test_published_file_is_whole_and_alone(tmp_path: Path) -> None:
    """Its bytes, its length, and nothing beside it."""
    assert publish(tmp_path / "entry", lambda file: file.write(b"12345"), expected_bytes=5) == 5
    assert (tmp_path / "entry").read_bytes() == b"12345"
    assert os.listdir(tmp_path) == ["entry"]


@pytest.mark.parametrize("mode", [0o600, 0o660])
def test_permissions_are_those_asked_for(tmp_path: Path, mode: int) -> None:
    """Whatever the umask is."""
    before = os.umask(0o077)
    try:
        publish(tmp_path / "entry", lambda file: file.write(b"x"), mode=mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "entry").st_mode) == mode


@pytest.mark.parametrize("length", [4, 6])
def test_wrong_length_is_not_published(tmp_path: Path, length: int) -> None:
    """The old file stays, the partial one goes."""
    (tmp_path / "entry").write_bytes(b"old")
    with pytest.raises(
        IncompleteArrayError, match=f"{length} bytes written where 5 were announced"
    ):
        publish(tmp_path / "entry", lambda file: file.write(b"x" * length), expected_bytes=5)
    assert os.listdir(tmp_path) == ["entry"]
    assert (tmp_path / "entry").read_bytes() == b"old"


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("bug")]
)
def test_whatever_stops_the_writer_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    """Ctrl-C too."""

    def write(file: FileIO) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(type(error)):
        publish(tmp_path / "entry", write)
    assert os.listdir(tmp_path) == []


def test_file_that_was_deleted_under_its_writer_is_an_error(tmp_path: Path) -> None:
    """A sweep may take a partial file away; its writer hears of it."""
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "entry", lambda file: next(tmp_path.glob(".entry.*.partial")).unlink())


def test_writers_of_one_name_do_not_write_into_each_other(tmp_path: Path) -> None:
    """The last rename wins; the file is one of the versions."""
    versions = [bytes([n]) * 50_000 for n in range(16)]
    with ThreadPoolExecutor(8) as pool:
        list(
            pool.map(
                lambda data: publish(
                    tmp_path / "entry", lambda file: write_all(file, memoryview(data))
                ),
                versions * 4,
            )
        )
    assert (tmp_path / "entry").read_bytes() in versions
    assert os.listdir(tmp_path) == ["entry"]


def test_reader_keeps_the_old_file_that_is_replaced(tmp_path: Path) -> None:
    """Entries are never rewritten in place: an open file stays what it was."""
    publish(tmp_path / "entry", lambda file: file.write(b"old"))
    with (tmp_path / "entry").open("rb") as reader:
        publish(tmp_path / "entry", lambda file: file.write(b"new"))
        assert reader.read() == b"old"


def test_short_writes_are_continued() -> None:
    """An unbuffered file may take less than it is given; Linux stops at 2 GiB."""

    class Narrow:
        taken = b""

        def write(self, buffer: memoryview) -> int:
            self.taken += bytes(buffer[:3])
            return min(3, len(buffer))

    file = Narrow()
    write_all(file, memoryview(b"0123456789"))  # type: ignore[arg-type]
    assert file.taken == b"0123456789"
