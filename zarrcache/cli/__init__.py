"""The command line: ``zarrcache`` and ``python -m zarrcache``.

Each command imports what it needs when it runs, so that ``zarrcache --help`` takes 0.1 s. Importing
this module imports none of them, so that ``main`` decides what Ctrl-C does meanwhile.
"""

from __future__ import annotations

import functools
import importlib

from zarrcache.cli._early import end_on_ctrl_c

TYPE_CHECKING = False  # typing imports much, and Ctrl-C is not handled yet
if TYPE_CHECKING:
    import typer

__all__ = ["main"]

#: In the order of the help page.
_COMMANDS = (
    "demo init convert map warm evict status ls verify doctor plan report top audit plot lock diff "
    "serve schema"
).split()
#: The modules of commands that have none of their own name.
_MODULES = {
    **dict.fromkeys(("evict", "status", "ls", "verify", "doctor"), "cache"),
    "diff": "lock",
    "schema": "init",
}


def main() -> None:
    """Entry point of ``zarrcache`` and ``python -m zarrcache``."""
    end_on_ctrl_c()
    _application()()


@functools.cache
def _application() -> typer.Typer:
    from zarrcache.cli.app import app

    for name in _COMMANDS:
        module = importlib.import_module(f"zarrcache.cli.{_MODULES.get(name, name)}")
        # convert says itself how to give it several paths.
        settings = {"allow_extra_args": name == "convert"}
        app.command(name, context_settings=settings)(getattr(module, name))
    return app
