"""The typer application, exit codes and output: data on stdout, messages and prompts on stderr.

Exit codes: 0 done, 1 some failed, 2 wrong usage or settings, 130 Ctrl-C, 143 SIGTERM.

``--quiet`` does not change stdout. On stderr it keeps prompts, errors and failures.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from zarrcache import __version__
from zarrcache._keys import is_url
from zarrcache.cli import leave_ctrl_c_to_python
from zarrcache.cli.progress import StderrHandler, is_quiet
from zarrcache.errors import ConfigError, OriginNotFoundError, ZarrCacheError
from zarrcache.parallel import Terminated, exit_code, raise_on_signals

__all__ = [
    "app",
    "command",
    "failures",
    "say",
    "say_refusal",
    "show",
    "show_json",
    "show_some",
    "show_table",
]

app = typer.Typer(
    name="zarrcache",
    help="Train from S3 at the speed of the node's own SSD: convert, cache and maintain charge "
    "densities in Zarr stores.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain help: without rich, and greppable
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)

_MAX_FAILURES = 20  # printed; --json has all
_log = logging.getLogger("zarrcache")

#: Options of every command.
_QUIET = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="print only results, errors and failures; no progress, warnings or hints",
    ),
]
_VERBOSE = Annotated[
    bool, typer.Option("--verbose", "-v", help="log every step; print the traceback of an error")
]


def command(*, resumable: bool) -> Callable[[Callable[..., int]], Callable[..., None]]:
    """Turn a function that returns an exit code into a command.

    Errors become a message on stderr and an exit code. That of an interruption says whether the
    command is ``resumable``: finished work is kept, and the next run continues.
    """

    def decorate(function: Callable[..., int]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, quiet: bool, verbose: bool, **kwargs: Any) -> None:
            leave_ctrl_c_to_python()
            if quiet and verbose:
                raise typer.BadParameter("--quiet and --verbose exclude each other.")
            if quiet or verbose:
                _log.setLevel(logging.DEBUG if verbose else logging.ERROR)
            try:
                for value in kwargs.values():
                    if isinstance(value, Path) and is_url(value):
                        raise ConfigError(
                            f"{value} is a URL. Give a path of this machine; `aws s3 cp` copies "
                            "files from and to S3."
                        )
                with raise_on_signals():
                    code = function(*args, **kwargs)
            except BrokenPipeError:  # `zarrcache ls | head`: click ends quietly
                raise
            except (ZarrCacheError, OSError, ModuleNotFoundError, UnicodeEncodeError) as exc:
                if _log.isEnabledFor(logging.DEBUG):
                    traceback.print_exc()
                text, code = _in_words(exc)
                if kwargs.get("s3_kwargs", "") is None and " in s3_kwargs" in text:
                    text += " Pass s3_kwargs with --s3-kwargs or --config CONFIG."
                say(f"error: {text}", always=True)
            except KeyboardInterrupt as exc:
                word = "Terminated" if isinstance(exc, Terminated) else "Interrupted"
                hint = " Finished work is kept; run the same command again to continue."
                say(f"{word}.{hint if resumable else ''}", always=True)
                code = exit_code(exc)
            raise typer.Exit(code)

        shown = inspect.signature(function, eval_str=True)
        ways = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=annotation
            )
            for name, annotation in (("quiet", _QUIET), ("verbose", _VERBOSE))
        ]
        parameters = [*shown.parameters.values(), *ways]
        run.__signature__ = shown.replace(parameters=parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _in_words(exc: Exception) -> tuple[str, int]:
    """The message for an error of ours or a fault of the machine, and the exit code."""
    if isinstance(exc, ZarrCacheError):
        # A directory or bucket that does not exist is a wrong argument or setting.
        return str(exc), 2 if isinstance(exc, (ConfigError, OriginNotFoundError)) else 1
    if isinstance(exc, UnicodeEncodeError):  # of a path; Python's own choice is UTF-8
        text = f"{exc.object!r} cannot be written in {exc.encoding}, the encoding of this locale."
        return f"{text} Run the command with PYTHONUTF8=1.", 2
    where = "--verbose shows the traceback."
    if isinstance(exc, OSError):
        file = f"{exc.filename}: " if exc.filename else ""
        return f"{file}{exc.strerror or exc}. {where}", 1
    return f"{exc}. {where} Install what is missing: pip install zarrcache", 1


def _version(is_given: bool) -> None:
    if is_given:
        show(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_version, help="print the version and exit", is_eager=True
        ),
    ] = False,
) -> None:
    _log.setLevel(logging.WARNING)
    logging.basicConfig(level=logging.WARNING, handlers=[StderrHandler()], format="%(message)s")


def show(line: str = "") -> None:
    """Print a line of data on stdout, unbuffered."""
    print(line, flush=True)


def show_some(lines: Sequence[str], most: int) -> None:
    """Print up to ``most`` lines of data on stdout, and the number of further ones on stderr."""
    for line in lines[:most]:
        show(line)
    if len(lines) > most:
        say(f"{len(lines) - most:,} more; --json lists all")


def show_table(rows: Sequence[Sequence[str]], *, numeric: bool = False) -> None:
    """Print rows on stdout in columns, aligned to the right if ``numeric``, except for the first.

    The first row has the names of the columns.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.rjust(width) if numeric and number else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        show("  ".join(cells).rstrip())


def say(line: str, *, always: bool = False) -> None:
    """Print a message on stderr; with ``--quiet`` only errors and failures (``always``)."""
    if always or not is_quiet():
        print(line, file=sys.stderr, flush=True)


def say_refusal(refusal: str) -> None:
    """Print why the training refuses a config, if it does."""
    if refusal:
        say(f"The training refuses this config: {refusal}", always=True)


def show_json(document: dict[str, Any]) -> None:
    """Print one JSON object on stdout."""
    show(json.dumps(document, indent=2, default=str))


def failures(lines: Iterable[str], verdict: str = "failed") -> None:
    """Print up to 20 failures on stderr, one per line, and the number of further ones."""
    every = list(lines)
    for line in every[:_MAX_FAILURES]:
        say(f"{verdict}: {line}", always=True)
    if len(every) > _MAX_FAILURES:
        say(f"{verdict}: {len(every) - _MAX_FAILURES:,} more; --json lists all", always=True)
