"""An exception of a library in a read becomes one of this package."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from zarrcache.errors import ZarrCacheError

__all__ = ["as_our_error", "only_our_errors"]


def as_our_error(exc: Exception, what: str) -> ZarrCacheError:
    """The error to raise in place of ``exc`` when ``what`` was read."""
    return ZarrCacheError(
        f"{what} could not be read ({type(exc).__name__}: {exc}). If the store is sound, please "
        "report this with the traceback."
    )


@contextlib.contextmanager
def only_our_errors(what: str) -> Iterator[None]:
    """Around a read of ``what`` that is not a warm hit."""
    try:
        yield
    except ZarrCacheError:
        raise
    except Exception as exc:
        raise as_our_error(exc, what) from exc
