"""The word that nodes of one cluster show each other: read from a file that its owner alone can
read, never from a config or a command line.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from zarrcache.errors import ConfigError

__all__ = ["read_token"]

#: What a header can carry. Shorter words can be guessed.
_TOKEN = re.compile(r"[\x21-\x7e]{16,512}")
_MAKE = "Make one with: (umask 077; openssl rand -hex 32 > FILE)"


def read_token(path: Path) -> str:
    """The token in a file.

    Raises
    ------
    ConfigError
        The file cannot be read, may be read by others, or does not hold one word of 16 to 512
        printable characters. The word is not shown.
    """
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if (
                not stat.S_ISREG(found.st_mode)
                or found.st_mode & 0o077
                or found.st_uid not in (os.getuid(), 0)
            ):
                raise ConfigError(
                    f"token file {path} has to be a file of this user that nobody else may read; "
                    f"it belongs to user {found.st_uid} and has mode "
                    f"{stat.S_IMODE(found.st_mode):04o}. Run: chmod 600 {path}"
                )
            raw = file.read(1024)
    except OSError as exc:
        raise ConfigError(f"token file {path} cannot be read ({exc.strerror}). {_MAKE}") from exc
    token = raw.decode("latin-1").strip()
    if _TOKEN.fullmatch(token) is None:
        raise ConfigError(
            f"token file {path} does not hold one word of 16 to 512 printable characters. {_MAKE}"
        )
    return token
