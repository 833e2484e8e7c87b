"""Publishing: a file is visible whole or not at all, and it shows whether its writer is alive."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from io import FileIO
from pathlib import Path

import pytest

from zarrcache.disk._publish import (
    _tag_of,
    hidden_path,
    is_dead,
    owner_id,
    partials_of,
    publish,
    published_name,
    sweep_hidden,
    write_all,
    write_file,
)
from zarrcache.errors import IncompleteArrayError


def test_published_file_is_whole_and_alone(tmp_path: Path) -> None:
    occupied_bytes = publish(
        tmp_path / "entry", lambda file: file.write(b"12345"), expected_bytes=5
    )
    assert occupied_bytes == (tmp_path / "entry").stat().st_blocks * 512
    assert (tmp_path / "entry").read_bytes() == b"12345"
    assert os.listdir(tmp_path) == ["entry"]


@pytest.mark.parametrize("mode", [0o600, 0o660])
def test_permissions_do_not_depend_on_the_umask(tmp_path: Path, mode: int) -> None:
    before = os.umask(0o077)
    try:
        publish(tmp_path / "entry", lambda file: file.write(b"x"), mode=mode)
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "entry").st_mode) == mode


@pytest.mark.parametrize("length", [4, 6])
def test_wrong_length_is_not_published_and_the_old_file_stays(tmp_path: Path, length: int) -> None:
    (tmp_path / "entry").write_bytes(b"old")
    with pytest.raises(IncompleteArrayError, match=f"{length} bytes were written, 5 expected"):
        publish(tmp_path / "entry", lambda file: file.write(b"x" * length), expected_bytes=5)
    assert os.listdir(tmp_path) == ["entry"]
    assert (tmp_path / "entry").read_bytes() == b"old"


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("bug")]
)
def test_a_writer_that_fails_or_is_interrupted_leaves_no_file(
    tmp_path: Path, error: BaseException
) -> None:
    def write(file: FileIO) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(type(error)):
        publish(tmp_path / "entry", write)
    assert os.listdir(tmp_path) == []


def test_a_partial_file_that_a_sweep_removed_is_an_error_of_its_writer(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        publish(tmp_path / "entry", lambda file: next(tmp_path.glob(".entry.partial-*")).unlink())


def test_writers_of_one_name_do_not_write_into_each_other(tmp_path: Path) -> None:
    """The last rename wins."""
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
    publish(tmp_path / "entry", lambda file: file.write(b"old"))
    with (tmp_path / "entry").open("rb") as reader:
        publish(tmp_path / "entry", lambda file: file.write(b"new"))
        assert reader.read() == b"old"


def test_short_writes_are_continued() -> None:
    """Linux writes at most 2 GiB per call."""

    class Narrow:
        taken = b""

        def write(self, buffer: memoryview) -> int:
            self.taken += bytes(buffer[:3])
            return min(3, len(buffer))

    file = Narrow()
    write_all(file, memoryview(b"0123456789"))  # type: ignore[arg-type]
    assert file.taken == b"0123456789"


# -- owners


def owner_of_a_child(*, keep: bool) -> tuple[subprocess.Popen[str], str]:
    """A child that prints its identity and waits."""
    code = "from zarrcache.disk._publish import owner_id; print(owner_id(), flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    owner = child.stdout.readline().strip()
    if not keep:
        child.communicate("\n")
    return child, owner


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    """Renaming a file to the name of a device would replace the device."""
    pipe = tmp_path / "a.prom"
    os.mkfifo(pipe)
    reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        write_file(pipe, b"values")
        assert os.read(reading, 10) == b"values"
    finally:
        os.close(reading)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_link_to_the_users_file_and_its_permissions_stay(tmp_path: Path) -> None:
    """A map may be shared with a group, and be linked to from several projects."""
    shared, link = tmp_path / "shared" / "map.json", tmp_path / "map.json"
    shared.parent.mkdir()
    shared.write_bytes(b"old")
    shared.chmod(0o664)
    link.symlink_to(shared)
    write_file(link, b"new")
    assert link.is_symlink()
    assert (shared.read_bytes(), shared.stat().st_mode & 0o777) == (b"new", 0o664)
    assert list(shared.parent.iterdir()) == [shared]


def test_living_process_is_not_dead() -> None:
    child, owner = owner_of_a_child(keep=True)
    try:
        assert not is_dead(owner_id())
        assert not is_dead(owner)
    finally:
        child.communicate("\n")


def test_ended_process_is_dead() -> None:
    assert is_dead(owner_of_a_child(keep=False)[1])


def test_killed_process_is_dead_before_its_parent_has_waited_for_it() -> None:
    """A DataLoader may not wait for a worker that it lost for days."""
    child, owner = owner_of_a_child(keep=True)
    os.kill(child.pid, 9)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_dead(owner)
    child.communicate()


def test_a_reused_pid_is_another_process() -> None:
    machine, pid, started = owner_id().split(" ")
    assert is_dead(f"{machine} {pid} {int(started) - 1}")


def test_process_of_another_machine_counts_as_alive() -> None:
    """A reservation too many is better than a file deleted under its writer."""
    _, pid, started = owner_id().split(" ")
    assert not is_dead(f"otherhost:boot:pid:[1] {pid} {int(started) - 1}")


@pytest.mark.parametrize(
    "owner",
    [
        "",
        "x",
        "a b",
        "a b c d",
        f"{owner_id().split(' ')[0]} pid 1",
        f"{owner_id().split(' ')[0]} 99999999999999999999 1 ",
    ],
)
def test_a_malformed_owner_in_a_damaged_row_does_not_stop_a_sweep(owner: str) -> None:
    assert is_dead(owner) in (True, False)


def test_forked_child_has_an_identity_of_its_own() -> None:
    parent = owner_id()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.write(write, owner_id().encode())
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    child = os.read(read, 1000).decode()
    os.close(read)
    assert child.split(" ")[0] == parent.split(" ")[0]
    assert child.split(" ")[1] == str(pid)
    assert is_dead(child)


def test_process_from_before_a_reboot_is_dead() -> None:
    host, boot, rest = owner_id().split(":", 2)
    assert is_dead(f"{host}:another-{boot}:{rest}")


def test_a_process_of_another_container_counts_as_dead_after_a_day() -> None:
    unseen = "elsewhere:boot:pid:[1] 7 8"
    assert not is_dead(unseen, age_s=3600.0)
    assert is_dead(unseen, age_s=2 * 86400.0)


# -- hidden files


def test_only_the_partial_files_of_one_owner_are_its_own(tmp_path: Path) -> None:
    final, dead = tmp_path / "entry", "elsewhere 1 2"
    mine = hidden_path(final, "partial")
    left = tmp_path / f".entry.partial-{_tag_of(dead)}-0123abcd"
    other = tmp_path / f".entry2.partial-{_tag_of(dead)}-0123abcd"
    for path in (mine, left, other):
        path.touch()
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert partials_of(final.name, dead, fd) == [left.name]
        assert partials_of(final.name, owner_id(), fd) == [mine.name]
    finally:
        os.close(fd)


@pytest.mark.parametrize("owner", ["machine 1 ../../x", "machine * *", "machine"])
def test_a_planted_owner_finds_no_file(tmp_path: Path, owner: str) -> None:
    hidden_path(tmp_path / "entry", "partial").touch()
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        assert partials_of("entry", owner, fd) == []
    finally:
        os.close(fd)


def test_a_hidden_name_says_what_it_will_be_published_as(tmp_path: Path) -> None:
    assert published_name(hidden_path(tmp_path / "entry", "partial").name) == "entry"
    assert published_name("entry") is None
    assert published_name(".entry.partial") is None


def test_a_sweep_leaves_names_of_others_and_writers_that_live(tmp_path: Path) -> None:
    machine = owner_id().partition(" ")[0]
    dead = _tag_of(f"{machine} 1 2")
    ours = tmp_path / f".a.zarr.partial-{dead}-0123abcd"
    others = tmp_path / f".a.txt.partial-{dead}-0123abcd"
    alive = hidden_path(tmp_path / "b.zarr", "partial")
    for path in (ours, others, alive):
        path.touch()
    assert sweep_hidden(tmp_path, lambda name: name.endswith(".zarr")) == [ours]
    assert sorted(tmp_path.iterdir()) == sorted([others, alive])
