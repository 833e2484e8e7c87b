"""``convert_directory`` in several worker processes: the same stores as in one, and a process that
dies costs at most its file.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.chgcars import SMALL
from tests.support.processes import Deadly, interpreters
from zarrcache.convert.converter import ConvertResult
from zarrcache.convert.plan import convert_directory, plan_convert
from zarrcache.demo.synthetic import write_pairs

pytest.importorskip("pymatgen", reason="needs the extra 'convert'")

IDS = [f"syn-{SMALL}-000{n}" for n in range(3)]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three small densities as text."""
    write_pairs(tmp_path / "pairs", 3, seed=SMALL)
    return tmp_path / "pairs" / "label"


def test_two_processes_write_the_bytes_that_one_writes(source: Path, tmp_path: Path) -> None:
    """Unreadable files among them: the same files fail, and no process is left."""
    (source / "bad-1.CHGCAR").write_bytes((source / f"{IDS[0]}.CHGCAR").read_bytes()[:5000])
    (source / "bad-2.json.gz").write_bytes(b"not gzip")
    seen: list[ConvertResult] = []
    two = convert_directory(source, tmp_path / "two", workers=2, progress=seen.append)
    one = convert_directory(source, tmp_path / "one", workers=1)
    assert {result.path for result in seen} == set(source.iterdir())
    assert [result.task_id for result in two.converted] == IDS
    assert [result.path.name for result in two.failed] == ["bad-1.CHGCAR", "bad-2.json.gz"]
    assert [result.error for result in two.failed] == [result.error for result in one.failed]
    assert [result.written_bytes for result in two.converted] == [
        result.written_bytes for result in one.converted
    ]
    assert _tree(tmp_path / "two") == _tree(tmp_path / "one")
    assert interpreters() == []


def _tree(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# tests/processes/test_pool.py tries an item again whose process died, without pymatgen
@pytest.mark.slow
def test_a_file_whose_process_is_killed_is_converted_in_another_one(
    source: Path, tmp_path: Path
) -> None:
    """The kernel kills a process when memory runs out; alone, the same file may fit."""

    def kill_all(_: ConvertResult) -> None:
        for pid in interpreters():
            os.kill(pid, signal.SIGKILL)

    report = convert_directory(source, tmp_path / "out", workers=2, progress=kill_all)
    assert [result.task_id for result in report.converted] == IDS
    assert report.failed == ()


# tests/processes/test_child_process.py runs a script without a guard, without pymatgen
@pytest.mark.slow
def test_a_script_converts_without_a_guard(source: Path, tmp_path: Path) -> None:
    """In two processes, which do not run the script again."""
    script = tmp_path / "script.py"
    script.write_text(
        f"from zarrcache import convert_directory\nprint(len(convert_directory({str(source)!r}, "
        "'out', workers=2).converted))\n"
    )
    done = subprocess.run(
        [sys.executable, script],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.stdout, done.stderr) == (f"{len(IDS)}\n", "")


def test_a_file_that_kills_every_process_is_named(source: Path, tmp_path: Path) -> None:
    """After a second process died of it; the other files are converted."""
    plan = plan_convert(source, tmp_path / "out", workers=2)
    report = dataclasses.replace(plan, _convert=Deadly(plan._convert, IDS[1])).execute()  # type: ignore[arg-type]
    assert [result.task_id for result in report.converted] == [IDS[0], IDS[2]]
    (failed,) = report.failed
    assert failed.error is not None
    assert (
        f"{failed.path}: two worker processes died while converting it (SIGKILL, perhaps out "
        "of memory)" in failed.error
    )


def test_partial_stores_of_killed_runs_are_removed_first(source: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, pathlib; from zarrcache.convert import writer as s\n"
        "p = s.hidden_path(pathlib.Path(sys.argv[1]), 'partial'); p.mkdir(parents=True); (p / "
        "'big').write_bytes(b'x'); os.kill(os.getpid(), 9)"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "out" / f"{IDS[0]}.zarr")], check=False
    )
    assert len(list((tmp_path / "out").iterdir())) == 1
    convert_directory(source, tmp_path / "out", workers=1)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        f"{task_id}.zarr" for task_id in IDS
    ]
