"""A Python process of its own, with nothing in it that this one has opened, locked or imported.

Not a process that multiprocessing spawns: that one first runs the program's main module again, with
all that it imports. Work would wait for it (5 s if it imports Lightning), and a program without
``if __name__ == "__main__"`` would begin anew. A process of this module runs the main module only
for work that refers to something in it.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.spawn import get_executable, get_preparation_data
from typing import Any

from zarrcache.parallel.signals import deferred_signals

__all__ = ["Interpreter"]

#: What it imports of ours is found where this process finds it, so the settings come first. As in a
#: process that multiprocessing spawns, a main module that starts processes while it is imported for
#: one raises a RuntimeError: it would start them without end.
_PROGRAM = """
from multiprocessing.connection import Connection
from multiprocessing.process import current_process
from multiprocessing.spawn import prepare
connection = Connection({fd})
try:
    settings = connection.recv()
except (EOFError, OSError):
    raise SystemExit(1) from None
current_process()._inheriting = True
prepare(settings)
del current_process()._inheriting
from {module} import {function}
{function}(connection, {argument})
"""

#: The main module in a pickle: `__main__`, or `__mp_main__` in a process that multiprocessing has
#: spawned. With the opcodes before them: a directory may be called `domain__pbe`.
_MAIN = (b"\x8c\x08__main__", b"\x8c\x0b__mp_main__", b"c__main__\n", b"c__mp_main__\n")


class Interpreter:
    """``function(connection, argument)`` in a process of its own, deaf to Ctrl-C in the terminal
    and to a SIGTERM to all of a job.

    Whoever starts it ends it, in order: it is to end when this side hangs up. When this process
    dies, that happens by itself.

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

    def __init__(
        self, function: Callable[[Connection, int], None], argument: int, work: bytes
    ) -> None:
        settings = _settings(work)
        # also after Ctrl-C: a process that nobody knows would be nobody's to end
        with contextlib.ExitStack() as undo:
            # its mask is what makes the process deaf; whoever has to note more than this holds back
            # for longer
            with deferred_signals():
                self.connection, theirs = Pipe()
                undo.callback(self.connection.close)
                with theirs:
                    # ends with the process, which has the other end
                    self._sentinel, alive = Pipe(duplex=False)
                    undo.callback(self._sentinel.close)
                    with alive:
                        program = _PROGRAM.format(
                            fd=theirs.fileno(),
                            module=function.__module__,
                            function=function.__name__,
                            argument=argument,
                        )
                        self._process = _started(program, (theirs.fileno(), alive.fileno()))
                undo.callback(self.kill)
            with contextlib.suppress(OSError):  # it has died
                self.connection.send(settings)
            undo.pop_all()
        self.pid = self._process.pid

    def has_ended(self, within_s: float = 0.0) -> bool:
        """Whether the process is gone, after so many seconds at the most."""
        # The second, because a process that another thread has forked in that moment may have taken
        # the sentinel's other end along.
        return bool(wait([self._sentinel], within_s)) or self._process.poll() is not None

    @property
    def exitcode(self) -> int:
        """How it ended, as :class:`subprocess.Popen` tells it. Waits for the end."""
        return self._process.wait()

    def hang_up(self) -> None:
        """Say that nothing more will come, and that nothing is read any more. Whoever is writing to
        the process has an OSError.
        """
        # Shut down and not closed: processes that were forked meanwhile have a copy, which would
        # keep the stream open; and a thread that is about to write must not find somebody's new
        # file under the same number.
        with contextlib.suppress(OSError):
            ours = socket.socket(fileno=self.connection.fileno())
            try:
                ours.shutdown(socket.SHUT_RDWR)
            finally:
                ours.detach()

    def kill(self) -> None:
        """End it without asking if it has not ended by itself, and let the system forget it."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """Give the descriptors back, when it has ended and no thread uses the connection any more."""
        self.connection.close()
        self._sentinel.close()


def _started(program: str, descriptors: tuple[int, int]) -> subprocess.Popen[bytes]:
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined] # -W, -X, -O: multiprocessing passes them on by this too
    # -P: until it has this process's path it imports nothing from the working directory, where a
    # `socket.py` may lie.
    command = [get_executable(), *flags, "-P", "-c", program]
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=descriptors)


def _settings(work: bytes) -> dict[str, Any]:
    """What multiprocessing tells a spawned process of this one, without a key that it needs not.
    With the start method "fork", locks that are made in there (numcodecs makes one) have no name in
    the system, so none is left behind when it is killed.
    """
    left_out = (
        {"authkey"}
        if any(name in work for name in _MAIN)
        else {"authkey", "init_main_from_name", "init_main_from_path"}
    )
    settings = get_preparation_data("zarrcache")
    return {name: value for name, value in settings.items() if name not in left_out} | {
        "start_method": "fork"
    }
