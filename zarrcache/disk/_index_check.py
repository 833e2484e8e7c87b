"""What SQLite does not notice: a checksum in every row of the index, a look at the whole of it, and
which of its errors mean damage.

Of 600 single bits and lost ends in an index of 24 entries, SQLite itself noticed one in six. Most
others hit free space; one in twenty made it forget or misplace a file, for good and without a word.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Callable
from typing import Any

from zarrcache.disk.checksums import crc32c
from zarrcache.disk.directory import is_entry_name

__all__ = ["damage_of", "is_damage", "is_right_row", "row_mode", "row_of", "schema_id", "volume_of"]

#: Of every row that is ours; outside diskcache's own modes 0 to 4, so a planted row with its pickle
#: mode is not read.
_MODE_FILE = 16
_MODE_BITS = 8  # the checksum lies above
_VALUE = re.compile(r"(0|[1-9][0-9]{0,17}) .*", re.DOTALL)
_PAGE = 10_000  # rows in memory at a time

#: PERM, BUSY, LOCKED, NOMEM, READONLY, INTERRUPT, IOERR, FULL, CANTOPEN, PROTOCOL, NOLFS, AUTH: not
#: the file is bad, but its surroundings.
_SURROUNDINGS = frozenset({3, 5, 6, 7, 8, 9, 10, 13, 14, 15, 22, 23})

Select = Callable[..., list[tuple[Any, ...]]]


def row_mode(filename: str, value: str) -> int:
    """What diskcache's column ``mode`` holds: the kind of the row, and a checksum of what the row
    says.
    """
    return crc32c(f"{filename}\n{value}".encode()) << _MODE_BITS | _MODE_FILE


def is_right_row(mode: object, filename: object, value: object) -> bool:
    """Whether a row is one of ours, as it was written. No other is read, and no file is deleted
    because of it.
    """
    if not isinstance(filename, str) or not isinstance(value, str):
        return False
    return (
        mode == row_mode(filename, value)
        and is_entry_name(filename)
        and _VALUE.fullmatch(value) is not None
    )


def is_damage(exc: BaseException) -> bool:
    """Whether an error of SQLite says that the file is bad, and not that it is busy, full or out of
    reach.
    """
    # of an error's own text, which repeats what is in the file
    if isinstance(exc, UnicodeDecodeError):
        return True
    # none: raised by Python, of a column that is no text
    code = getattr(exc, "sqlite_errorcode", None)
    return isinstance(exc, sqlite3.DatabaseError) and (
        code is None or code & 0xFF not in _SURROUNDINGS
    )


def schema_id(select: Select) -> int:
    """A checksum of the definitions of all tables and triggers, 0 to 2**31. A changed letter may
    well be other SQL.
    """
    return crc32c(repr(select("SELECT name, sql FROM sqlite_master ORDER BY name")).encode()) >> 1


def damage_of(select: Select) -> str | None:
    """Look at the whole index; what is wrong with it, or None. About 1 s for 100,000 rows.

    Parameters
    ----------
    select : callable
        Rows of a query with its values.

    Raises
    ------
    sqlite3.Error, UnicodeDecodeError
    """
    if (found := select("PRAGMA integrity_check(1)")) != [("ok",)]:
        return str(found[0][0])
    if select("PRAGMA application_id") != [(schema_id(select),)]:
        return "its tables are not defined as they were"
    settings = "(SELECT value FROM Settings WHERE key = 'count'), (SELECT value FROM Settings WHERE key = 'size')"
    ((count, size, rows, total),) = select(
        f"SELECT {settings}, COUNT(*), COALESCE(SUM(size), 0) FROM Cache"
    )
    if (count, size) != (rows, total):
        return f"it has {rows} rows of {total} bytes, and says {count} of {size}"
    last, columns = 0, "rowid, key, raw, tag, size, store_time, expire_time, mode, filename, value"
    while page := select(
        f"SELECT {columns} FROM Cache WHERE rowid > ? ORDER BY rowid LIMIT {_PAGE}", (last,)
    ):
        for last, key, raw, tag, size, stored_s, expires_s, mode, filename, value in page:
            if not is_right_row(mode, filename, value) or value.partition(" ")[0] != str(size):
                return f"row {last} does not match its checksum"
            is_intent = str(key).startswith(("+", "-"))
            named = is_intent or f"/{key}" in filename
            if (
                not named
                or (tag == "intent") != is_intent
                or (raw, expires_s) != (1, None)
                or not isinstance(stored_s, float)
            ):
                return f"row {last} contradicts itself"
    return None


def row_of(table: Any, digest: str) -> Any:
    """The row of an entry, or of a loan, whose key has a mark before the digest; None if there is
    none.

    Raises
    ------
    sqlite3.DatabaseError
        It is damaged, or of another entry.
    """
    found = table.get(digest)
    if found is not None and digest.rpartition("-")[2] not in found.filename:
        raise sqlite3.DatabaseError(f"the row of {digest} names {found.filename}")
    return found


def volume_of(table: Any) -> int:
    """The sum of all sizes, bytes.

    Raises
    ------
    sqlite3.DatabaseError
        It is no number.
    """
    try:
        return int(table.reset("size"))
    except (TypeError, ValueError) as exc:
        raise sqlite3.DatabaseError(f"the sum of all sizes is none ({exc})") from exc
