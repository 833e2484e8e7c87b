"""Every error that zarrcache raises on purpose.

::

    ZarrCacheError(Exception)                       one string: what, where (full URL), what to do
    ├── ConfigError (+ ValueError)                  a setting, a command-line value, a map file
    ├── SchemaError (+ ValueError)                  array absent, wrong dtype, not 3-D, too large
    ├── OriginError (+ OSError)
    │   ├── OriginNotFoundError (+ FileNotFoundError)   a whole store, bucket or directory
    │   ├── OriginAccessError (+ PermissionError)       never retried
    │   └── OriginUnavailableError (+ ConnectionError)  transient, attempts used up
    ├── IncompleteArrayError                        a listed object is gone or was changed
    ├── CorruptEntryError                           by verify; elsewhere a purge and a miss
    └── LockTimeoutError (+ TimeoutError)           names the lock file and the seconds waited

Two of these choices keep wrong numbers out of a training run:

* ``IncompleteArrayError`` is not an ``OSError``.  zarr turns ``FileNotFoundError`` from a store
  into "missing chunk" and fills it with the fill value, without a word.  A listed object that
  cannot be read must never look like that.
* Every error takes exactly one string.  A DataLoader worker's exception is rebuilt in the parent as
  ``type(exc)(message)``; an error with two arguments fails there and hides its cause.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "CorruptEntryError",
    "IncompleteArrayError",
    "LockTimeoutError",
    "OriginAccessError",
    "OriginError",
    "OriginNotFoundError",
    "OriginUnavailableError",
    "SchemaError",
    "ZarrCacheError",
]


class ZarrCacheError(Exception):
    """Base of every error of this package. ``str(exc)`` says what, where and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(message)

    # OSError.__str__ shows "[Errno None] None" for a subclass that is built from one string on some
    # paths; the message is all there is.
    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ConfigError(ZarrCacheError, ValueError):
    """A setting that cannot be used: unknown key, unparsable size, unusable directory, bad map
    file.
    """


class SchemaError(ZarrCacheError, ValueError):
    """The store is readable but does not hold the array that was asked for."""


class OriginError(ZarrCacheError, OSError):
    """The origin (S3, or the directory the data comes from) did not deliver."""


class OriginNotFoundError(OriginError, FileNotFoundError):
    """The origin answered: there is no such store, bucket or directory. Never raised inside zarr's
    read path.
    """


class OriginAccessError(OriginError, PermissionError):
    """The origin answered: not with these credentials. Never retried."""


class OriginUnavailableError(OriginError, ConnectionError):
    """The origin did not answer, or answered "try later", until the attempts or the time were used
    up.
    """


class IncompleteArrayError(ZarrCacheError):
    """A listed object is gone, changed, or does not match its listing. Nothing of the array is
    cached.
    """


class CorruptEntryError(ZarrCacheError):
    """A cache entry does not match its checksum or identity. Raised by ``verify``; elsewhere it is
    a purge and a miss.
    """


class LockTimeoutError(ZarrCacheError, TimeoutError):
    """A lock was not free in time. The message names the lock file and the seconds waited."""
