"""The command line: ``zarrcache`` and ``python -m zarrcache``.

Each command imports what it needs when it runs, so that ``zarrcache --help`` takes 0.1 s. Importing
this module imports none of them, so that ``main`` decides what Ctrl-C does meanwhile.
"""

from __future__ import annotations

import functools

from zarrcache.cli._early import end_on_ctrl_c

TYPE_CHECKING = False  # typing imports much, and Ctrl-C is not handled yet
if TYPE_CHECKING:
    import typer

__all__ = ["main"]


def main() -> None:
    """Entry point of ``zarrcache`` and ``python -m zarrcache``."""
    end_on_ctrl_c()
    _application()()


@functools.cache
def _application() -> typer.Typer:
    from zarrcache.cli.app import app
    from zarrcache.cli.audit import audit
    from zarrcache.cli.cache import doctor, evict, status, verify
    from zarrcache.cli.convert import convert
    from zarrcache.cli.demo import demo
    from zarrcache.cli.init import init, schema
    from zarrcache.cli.lock import diff, lock
    from zarrcache.cli.ls import ls
    from zarrcache.cli.map import make_map
    from zarrcache.cli.plan import plan
    from zarrcache.cli.plot import plot
    from zarrcache.cli.report import report
    from zarrcache.cli.serve import serve
    from zarrcache.cli.top import top
    from zarrcache.cli.warm import warm

    # In the order of the help page.
    for command in (
        demo,
        init,
        convert,
        warm,
        evict,
        status,
        ls,
        verify,
        doctor,
        plan,
        report,
        top,
        audit,
        plot,
        lock,
        diff,
        serve,
        schema,
    ):
        app.command(context_settings={"allow_extra_args": command is convert})(command)
        if command is convert:
            app.command("map")(make_map)
    return app
