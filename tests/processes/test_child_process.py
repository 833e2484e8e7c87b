"""Child processes: which modules they run, which flags they have, and what they find on import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from zarrcache.parallel.pool import Reserve, spread


def _run(script: Path, text: str, *flags: str) -> subprocess.CompletedProcess[str]:
    script.write_text(text)
    return subprocess.run(
        [sys.executable, *flags, script], capture_output=True, text=True, timeout=120, check=False
    )


def test_a_script_needs_no_guard(tmp_path: Path) -> None:
    """It runs once, and no process imports again what it has imported."""
    done = _run(
        tmp_path / "script.py",
        "print('imported')\n"
        "import operator\n"
        "from zarrcache.parallel.pool import spread\n"
        "found = spread(operator.is_, [b'', bytes(5_000_000)], 2)\n"
        "print([result for _, result in found])\n",
    )
    assert (done.stdout, done.stderr) == ("imported\n[False, False]\n", "")


def test_a_directory_may_be_named_like_a_main_module(tmp_path: Path) -> None:
    """Work refers to the script by its module's name, not by any text that contains it."""
    done = _run(
        tmp_path / "script.py",
        "print('imported', flush=True)\n"
        "import functools, operator\n"
        "from zarrcache.parallel.pool import spread\n"
        "f = functools.partial(print, '/data/domain__pbe')\n"
        "print([kind for _, kind in spread(f, [1], 1)])\n",
    )
    found = (done.stdout.count("imported"), done.stdout.count("domain__pbe"), done.stderr)
    assert found == (1, 1, "")


SCRIPT = """
from zarrcache.parallel.pool import spread
def double(n, reserve):
    return 2 * n
print("imported")
"""
MAIN = "print(sorted(spread(double, range(3), 1)), flush=True)\n"
RESULT = "[(0, 0), (1, 2), (2, 4)]\n"
GUARD = "if __name__ == '__main__':\n    "


def test_a_script_whose_own_function_runs_needs_the_guard_and_the_error_says_so(
    tmp_path: Path,
) -> None:
    """Its processes run it, and would start processes in turn, without end."""
    done = _run(tmp_path / "script.py", SCRIPT + GUARD + MAIN)
    assert (sorted(done.stdout.splitlines()), done.stderr) == (
        [RESULT.strip(), "imported", "imported"],
        "",
    )
    done = _run(tmp_path / "script.py", SCRIPT + MAIN)
    assert "ended before its first item (exit code 1)" in done.stderr
    assert "below `if __name__ == '__main__':`" in done.stderr
    assert "[" not in done.stdout


def test_items_and_results_may_be_of_classes_of_the_script(tmp_path: Path) -> None:
    """The function is not: only an item shows that the script is needed."""
    done = _run(
        tmp_path / "script.py",
        f"{SCRIPT}class Own(int):\n    def __add__(self, reserve):\n        return self\n"
        "import operator\n"
        f"{GUARD}print([type(n) is Own for n, _ in spread(operator.add, [Own(3)], 1)],"
        " [type(n) is Own for _, n in spread(operator.add, [Own(3)], 1)])\n",
    )
    assert done.stderr == ""
    assert done.stdout.endswith("[True] [True]\n")


def test_a_module_run_by_name_spreads_its_own_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``python -m package.module``, with a relative import."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "other.py").write_text("FACTOR = 2\n")
    (package / "module.py").write_text(
        f"{SCRIPT}from .other import FACTOR\n"
        f"def twice(n, reserve):\n    return FACTOR * n\n{GUARD}{MAIN.replace('double', 'twice')}"
    )
    monkeypatch.chdir(tmp_path)
    done = subprocess.run(
        [sys.executable, "-m", "package.module"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stderr == ""
    assert RESULT in done.stdout


def test_a_spawned_process_spreads_functions_of_its_script(tmp_path: Path) -> None:
    """A rank, say. There the script has another name."""
    done = _run(
        tmp_path / "script.py",
        f"{SCRIPT}def run():\n    {MAIN}{GUARD}import multiprocessing\n"
        "    child = multiprocessing.get_context('spawn').Process(target=run)\n"
        "    child.start()\n"
        "    child.join()\n",
    )
    assert done.stderr == ""
    assert RESULT in done.stdout


def test_the_interpreter_passes_on_its_flags(tmp_path: Path) -> None:
    """``python -O``, ``-W`` and ``-X``."""
    report = (
        "def flags(n, reserve):\n"
        "    import sys\n"
        "    return sys.flags.optimize, sys.warnoptions, sys._xoptions\n"
    )
    done = _run(
        tmp_path / "script.py",
        f"{SCRIPT}{report}{GUARD}print(list(spread(flags, [0], 1)))\n",
        "-O",
        "-Wignore",
        "-Xutf8",
        "-Xpycache_prefix=/tmp/x y",
    )
    assert done.stderr == ""
    flags = "(1, ['ignore'], {'utf8': True, 'pycache_prefix': '/tmp/x y'})"
    assert f"[(0, {flags})]" in done.stdout


def _double(n: int, reserve: Reserve) -> int:
    return 2 * n


def test_files_in_the_working_directory_are_not_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of notes with the name of a module of Python."""
    (tmp_path / "socket.py").write_text("raise ImportError('of mine')")
    monkeypatch.chdir(tmp_path)
    assert list(spread(_double, [3], 1)) == [(3, 6)]


def test_what_the_parent_can_import_the_child_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also from a directory that the parent has added to its path."""
    (tmp_path / "mine.py").write_text("def triple(n, reserve):\n    return 3 * n\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import mine  # type: ignore[import-not-found]

    try:
        assert list(spread(mine.triple, [3], 1)) == [(3, 9)]
    finally:
        del sys.modules["mine"]


@pytest.mark.parametrize("sent", ["half of an object", "all"])
def test_a_child_whose_parent_dies_ends_without_a_word(tmp_path: Path, sent: str) -> None:
    """Such as that of a DataLoader worker which is stopped in the middle of an array."""
    done = _run(
        tmp_path / "script.py",
        "import os, numpy, zarr\n"
        "from zarrcache.arrays.foreign import _serve\n"
        "from zarrcache.parallel import ChildProcess\n"
        "store = zarr.storage.MemoryStore(objects := {})\n"
        "zarr.create_array(store, data=numpy.ones(3_000_000), chunks=(3_000_000,), zarr_format=2)\n"
        "child = ChildProcess(_serve, 2, 2**30)\n"
        "for key, data in objects.items():\n"
        "    child.connection.send(key)\n"
        f"    if {sent != 'all'}:\n"
        "        os._exit(0)\n"
        "    child.connection.send_bytes(data.to_bytes())\n"
        "child.connection.send(None)\n"
        "child.connection.poll(60)  # the answer begins\n"
        "os._exit(0)\n",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
