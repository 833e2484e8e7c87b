"""``zarrcache`` and ``python -m zarrcache``: all commands, in the order in which one meets them.

Every command imports what it needs when it runs, so that ``zarrcache --help`` is there at once.
"""

from __future__ import annotations

# Importing a module registers its commands; the order of these lines is that of the help.
from zarrcache import clidata  # isort: skip
from zarrcache import clicache  # isort: skip
from zarrcache import clicluster  # isort: skip
from zarrcache.cliapp import app

__all__ = ["clicache", "clicluster", "clidata", "main"]


def main() -> None:
    """Entry point of ``zarrcache`` and ``python -m zarrcache``."""
    app()


if __name__ == "__main__":
    main()
