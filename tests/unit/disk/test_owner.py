"""Who is writing: a process is told from another of the same pid, on this machine only."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from zarrcache.disk._owner import is_dead, owner_id


def owner_of_a_child(*, keep: bool) -> tuple[subprocess.Popen[str], str]:
    """A child that tells its identity and waits."""
    code = "from zarrcache.disk._owner import owner_id; print(owner_id(), flush=True); input()"
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    owner = child.stdout.readline().strip()
    if not keep:
        child.communicate("\n")
    return child, owner


def test_living_process_is_not_dead() -> None:
    """Neither this one nor a child."""
    child, owner = owner_of_a_child(keep=True)
    try:
        assert not is_dead(owner_id())
        assert not is_dead(owner)
    finally:
        child.communicate("\n")


def test_ended_process_is_dead() -> None:
    """However it ended."""
    assert is_dead(owner_of_a_child(keep=False)[1])


def test_killed_process_is_dead_before_its_parent_has_waited_for_it() -> None:
    """A zombie writes no more; a DataLoader that lost a worker may not wait for it for days."""
    child, owner = owner_of_a_child(keep=True)
    os.kill(child.pid, 9)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert is_dead(owner)
    child.communicate()


def test_pid_that_was_used_again_is_another_process() -> None:
    """The start time tells them apart."""
    machine, pid, started = owner_id().split(" ")
    assert is_dead(f"{machine} {pid} {int(started) - 1}")


def test_process_of_another_machine_counts_as_alive() -> None:
    """Nobody here can know; an entry more or less is better than a file deleted under its writer."""
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
def test_owner_that_cannot_be_read_counts_as_alive_or_gone_without_an_error(owner: str) -> None:
    """A damaged row must not stop a sweep."""
    assert is_dead(owner) in (True, False)


def test_forked_child_has_an_identity_of_its_own() -> None:
    """Cached per process, right after a fork too."""
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
    """Same host, another boot: whatever it had reserved is free again."""
    host, boot, rest = owner_id().split(":", 2)
    assert is_dead(f"{host}:another-{boot}:{rest}")


def test_process_that_cannot_be_seen_is_given_a_day() -> None:
    """Another container on the same disk: alive for a day, then its reservation ends."""
    stranger = "elsewhere:boot:pid:[1] 7 8"
    assert not is_dead(stranger, age_s=3600.0)
    assert is_dead(stranger, age_s=2 * 86400.0)
