"""``zarrcache`` and ``python -m zarrcache``: all commands, in the order in which one meets them.

Every command imports what it needs when it runs, so that ``zarrcache --help`` is there at once.
"""

from __future__ import annotations

from zarrcache import clidata  # isort: split

from zarrcache import clicache
from zarrcache.cliapp import app

__all__ = ["clicache", "clidata", "main"]


def main() -> None:
    """Entry point of ``zarrcache`` and ``python -m zarrcache``."""
    app()


if __name__ == "__main__":
    main()
