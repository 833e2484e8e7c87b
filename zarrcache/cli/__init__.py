"""``zarrcache`` and ``python -m zarrcache``: all commands, in the order in which one meets them.

Every command imports what it needs when it runs, so that ``zarrcache --help`` is there at once.
"""

from __future__ import annotations

# Importing a module registers its commands; the order of these lines is that of the help.
from zarrcache.cli import _data  # isort: skip
from zarrcache.cli import _cache  # isort: skip
from zarrcache.cli import _cluster  # isort: skip
from zarrcache.cli.app import app

__all__ = ["_cache", "_cluster", "_data", "main"]


def main() -> None:
    """Entry point of ``zarrcache`` and ``python -m zarrcache``."""
    app()


if __name__ == "__main__":
    main()
