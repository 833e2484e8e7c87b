"""Items spread over processes: a dead process costs one item, and none is left behind."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import interpreters
from zarrcache.errors import ConfigError
from zarrcache.parallel.pool import Died, Reserve, spread
from zarrcache.parallel.process import ChildProcess
from zarrcache.parallel.signals import raise_on_signals


def _double(n: int, reserve: Reserve) -> int:
    return 2 * n


def _die_of_seven(n: int, reserve: Reserve) -> int:
    if n == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * n


def _die_once(marker: str, reserve: Reserve) -> str:
    if marker and not os.path.exists(marker):
        Path(marker).touch()
        os._exit(3)
    return marker


def _see(directory: str, count: int) -> None:
    """Return when ``count`` others have started."""
    while len(list(Path(directory.removeprefix("see:")).glob("*.started"))) < count:
        time.sleep(0.01)


def _work_until_go(directory: str, reserve: Reserve) -> None:
    if directory.startswith("see:"):
        _see(directory, 2)
        return
    Path(directory, f"{os.getpid()}.started").touch()
    while not Path(directory, "go").exists():
        time.sleep(0.05)
    Path(directory, f"{os.getpid()}.ended").touch()


def _work_through_a_pool(directory: str, reserve: Reserve) -> None:
    """As zarr does it: start a thread for a part of the work, after the parent has hung up."""
    _work_until_go(directory, reserve)
    if not directory.startswith("see:"):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(Path(directory, f"{os.getpid()}.pooled").touch).result()


def _meet(directory: str, reserve: Reserve) -> int:
    """Wait for three items that run at once."""
    Path(directory, secrets.token_hex(8)).touch()
    while len(os.listdir(directory)) < 3:
        time.sleep(0.01)
    return os.getpid()


def _hold(need: tuple[int, str], reserve: Reserve) -> int:
    """Reserve memory in two parts; the bytes that all items hold together after the second."""
    nbytes, directory = need
    mine = Path(directory, secrets.token_hex(8))
    for held in (nbytes // 4, nbytes):
        reserve(held - (mine.stat().st_size if mine.exists() else 0))
        mine.write_bytes(bytes(held))
        time.sleep(0.01)
    together = sum(path.stat().st_size for path in Path(directory).iterdir())
    mine.write_bytes(b"")
    return together


def _hold_until_go(directory: str, reserve: Reserve) -> None:
    if directory.startswith("see:"):
        _see(directory, 1)
        return
    reserve(1)
    _work_until_go(directory, reserve)


def _fail(n: int, reserve: Reserve) -> int:
    if n == 3:
        raise ValueError("three")
    return n


class _LargeAndCannotBeUnpickled:
    def __init__(self) -> None:
        self.names = bytes(5_000_000)

    def __call__(self, n: int, reserve: Reserve) -> int:
        return n

    def __setstate__(self, state: object) -> None:
        os._exit(6)


class _CannotBeUnpickled:
    def __call__(self, n: int, reserve: Reserve) -> int:
        return n

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (5,)


def test_every_item_gets_its_result() -> None:
    """More items than processes, fewer, and none; no process is left."""
    assert dict(spread(_double, range(10), 2)) == {n: 2 * n for n in range(10)}
    assert dict(spread(_double, [4], 3)) == {4: 8}
    assert list(spread(_double, [], 2)) == []
    assert interpreters() == []


def test_an_item_that_kills_its_process_is_named_and_the_others_go_on() -> None:
    """It is given up after two processes: one that worked on others too, and one of its own."""
    results = dict(spread(_die_of_seven, range(12), 2))
    assert {n: result for n, result in results.items() if n != 7} == {
        n: 2 * n for n in range(12) if n != 7
    }
    assert results[7] == Died(-signal.SIGKILL)
    assert str(results[7]) == "SIGKILL, perhaps out of memory"


def test_an_item_whose_process_died_by_chance_is_tried_again(tmp_path: Path) -> None:
    """The second time it is alone, and may have enough memory."""
    marker = str(tmp_path / "was here")
    assert dict(spread(_die_once, ["", marker], 2)) == {"": "", marker: marker}


def test_processes_that_cannot_load_the_function_are_one_error_and_no_endless_loop() -> None:
    with pytest.raises(ConfigError, match=r"ended before its first item \(exit code 5\).*__main__"):
        list(spread(_CannotBeUnpickled(), range(3), 2))
    with pytest.raises(ConfigError, match=r"ended before its first item \(exit code 6\)"):
        list(spread(_LargeAndCannotBeUnpickled(), range(3), 2))
    assert interpreters() == []


@contextlib.contextmanager
def _descriptors(count: int) -> Iterator[None]:
    """Leave this process ``count`` file descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = [os.open("/dev/null", os.O_RDONLY) for _ in range(count)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 1, hard))
    for fd in held:
        os.close(fd)
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_where_few_processes_can_be_started_these_do_it(caplog: pytest.LogCaptureFixture) -> None:
    """The items of a process that cannot be started are left to the others."""
    with _descriptors(8):  # one for each process, and five to start one
        assert sorted(spread(_double, range(8), 6)) == [(n, 2 * n) for n in range(8)]
    assert [
        "worker processes instead of 6" in record.getMessage() for record in caplog.records
    ] == [True]
    with _descriptors(3), pytest.raises(ConfigError, match="No worker process can be started"):
        list(spread(_double, range(8), 6))
    assert interpreters() == []


@pytest.mark.parametrize(
    "kill", ["kill -INT $PPID", "kill -INT $PPID; kill -TERM $PPID"], ids=["Ctrl-C", "and SIGTERM"]
)
@pytest.mark.parametrize("with_thread", [False, True], ids=["alone", "beside a thread"])
def test_interrupted_while_a_process_starts_nothing_of_it_stays(
    kill: str,
    with_thread: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The main thread blocks the signals at that moment; another thread may receive them."""
    executable, until_done = tmp_path / "python", threading.Event()
    executable.write_text(f'#!/bin/sh\n{kill}\nsleep 0.2\nexec {sys.executable} "$@"\n')
    executable.chmod(0o755)
    descriptors = len(os.listdir("/proc/self/fd"))
    other = threading.Thread(target=until_done.wait if with_thread else int)
    other.start()
    monkeypatch.setattr(sys, "executable", str(executable))
    try:
        with raise_on_signals():
            with pytest.raises(KeyboardInterrupt):
                list(spread(_work_until_go, [str(tmp_path)], 1, stop_s=0.1))
            # Until then the script may send its second signal, which would end pytest.
            _wait_until(lambda: interpreters() == [])
    finally:
        until_done.set()
        other.join()
    # Fewer: what earlier tests left is closed at any time.
    assert len(os.listdir("/proc/self/fd")) <= descriptors
    assert "Traceback" not in capfd.readouterr().err


def _wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_third_ctrl_c_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second interrupts the wait for items that have begun, the third the killing of a
    process.
    """
    outcomes = _busy(tmp_path)
    kill, kills = ChildProcess.kill, itertools.count()

    def interrupted_wait(self: ChildProcess, within_s: float) -> bool:
        raise KeyboardInterrupt

    def interrupted_kill(self: ChildProcess) -> None:
        kill(self)
        if next(kills) == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(ChildProcess, "has_ended", interrupted_wait)
    monkeypatch.setattr(ChildProcess, "kill", interrupted_kill)
    with pytest.raises(KeyboardInterrupt):
        outcomes.close()
    assert interpreters() == []


def _busy(directory: Path, **options: Any) -> Generator[tuple[str, Any]]:
    """Results of two processes that work on an item until ``directory/go`` exists."""
    outcomes = spread(
        _work_until_go, [f"see:{directory}", str(directory), str(directory)], 3, **options
    )
    assert next(outcomes) == (f"see:{directory}", None)
    return outcomes


def test_a_consumer_that_stops_lets_the_processes_finish_their_items(tmp_path: Path) -> None:
    """No item is left half done, and no other is begun."""
    outcomes = _busy(tmp_path)
    (tmp_path / "go").touch()
    outcomes.close()
    assert len(list(tmp_path.glob("*.ended"))) == 2
    assert interpreters() == []


def _go_later(directory: Path) -> None:
    """Write ``go`` when both processes have had time to see that the parent has hung up."""
    time.sleep(0.5)
    (directory / "go").touch()


def test_what_a_process_finishes_may_still_use_threads(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its interpreter must not begin to shut down: then no executor accepts work, and a store
    would fail in its middle.
    """
    outcomes = spread(_work_through_a_pool, [f"see:{tmp_path}", str(tmp_path), str(tmp_path)], 3)
    assert next(outcomes) == (f"see:{tmp_path}", None)
    threading.Thread(target=_go_later, args=(tmp_path,)).start()
    outcomes.close()
    assert len(list(tmp_path.glob("*.pooled"))) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_a_process_that_does_not_finish_is_killed(tmp_path: Path) -> None:
    _busy(tmp_path, stop_s=0.1).close()
    assert list(tmp_path.glob("*.ended")) == []
    assert interpreters() == []


def test_a_process_works_on_as_many_items_as_it_has_threads(tmp_path: Path) -> None:
    """Three items that wait for each other are in one process together."""
    pids = dict.fromkeys(pid for _, pid in spread(_meet, [str(tmp_path)] * 3, 1, threads=3))
    assert len(pids) == 1
    assert os.getpid() not in pids


def test_every_item_of_a_process_that_dies_is_tried_again_alone() -> None:
    """Items that ran beside the cause have their results."""
    results = dict(spread(_die_of_seven, range(12), 2, threads=3))
    assert results == {n: 2 * n for n in range(12)} | {7: Died(-signal.SIGKILL)}


def test_an_item_that_raises_ends_its_process(capfd: pytest.CaptureFixture[str]) -> None:
    """An item reports failures in its result; any other exception is a bug, and is printed."""
    assert dict(spread(_fail, range(5), 1, threads=2)) == {0: 0, 1: 1, 2: 2, 3: Died(1), 4: 4}
    assert "ValueError: three" in capfd.readouterr().err


def test_the_memory_of_all_processes_together_has_a_budget(tmp_path: Path) -> None:
    """Six at a time would hold six times 600 bytes; an item of 5000 runs all the same."""
    needs = [(600, str(tmp_path))] * 20 + [(5000, str(tmp_path))] + [(300, str(tmp_path))] * 20
    together = [held for _, held in spread(_hold, needs, 2, threads=3, budget_bytes=1500)]
    assert len(together) == len(needs)
    assert sum(held > 1500 + 600 for held in together) == 1
    assert 5000 <= max(together) <= 5000 + 1500


def test_an_item_that_waits_for_memory_ends_when_the_rest_is_cancelled(tmp_path: Path) -> None:
    """At once, without having begun; the item that has memory finishes."""
    outcomes = spread(
        _hold_until_go,
        [str(tmp_path), str(tmp_path), f"see:{tmp_path}"],
        1,
        threads=3,
        budget_bytes=0,
        stop_s=250,
    )
    assert next(outcomes) == (f"see:{tmp_path}", None)
    (tmp_path / "go").touch()
    outcomes.close()
    assert (len(list(tmp_path.glob("*.started"))), len(list(tmp_path.glob("*.ended")))) == (1, 1)
    assert interpreters() == []
