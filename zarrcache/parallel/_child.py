"""The program of a child process: take over the parent's import path, then run what it sends.

:class:`zarrcache.parallel.process.ChildProcess` runs this file as a script. It imports the standard
library only until the import path has arrived, because zarrcache may be found nowhere else.
"""

from __future__ import annotations

import sys
from multiprocessing import set_start_method
from multiprocessing.connection import Connection


def main() -> None:
    """Run the function that arrives through the file descriptor that is the only argument."""
    connection = Connection(int(sys.argv[1]))
    try:
        sys.path[:], sys.argv[:], main_module = connection.recv()
    except (EOFError, OSError):
        return  # the parent has gone
    # Locks of the start method "spawn" have a name in the system, which a killed process leaves
    # behind; those of "fork" have none. numcodecs makes one when it is imported.
    set_start_method("fork")

    from zarrcache.parallel.process import run_child

    run_child(connection, main_module)


if __name__ == "__main__":
    main()
