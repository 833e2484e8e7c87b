"""How things are measured: rounds of interleaved competitors, and what is said of them.

A figure counts as a ratio of two competitors of one run. They take turns, in an order that moves on
by one each round, so that what else the machine does, and what one leaves behind in the page cache,
falls on all of them alike.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = [
    "TIMES",
    "Bar",
    "Context",
    "Measured",
    "Round",
    "Summary",
    "Table",
    "cores",
    "in_unit_of",
    "interleave",
    "orders",
    "percentile",
    "summarise",
]


@dataclass(frozen=True, slots=True)
class Measured:
    """One round of one competitor.

    Attributes
    ----------
    seconds : float
    items : int
        Samples, stores or objects in these seconds.
    requests, nbytes : int, optional
        At the server, from its log.
    extra : mapping
        Other figures by name, the unit in the name: ``{"pss_mib": 12.3}``.
    """

    seconds: float
    items: int = 1
    requests: int | None = None
    nbytes: int | None = None
    extra: Mapping[str, float] = field(default_factory=dict)

    def value(self, of: str | None = None) -> float:
        """Seconds per item, or the figure named ``of``: one of ``extra``, or ``requests`` or
        ``nbytes``.
        """
        if of is None:
            return self.seconds / self.items
        counted = {"requests": self.requests, "nbytes": self.nbytes}.get(of)
        return self.extra[of] if counted is None else counted


#: Units of seconds.
TIMES = {"s": 1.0, "ms": 1e3, "µs": 1e6}
#: Runs a competitor once.
Round = Callable[[], Measured]


@dataclass(frozen=True, slots=True)
class Bar:
    """A goal: a ratio of the medians of two competitors of this run.

    Attributes
    ----------
    competitor : str
    reference : str, optional
        None: the goal is the figure itself, in seconds per item or the unit of ``of``; counts and
        the few times that are promised as such.
    at_least : float, optional
        For rates: how many times the reference's rate. With ``of``: how many times the reference's
        figure.
    at_most : float, optional
        For times (or the figure ``of``): how many times the reference's.
    of : str, optional
        A figure of ``Measured.extra``, or ``requests``; by default seconds per item.
    """

    competitor: str
    reference: str | None
    at_least: float | None = None
    at_most: float | None = None
    of: str | None = None

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError(f"the bar of {self.competitor!r} needs one of at_least and at_most")
        if self.reference is None and self.of is None and self.at_least is not None:
            raise ValueError(
                f"the bar of {self.competitor!r} has no reference: seconds have an at_most"
            )


@dataclass(frozen=True, slots=True)
class Table:
    """What one benchmark found.

    Attributes
    ----------
    name : str
        ``W1``.
    title : str
        One line that a user understands.
    unit : {"samples/s", "s", "ms", "MiB", ...}
        Units that end in ``/s`` are rates; ``MiB`` and others that are no times need ``of``.
    reference : str
        The competitor that ratios refer to.
    rounds : mapping
        Competitor to its rounds.
    facts : mapping
        Sizes, page-cache state, latency, and what else has to be known with the figures.
    bars : sequence of Bar
    missing : mapping
        Competitor to the reason why it did not run.
    of : str, optional
        The figure of ``Measured.extra`` that the table shows; by default seconds per item, in
        ``unit``.
    """

    name: str
    title: str
    unit: str
    reference: str
    rounds: Mapping[str, Sequence[Measured]]
    facts: Mapping[str, object]
    bars: Sequence[Bar] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    of: str | None = None


@dataclass(frozen=True, slots=True)
class Context:
    """What a benchmark gets.

    Attributes
    ----------
    rounds : int
        Of each competitor, after the warm-up.
    quick : bool
        A smoke test: the smallest sizes that still say something.
    workdir : Path
        An empty directory of this benchmark, removed after it.
    seed : int
    """

    rounds: int
    quick: bool
    workdir: Path
    seed: int


def interleave(
    competitors: Mapping[str, Round], rounds: int, *, warmup: int = 1
) -> dict[str, list[Measured]]:
    """Run the competitors in turns: A B C, C A B, B C A, ...

    Parameters
    ----------
    competitors : mapping
        Name to what runs it once.
    rounds : int
    warmup : int
        Rounds before these that are not counted.
    """
    found: dict[str, list[Measured]] = {name: [] for name in competitors}
    gc.collect()
    # what is imported stays: to look through it before every round takes longer than most rounds
    gc.freeze()
    try:
        for number, order in enumerate(orders(list(competitors), warmup + rounds)):
            for name in order:
                gc.collect()
                try:
                    measured = competitors[name]()
                except Exception as exc:
                    exc.add_note(f"in round {number} of {name!r}")
                    raise
                if number >= warmup:
                    found[name].append(measured)
    finally:
        gc.unfreeze()
    return found


def orders(names: Sequence[str], rounds: int) -> Iterator[list[str]]:
    """The order of each round: the last of one round is the first of the next."""
    for number in range(rounds):
        start = -number % len(names) if names else 0
        yield [*names[start:], *names[:start]]


def percentile(values: Sequence[float], percent: float) -> float:
    """By linear interpolation between the two nearest, as numpy's default."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@dataclass(frozen=True, slots=True)
class Summary:
    """Median, P90 and P99 of rounds. For rates they are those of the time: a P90 is slower than the
    median.
    """

    median: float
    p90: float
    p99: float
    rounds: int


def summarise(rounds: Sequence[Measured], of: str | None = None) -> Summary:
    """Summarise seconds per item, or the figure ``of``."""
    values = [measured.value(of) for measured in rounds]
    return Summary(
        statistics.median(values), percentile(values, 90), percentile(values, 99), len(values)
    )


def in_unit_of(table: Table, summary: Summary) -> tuple[float, float, float]:
    """Median, P90 and P99 in the table's unit. For rates the percentiles are those of the time: the
    slow end.
    """
    values = summary.median, summary.p90, summary.p99
    if table.of is not None:
        return values
    if table.unit.endswith("/s"):
        return tuple(1 / value for value in values)  # type: ignore[return-value]
    return tuple(value * TIMES[table.unit] for value in values)  # type: ignore[return-value]


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
