"""How things are shown to people: progress, log lines, tables. The only import of rich, and only
where it is needed.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from zarrcache._units import format_bytes
from zarrcache.cli.format import count, duration

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = ["Meter", "StderrHandler", "show_table"]

#: Seconds between two lines of progress where nobody watches: a log of an hour stays a page.
_LINE_EVERY_S = 10.0


class StderrHandler(logging.Handler):
    """Log lines among the progress: written to whatever ``sys.stderr`` is now, which a live display
    replaces.
    """

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"{record.levelname.lower()}: {self.format(record)}\n")


class Meter:
    """Progress on stderr: a bar where somebody watches, else a line now and then.

    Parameters
    ----------
    verb : str
        For example ``Warming``.
    noun : str
        What is counted, in the plural.
        Empty: bytes are counted.
    total : int
    fetched : callable, optional
        Bytes that came from the origin so far; shown with their rate.
    """

    def __init__(
        self, verb: str, noun: str, total: int, fetched: Callable[[], int] | None = None
    ) -> None:
        self._verb, self._noun, self._total, self._fetched = verb, noun, total, fetched
        self._done = self._failed = 0
        self._start_s = self._line_s = time.monotonic()
        self._bar: tuple[Progress, TaskID] | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn(self._verb),
                BarColumn(),
                TextColumn("{task.fields[words]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
            )
            progress = Progress(*columns, console=Console(stderr=True), transient=True)
            progress.start()
            self._bar = progress, progress.add_task("", total=self._total, words=self._words())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar[0].stop()

    def advance(self, *, failed: bool = False) -> None:
        """One more is done."""
        self._failed += failed
        self.reach(self._done + 1)

    def reach(self, done: int, total: int | None = None) -> None:
        """So many are done, of so many if that is known only now."""
        self._done, self._total = done, self._total if total is None else total
        if self._bar is not None:
            progress, task = self._bar
            progress.update(task, completed=done, total=self._total, words=self._words())
        elif time.monotonic() - self._line_s >= _LINE_EVERY_S:
            self._line_s = time.monotonic()
            left_s = (self._line_s - self._start_s) * (self._total - done) / max(1, done)
            sys.stderr.write(f"{self._verb}: {self._words()}, {duration(left_s)} left\n")
            sys.stderr.flush()

    def _words(self) -> str:
        seconds = max(1e-3, time.monotonic() - self._start_s)
        if not self._noun:
            return f"{format_bytes(self._done)} of {format_bytes(self._total)}, {format_bytes(int(self._done / seconds))}/s"
        words = f"{count(self._done)} of {count(self._total)} {self._noun}"
        if self._fetched is not None:
            fetched = self._fetched()
            words += f", {format_bytes(fetched)}, {format_bytes(int(fetched / seconds))}/s"
        return words + (f", {count(self._failed)} failed" if self._failed else "")


def show_table(rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout. The first row names the columns; the first column is words, the others are
    numbers.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for number, column in enumerate(rows[0]):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for row in rows[1:]:
        table.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
