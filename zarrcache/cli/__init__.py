"""The command line: ``zarrcache`` and ``python -m zarrcache``.

Each command imports what it needs when it runs, so that ``zarrcache --help`` takes 0.1 s. The
command line imports for 0.1 to 0.5 s before it can do anything. Meanwhile Ctrl-C ends it at once,
with one word: an exception inside an import prints a traceback, and some packages swallow it.
"""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import os
import signal
import threading

TYPE_CHECKING = False  # typing imports much, and Ctrl-C is not handled yet
if TYPE_CHECKING:
    from types import FrameType

    import typer

__all__ = ["leave_ctrl_c_to_python", "main"]

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
    if (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, _end)
    # At its end Python searches all that was imported for garbage, which takes 0.1 to 0.2 s of CPU.
    atexit.register(gc.freeze)
    _application()()


def leave_ctrl_c_to_python() -> None:
    """Raise ``KeyboardInterrupt`` again: now there may be work to end in order."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    os.write(2, b"Interrupted.\n")
    os._exit(128 + number)  # nothing is open yet; atexit functions may not be complete


@functools.cache
def _application() -> typer.Typer:
    from zarrcache.cli.app import app

    for name in _COMMANDS:
        module = importlib.import_module(f"zarrcache.cli.{_MODULES.get(name, name)}")
        # convert says itself how to give it several paths.
        settings = {"allow_extra_args": name == "convert"}
        app.command(name, context_settings=settings)(getattr(module, name))
    return app
