"""The index's write-ahead log, kept short.

SQLite writes a log until it can begin it anew, and that is when nobody reads or writes.  Beside
eight busy processes the moment never came (20 MiB after 20 s), so every writer looks for it above
one size; and since it is a lottery which of eight gets in, above another size none of them writes
on before one has.  So the log has 3 MiB and what the transactions under way add to it
(tests/processes/test_limit.py).
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time

from zarrcache.disk._index_check import Select

__all__ = ["LOG_MOST_BYTES", "ShortLog"]

#: From here on whoever has written tries to begin it anew.
_LOG_BYTES = 2 * 2**20
#: From here on nobody writes before that is done.
LOG_MOST_BYTES = 3 * 2**20
#: ... for so long, and once in so many seconds: a process that was stopped while it reads must not
#: hold up the others.
_WAIT_S, _WAIT_EVERY_S = 5.0, 60.0


class ShortLog:
    """The log of one index. Safe from any thread.

    Parameters
    ----------
    path : str
        Of the log.
    checkpoint : callable
        Runs a statement over a connection of its own, and waits for others a tenth of a second at
        the most.
    """

    def __init__(self, path: str, checkpoint: Select) -> None:
        self._path = path
        self._checkpoint = checkpoint
        self._waited_s = -_WAIT_EVERY_S

    def keep(self) -> None:
        """Begin it anew if it is long. Call after a transaction, outside of it. What goes wrong is
        left to whoever comes next.
        """
        start_s = time.monotonic()
        with contextlib.suppress(OSError, sqlite3.Error):  # no log, on a network file system
            while (size := os.stat(self._path).st_size) > _LOG_BYTES:
                self._checkpoint("PRAGMA wal_checkpoint(TRUNCATE)")
                if size <= LOG_MOST_BYTES or start_s < self._waited_s + _WAIT_EVERY_S:
                    return
                if time.monotonic() > start_s + _WAIT_S:
                    self._waited_s = time.monotonic()
                time.sleep(0.01)  # SQLite comes back at once while another process is at it
