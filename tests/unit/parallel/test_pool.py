"""Work spread over processes: who dies costs one item, who stops leaves nobody behind."""

from __future__ import annotations

import contextlib
import os
import resource
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.spawn import get_executable, set_executable
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import interpreters
from zarrcache.errors import ConfigError
from zarrcache.parallel.pool import Died, Reserve, spread
from zarrcache.parallel.signals import ending_in_order


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
    """Come to an end when so many others have started."""
    while len(list(Path(directory.removeprefix("see:")).glob("*.started"))) < count:
        time.sleep(0.01)


def _work_until_told(directory: str, reserve: Reserve) -> None:
    if directory.startswith("see:"):
        _see(directory, 2)
        return
    Path(directory, f"{os.getpid()}.started").touch()
    while not Path(directory, "go").exists():
        time.sleep(0.05)
    Path(directory, f"{os.getpid()}.ended").touch()


def _work_through_a_pool(directory: str, reserve: Reserve) -> None:
    """As zarr does it: a part of the work is given to threads when the process has been told to
    stop.
    """
    _work_until_told(directory, reserve)
    if not directory.startswith("see:"):
        with ThreadPoolExecutor(1) as pool:
            pool.submit(Path(directory, f"{os.getpid()}.pooled").touch).result()


def _meet(directory: str, reserve: Reserve) -> int:
    """Wait until as many are here as there should be."""
    Path(directory, secrets.token_hex(8)).touch()
    while len(os.listdir(directory)) < 3:
        time.sleep(0.01)
    return os.getpid()


def _hold(need: tuple[int, str], reserve: Reserve) -> int:
    """Take memory in two parts, and note at each moment what all hold together; two or three hold
    some at once.
    """
    nbytes, directory = need
    mine = Path(directory, secrets.token_hex(8))
    for held in (nbytes // 4, nbytes):
        reserve(held - (mine.stat().st_size if mine.exists() else 0))
        mine.write_bytes(bytes(held))
        time.sleep(0.01)
    together = sum(path.stat().st_size for path in Path(directory).iterdir())
    mine.write_bytes(b"")
    return together


def _hold_until_told(directory: str, reserve: Reserve) -> None:
    if directory.startswith("see:"):
        _see(directory, 1)
        return
    reserve(1)
    _work_until_told(directory, reserve)


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
    """More items than processes, fewer, and none; nobody stays behind."""
    assert dict(spread(_double, range(10), 2)) == {n: 2 * n for n in range(10)}
    assert dict(spread(_double, [4], 3)) == {4: 8}
    assert list(spread(_double, [], 2)) == []
    assert interpreters() == []


def test_an_item_that_kills_its_process_is_named_and_the_others_go_on() -> None:
    """Killed once beside others and once alone, it is given up; the signal is said."""
    results = dict(spread(_die_of_seven, range(12), 2))
    assert {n: result for n, result in results.items() if n != 7} == {
        n: 2 * n for n in range(12) if n != 7
    }
    assert results[7] == Died(-signal.SIGKILL)
    assert str(results[7]) == "SIGKILL, perhaps for lack of memory"


def test_an_item_whose_process_died_by_chance_is_tried_again(tmp_path: Path) -> None:
    """The second time, alone, there is memory enough."""
    marker = str(tmp_path / "was here")
    assert dict(spread(_die_once, ["", marker], 2)) == {"": "", marker: marker}


def test_processes_that_cannot_begin_are_one_error_and_no_endless_loop() -> None:
    """Of the parts of a function that its process cannot have."""
    with pytest.raises(ConfigError, match=r"ended before it could begin \(exit code 5\).*__main__"):
        list(spread(_CannotBeUnpickled(), range(3), 2))
    with pytest.raises(ConfigError, match=r"ended before it could begin \(exit code 6\)"):
        list(spread(_LargeAndCannotBeUnpickled(), range(3), 2))
    assert interpreters() == []


def _run(script: Path, text: str) -> subprocess.CompletedProcess[str]:
    script.write_text(text)
    return subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=120, check=False
    )


def test_a_script_needs_no_guard(tmp_path: Path) -> None:
    """What it does it does once, and what it has imported no process imports again."""
    text = "import operator\nfrom zarrcache.parallel.pool import spread\nfound = spread(operator.is_, [b'', bytes(5_000_000)], 2)\n"
    done = _run(
        tmp_path / "script.py", f"print('imported')\n{text}print([result for _, result in found])\n"
    )
    assert (done.stdout, done.stderr) == ("imported\n[False, False]\n", "")


def test_a_directory_may_be_named_like_a_main_module(tmp_path: Path) -> None:
    """Work refers to the script by its module's name, not by any text that holds it."""
    text = "import functools, operator\nfrom zarrcache.parallel.pool import spread\nf = functools.partial(print, '/data/domain__pbe')\n"
    done = _run(
        tmp_path / "script.py",
        f"print('imported', flush=True)\n{text}print([kind for _, kind in spread(f, [1], 1)])\n",
    )
    assert (done.stdout.count("imported"), done.stdout.count("domain__pbe"), done.stderr) == (
        1,
        1,
        "",
    )


SCRIPT = """
from zarrcache.parallel.pool import spread
def double(n, reserve):
    return 2 * n
"""
MAIN = "print(sorted(spread(double, range(3), 2)))\n"


def test_a_script_whose_own_function_is_to_run_needs_the_guard_and_is_told(tmp_path: Path) -> None:
    """Its processes import it, and would start processes in turn, without end."""
    done = _run(tmp_path / "script.py", f"{SCRIPT}if __name__ == '__main__':\n    {MAIN}")
    assert (done.stdout, done.stderr) == ("[(0, 0), (1, 2), (2, 4)]\n", "")
    done = _run(tmp_path / "script.py", SCRIPT + MAIN)
    assert "ended before it could begin (exit code 1)" in done.stderr
    assert "below `if __name__ == '__main__':`" in done.stderr
    assert done.stdout == ""


def test_a_spawned_process_spreads_functions_of_its_script(tmp_path: Path) -> None:
    """There the script has another name."""
    main = "def run():\n    print(sorted(spread(double, range(3), 2)))\n"
    start = "    import multiprocessing\n    child = multiprocessing.get_context('spawn').Process(target=run)\n    child.start()\n    child.join()\n"
    done = _run(tmp_path / "script.py", f"{SCRIPT}{main}if __name__ == '__main__':\n{start}")
    assert (done.stdout, done.stderr) == ("[(0, 0), (1, 2), (2, 4)]\n", "")


def test_workers_have_the_flags_of_the_interpreter(tmp_path: Path) -> None:
    """Of ``python -O`` and ``-W``, as those of multiprocessing have."""
    script = tmp_path / "script.py"
    report = (
        "def flags(n, reserve):\n    import sys\n    return sys.flags.optimize, sys.warnoptions\n"
    )
    script.write_text(
        f"{SCRIPT}{report}if __name__ == '__main__':\n    print(list(spread(flags, [0], 1)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-O", "-Wignore", script],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("[(0, (1, ['ignore']))]\n", "")


def test_what_lies_in_the_working_directory_is_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of notes that is called like a module of Python."""
    (tmp_path / "socket.py").write_text("raise ImportError('of mine')")
    monkeypatch.chdir(tmp_path)
    assert list(spread(_double, [3], 1)) == [(3, 6)]


@contextlib.contextmanager
def _descriptors(count: int) -> Iterator[None]:
    """So many are left to this process."""
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
    """And one that cannot be started does not lose what the others do."""
    with _descriptors(12):
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
def test_interrupted_while_a_process_starts_nothing_of_it_stays(
    kill: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C between the start and its settings: the signal goes to whichever thread does not hold
    it back.
    """
    executable, until_told = tmp_path / "python", threading.Event()
    executable.write_text(f'#!/bin/sh\n{kill}\nsleep 0.2\nexec {sys.executable} "$@"\n')
    executable.chmod(0o755)
    other = threading.Thread(target=until_told.wait)
    other.start()
    before, descriptors = get_executable(), len(os.listdir("/proc/self/fd"))
    set_executable(str(executable))
    try:
        with ending_in_order(), pytest.raises(KeyboardInterrupt):
            list(spread(_work_until_told, [str(tmp_path)], 1, stop_s=0.1))
    finally:
        set_executable(before)
        until_told.set()
        other.join()
    time.sleep(0.5)
    assert interpreters() == []
    assert len(os.listdir("/proc/self/fd")) == descriptors
    assert "Traceback" not in capfd.readouterr().err


def _busy(directory: Path, **options: Any) -> Generator[tuple[str, Any]]:
    """Two processes that are at work for sure."""
    outcomes = spread(
        _work_until_told, [f"see:{directory}", str(directory), str(directory)], 3, **options
    )
    assert next(outcomes) == (f"see:{directory}", None)
    return outcomes


def test_a_consumer_that_stops_lets_the_processes_finish_their_items(tmp_path: Path) -> None:
    """Nothing is left half done, and nothing new is begun."""
    outcomes = _busy(tmp_path)
    (tmp_path / "go").touch()
    outcomes.close()
    assert len(list(tmp_path.glob("*.ended"))) == 2
    assert interpreters() == []


def _told_later(directory: Path) -> None:
    """Say go, when both have had time to find that nobody wants the rest."""
    time.sleep(0.5)
    (directory / "go").touch()


def test_what_a_process_finishes_may_still_use_threads(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its interpreter has not begun to end: from then on no executor would take work, and a store
    would fail in its middle.
    """
    outcomes = spread(_work_through_a_pool, [f"see:{tmp_path}", str(tmp_path), str(tmp_path)], 3)
    assert next(outcomes) == (f"see:{tmp_path}", None)
    threading.Thread(target=_told_later, args=(tmp_path,)).start()
    outcomes.close()
    assert len(list(tmp_path.glob("*.pooled"))) == 2
    assert "Traceback" not in capfd.readouterr().err


def test_a_process_that_does_not_finish_is_killed(tmp_path: Path) -> None:
    """Whoever pressed Ctrl-C does not wait for ever."""
    _busy(tmp_path, stop_s=0.1).close()
    assert list(tmp_path.glob("*.ended")) == []
    assert interpreters() == []


def test_a_process_has_as_many_items_as_it_has_lanes(tmp_path: Path) -> None:
    """Three that wait for each other are in one process together."""
    pids = dict.fromkeys(pid for _, pid in spread(_meet, [str(tmp_path)] * 3, 1, lanes=3))
    assert len(pids) == 1
    assert os.getpid() not in pids


def test_of_a_process_that_dies_every_item_is_tried_again_alone() -> None:
    """Whoever was beside the one to blame has his result."""
    results = dict(spread(_die_of_seven, range(12), 2, lanes=3))
    assert results == {n: 2 * n for n in range(12)} | {7: Died(-signal.SIGKILL)}


def test_an_item_that_raises_ends_its_process(capfd: pytest.CaptureFixture[str]) -> None:
    """It reports failures in its result; anything else is a bug, which is shown and not swallowed."""
    assert dict(spread(_fail, range(5), 1, lanes=2)) == {0: 0, 1: 1, 2: 2, 3: Died(1), 4: 4}
    assert "ValueError: three" in capfd.readouterr().err


def test_the_memory_of_all_processes_together_has_a_budget(tmp_path: Path) -> None:
    """Six at a time would hold six times 600; one of 5000 is read all the same."""
    needs = [(600, str(tmp_path))] * 20 + [(5000, str(tmp_path))] + [(300, str(tmp_path))] * 20
    together = [held for _, held in spread(_hold, needs, 2, lanes=3, budget_bytes=1500)]
    assert len(together) == len(needs)
    assert sum(held > 1500 + 600 for held in together) == 1
    assert 5000 <= max(together) <= 5000 + 1500


def test_who_waits_for_memory_ends_when_nobody_wants_the_rest(tmp_path: Path) -> None:
    """At once, and without having begun; the one that has it finishes."""
    outcomes = spread(
        _hold_until_told,
        [str(tmp_path), str(tmp_path), f"see:{tmp_path}"],
        1,
        lanes=3,
        budget_bytes=0,
        stop_s=250,
    )
    assert next(outcomes) == (f"see:{tmp_path}", None)
    (tmp_path / "go").touch()
    outcomes.close()
    assert (len(list(tmp_path.glob("*.started"))), len(list(tmp_path.glob("*.ended")))) == (1, 1)
    assert interpreters() == []
