"""Format plans and reports as text. Returns strings; prints nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from zarrcache._keys import FLOAT32, ArrayKey, Missing, density_name, is_density, safe_repr
from zarrcache._units import format_bytes

if TYPE_CHECKING:
    from zarrcache.convert import ConvertPlan, ConvertReport
    from zarrcache.demo import DemoReport
    from zarrcache.disk import Row
    from zarrcache.ops import (
        Activity,
        EpochForecast,
        Forecast,
        Status,
        VerifyReport,
        WarmEstimate,
        WarmPlan,
        WarmReport,
    )

__all__ = [
    "activity_lines",
    "count",
    "demo_rows",
    "duration",
    "entries_by_kind",
    "estimate_notes",
    "format_conversion",
    "format_convert_plan",
    "format_verification",
    "format_warm_estimate",
    "format_warm_report",
    "lacking_note",
    "left_out_lines",
    "nothing_selected",
    "plan_lines",
    "plural",
    "status_lines",
    "warm_errors",
    "warm_notes",
]

#: Values of ``normalize_data`` by the units of the entries.
_NORMALIZED = {
    "cell": "normalize_data: false",
    "points": "normalize_data: true",
    "volume": "normalize_data: volume",
}


def count(n: int) -> str:
    """``98 302``."""
    return f"{n:,}".replace(",", " ")


def plural(n: int, noun: str, more: str | None = None) -> str:
    """``1 entry``, ``37 entries``."""
    return f"{count(n)} {noun if n == 1 else more or noun + 's'}"


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``6 min 12 s``, ``3 h 05 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def format_warm_estimate(plan: WarmPlan, estimate: WarmEstimate) -> str:
    """One line for ``warm --dry-run``."""
    densities = plural(plan.trusted + len(plan.densities), "density", "densities")
    about = ""
    if estimate.compared < len(plan.densities):
        about = f" (extrapolated from {count(estimate.compared)})"
    return (
        f"Would fetch {count(estimate.to_fetch)} of {densities} of "
        f"{plural(len(plan.task_ids), 'id')}{about} "
        f"({format_bytes(estimate.fetch_bytes)}, {plural(estimate.requests, 'request')}); "
        f"{count(estimate.fresh)} fresh. "
        "Dry run: nothing was fetched."
    )


def estimate_notes(plan: WarmPlan, estimate: WarmEstimate) -> list[str]:
    """Hints for the user after ``warm --dry-run``, one per line."""
    notes = []
    if estimate.lacking and not estimate.refusal:
        note = lacking_note(estimate.lacking, plan.reader.if_missing)
        if estimate.compared < len(plan.densities):
            note = f"Of {count(estimate.compared)} densities compared: {note}"
        notes.append(note)
    if estimate.unread:
        notes.append(
            f"Which channels {plural(estimate.unread, 'file')} (CHGCAR, json.gz, .zarr.zip) have "
            "shows only when they are read: without --dry-run."
        )
    return notes


def nothing_selected(plan: WarmPlan, split: str) -> str:
    """Why ``warm`` has no ids to fetch."""
    reader = plan.reader
    if reader.if_missing == "drop" and reader.stored_ids:
        return (
            "all ids lack a channel of density_type, so missing: drop leaves none. Where "
            "only input or label has it, write density_type: {data: ..., label: ...}."
        )
    if not plan.missing:
        part = "has no ids" if split == "all" else f"has no ids in the {split} set"
        return f"{reader.functional} {part}. Check functional and map_dir ({reader.map_dir})."
    directories = f"{reader.origin('data').url} and {reader.origin('label').url}"
    return (
        f"none of the {plural(len(plan.missing), 'id')} of {reader.functional} has a store "
        f"in {directories}. Check data_dir, label_dir and source ({reader.source}): the stores are "
        "<task_id>.zarr or .zarr.zip, or files <task_id>.json.gz or .CHGCAR, directly below them."
    )


def format_warm_report(report: WarmReport, directory: object) -> str:
    """One line for ``warm``."""
    fresh = f"; {count(report.fresh)} fresh already" if report.fresh else ""
    cost = f"{format_bytes(report.nbytes)}, {plural(report.stats.requests, 'request')}{fresh}"
    return (
        f"Warmed {count(report.warm)} of {plural(report.ids, 'id')} ({cost}) in {directory} in "
        f"{duration(report.seconds)}; {count(len(report.failed_ids))} failed."
    )


def warm_notes(plan: WarmPlan, report: WarmReport) -> list[str]:
    """Hints for the user after ``warm``, one per line."""
    notes = []
    if plan.trusted and not plan.revalidate:
        trusted = plural(plan.trusted, "density was", "densities were")
        notes.append(
            f"{trusted} in the cache already, and not compared with the origin (cache.revalidate: "
            "never). Pass --revalidate to compare."
        )
    if any(result.is_gone for result in report.failed) and not plan.revalidate:
        notes.append(
            "If stores were moved or removed since the directories were last listed, pass "
            "--revalidate to list them again."
        )
    if report.unequal:
        names = ", ".join(report.unequal[:5]) + (", …" if report.unequal[5:] else "")
        notes.append(
            f"{plural(len(report.unequal), 'id')} with input and label on different grids: "
            f"{names}. If the network needs equal grids, leave them out of the map."
        )
    if report.lacking and not report.refusal:
        notes.append(lacking_note(report.lacking, plan.reader.if_missing))
    if any(result.is_absent for result in report.failed) and not report.refusal:
        notes.append(
            "Set missing: zero, which fills a channel that is absent with zeros, or missing: drop, "
            "which leaves out the materials that lack one."
        )
    if report.untried:
        limit = format_bytes(plan.limit_bytes or 0)
        notes.append(f"{plural(report.untried, 'id')} left out: --limit ({limit}) is reached.")
    is_full = report.bypassed and not report.stats.cache_errors and not report.is_disk_full
    if is_full and report.warm:
        notes.append(_limit_reached(plan, report))
    return notes


def warm_errors(plan: WarmPlan, report: WarmReport) -> list[str]:
    """Why ``warm`` fails, beside densities that cannot be read, one per line."""
    if report.stats.cache_errors:
        times = plural(report.stats.cache_errors, "time")
        advice = "Run `zarrcache doctor` with the same config."
        return [f"the cache in {plan.cache.dir} failed {times}, see above. {advice}"]
    if report.bypassed and report.is_disk_full:
        left_out = f"{plural(len(report.bypassed), 'id')} did not fit"
        full = f"the disk of {plan.cache.dir} is full, or cache.min_free is reached"
        advice = "Free space there, or choose a larger disk."
        needed = f"{_needed(report)}. " if report.needed_bytes else ""
        return [f"{left_out}: {full}. {needed}{advice}"]
    return [_limit_reached(plan, report)] if report.bypassed and not report.warm else []


def _limit_reached(plan: WarmPlan, report: WarmReport) -> str:
    raise_it = f"{_needed(report)}: raise" if report.needed_bytes else "Raise"
    smaller = ""
    if plan.cache.arrays.encoding == FLOAT32:
        smaller = " Entries in float16 take half the room (cache.arrays.encoding)."
    return (
        f"{plural(len(report.bypassed), 'id')} did not fit: cache.limit "
        f"({format_bytes(plan.cache.limit)}) or cache.min_free is reached, and training will read "
        "what did not fit from the origin in every epoch. "
        f"{raise_it} cache.limit, or free space with `zarrcache evict`.{smaller}"
    )


def lacking_note(task_ids: Sequence[str], missing: Missing) -> str:
    """What becomes of ids that lack a channel."""
    becomes = {"zero": "it is zero there", "drop": "they are left out of the split"}
    lack = "lacks" if len(task_ids) == 1 else "lack"
    names = ", ".join(task_ids[:5]) + (", …" if task_ids[5:] else "")
    return (
        f"{plural(len(task_ids), 'id')} {lack} a channel of density_type; {becomes[missing]} "
        f"(missing: {missing}): {names}."
    )


def _needed(report: WarmReport) -> str:
    return f"The cache needs about {format_bytes(report.needed_bytes)} on disk for all ids"


def status_lines(state: Status) -> list[str]:
    """Lines for ``status``."""
    limit = reserve = ""
    if state.limit_bytes is not None:
        percent = 100 * state.volume_bytes / state.limit_bytes
        limit = f" of {format_bytes(state.limit_bytes)} ({percent:.1f} %)"
    if state.min_free_bytes is not None:
        reserve = f"; min_free {format_bytes(state.min_free_bytes)}"
    free = f"{format_bytes(state.free_bytes)} free of {format_bytes(state.disk_bytes)}"
    densities = plural(state.array_tier.entries - state.listings, "density", "densities")
    others = plural(state.listings, "file", "files")
    arrays = f"{densities}, {others} of listings and attributes"
    blocks = plural(state.byte_tier.entries, "entry", "entries")
    lines = [
        f"cache        {state.directory}{'' if state.exists else ' (nothing is cached there yet)'}",
        f"array tier   {arrays}, {format_bytes(state.array_tier.nbytes)}",
        f"byte tier    {blocks}, {format_bytes(state.byte_tier.nbytes)}",
        f"volume       {format_bytes(state.volume_bytes)}{limit}",
        f"file system  {free}{reserve}",
    ]
    if (covered := state.coverage) is not None:
        present = plural(covered.present, "id")
        half = f", {count(covered.half)} half" if covered.half else ""
        missing = ""
        if covered.missing:
            verb = "has" if covered.missing == 1 else "have"
            missing = f"; {plural(covered.missing, 'more id')} in the map {verb} no store"
        if covered.dropped:
            verb = "lacks" if covered.dropped == 1 else "lack"
            missing += f"; {plural(covered.dropped, 'id')} {verb} a channel (missing: drop)"
        lines.append(
            f"{covered.functional:<12} {count(covered.warm)} of {present} warm "
            f"({100 * covered.warm_ratio:.1f} %){half}{missing}"
        )
        lines += [
            f"{'':<12} not used by this config: "
            f"{_densities(one.densities, one.array, one.units, one.encoding)}"
            for one in covered.unused
        ]
        if covered.to_encode:
            lines.append(
                f"{'':<12} {plural(covered.to_encode, 'id')} of these still in float32; `zarrcache "
                "warm` or the next read encodes them without fetching"
            )
        lines += [f"{'':<12} {text}" for text in covered.several_sources]
    return lines


def _densities(number: int, array: str, units: str, encoding: str) -> str:
    """``24 densities of total, normalize_data: true, encoding float16``."""
    text = f"{plural(number, 'density', 'densities')} of {density_name(array)}"
    if is_density(array):
        text += f", {_NORMALIZED[units]}"
    if encoding != FLOAT32:
        text += f", encoding {encoding}"
    return text if text.isprintable() else safe_repr(text)  # a planted row of a shared cache


def entries_by_kind(entries: Iterable[Row]) -> str:
    """What entries hold, each kind with its number."""
    from zarrcache.disk import ARRAY, LISTING

    numbers: Counter[tuple[str, str]] = Counter()
    for row in entries:
        array = row.note.rpartition("\n")[2] if row.kind == ARRAY else ""
        numbers[row.kind, array] += 1
    parts = []
    for (kind, array), number in sorted(numbers.items(), key=lambda one: (one[0][0], -one[1])):
        key = ArrayKey("", "", array)
        parts.append(
            _densities(number, key.source_array, key.units, key.encoding)
            if kind == ARRAY
            else f"{plural(number, 'file')} of listings and attributes"
            if kind == LISTING
            else f"{plural(number, 'entry', 'entries')} of the byte tier"
        )
    return "; ".join(parts)


def format_verification(report: VerifyReport) -> str:
    """One line for ``verify``."""
    stale = f", {count(len(report.stale))} stale" if report.stale else ""
    unreadable = f", {count(len(report.unreadable))} cannot be read" if report.unreadable else ""
    n_flawed = len({problem.url for problem in (*report.flawed, *report.filled)})
    flawed = f", {count(n_flawed)} flawed at the origin" if n_flawed else ""
    within = ""
    if report.within_bound:
        entries = plural(report.within_bound, "rounded entry", "rounded entries")
        within = f"; {entries} read from the origin: within the error bound"
    strays = ""
    if report.strays:
        strays = f"; removed {plural(len(report.strays), 'file')} without an entry"
    return (
        f"Verified {plural(report.entries, 'entry', 'entries')} ({format_bytes(report.nbytes)}): "
        f"{count(len(report.corrupt))} corrupt{stale}{unreadable}{flawed}{within}{strays}."
    )


def format_convert_plan(plan: ConvertPlan) -> str:
    """For ``convert --dry-run``: a summary, and each file below its task id."""
    already = f"; {count(len(plan.skipped))} converted already" if plan.skipped else ""
    summary = (
        f"Would convert {plural(len(plan.files), 'file')} "
        f"({format_bytes(plan.source_bytes)}) to {plan.dst}{already}"
    )
    ids = plan.task_ids
    width = max(map(len, ids.values()), default=0)
    return "\n".join(
        (
            summary,
            *(f"  {ids[path]:{width}}  {path}" for path in plan.files),
            "Dry run: nothing was written.",
        )
    )


def left_out_lines(plan: ConvertPlan, most: int | None = 10) -> list[str]:
    """Files that ``convert`` does not read, each with the reason, at most ``most`` of them."""
    lines = [f"left out: {item.path}: {item.reason}" for item in plan.left_out[:most]]
    if len(plan.left_out) > len(lines):
        more = len(plan.left_out) - len(lines)
        lines.append(f"left out: {count(more)} more; --dry-run lists all")
    if plan.unrecorded:
        stores = plural(len(plan.unrecorded), "existing store")
        lines.append(
            f"skipped: {stores} without a record of its file ({plan.unrecorded[0]} for example), "
            "written by an earlier version or another program. --overwrite converts again."
        )
    return lines


def format_conversion(dst: str, report: ConvertReport, seconds: float) -> str:
    """One line for ``convert``."""
    files = len(report.converted) + len(report.failed)
    skipped = (
        f", {count(len(report.skipped))} skipped (converted already; --overwrite converts them "
        "again)"
        if report.skipped
        else ""
    )
    return (
        f"Converted {count(len(report.converted))} of {plural(files, 'file')} to {dst} "
        f"({format_bytes(report.written_bytes)}) "
        f"in {duration(seconds)}; {count(len(report.failed))} failed{skipped}."
    )


def demo_rows(report: DemoReport) -> list[tuple[str, ...]]:
    """Rows of the table of ``demo``; the first one has the column names."""
    rows: list[tuple[str, ...]] = [
        (
            "epoch",
            "seconds",
            "of these waiting",
            "samples/s",
            "S3 requests",
            "bytes from S3",
            "hit ratio",
        )
    ]
    for row in report.rows:
        ratio = "" if row.hit_ratio is None else f"{100 * row.hit_ratio:.0f} %"
        rows.append(
            (
                row.epoch,
                f"{row.seconds:.2f}",
                f"{row.waited_s:.2f}",
                f"{row.samples_per_s:.1f}",
                count(row.requests),
                format_bytes(row.fetched_bytes),
                ratio,
            )
        )
    return rows


def plan_lines(plan: Forecast) -> Iterator[str]:
    """Lines for ``plan``."""
    asked = "all" if plan.measured == plan.densities else count(plan.measured)
    yield (
        f"Training split: {plural(plan.samples, 'sample')}, "
        f"{plural(plan.densities, 'density', 'densities')} of {plan.gets:.0f} objects on average; "
        f"{format_bytes(plan.stored_bytes)} at the origin, {format_bytes(plan.disk_bytes)} in a "
        f"cache{'' if plan.encoding == FLOAT32 else f' as {plan.encoding}'} ({asked} measured)."
    )
    share = plan.capacity_bytes / plan.disk_bytes if plan.disk_bytes else 1.0
    ahead = ""
    if plan.lookahead_bytes:
        ahead = f" (of which the look-ahead takes {format_bytes(plan.lookahead_bytes)})"
    yield (
        f"{plural(plan.nodes, 'node')}, {plural(plan.ranks, 'rank')}: each cache holds "
        f"{format_bytes(plan.capacity_bytes)}{ahead}, "
        f"{min(1.0, share):.0%} of that; assignment {plan.variant.assignment}, eviction "
        f"{plan.variant.eviction}."
    )
    yield ""
    for number, epoch in enumerate(plan.epochs[:3], start=1):
        yield f"epoch {number}: {_epoch(epoch, plan.prices.currency)}"
    yield f"{plural(plan.run_epochs, 'epoch')}: {_epoch(plan.total, plan.prices.currency)}"
    timed = (
        " The time is that of reading alone, without training."
        if plan.speed is not None
        else " Pass --probe to estimate the time as well."
    )
    yield f"Prices of {plan.prices.dated}, from cache.prices.{timed}"
    if len(plan.others) > 1:
        yield ""
        yield (
            f"Hits in the last half of {plural(len(plan.epochs), 'epoch')}, by assignment and "
            "eviction:"
        )
        for way, ratio in plan.others.items():
            mark = "  <- this" if way == plan.variant else ""
            yield f"  {way.assignment:<7} {way.eviction:<22} {ratio:4.0%}{mark}"


def _epoch(epoch: EpochForecast, currency: str) -> str:
    text = (
        f"{epoch.hit_ratio:.1%} hits, {plural(epoch.requests, 'request')}, "
        f"{format_bytes(epoch.nbytes)}, {epoch.dollars:.2f} {currency}"
    )
    return text if epoch.seconds is None else f"{text}, {duration(epoch.seconds)}"


def activity_lines(activity: Activity) -> list[str]:
    """Lines of ``zarrcache top``, at most 60 columns wide."""
    pids = activity.pids
    named = ", ".join(map(str, pids[:5])) + (", ..." if len(pids) > 5 else "")
    runs = f"{plural(len(activity.boards), 'run')}, {plural(len(pids), 'process', 'processes')}"
    lines = [
        activity.directory if len(activity.directory) <= 60 else f"...{activity.directory[-57:]}",
        f"{runs} ({named})" if pids else "No process of this user uses this cache now.",
        f"{'':<20}{'per second':>18}{'since the start':>20}",
    ]

    def row(name: str, now: str, since: str) -> None:
        lines.append(f"{name:<20}{now:>18}{since:>20}")

    for name, counter in (
        ("hits", "hits"),
        ("misses", "misses"),
        ("not stored", "bypasses"),
        ("requests to origin", "requests"),
        ("retries", "retries"),
    ):
        row(name, f"{activity.per_second(counter):,.1f}", count(getattr(activity.total, counter)))
    for name, counter in (
        ("from the origin", "fetched_bytes"),
        ("from other nodes", "peer_bytes"),
        ("to other nodes", "sent_bytes"),
        ("from disk", "served_bytes"),
    ):
        rate = format_bytes(int(activity.per_second(counter)))
        row(name, f"{rate}/s", format_bytes(getattr(activity.total, counter)))
    row(
        "hit ratio",
        *(
            f"{100 * stats.hit_ratio:.1f} %" if stats.hits + stats.misses else "-"
            for stats in (activity.recent, activity.total)
        ),
    )
    row("look-ahead, ready", "", format_bytes(activity.total.ahead_bytes))
    limit = activity.limit_bytes
    of = ""
    if limit is not None:
        of = f"{100 * activity.volume_bytes / limit:.0f} % of {format_bytes(limit)}"
    row("on disk", of, format_bytes(activity.volume_bytes))
    return lines
