"""The page of ``zarrcache report``: recorded epochs, cost, and the effect of another cache."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import TypeVar

from zarrcache._units import counted, format_bytes, format_money
from zarrcache.config import CacheConfig, DataConfig, cache_of
from zarrcache.ops.forecast import EpochForecast, Forecast, WhatIf
from zarrcache.ops.pages import Axis, Series, columns, lines, page, short, table
from zarrcache.ops.runs import RecordedRun, RecordedRuns
from zarrcache.train import EpochTimes

__all__ = ["report_page"]

T = TypeVar("T")

#: Epochs that a chart and its table show; the sums count all.
_EPOCHS = 200
#: Six, as there are colours.
_PARTS = {
    "reads from the cache": ("hit", "checksum", "held"),
    "reads from the origin and other nodes": ("miss", "bypass", "peer"),
    "rotation and cast": ("augment",),
    "your own code": ("transform", "collate", "dataset"),
    "copies": ("copy",),
    "waiting for the disk or a core": ("disk", "cores"),
}
_HOW = """with LoaderMonitor(loader) as batches:  # from zarrcache.train import LoaderMonitor
    for epoch in range(epochs):
        for batch in batches:
            train(batch)
print(batches.verdict)

# with Lightning: from zarrcache.lightning import CacheMonitor
Trainer(callbacks=[CacheMonitor()]).fit(model, data)
"""


def _plain(value: float) -> str:
    return f"{value:.3g}"


_HITS = Axis("% of the reads", _plain, top=100)
_BY_EPOCH = Axis("epoch", lambda value: f"{value:g}")
_table = functools.partial(table, numbers=True)


def report_page(
    config: DataConfig, recorded: RecordedRuns, forecast: WhatIf | str, *, now_s: float
) -> str:
    """The page, as one HTML document.

    ``forecast`` may be the reason why there is none; ``now_s`` is the time that the page states.
    """
    cache = cache_of(config)
    plan = forecast if isinstance(forecast, WhatIf) else None
    where = (
        f"Input <code>{escape(str(config.data_dir))}</code>, label "
        f"<code>{escape(str(config.label_dir))}</code>. Cache "
        f"<code>{escape(str(cache.dir))}</code>, at most {format_bytes(cache.limit)}. Written on "
        f"{_date(now_s)}."
    )
    parts = [
        f'<p class="faint">{where}</p>',
        _tiles(recorded, plan),
        *_recorded(recorded, cache),
    ]
    if plan is None:
        parts.append(f"<h2>Forecast</h2><p>There is no forecast: {escape(str(forecast))}</p>")
    else:
        parts += [*_forecast(plan.present), *_sizes(plan), *_nodes(plan)]
        parts.append(_basis(plan.present, config))
    return page(f"Training report: {config.functional}", "\n".join(parts))


def _tiles(recorded: RecordedRuns, plan: WhatIf | None) -> str:
    total = recorded.total
    if total is None:
        return ""
    last = recorded.runs[0].epochs[-1]
    fetched = format_bytes(total.stats.fetched_bytes)
    found = [
        ("Waiting for data", _percent(last.waiting_ratio), "of the time, in the last epoch"),
        ("Hits", _percent(last.stats.hit_ratio), "of the reads, in the last epoch"),
        ("Requests", short(total.stats.requests), f"in all epochs, {fetched}"),
    ]
    if plan is not None:
        paid, saved = _dollars(total, plan.present)
        currency = plan.present.prices.currency
        found += [
            ("Cost so far", f"{format_money(paid)} {currency}", "requests and bytes of all epochs"),
            ("Saved", f"{format_money(saved)} {currency}", "cost of the hits at the origin"),
        ]
    tiles = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(what)}</small></dd></div>"
        for name, value, what in found
    )
    return f'<dl class="tiles">{tiles}</dl>'


def _recorded(recorded: RecordedRuns, cache: CacheConfig) -> Iterable[str]:
    yield "<h2>Recorded epochs</h2>"
    for note in recorded.notes:
        yield f'<p class="say">{escape(note)}</p>'
    if not recorded.runs:
        yield (
            f"<p>No training has recorded epochs in <code>{escape(str(cache.dir))}</code> yet. "
            "Each process that trains under a monitor records its epochs there:</p>"
            f"<pre><code>{escape(_HOW)}</code></pre>"
        )
        return
    run = recorded.runs[0]
    shown = run.epochs[-_EPOCHS:]
    skipped = len(run.epochs) - len(shown)
    yield (
        f"<p>The process that recorded last, with {counted(run.workers, 'worker')}: "
        f"{counted(len(run.epochs), 'epoch')}, the last of them on {_date(run.ended_s[-1])}."
        + (f" The last {_EPOCHS} are shown." if skipped else "")
        + "</p>"
    )
    verdict = re.sub("`([^`]+)`", r"<code>\1</code>", escape(run.verdict.text))
    yield f'<p class="say">{verdict}</p>'
    yield f'<div class="charts">{"".join(_epoch_charts(run, skipped))}</div>'
    numbers = enumerate(run.epochs[skipped:], start=skipped + 1)
    yield _folded(
        "Numbers of the epochs",
        _table(
            ("epoch", *_NUMBERS), [(str(number), *_numbers_of(times)) for number, times in numbers]
        ),
    )
    if len(recorded.runs) > 1:
        yield "<h2>All recorded processes</h2>"
        yield (
            '<p class="faint">Each rank of a training on several GPUs is a separate process. '
            "Sums over all epochs.</p>"
        )
        every = _table(
            ("last epoch ended", "epochs", *_NUMBERS),
            [
                (_date(one.ended_s[-1]), f"{len(one.epochs):,}", *_numbers_of(one.total))
                for one in recorded.runs
            ],
        )
        yield every if len(recorded.runs) <= 10 else _folded("Numbers of the processes", every)


def _epoch_charts(run: RecordedRun, skipped: int) -> Iterable[str]:
    shown = list(enumerate(run.epochs[skipped:], start=skipped + 1))
    labels = [str(number) for number, _ in shown]
    of = functools.partial(_series, shown=shown)

    def in_seconds(title: str, series: Sequence[Series]) -> str:
        """Columns in seconds, or in minutes or hours where they are large."""
        largest = max(
            sum(y for _, y in points)
            for points in zip(*(one.points for one in series), strict=True)
        )
        unit, size = ("h", 3600) if largest > 7200 else ("min", 60) if largest > 180 else ("s", 1)
        divided = [Series(one.name, [(x, y / size) for x, y in one.points]) for one in series]
        return columns(title, labels, divided, "epoch", Axis(unit, _plain))

    yield in_seconds(
        "Time of each epoch",
        [
            of("waiting for data", lambda times: times.waited_s),
            of("training", lambda times: times.worked_s),
        ],
    )
    yield lines(
        "Waiting for data",
        [of("waiting", lambda times: 100 * times.waiting_ratio)],
        _BY_EPOCH,
        Axis("% of the time", _plain, top=100),
    )
    yield lines("Hits", [of("hits", lambda times: 100 * times.stats.hit_ratio)], _BY_EPOCH, _HITS)
    yield columns(
        "Requests to the origin",
        labels,
        [of("requests", lambda times: times.stats.requests)],
        "epoch",
        Axis("requests", short),
    )
    used = [
        of(text, functools.partial(_seconds_of, names))
        for text, names in _PARTS.items()
        if any(times.parts.get(name) for _, times in shown for name in names)
    ]
    if used:
        yield in_seconds("Work of the workers, summed over them", used)
    yield columns(
        "Bytes from the origin",
        labels,
        [of("bytes", lambda times: times.stats.fetched_bytes / 1024**2)],
        "epoch",
        Axis("MiB", short),
    )


#: Columns of the tables of epochs and of processes.
_NUMBERS: dict[str, Callable[[EpochTimes], str]] = {
    "steps": lambda times: f"{times.steps:,}",
    "waited, s": lambda times: f"{times.waited_s:,.2f}",
    "trained, s": lambda times: f"{times.worked_s:,.2f}",
    "waited": lambda times: _percent(times.waiting_ratio),
    "hits": lambda times: f"{times.stats.hits:,}",
    "misses": lambda times: f"{times.stats.misses:,}",
    "of them not admitted": lambda times: f"{times.stats.bypasses:,}",
    "hit rate": lambda times: _percent(times.stats.hit_ratio),
    "requests": lambda times: f"{times.stats.requests:,}",
    "from origin": lambda times: format_bytes(times.stats.fetched_bytes),
}


def _numbers_of(times: EpochTimes) -> list[str]:
    return [show(times) for show in _NUMBERS.values()]


def _forecast(plan: Forecast) -> Iterable[str]:
    where = counted(plan.nodes, "node")
    yield f"<h2>Forecast of {counted(plan.run_epochs, 'epoch')} on {where}</h2>"
    share = min(1.0, plan.capacity_bytes / plan.disk_bytes) if plan.disk_bytes else 1.0
    ahead = ""
    if plan.lookahead_bytes:
        ahead = f" (of which the look-ahead takes {format_bytes(plan.lookahead_bytes)})"
    yield (
        f"<p>From an empty cache: {_percent(plan.total.hit_ratio)} hits, "
        f"{plan.total.requests:,} requests, {format_bytes(plan.total.nbytes)}, "
        f"{format_money(plan.total.dollars)} {escape(plan.prices.currency)}. Each node's cache of "
        f"{format_bytes(plan.capacity_bytes)}{ahead} holds {_percent(share)} of the data "
        f"({format_bytes(plan.disk_bytes)} on disk). Without a cache it would be "
        f"{format_money(plan.cold_dollars(plan.densities) * plan.run_epochs)} "
        f"{escape(plan.prices.currency)}.</p>"
    )
    shown = list(enumerate(plan.epochs[:_EPOCHS], start=1))
    if len(shown) < plan.run_epochs:
        yield f"<p>The charts show the first {len(shown)} epochs; later ones are like the last.</p>"
    yield '<div class="charts">'
    yield lines(
        "Hits",
        [_series("hits", lambda epoch: 100 * epoch.hit_ratio, shown)],
        _BY_EPOCH,
        _HITS,
    )
    yield lines(
        "Requests to the origin",
        [_series("requests", lambda epoch: epoch.requests, shown)],
        _BY_EPOCH,
        Axis("requests", short),
    )
    yield "</div>"
    yield _folded(
        "Numbers of the epochs",
        _table(
            ("epoch", "hit rate", *_costs(plan)),
            [
                (str(number), _percent(epoch.hit_ratio), *_costs_of(epoch))
                for number, epoch in shown
            ],
        ),
    )


def _sizes(plan: WhatIf) -> Iterable[str]:
    present, disk_bytes = plan.present, plan.present.disk_bytes
    yield "<h2>What if the cache had another size or policy?</h2>"
    steady = f"in the last half of {counted(len(present.epochs), 'epoch')}"
    yield (
        f"<p>Hits {steady}, on {counted(present.nodes, 'node')}, against <code>cache.limit</code> "
        "of each node, for each <code>cache.eviction</code>.</p>"
    )
    policies = list(plan.sizes[0].others)
    sizes = [(100 * one.capacity_bytes / disk_bytes, one) for one in plan.sizes]
    axis = Axis(
        f"cache of each node, % of the data ({format_bytes(disk_bytes)})",
        _plain,
        top=100,
    )
    now = 100 * present.capacity_bytes / disk_bytes if disk_bytes else 100
    mark = (now, f"now: {format_bytes(present.capacity_bytes)}") if now <= 100 else None
    yield '<div class="charts">'
    yield lines(
        "Hits",
        [
            Series(way.eviction, [(share, 100 * one.others[way]) for share, one in sizes])
            for way in policies
        ],
        axis,
        _HITS,
        mark,
    )
    currency = present.prices.currency
    yield lines(
        f"Cost of {counted(present.run_epochs, 'epoch')} with eviction {present.variant.eviction}",
        [_series("cost", lambda one: one.total.dollars, sizes)],
        axis,
        Axis(currency, short),
        mark,
    )
    yield "</div>"
    if now > 100:
        yield (
            f"<p>Now: {format_bytes(present.capacity_bytes)}, more than the data. A larger cache "
            "changes nothing.</p>"
        )
    yield _table(
        (
            "cache of each node",
            "of the data",
            *(way.eviction for way in policies),
            *_costs(present),
        ),
        [
            (
                _now(
                    format_bytes(one.capacity_bytes), one.capacity_bytes == present.capacity_bytes
                ),
                _percent(share / 100),
                *(_percent(one.others[way]) for way in policies),
                *_costs_of(one.total),
            )
            for share, one in sizes
        ],
    )
    yield (
        f'<p class="faint">Requests, bytes and cost are of {counted(present.run_epochs, "epoch")} '
        f"with cache.eviction: {present.variant.eviction}, as in the config."
        "</p>"
    )


def _nodes(plan: WhatIf) -> Iterable[str]:
    present = plan.present
    yield "<h2>What if the training ran on other numbers of nodes?</h2>"
    yield (
        f"<p>Each node has its own cache of {format_bytes(present.capacity_bytes)}, and does not "
        "take entries from other nodes (<code>cache.peers</code> saves requests beyond this). "
        "With <code>assignment: global</code> any node may read any sample; with "
        "<code>node</code> each node has its own share.</p>"
    )

    def by_nodes(value: Callable[[Forecast], float]) -> list[Series]:
        ways = dict.fromkeys(one.variant.assignment for one in plan.nodes)
        return [
            _series(
                way,
                value,
                [(one.nodes, one) for one in plan.nodes if one.variant.assignment == way],
            )
            for way in ways
        ]

    axis = Axis("nodes", _plain)
    yield '<div class="charts">'
    yield lines("Hits", by_nodes(lambda one: 100 * one.steady_ratio), axis, _HITS)
    yield lines(
        f"Cost of {counted(present.run_epochs, 'epoch')}",
        by_nodes(lambda one: one.total.dollars),
        axis,
        Axis(present.prices.currency, short),
    )
    yield "</div>"
    yield _table(
        ("nodes", "assignment", "hit rate", *_costs(present)),
        [
            (
                _now(str(one.nodes), (one.nodes, one.variant) == (present.nodes, present.variant)),
                one.variant.assignment if one.nodes > 1 else "either",
                _percent(one.steady_ratio),
                *_costs_of(one.total),
            )
            for one in plan.nodes
        ],
    )


def _basis(plan: Forecast, config: DataConfig) -> str:
    prices = plan.prices
    is_billed = any("://" in str(place) for place in (config.data_dir, config.label_dir))
    free = "" if is_billed else " These densities are in a directory; this is what S3 would charge."
    measured = "all" if plan.measured == plan.densities else f"{plan.measured:,}"
    return (
        "<h2>How it was computed</h2>"
        f"<p>Training split: {counted(plan.samples, 'sample')}, {plan.densities:,} densities of "
        f"{plan.gets:.0f} objects and {format_bytes(plan.stored_bytes // plan.densities)} on "
        f"average, {measured} of them measured at the origin. Hits are simulated with the "
        "sampler's own order from an empty cache, as in <code>zarrcache plan</code>. Epochs that "
        "were not simulated count as the mean of the last half of the simulated ones.</p>"
        f"<p>Prices of {escape(prices.dated)}, from <code>cache.prices</code>: 1,000 LIST requests "
        f"{prices.list_per_1000:g}, 1,000 GET requests {prices.get_per_1000:g}, one GiB "
        f"{prices.transfer_per_gib:g} {escape(prices.currency)}.{free} The cost so far is that of "
        f"the recorded bytes and requests, of which {plan.lists:.2g} per density read from the "
        "origin count as LIST. The cost saved is the cost at the origin of the hits, and of the "
        "entries taken from other nodes, computed with densities of the mean size. "
        "<code>zarrcache warm</code> records nothing, so neither cost includes it.</p>"
    )


def _series(name: str, value: Callable[[T], float], shown: Iterable[tuple[float, T]]) -> Series:
    return Series(name, [(x, value(one)) for x, one in shown])


def _dollars(total: EpochTimes, plan: Forecast) -> tuple[float, float]:
    """Paid and saved by recorded epochs."""
    stats = total.stats
    elsewhere = min(stats.misses, stats.lower_hits + stats.peer_hits)
    read = stats.misses - elsewhere
    paid = plan.paid_dollars(read, stats.requests, stats.fetched_bytes)
    return paid, plan.cold_dollars(stats.hits + elsewhere)


def _seconds_of(names: Sequence[str], times: EpochTimes) -> float:
    return sum(times.parts.get(name, 0.0) for name in names)


def _costs(plan: Forecast) -> tuple[str, str, str]:
    """Titles of the columns of `_costs_of`."""
    return "requests", "from origin", f"cost, {plan.prices.currency}"


def _costs_of(epochs: EpochForecast) -> tuple[str, str, str]:
    return f"{epochs.requests:,}", format_bytes(epochs.nbytes), format_money(epochs.dollars)


def _now(text: str, is_now: bool) -> str:
    """The first cell of a row, which may be that of the present config."""
    return f"{text} (now)" if is_now else text


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.1f} %"


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
