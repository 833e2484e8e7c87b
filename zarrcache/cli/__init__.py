"""The command line: ``zarrcache`` and ``python -m zarrcache``.

Each command imports what it needs when it runs, so that ``zarrcache --help`` takes 0.1 s.
"""

from __future__ import annotations

from zarrcache.cli.app import app
from zarrcache.cli.cache import doctor, evict, status, verify
from zarrcache.cli.convert import convert
from zarrcache.cli.demo import demo
from zarrcache.cli.plan import plan
from zarrcache.cli.serve import serve
from zarrcache.cli.warm import warm

__all__ = ["main"]

# In the order of the help page.
for _command in (demo, convert, warm, evict, status, verify, doctor, plan, serve):
    app.command()(_command)


def main() -> None:
    """Entry point of ``zarrcache`` and ``python -m zarrcache``."""
    app()
