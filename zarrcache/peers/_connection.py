"""HTTP connections with a limit of the total time, besides the timeout of each part.

The timeout of a plain socket is per part only, and a part may be one byte.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import time
from typing import Any

__all__ = ["Connection"]

#: Longest time between two parts of an answer. At least as long as a home may take to answer.
_PART_S = 2.5


class Connection(http.client.HTTPConnection):
    """An HTTP connection whose transfers end within :meth:`limit_s`."""

    _until_s = 0.0
    _limited: _LimitedSocket | None = None

    def connect(self) -> None:
        """Try each address of the host within the limit.

        The look-up of a name cannot be cut short; a name server that hangs is charged to the peer.
        """
        failure: OSError = ConnectionError("its name has no address")
        for family, kind, protocol, _, address in socket.getaddrinfo(
            self.host, self.port, type=socket.SOCK_STREAM
        ):
            limited = _LimitedSocket(family, kind, protocol)
            limited.until_s = self._until_s
            try:
                limited.connect(address)
            except OSError as exc:
                limited.close()
                failure = exc
                continue
            limited.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            # Keep it, because http.client drops `sock` when only the body of an answer is left.
            self.sock = self._limited = limited
            return
        raise failure

    def limit_s(self, seconds: float) -> None:
        """Limit the total time of all transfers until the next call to ``seconds``."""
        self._until_s = time.monotonic() + seconds
        if self._limited is not None:
            self._limited.until_s = self._until_s

    def hang_up(self) -> None:
        """Close the connection, also if a child that was forked meanwhile holds its descriptor."""
        if self._limited is not None:
            with contextlib.suppress(OSError):
                self._limited.shutdown(socket.SHUT_RDWR)
        self.close()


class _LimitedSocket(socket.socket):
    """A socket that raises TimeoutError after ``until_s`` of the monotonic clock."""

    until_s = 0.0

    def connect(self, *args: Any) -> None:
        self._set_timeout()
        super().connect(*args)

    def sendall(self, *args: Any) -> None:
        self._set_timeout()
        super().sendall(*args)

    def recv_into(self, *args: Any) -> int:
        # http.client reads through this method.
        self._set_timeout()
        return super().recv_into(*args)

    def _set_timeout(self) -> None:
        left_s = self.until_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError("it is too slow")
        self.settimeout(min(left_s, _PART_S))
