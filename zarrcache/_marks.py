"""Empty files whose times carry a number from one process of a node to the others.

Setting or reading one is one system call, and there is no content that could be torn or forged.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

__all__ = ["set_mark"]


def set_mark(path: Path, *, accessed_s: float, modified_s: float) -> None:
    """Set the times of an empty file, and make it if it is not there. Follows no link.

    Raises
    ------
    OSError
        Full disk, read-only, or the directory is gone.
    """
    times = (accessed_s, modified_s)
    try:
        os.utime(path, times, follow_symlinks=False)
        return
    except FileNotFoundError:
        pass
    except PermissionError:  # another user of a shared directory made it
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    with contextlib.suppress(FileExistsError):  # another process makes the same file right now
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.utime(fd, times)
        finally:
            os.close(fd)
