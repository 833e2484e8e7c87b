"""Run a function as another user of the node: in a forked child that gives up root."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

__all__ = [
    "ALICE",
    "BOB",
    "CAROL",
    "TEAM",
    "User",
    "as_user",
    "needs_users",
    "open_to_all",
    "start_as",
    "without_privileges",
]

_ENDS_S = 120.0
#: A group that ALICE and BOB are in, beside each one's own. No such user or group exists: the
#: numbers are all that counts.
TEAM = 51000


@dataclass(frozen=True)
class User:
    """A user of the node."""

    uid: int
    groups: tuple[int, ...] = ()
    umask: int = 0o022


ALICE = User(51001, (TEAM,), umask=0o077)
BOB = User(51002, (TEAM,), umask=0o022)
CAROL = User(51003)


def _can_change_users() -> bool:
    """Whether this is root with these numbers: not in a user namespace that maps root alone."""
    try:
        maps = [Path(f"/proc/self/{kind}_map").read_text().splitlines() for kind in ("uid", "gid")]
    except OSError:  # not Linux
        return os.geteuid() == 0
    return os.geteuid() == 0 and all(
        any(
            int(first) <= number < int(first) + int(count)
            for first, _, count in map(str.split, lines)
        )
        for lines in maps
        for number in (TEAM, ALICE.uid, BOB.uid, CAROL.uid)
    )


#: Mark of tests that need several users.
needs_users = pytest.mark.skipif(
    not _can_change_users(),
    reason="only root can act as several users (or `unshare --user --map-root-user --map-auto`, "
    "which needs newuidmap and /etc/subuid)",
)


def without_privileges(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` in a child that may do no more than the files' permissions say."""
    if os.geteuid() == 0 and not _can_change_users():
        pytest.skip("root of a user namespace may do everything and be no other user")
    return as_user(CAROL if os.geteuid() == 0 else None, function, *args)


def as_user(user: User | None, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` as ``user`` (None: as it is); what it returns, or an AssertionError with
    its traceback.

    Modules have to be imported before: the interpreter may lie where the user cannot read.
    """
    return start_as(user, function, *args)()


def start_as(user: User | None, function: Callable[..., Any], *args: Any) -> Callable[[], Any]:
    """As :func:`as_user`, but without waiting: the returned function waits for the result."""
    context = get_context("fork")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(user, there, function, args))
    process.start()
    there.close()

    def wait() -> Any:
        try:
            is_good, answer = here.recv() if here.poll(_ENDS_S) else (False, "it did not end")
        except EOFError:
            is_good, answer = False, "it sent no answer"
        if not is_good:
            process.kill()
        process.join()
        here.close()
        assert is_good, f"{user}, exit code {process.exitcode}: {answer}"
        return answer

    return wait


def _run(
    user: User | None, answer: Connection, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    gc.freeze()  # the collector would look through, and so copy, all that was imported
    if user is not None:
        os.setgroups(user.groups)
        os.setresgid(user.uid, user.uid, user.uid)
        os.setresuid(user.uid, user.uid, user.uid)
        os.umask(user.umask)
    try:
        result = (True, function(*args))
    except BaseException:  # noqa: BLE001 - raised in the test
        result = (False, traceback.format_exc())
    answer.send(result)


@contextlib.contextmanager
def open_to_all() -> Iterator[Path]:
    """A directory that every user can enter (pytest's own belong to root) and only root can
    write.
    """
    path = Path(tempfile.mkdtemp(prefix="zarrcache-users-"))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path)
