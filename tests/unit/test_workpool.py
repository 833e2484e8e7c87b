"""Work spread over processes: who dies costs one item, who stops leaves nobody behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from zarrcache.errors import ConfigError
from zarrcache.workpool import Died, spread


def _double(n: int) -> int:
    return 2 * n


def _die_of_seven(n: int) -> int:
    if n == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * n


def _die_once(marker: str) -> str:
    if marker and not os.path.exists(marker):
        Path(marker).touch()
        os._exit(3)
    return marker


def _work_until_stopped(directory: str) -> None:
    if not directory:
        return
    started = Path(directory, f"{os.getpid()}.started")
    try:
        started.touch()
        while True:
            time.sleep(60)
    finally:
        started.rename(started.with_suffix(".ended"))


class _CannotBeUnpickled:
    def __call__(self, n: int) -> int:
        return n

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (5,)


def test_every_item_gets_its_result() -> None:
    """More items than processes, fewer, and none; nobody stays behind."""
    assert dict(spread(_double, range(10), 2)) == {n: 2 * n for n in range(10)}
    assert dict(spread(_double, [4], 3)) == {4: 8}
    assert list(spread(_double, [], 2)) == []
    assert multiprocessing.active_children() == []


def test_an_item_that_kills_its_process_is_named_and_the_others_go_on() -> None:
    """Killed once beside others and once alone, it is given up; the signal is said."""
    results = dict(spread(_die_of_seven, range(12), 2))
    assert {n: result for n, result in results.items() if n != 7} == {n: 2 * n for n in range(12) if n != 7}
    assert results[7] == Died(-signal.SIGKILL)
    assert str(results[7]) == "SIGKILL, perhaps for lack of memory"


def test_an_item_whose_process_died_by_chance_is_tried_again(tmp_path: Path) -> None:
    """The second time, alone, there is memory enough."""
    marker = str(tmp_path / "was here")
    assert dict(spread(_die_once, ["", marker], 2)) == {"": "", marker: marker}


def test_processes_that_cannot_begin_are_one_error_and_no_endless_loop() -> None:
    """A script without the ``__main__`` guard dies like this, and has to be told."""
    with pytest.raises(ConfigError, match=r"ended before it could begin \(exit code 5\).*__main__"):
        list(spread(_CannotBeUnpickled(), range(3), 2))
    assert multiprocessing.active_children() == []


def test_a_consumer_that_stops_ends_the_processes_in_order(tmp_path: Path) -> None:
    """Each gets to clean up what it has half done."""
    outcomes = spread(_work_until_stopped, ["", str(tmp_path), str(tmp_path)], 3)
    assert next(outcomes) == ("", None)
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.started"))) < 2:
        assert time.monotonic() < deadline, "the processes did not start"
        time.sleep(0.01)
    outcomes.close()
    assert len(list(tmp_path.glob("*.ended"))) == 2
    assert multiprocessing.active_children() == []
