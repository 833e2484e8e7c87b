"""Credentials that expire while a run goes on."""

from __future__ import annotations

from typing import Any

from zarrcache.origin._retry import TransientError
from zarrcache.origin._s3_errors import RequestContext, S3Fault, to_error

__all__ = ["Renewal"]


class Renewal:
    """What to raise for a fault in the course of one operation: credentials that the server calls
    expired are asked for anew, once.

    Whoever gave them (a process, SSO, the instance) renews them by the clock; a server may revoke
    them earlier.  A new engine begins with a new session, and so with new credentials.

    Parameters
    ----------
    engines : dict or None
        Those that are open; None: there are no other credentials.
    """

    def __init__(self, engines: dict[tuple[int, str], Any] | None) -> None:
        self._engines = engines
        self._expired: Any = None

    def error(self, fault: S3Fault, asked: RequestContext, engine: object) -> Exception:
        """See `to_error`. Of requests that are in flight together, all are to be tried again."""
        if self._engines is None or not fault.is_expired or self._expired not in (None, engine):
            return to_error(fault, asked)
        self._expired = engine
        for key, opened in list(self._engines.items()):
            if opened is engine:
                self._engines.pop(key, None)
        error = TransientError(asked.url, str(fault))
        error.__cause__ = fault.__cause__ or fault
        return error
