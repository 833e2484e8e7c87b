"""The command line's frame: the app, exit codes, and the only ``print``. Data on stdout, talk and
prompts on stderr.

Exit 0 done, 1 some failed, 2 usage or settings, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer

from zarrcache import __version__
from zarrcache.errors import ConfigError, ZarrCacheError
from zarrcache.parallel import Terminated, ending_in_order, exit_code

__all__ = ["app", "failures", "guarded", "guarded_look", "say", "show", "show_json"]

app = typer.Typer(
    name="zarrcache",
    help="Train from S3 at the speed of the node's own SSD: convert, cache and look after charge "
    "densities in Zarr stores.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: it needs no rich, and can be searched
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)

_SHOWN = 20  # failures that are printed; --json has all
_settings = {"debug": False}


def guarded(command: Callable[..., int | None], *, goes_on: bool = True) -> Callable[..., None]:
    """Exit codes and words for what may end a command early. ``goes_on``: what it finished stays,
    and the next run need not do it again.
    """

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            with ending_in_order():
                code = command(*args, **kwargs) or 0
        except ZarrCacheError as exc:
            if _settings["debug"]:
                traceback.print_exc()
            say(f"error: {exc}")
            code = 2 if isinstance(exc, ConfigError) else 1
        except KeyboardInterrupt as exc:
            word = "Terminated" if isinstance(exc, Terminated) else "Interrupted"
            say(
                f"{word}. What is finished stays; run the same command again to go on."
                if goes_on
                else f"{word}."
            )
            code = exit_code(exc)
        raise typer.Exit(code)

    return run


#: Of a command that only looks.
guarded_look = functools.partial(guarded, goes_on=False)


def _version(is_asked: bool) -> None:
    if is_asked:
        print(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, help="print the version and exit", is_eager=True
        ),
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="log everything, and show the traceback of an error")
    ] = False,
) -> None:
    from zarrcache.cli.progress import StderrHandler

    _settings["debug"] = debug
    logging.getLogger("zarrcache").setLevel(logging.DEBUG if debug else logging.WARNING)
    logging.basicConfig(level=logging.WARNING, handlers=[StderrHandler()], format="%(message)s")


def show(line: str = "") -> None:
    """A line of data, on stdout, at once."""
    print(line, flush=True)


def say(line: str) -> None:
    """A line of talk, on stderr."""
    print(line, file=sys.stderr, flush=True)


def show_json(document: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    show(json.dumps(document, indent=2, default=str))


def failures(lines: Iterable[str], verdict: str = "failed") -> None:
    """The first failures, a line each, on stderr."""
    from zarrcache.cli.format import count

    every = list(lines)
    for line in every[:_SHOWN]:
        say(f"{verdict}: {line}")
    if len(every) > _SHOWN:
        say(f"{verdict}: {count(len(every) - _SHOWN)} more; --json lists all")
