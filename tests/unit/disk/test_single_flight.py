"""Single flight: one holder per digest, and a broken lock stops no reader."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import threading
from pathlib import Path

import pytest

from zarrcache.disk.single_flight import STRIPES, SingleFlight
from zarrcache.errors import LockTimeoutError

DIGEST = "0123456789abcdef" * 2


def test_threads_of_one_process_exclude_each_other(tmp_path: Path) -> None:
    inside, most = 0, 0
    counting = threading.Lock()

    def work() -> None:
        nonlocal inside, most
        with SingleFlight(tmp_path, timeout_s=60).hold(DIGEST) as held:
            assert held
            with counting:
                inside += 1
                most = max(most, inside)
            threading.Event().wait(0.01)
            with counting:
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1


def test_without_a_lock_in_time_the_work_is_done_and_that_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The message names the file and the seconds."""
    impatient = SingleFlight(tmp_path, timeout_s=0.05)
    with SingleFlight(tmp_path, timeout_s=5).hold(DIGEST) as held, caplog.at_level(logging.WARNING):
        assert held
        for _ in range(2):
            with impatient.hold(DIGEST) as mine:
                assert not mine
    (record,) = caplog.records
    assert f"{tmp_path / 'flight-567.lock'} was not free within 0 s" in record.getMessage()
    assert isinstance(record.args[0], LockTimeoutError)  # type: ignore[index]


def test_other_digests_and_other_kinds_of_locks_do_not_wait(tmp_path: Path) -> None:
    with SingleFlight(tmp_path, timeout_s=5).hold(DIGEST):
        with SingleFlight(tmp_path, timeout_s=0).hold("1" * 32) as other:
            assert other
        with SingleFlight(tmp_path, timeout_s=0, name="open").hold(DIGEST) as opening:
            assert opening


def test_a_lock_is_released_after_an_error(tmp_path: Path) -> None:
    flight = SingleFlight(tmp_path, timeout_s=0)
    with pytest.raises(TimeoutError, match="origin"), flight.hold(DIGEST):
        raise TimeoutError("origin")
    with flight.hold(DIGEST) as held:
        assert held


def test_lock_files_are_few_and_private(tmp_path: Path) -> None:
    """200,000 digests share 4,096 files."""
    flight = SingleFlight(tmp_path, timeout_s=1, mode=0o660)
    for number in (0, 1, STRIPES - 1, STRIPES, STRIPES + 1):
        with flight.hold(f"{number:08x}" + "0" * 24):
            pass
    assert sorted(os.listdir(tmp_path)) == ["flight-000.lock", "flight-001.lock", "flight-fff.lock"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {0o660}


def test_a_missing_directory_is_not_created(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only ``CacheDir`` knows its permissions. The work is done without a lock."""
    with SingleFlight(tmp_path / "locks", timeout_s=1).hold(DIGEST) as held:
        assert not held
    assert not (tmp_path / "locks").exists()
    assert "single flight is off" in caplog.text


def test_a_file_system_without_locks_does_not_stop_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(fcntl, "flock", flock)
    with SingleFlight(tmp_path, timeout_s=1).hold(DIGEST) as held:
        assert not held
