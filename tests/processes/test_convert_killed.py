"""A conversion killed or interrupted at any moment leaves only complete stores; the next run
completes it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.faultproxy import Rule, running_proxy
from tests.support.processes import HANG_S, end_all, until, wait_for_all
from tests.support.s3server import S3Server
from tests.support.stores import plain_read
from tests.support.training import start
from zarrcache.convert.density import read_density
from zarrcache.convert.plan import convert_directory, plan_convert
from zarrcache.convert.writer import is_document
from zarrcache.demo.synthetic import write_pairs

pytest.importorskip("pymatgen", reason="needs the extra 'convert'")

#: Small chunks make many files, so that there is time to be killed in the middle of a store.
OPTIONS: dict[str, Any] = {"chunks": 6, "workers": 2}
#: How the words of Python's resource tracker begin.
_TIDIED = f"{Path(resource_tracker.__file__)}:"
TO_COMPLETE: dict[str, Any] = {"chunks": 16, "workers": 1}
PROGRAM = """
import json, sys
from zarrcache.convert.plan import convert_directory
if __name__ == "__main__":
    src, dst, options = sys.argv[1:]
    print("started", flush=True)
    convert_directory(src, dst, **json.loads(options))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four densities as text."""
    root = tmp_path_factory.mktemp("pairs")
    write_pairs(root, 4, seed=4)
    return root / "label"


@contextmanager
def _converting(
    directory: Path, source: Path, dst: object, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """A conversion in its own process group, as a terminal or a batch system starts it."""
    program = directory / "program.py"
    program.write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, str(program), str(source), str(dst), json.dumps({**OPTIONS, **options})],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        end_all(process)


def _kill(process: subprocess.Popen[str]) -> None:
    """Kill the whole group, as a batch system does."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    wait_for_all(process)


def _visible(directory: Path) -> list[Path]:
    return sorted(path for path in directory.glob("*") if not path.name.startswith("."))


def _partials(directory: Path) -> list[Path]:
    return [path for path in directory.glob(".*") if ".partial-" in path.name]


def _check_complete(source: Path, out: Path) -> None:
    assert [path.name for path in _visible(out)] == sorted(
        f"{path.name.removesuffix('.CHGCAR')}.zarr" for path in source.iterdir()
    )
    assert len(list(out.iterdir())) == 4
    for path in source.iterdir():
        assert np.array_equal(
            plain_read(out / f"{path.name.removesuffix('.CHGCAR')}.zarr"), read_density(path).total
        )


def test_killed_in_the_middle_of_a_store_only_whole_ones_are_visible(
    source: Path, tmp_path: Path
) -> None:
    """All processes at once, as a batch system does. The next run cleans up and completes."""
    out = tmp_path / "out"
    with _converting(tmp_path, source, out) as process:
        until(lambda: _visible(out) and _partials(out), process, "store half written")
        _kill(process)
    whole = _visible(out)
    for store in whole:
        assert np.array_equal(
            plain_read(store),
            read_density(source / f"{store.name.removesuffix('.zarr')}.CHGCAR").total,
        )
    report = convert_directory(source, out, **TO_COMPLETE)
    assert [result.target for result in report.skipped] == [str(store) for store in whole]
    assert report.failed == ()
    _check_complete(source, out)


def _inode(store: Path) -> int | None:
    """Inode of the directory with this name; None between two renames."""
    try:
        return store.stat().st_ino
    except FileNotFoundError:
        return None


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_killed_while_it_overwrites_every_store_is_the_old_or_the_new_one(
    source: Path, tmp_path: Path, workers: int
) -> None:
    """Never absent, never mixed: old and new store differ in their number of chunks."""
    out = tmp_path / "out"
    convert_directory(source, out, chunks=16, workers=1)
    old = {store.name: _inode(store) for store in _visible(out)}
    with _converting(tmp_path, source, out, overwrite=True, workers=workers) as process:
        until(
            lambda: [
                store for store in _visible(out) if old.get(store.name) not in (None, _inode(store))
            ],
            process,
            "new store",
        )
        _kill(process)
    plan_convert(source, out, workers=1).execute()
    _check_complete(source, out)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_ends_every_process_and_leaves_nothing_half_written(
    source: Path, tmp_path: Path, workers: int
) -> None:
    """The terminal sends it to all processes; only the main program prints a message, and no hidden
    file remains.
    """
    out = tmp_path / "out"
    with _converting(tmp_path, source, out, workers=workers) as process:
        until(lambda: _partials(out), process, "store half written")
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=HANG_S)
        assert process.returncode == -signal.SIGINT
        wait_for_all(process)
    assert "SpawnProcess" not in stderr
    # On a busy machine a process is killed while it still imports, and Python's resource tracker
    # says that it has tidied up behind it.
    assert stderr.partition(_TIDIED)[0].rstrip().endswith("KeyboardInterrupt")
    assert [path for path in out.iterdir() if path.name.startswith(".")] == []
    convert_directory(source, out, **TO_COMPLETE)
    _check_complete(source, out)


@contextmanager
def _command(source: Path, dst: object, *options: object) -> Iterator[subprocess.Popen[str]]:
    """``zarrcache convert`` in its own process group."""
    process = start("convert", source, dst, *options)
    try:
        yield process
    finally:
        end_all(process)


GO_ON = "Finished work is kept; run the same command again to continue."


TERM, CTRL_C = (signal.SIGTERM, 143, "Terminated"), (signal.SIGINT, 130, "Interrupted")


@pytest.mark.parametrize(
    ("sent", "workers", "to_all"),
    [
        pytest.param(CTRL_C, 1, False, id="Ctrl-C here"),
        pytest.param(TERM, 1, False, id="SIGTERM here", marks=pytest.mark.slow),
        pytest.param(CTRL_C, 2, False, id="Ctrl-C to the first of three", marks=pytest.mark.slow),
        pytest.param(TERM, 2, False, id="SIGTERM to the first of three", marks=pytest.mark.slow),
        pytest.param(CTRL_C, 2, True, id="Ctrl-C to all"),
        pytest.param(TERM, 2, True, id="SIGTERM to all", marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_command_says_so_and_leaves_nothing_half_written(
    source: Path, tmp_path: Path, sent: tuple[signal.Signals, int, str], workers: int, to_all: bool
) -> None:
    """SIGTERM of a batch system, to one process or to all: one line, its exit code, no process and
    no hidden file left.
    """
    number, code, word = sent
    out = tmp_path / "out"
    with _command(source, out, "--workers", workers, "--chunks", 6) as process:
        until(lambda: _partials(out), process, "store half written")
        sent_s = time.monotonic()
        (os.killpg if to_all else os.kill)(process.pid, number)
        stdout, stderr = process.communicate(timeout=HANG_S)
        wait_for_all(process)
        print(f"ended after {time.monotonic() - sent_s:.1f} s")
        assert (process.returncode, stdout) == (code, "")
        assert stderr.startswith(f"{word}. {GO_ON}\n")
        assert "Traceback" not in stderr
    assert [path for path in out.iterdir() if path.name.startswith(".")] == []
    for store in _visible(out):
        assert np.array_equal(
            plain_read(store),
            read_density(source / f"{store.name.removesuffix('.zarr')}.CHGCAR").total,
        )


def test_a_worker_that_does_not_finish_in_time_is_killed_and_swept_after(
    source: Path, tmp_path: Path
) -> None:
    """A worker is stopped in the middle of a store, as if its disk hung."""
    out = tmp_path / "out"
    with _command(source, out, "--workers", 2, "--chunks", 4) as process:
        until(lambda: _stopped_in_a_store(out), process, "store half written by a stopped worker")
        process.terminate()
        _, stderr = process.communicate(timeout=HANG_S)
        wait_for_all(process)
    assert process.returncode == 143
    assert f"Terminated. {GO_ON}\n" in stderr
    assert "Traceback" not in stderr
    assert [path for path in out.iterdir() if path.name.startswith(".")] == []
    convert_directory(source, out, **TO_COMPLETE)
    _check_complete(source, out)


def _stopped_in_a_store(out: Path) -> bool:
    """Stop the first worker found in the middle of a store, and check that it still is."""
    for partial in _partials(out):
        pid = int(partial.name.rsplit("-", 3)[1])
        os.kill(pid, signal.SIGSTOP)
        if partial.exists():
            return True
        os.kill(pid, signal.SIGCONT)
    return False


def test_workers_whose_program_is_killed_end_by_themselves(source: Path, tmp_path: Path) -> None:
    """Only the main program is killed: its workers finish their store, find the pipe closed, and
    exit.
    """
    out = tmp_path / "out"
    with _converting(tmp_path, source, out) as process:
        until(lambda: _partials(out), process, "store half written")
        process.kill()
        process.wait()
        wait_for_all(process)
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    assert _partials(out) == []
    convert_directory(source, out, **TO_COMPLETE)
    _check_complete(source, out)


def test_killed_in_the_middle_of_an_upload_the_store_is_not_there(
    s3_server: S3Server, bucket: str, source: Path, tmp_path: Path
) -> None:
    """Chunks without metadata are not a store. The next run completes it and leaves no stray
    object.
    """
    url = f"s3://{bucket}/label"
    with running_proxy(s3_server.endpoint_url) as proxy:
        proxy.rules(Rule(("ok",) * 3, then="hang", op="PUT"))
        options = {"s3_kwargs": s3_server.kwargs_at(proxy.endpoint_url), "workers": 1, "chunks": 8}
        with _converting(tmp_path, source, url, **options) as process:
            until(lambda: len(s3_server.keys(url)) == 3, process, "object uploaded")
            _kill(process)
    keys = s3_server.keys(url)
    assert len(keys) == 3
    assert not any(is_document(key) for key in keys)
    s3_server.put(
        f"{url}/syn-4-0000.zarr/charge_density_total/99.99.99", b"of an older, larger grid"
    )
    plan = plan_convert(source, url, chunks=8, workers=1, s3_kwargs=s3_server.s3_kwargs)
    assert plan.skipped == ()
    plan.execute()
    convert_directory(source, tmp_path / "local", chunks=8, workers=1)
    local = sorted(
        f"label/{path.relative_to(tmp_path / 'local').as_posix()}"
        for path in (tmp_path / "local").rglob("*")
        if path.is_file()
    )
    assert s3_server.keys(url) == local


def test_ctrl_c_in_an_upload_leaves_all_of_a_store_or_nothing(
    s3_server: S3Server, bucket: str, source: Path, tmp_path: Path
) -> None:
    """Objects of the unfinished store are deleted before the program exits."""
    url = f"s3://{bucket}/label"
    with _converting(
        tmp_path, source, url, s3_kwargs=s3_server.s3_kwargs, workers=1, chunks=8
    ) as process:
        until(lambda: s3_server.keys(url), process, "object uploaded")
        os.killpg(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=HANG_S)
    assert process.returncode == -signal.SIGINT
    assert stderr.rstrip().endswith("KeyboardInterrupt")
    keys = s3_server.keys(url)
    assert {key.split("/")[1] for key in keys} == {
        key.split("/")[1] for key in keys if key.endswith("/.zgroup")
    }


def test_ctrl_c_takes_back_what_was_on_its_way_too(
    s3_server: S3Server, bucket: str, source: Path, tmp_path: Path
) -> None:
    """A server may accept an object after its client has gone; such a chunk would stay without a
    store.
    """
    url = f"s3://{bucket}/label"
    with running_proxy(s3_server.endpoint_url) as proxy:
        proxy.rules(Rule(op="PUT", latency_s=1.0))
        options = {"s3_kwargs": s3_server.kwargs_at(proxy.endpoint_url), "workers": 1, "chunks": 8}
        with _converting(tmp_path, source, url, **options) as process:
            until(lambda: proxy.count("PUT"), process, "object on its way")
            os.killpg(process.pid, signal.SIGINT)
            _, stderr = process.communicate(timeout=HANG_S)
        proxy.wait_in_flight(0)
    assert process.returncode == -signal.SIGINT
    assert stderr.rstrip().endswith("KeyboardInterrupt")
    assert s3_server.keys(url) == []


@pytest.mark.parametrize(
    ("number", "code", "word", "workers"),
    [
        pytest.param(signal.SIGINT, 130, "Interrupted", 2, marks=pytest.mark.slow),
        (signal.SIGTERM, 143, "Terminated", 1),
    ],
)
def test_an_interrupted_convert_prints_its_warnings_and_failures_so_far(
    tmp_path: Path, number: signal.Signals, code: int, word: str, workers: int
) -> None:
    """The next run skips converted files and would not repeat their warnings."""
    source, out = tmp_path / "input", tmp_path / "out"
    write_pairs(tmp_path, 12)
    first, *others = sorted(source.iterdir())
    strange = source / "a-shifted.CHGCAR"
    lines = first.read_text().splitlines()
    grid = next(place for place, line in enumerate(lines) if not line.strip()) + 2
    more = [" ".join(str(float(value) + 0.25) for value in line.split()) for line in lines[grid:]]
    strange.write_text("\n".join([*lines[:grid], *more, ""]))
    (source / "b.CHGCAR").write_text("not a density\n")
    process = start("convert", source, out, "--workers", workers, "--chunks", 8)
    try:
        # One more than can be finished without its result having arrived.
        until(
            lambda: (
                (out / "a-shifted.zarr").exists()
                and len(list(out.glob("*.zarr"))) > 2 * workers + 1
            ),
            process,
            "stores",
        )
        process.send_signal(number)
        stdout, err = process.communicate(timeout=HANG_S)
    finally:
        end_all(process)
    assert (process.returncode, stdout) == (code, "")
    assert f"warning: {strange}: mean(total) is " in err
    assert "not a whole number of electrons" in err
    assert f"failed: {source}/b.CHGCAR " in err
    # Not the last line: asyncio may log that a task of zarr was pending when the process ended.
    last = f"{word}. Finished work is kept; run the same command again to continue."
    assert last in err.splitlines()
    assert len(list(out.glob("*.zarr"))) < len(others)
