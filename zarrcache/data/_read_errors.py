"""Every exception in a read becomes one of this package."""

from __future__ import annotations

from types import TracebackType

from zarrcache.errors import ZarrCacheError

__all__ = ["ReadErrors"]


class ReadErrors:
    """Context of a read: every exception in it becomes one of this package.

    Ctrl-C and the end of the process pass.

    Parameters
    ----------
    what : str
        What is read, for the message.
    """

    __slots__ = ("_what",)

    def __init__(self, what: str) -> None:
        self._what = what

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(exc, Exception) and not isinstance(exc, ZarrCacheError):
            raise ZarrCacheError(
                f"{self._what} could not be read ({type(exc).__name__}: {exc}). If the store is "
                "sound, please report this with the traceback."
            ) from exc
