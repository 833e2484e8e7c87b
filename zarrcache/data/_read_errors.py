"""An exception of a library in a read becomes one of this package."""

from __future__ import annotations

from zarrcache.errors import ZarrCacheError

__all__ = ["as_our_error"]


def as_our_error(exc: Exception, what: str) -> ZarrCacheError:
    """The error to raise in place of ``exc`` when ``what`` was read."""
    return ZarrCacheError(
        f"{what} could not be read ({type(exc).__name__}: {exc}). If the store is sound, please "
        "report this with the traceback."
    )
