"""Child Python processes that share only a socket with their parent.

A child is a fresh interpreter, not a fork, so no client, lock or thread of the parent exists in it.
A process spawned by :mod:`multiprocessing` first runs the program's main module and all its imports
again (5 s with Lightning), and a program without ``if __name__ == "__main__"`` would start over. A
child of this module runs the main module only when it unpickles something that is defined there.
docs/explanation/decisions/018-processes.md has the alternatives.
"""

from __future__ import annotations

import contextlib
import io
import logging
import pickle
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from zarrcache.parallel.signals import signals_blocked

__all__ = ["ChildProcess", "HungUp", "receive", "receive_bytes", "run_child"]

_PROGRAM = Path(__file__).with_name("_child.py")

#: Names of the program's main module: the second one in a process that multiprocessing has spawned,
#: or that runs the module for what is defined in it.
_MAIN, _MAIN_IN_CHILD = "__main__", "__mp_main__"

#: The main module: its name if the program was started with ``python -m``, and its file.
_MainModule: TypeAlias = tuple[str | None, str | None]


class HungUp(Exception):
    """The parent has closed the connection or has died."""


class ChildProcess:
    """A child process that runs ``function(connection, *arguments)``.

    It ignores SIGINT and SIGTERM, which a terminal or a batch system sends to all processes of a
    job; the parent decides when it ends. ``function`` has to return when :func:`receive` raises
    :class:`HungUp`, which also happens when the parent dies.

    Parameters
    ----------
    function : callable
        Of a module of this package.
    *arguments
        Small: they are sent before the child reads. Send larger objects by ``connection``.

    Attributes
    ----------
    connection : Connection
        To the child.
    pid : int

    Raises
    ------
    OSError
        The system cannot start another process or has no file descriptors left.
    RuntimeError
        This process is a child that is running the program's main module: it would start children
        without end.
    """

    def __init__(self, function: Callable[..., None], *arguments: object) -> None:
        if _main.is_running:
            raise RuntimeError(
                "A child process runs the program's main module because it needs something that "
                "is defined there, and that module starts child processes in turn. Put its main "
                "part below `if __name__ == '__main__':`."
            )
        # If an exception interrupts the start, the child finds its connection closed and ends.
        with contextlib.ExitStack() as undo:
            self.connection, theirs = Pipe()
            undo.callback(self.connection.close)
            # -P: until the import path has arrived, nothing is imported from the directory of
            # _child.py, which holds a `dask.py`.
            command = [sys.executable, *_interpreter_flags(), "-P", str(_PROGRAM)]
            with theirs, signals_blocked():
                fd = theirs.fileno()
                self._process = subprocess.Popen(
                    [*command, str(fd)], stdin=subprocess.DEVNULL, pass_fds=[fd]
                )
                undo.callback(self.kill)
            with contextlib.suppress(OSError):  # it has died; the caller's next read detects that
                self.connection.send((sys.path, sys.argv, _main_module()))
                self.connection.send((logging.getLogger("zarrcache").level, function, arguments))
            undo.pop_all()
        self.pid = self._process.pid

    def has_ended(self, within_s: float = 0.0) -> bool:
        """Whether the process ends within ``within_s`` seconds."""
        try:
            self._process.wait(within_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def wait(self) -> int:
        """Wait for its end. Returns the exit code, or minus the number of the signal."""
        return self._process.wait()

    def hang_up(self) -> None:
        """Shut the connection down for both sides; a thread that is writing gets an OSError."""
        # Not just closed: processes forked since then have a copy of the descriptor, which keeps
        # the stream open; and after a close, a thread that is about to write could write to another
        # file with the same number.
        with contextlib.suppress(OSError):
            ours = socket.socket(fileno=self.connection.fileno())
            try:
                ours.shutdown(socket.SHUT_RDWR)
            finally:
                ours.detach()

    def kill(self) -> None:
        """Send SIGKILL if the process still runs, and reap it."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Close the connection. Call when no thread uses it any more."""
        self.connection.close()


def _interpreter_flags() -> list[str]:
    """``-O``, ``-W`` and ``-X`` of this interpreter. Others are not passed on."""
    return [
        *["-O"] * sys.flags.optimize,
        *(f"-W{option}" for option in sys.warnoptions),
        *(
            f"-X{name}" if value is True else f"-X{name}={value}"
            for name, value in sys._xoptions.items()
        ),
    ]


def _main_module() -> _MainModule:
    main = sys.modules[_MAIN]
    spec = getattr(main, "__spec__", None)  # pdb leaves none
    return getattr(spec, "name", None), getattr(main, "__file__", None)


# -- in the child
# --------------------------------------------------------------------------------


def run_child(connection: Connection, main_module: _MainModule) -> None:
    """Run the function that the parent sends first; ``main_module`` is the parent's."""
    _main.source = main_module
    # A function may be in the middle of an answer when the parent dies.
    with contextlib.suppress(HungUp, BrokenPipeError, ConnectionResetError):
        level, function, arguments = receive(connection)
        logging.getLogger("zarrcache").setLevel(level)  # --quiet and --verbose hold here too
        function(connection, *arguments)


def receive(connection: Connection) -> Any:
    """The next object that the parent has sent.

    Raises
    ------
    HungUp
    """
    return _Unpickler(io.BytesIO(receive_bytes(connection))).load()


def receive_bytes(connection: Connection) -> bytes:
    """The next bytes that the parent has sent. Raises as :func:`receive`."""
    try:
        return connection.recv_bytes()
    except (EOFError, OSError):
        raise HungUp from None


class _Unpickler(pickle.Unpickler):
    """Runs the program's main module when something that is defined there is needed."""

    def find_class(self, module_name: str, name: str) -> Any:
        if module_name in (_MAIN, _MAIN_IN_CHILD):
            _main.run()
        return super().find_class(module_name, name)


class _Main:
    """The program's main module, in a child that may have to run it."""

    #: Not known in a process that is not a child, in a notebook, and once it has run.
    source: _MainModule = (None, None)
    is_running = False

    def run(self) -> None:
        """Run it, once, under the name that multiprocessing gives it."""
        (name, path), self.source = self.source, (None, None)
        self.is_running = True
        try:
            if name is not None:
                content = runpy.run_module(name, run_name=_MAIN_IN_CHILD, alter_sys=True)
            elif path is not None:
                content = runpy.run_path(path, run_name=_MAIN_IN_CHILD)
            else:
                return
        finally:
            self.is_running = False
        module = ModuleType(_MAIN_IN_CHILD)
        vars(module).update(content)
        sys.modules[_MAIN] = sys.modules[_MAIN_IN_CHILD] = module


_main = _Main()
