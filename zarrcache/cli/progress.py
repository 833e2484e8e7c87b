"""Progress, log lines and pictures in the terminal; imports rich only when it is needed."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Self

from zarrcache._units import format_bytes, format_seconds

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from rich.progress import Progress, TaskID
    from rich.text import Text

    from zarrcache.ops import Panel

__all__ = ["Meter", "StderrHandler", "is_quiet", "live_text", "show_panels"]

#: Seconds between two progress lines without a terminal: the log of an hour fits a few pages.
_LINE_EVERY_S = 10.0
#: Characters from dark to bright, for terminals and files without colour.
_RAMP = " .:-=+*#%@"
_SMALLEST, _LARGEST = 12, 40  # columns of a plane


def is_quiet() -> bool:
    """Whether ``--quiet`` was given, which raises the level of the logger."""
    return not logging.getLogger("zarrcache").isEnabledFor(logging.WARNING)


class StderrHandler(logging.Handler):
    """Writes log lines to the current ``sys.stderr``, which rich replaces while a bar is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        sys.stderr.write(f"{record.levelname.lower()}: {self.format(record)}\n")


class Meter:
    """Progress on stderr: a bar on a terminal, otherwise a line every 10 seconds.

    With ``--quiet`` there is neither. ``Meter("Warming", "densities", 9)`` counts nine of them;
    without a noun the count is in bytes. ``fetched`` returns the bytes fetched from the origin so
    far; they are shown with their rate.
    """

    def __init__(
        self, verb: str, noun: str, total: int, fetched: Callable[[], int] | None = None
    ) -> None:
        self._verb, self._noun, self._total, self._fetched = verb, noun, total, fetched
        self._done = self._failed = 0
        self._start_s = self._line_s = time.monotonic()
        self._bar: tuple[Progress, TaskID] | None = None
        self._is_quiet = is_quiet()

    def __enter__(self) -> Self:
        if sys.stderr.isatty() and not self._is_quiet:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn(self._verb),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
            )
            progress = Progress(*columns, console=Console(stderr=True), transient=True)
            progress.start()
            self._bar = progress, progress.add_task("", total=self._total, text=self._text())
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._bar is not None:
            self._bar[0].stop()

    def advance(self, *, failed: bool = False) -> None:
        """Increase the count by one."""
        self._failed += failed
        self.reach(self._done + 1)

    def reach(self, done: int, total: int | None = None) -> None:
        """Set the count, and the total if it was unknown before."""
        self._done, self._total = done, self._total if total is None else total
        if self._bar is not None:
            progress, task = self._bar
            progress.update(task, completed=done, total=self._total, text=self._text())
        elif not self._is_quiet and time.monotonic() - self._line_s >= _LINE_EVERY_S:
            self._line_s = time.monotonic()
            left_s = (self._line_s - self._start_s) * (self._total - done) / max(1, done)
            sys.stderr.write(f"{self._verb}: {self._text()}, {format_seconds(left_s)} left\n")
            sys.stderr.flush()

    def _text(self) -> str:
        seconds = max(1e-3, time.monotonic() - self._start_s)
        if not self._noun:
            rate = format_bytes(int(self._done / seconds))
            return f"{format_bytes(self._done)} of {format_bytes(self._total)}, {rate}/s"
        text = f"{self._done:,} of {self._total:,} {self._noun}"
        if self._fetched is not None:
            fetched = self._fetched()
            text += f", {format_bytes(fetched)}, {format_bytes(int(fetched / seconds))}/s"
        return text + (f", {self._failed:,} failed" if self._failed else "")


@contextmanager
def live_text() -> Iterator[Callable[[Sequence[str]], None]]:
    """Lines on stdout that the function it gives replaces in place."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    with Live(console=Console(highlight=False), auto_refresh=False) as live:
        yield lambda lines: live.update(Text("\n".join(lines)), refresh=True)


def show_panels(rows: Sequence[Sequence[Panel]]) -> None:
    """Print planes side by side, in colour where the terminal has it, two points per character."""
    from rich.console import Console
    from rich.table import Table

    from zarrcache.ops import shrunk

    console = Console(highlight=False)
    has_colour = console.color_system is not None
    wide = min(_LARGEST, max(_SMALLEST, (console.width - 4) // 3))
    # Wrapped, never cut: a number that has lost its exponent is another number.
    console.width = max(console.width, len(rows[0]) * (wide + 2))
    grid = Table.grid(padding=(0, 2))
    for _ in rows[0]:
        grid.add_column(width=wide)
    for row in rows:
        grid.add_row(*(panel.caption for panel in row))
        grid.add_row(*(_picture(shrunk(panel.colours, wide), has_colour) for panel in row))
        grid.add_row()
    console.print(grid)


def _picture(colours: NDArray[np.uint8], has_colour: bool) -> Text:
    """Text in which each line shows two rows of points."""
    from rich.text import Text

    lines = []
    for top in range(0, len(colours), 2):
        bottom = min(top + 1, len(colours) - 1)
        line = Text()
        for above, below in zip(colours[top], colours[bottom], strict=True):
            if has_colour:
                upper, lower = (f"rgb({','.join(map(str, point))})" for point in (above, below))
                line.append("▀", style=f"{upper} on {lower}")
            else:
                brightness = (above.mean() + below.mean()) / 2 / 256
                line.append(_RAMP[int(brightness * len(_RAMP))])
        lines.append(line)
    return Text("\n").join(lines)
