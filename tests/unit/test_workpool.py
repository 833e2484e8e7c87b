"""Work spread over processes: who dies costs one item, who stops leaves nobody behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from zarrcache import workpool
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


def _work_until_told(directory: str) -> None:
    if not directory:
        return
    Path(directory, f"{os.getpid()}.started").touch()
    while not Path(directory, "go").exists():
        time.sleep(0.05)
    Path(directory, f"{os.getpid()}.ended").touch()


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


def _busy(directory: Path) -> Generator[tuple[str, Any]]:
    """Two processes that are at work for sure."""
    outcomes = spread(_work_until_told, ["", str(directory), str(directory)], 3)
    assert next(outcomes) == ("", None)
    deadline = time.monotonic() + 60
    while len(list(directory.glob("*.started"))) < 2:
        assert time.monotonic() < deadline, "the processes did not start"
        time.sleep(0.01)
    return outcomes


def test_a_consumer_that_stops_lets_the_processes_finish_their_items(tmp_path: Path) -> None:
    """Nothing is left half done, and nothing new is begun."""
    outcomes = _busy(tmp_path)
    (tmp_path / "go").touch()
    outcomes.close()
    assert len(list(tmp_path.glob("*.ended"))) == 2
    assert multiprocessing.active_children() == []


def test_a_process_that_does_not_finish_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever pressed Ctrl-C does not wait for ever."""
    monkeypatch.setattr(workpool, "_STOP_S", 0.1)
    _busy(tmp_path).close()
    assert list(tmp_path.glob("*.ended")) == []
    assert multiprocessing.active_children() == []
