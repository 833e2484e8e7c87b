"""All errors that zarrcache raises on purpose.

::

    ZarrCacheError(Exception)                       one string: what, where (full URL), what to do
    ├── ConfigError (+ ValueError)                  a setting, command-line value, map file
    ├── SchemaError (+ ValueError)                  wrong dtype, not 3-D
    │   └── ArrayNotFoundError                          a complete listing shows that it is absent
    ├── OriginError (+ OSError)
    │   ├── OriginNotFoundError (+ FileNotFoundError)   a whole store, bucket or directory
    │   ├── OriginAccessError (+ PermissionError)       never retried
    │   └── OriginUnavailableError (+ ConnectionError)  transient, attempts used up
    ├── IncompleteArrayError                        a listed object is gone or was changed
    ├── CorruptEntryError                           by verify; elsewhere a purge and a miss
    └── LockTimeoutError (+ TimeoutError)           names the lock file and the seconds waited

Three of these choices keep wrong numbers out of a training run:

* ``IncompleteArrayError`` is not an ``OSError``. zarr takes a ``FileNotFoundError`` from a store
  for a chunk that was never written and silently returns the fill value. A listed object that
  cannot be read must not be mistaken for one.
* A reader raises only these errors, for any exception of the libraries beneath it. A loop over a
  dataset takes an ``IndexError`` for its end, and a loop over a DataLoader a ``StopIteration``.
* Every error takes exactly one string. DataLoader rebuilds a worker's exception as
  ``type(exc)(message)``; with two arguments that fails and hides the cause.
"""

from __future__ import annotations

__all__ = [
    "ArrayNotFoundError",
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

    # OSError.__str__ may show "[Errno None] None" for a subclass made from one string.
    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class ConfigError(ZarrCacheError, ValueError):
    """An invalid setting: unknown key, unparsable size, unusable directory, bad map file."""


class SchemaError(ZarrCacheError, ValueError):
    """The store is readable but lacks the requested array, or the array is not a density."""


class ArrayNotFoundError(SchemaError):
    """The store or file is complete and lacks the requested array; the message names those it has.

    Never raised because of a request that failed.
    """


class OriginError(ZarrCacheError, OSError):
    """The origin (S3, or the directory of the data) failed."""


class OriginNotFoundError(OriginError, FileNotFoundError):
    """The store, bucket or directory does not exist. Never raised inside zarr's read path."""


class OriginAccessError(OriginError, PermissionError):
    """The credentials do not allow the request. Never retried."""


class OriginUnavailableError(OriginError, ConnectionError):
    """Transient errors used up all attempts, or the time for them."""


class IncompleteArrayError(ZarrCacheError):
    """A listed object is gone, changed or damaged. Nothing of the array is cached."""


class CorruptEntryError(ZarrCacheError):
    """A cache entry does not match its checksum or identity. Outside of ``verify`` it is a miss."""


class LockTimeoutError(ZarrCacheError, TimeoutError):
    """A lock was not free in time. The message names the lock file and the seconds waited."""
