"""The program of a child process: set the parent's import path, then run the function it sends.

:class:`zarrcache.parallel.process.ChildProcess` runs this file as a script. It imports only the
standard library until the import path has arrived, because zarrcache may be on that path only.
"""

from __future__ import annotations

import atexit
import gc
import sys
from multiprocessing import set_start_method
from multiprocessing.connection import Connection


def main() -> None:
    """Run the function that arrives through the file descriptor given as the only argument."""
    # At its end Python searches all that was imported for garbage, which takes 0.2 s of CPU.
    atexit.register(gc.freeze)
    connection = Connection(int(sys.argv[1]))
    try:
        sys.path[:], sys.argv[:], main_module = connection.recv()
    except (EOFError, OSError):
        return  # the parent has gone
    # Locks of the start method "spawn" are named, and a killed process leaks them; those of "fork"
    # are not. numcodecs creates one when it is imported.
    set_start_method("fork")

    from zarrcache.parallel.process import run_child

    run_child(connection, main_module)


if __name__ == "__main__":
    main()
