"""``zarrcache`` commands in processes of their own, without the second that an interpreter needs to
start and to import everything.

``python -m tests.support.forkserver`` has imported what the commands import and has opened nothing.
It forks a child per command, which ends as ``python -m zarrcache`` does, but does not clear all
modules: that copies 50 MB of pages and costs more than most commands (``start`` in
``support/training.py`` ends in full). Requests are lines of JSON on stdin; the answer is the exit
code, a line on stdout.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

__all__ = ["ForkServer"]

_ROOT = Path(__file__).resolve().parents[2]
_ENDS_S = 120.0
#: What most commands import, and what some of them import beside it.
_IMPORTS = (
    *(f"zarrcache.cli.{name}" for name in "app cache convert demo plan serve warm".split()),
    "zarrcache.ops",
    "zarrcache.data.reader",
    "zarr",
    "s3fs",
    "rich.progress",
)
_MORE = {"convert": ("zarrcache.convert.plan", "pymatgen.io.vasp.outputs")}


class ForkServer:
    """Runs one command at a time. Do not use it in a forked child."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.forkserver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
            start_new_session=True,
        )

    def run(self, args: list[str], env: dict[str, str], stdin: Path, out: Path, err: Path) -> int:
        """The exit code; negative if a signal ended it."""
        job = {
            "args": args,
            "env": env,
            "cwd": os.getcwd(),
            "files": [str(stdin), str(out), str(err)],
        }
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        if not select.select([self._process.stdout], [], [], _ENDS_S)[0]:
            os.killpg(self._process.pid, 9)
            raise TimeoutError(f"zarrcache {' '.join(args)} did not end within {_ENDS_S:.0f} s")
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End the server."""
        self._process.communicate(timeout=_ENDS_S)


def _become(job: dict[str, Any]) -> None:
    """Turn this process into the requested command."""
    os.environ.clear()
    os.environ.update(job["env"])
    os.chdir(job["cwd"])
    for fd, path in enumerate(job["files"]):
        opened = os.open(path, os.O_RDWR if fd else os.O_RDONLY)
        os.dup2(opened, fd)
        os.close(opened)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.argv = ["zarrcache", *job["args"]]


_exit_code: int | None = None


def _run() -> None:
    """Run the command to its end."""
    import zarrcache.cli

    global _exit_code
    try:
        zarrcache.cli.main()
    except SystemExit as exc:
        if not isinstance(exc.code, str):
            _exit_code = int(exc.code or 0)
        raise


def _leave() -> None:
    """End without clearing all modules. Called when threads have ended, after all exit handlers."""
    if _exit_code is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(_exit_code)


def _serve() -> None:
    atexit.register(_leave)  # registered first, called last
    import botocore.session

    import zarrcache.cli
    from tests.support.services import parse_s3, sharing_loader

    for name in _IMPORTS:
        importlib.import_module(name)
    botocore.session.create_loader = sharing_loader()
    parse_s3()
    zarrcache.cli._application()  # which it keeps
    while line := sys.stdin.readline():
        job = json.loads(line)
        for name in (name for word in job["args"] for name in _MORE.get(word, ())):
            with contextlib.suppress(ImportError):  # an extra that is not installed
                importlib.import_module(name)
        # A child that ends need not look through all that was imported: 0.2 s.
        gc.freeze()
        pid = os.fork()
        if pid == 0:
            _become(job)
            _run()
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


if __name__ == "__main__":
    _serve()
