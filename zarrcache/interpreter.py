"""A Python process of its own, with nothing in it that this one has opened, locked or imported.

Not a process that multiprocessing spawns: that one first runs the program's main module again, with all that it imports. Work would wait for it
(5 s if it imports Lightning), and a program without ``if __name__ == "__main__"`` would begin anew. Here it does so only for work that refers to
something in that module.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.spawn import get_executable, get_preparation_data
from typing import Any

from zarrcache.signals import ENDING

__all__ = ["Interpreter"]

#: What it imports of ours is found where this process finds it, so the settings come first. As in a process that multiprocessing spawns, a main
#: module that starts processes while it is imported for one raises a RuntimeError: it would start them without end.
_PROGRAM = """
from multiprocessing.connection import Connection
from multiprocessing.process import current_process
from multiprocessing.spawn import prepare
connection = Connection({fd})
settings = connection.recv()
current_process()._inheriting = True
prepare(settings)
del current_process()._inheriting
from {module} import {function}
{function}(connection, {argument})
"""


class Interpreter:
    """``function(connection, argument)`` in a process of its own, deaf to Ctrl-C in the terminal and to a SIGTERM to all of a job.

    Whoever starts it ends it, in order: it is to end when this side hangs up. When this process dies, that happens by itself.

    Parameters
    ----------
    function : callable
        Of a module of ours.
    argument : int
    work : bytes
        A pickle that will be sent, and which may need the program's main module.

    Attributes
    ----------
    connection : Connection
        To the other end.
    pid : int

    Raises
    ------
    RuntimeError
        In a process whose main module is being imported for it.
    OSError
        The system starts no process, or has no file descriptors left.
    """

    def __init__(self, function: Callable[[Connection, int], None], argument: int, work: bytes) -> None:
        settings = _settings(work)
        self.connection, theirs = Pipe()
        self._sentinel, alive = Pipe(duplex=False)  # ends with the process, which has the other end
        flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined] # -W, -X, -O: multiprocessing passes them on by this too
        program = _PROGRAM.format(fd=theirs.fileno(), module=function.__module__, function=function.__name__, argument=argument)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)  # which is inherited
        try:
            command = [get_executable(), *flags, "-c", program]
            try:
                self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(), alive.fileno()))
            finally:
                theirs.close()
                alive.close()
            with contextlib.suppress(OSError):  # it has died
                self.connection.send(settings)
        finally:
            # Last: a Ctrl-C that came meanwhile is raised here, and a process that has its settings ends without a word when nobody holds its pipe.
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self.pid = self._process.pid

    def has_ended(self, within_s: float | None = 0.0) -> bool:
        """Whether the process is gone, after so many seconds at the most; None waits for it."""
        return bool(wait([self._sentinel], within_s))

    @property
    def exitcode(self) -> int:
        """How it ended, as :class:`subprocess.Popen` tells it. Waits for the end."""
        return self._process.wait()

    def hang_up(self) -> None:
        """Say that nothing more will come, and that nothing is read any more."""
        # Shut down and not only closed: processes that were forked meanwhile have a copy, which would keep the stream open.
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self.connection.fileno())) as ours:
            ours.shutdown(socket.SHUT_RDWR)
        self.connection.close()

    def kill(self) -> None:
        """End it without asking if it has not ended by itself, and let the system forget it."""
        self._process.kill()
        self._process.wait()


def _settings(work: bytes) -> dict[str, Any]:
    """What multiprocessing tells a spawned process of this one, without a key that it needs not. The locks that are made in there (numcodecs
    makes one) are for forked children only: they have no name, which somebody would have to remove when it is killed.
    """
    # `__main__`, or `__mp_main__` in a process that multiprocessing has spawned.
    left_out = {"authkey"} if b"main__" in work else {"authkey", "init_main_from_name", "init_main_from_path"}
    settings = get_preparation_data("zarrcache")
    return {name: value for name, value in settings.items() if name not in left_out} | {"start_method": "fork"}
