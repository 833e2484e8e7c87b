"""Tables to JSON, Markdown and plots. Everything that is shown is computed from the rounds in the
JSON, so it can be shown again.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.bench.harness import TIMES, Bar, Measured, Table, in_unit_of, summarise
from tests.bench.machine import commit, machine, versions
from tests.bench.plots import epoch_rates, epochs, plot

__all__ = [
    "BEGIN",
    "END",
    "HIGHLIGHTS",
    "Verdict",
    "document",
    "goals",
    "judge",
    "load",
    "markdown",
    "merge",
    "readme_block",
    "save",
    "slug",
    "tables_of",
    "with_block",
    "write_readme",
]

Document = dict[str, Any]

FORMAT = 1
#: The table that the README shows as a picture, and where the picture is.
PICTURED, PICTURE = "E1", "docs/images/epochs.svg"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


@dataclass(frozen=True)
class Highlight:
    """A row of the README: one competitor of a table relative to another."""

    table: str
    competitor: str
    than: str
    words: str
    shown: str
    is_rate: bool = True


HIGHLIGHTS = (
    Highlight(
        "A1",
        "zarrcache ZarrDataset",
        "np.load",
        "Warm epoch, samples rotated, every value used, 2 workers: samples per second",
        "`np.load`",
    ),
    Highlight(
        "A4",
        "zarrcache ZarrDataset",
        "np.load",
        "The same without rotation",
        "`np.load`",
    ),
    Highlight(
        "C1",
        "zarrcache, empty cache",
        "zarr + s3fs",
        "First read of a density of 343 chunks, 20 ms a request: time",
        "zarr with s3fs",
        is_rate=False,
    ),
    Highlight(
        "C1",
        "zarrcache, empty cache",
        "TensorStore, 64 in flight",
        "The same",
        "TensorStore, 64 in flight",
        is_rate=False,
    ),
    Highlight(
        "C2",
        "zarrcache warm",
        "bare GETs (obstore)",
        "Filling the cache: densities per second",
        "bare GETs in one process",
    ),
)


# -- JSON


def document(tables: Iterable[Table], *, quick: bool, workdir: Path) -> Document:
    """Tables with all of their rounds and where they come from: versions, machine, day. No host
    name, no paths.
    """
    run = {
        "date": datetime.date.today().isoformat(),
        "quick": quick,
        "commit": commit(),
        "versions": versions(),
        "machine": machine(workdir),
    }
    return {
        "format": FORMAT,
        "tables": {table.name: {**_plain(table), "run": run} for table in tables},
    }


def _plain(table: Table) -> dict[str, Any]:
    plain = asdict(table)
    del plain["name"]
    return plain


def tables_of(document: Mapping[str, Any]) -> dict[str, Table]:
    """The tables of a document, by name, in the order of their names."""
    found = {}
    for name in sorted(document["tables"]):
        plain = {key: value for key, value in document["tables"][name].items() if key != "run"}
        plain["rounds"] = {
            competitor: [Measured(**one) for one in rounds]
            for competitor, rounds in plain["rounds"].items()
        }
        plain["bars"] = [Bar(**bar) for bar in plain["bars"]]
        found[name] = Table(name=name, **plain)
    return found


def load(path: Path) -> Document:
    """A document; without tables if there is none yet.

    Raises
    ------
    ValueError
        It is of another format.
    """
    if not path.exists():
        return {"format": FORMAT, "tables": {}}
    found: Document = json.loads(path.read_text())
    if found.get("format") != FORMAT:
        raise ValueError(
            f"{path} has the format {found.get('format')!r}, this is {FORMAT}. Delete it and run "
            "tools/bench again."
        )
    return found


def merge(old: Document, new: Document) -> Document:
    """``old`` with the tables of ``new`` in the place of its own; the others stay as they were
    measured.
    """
    return {"format": FORMAT, "tables": dict(sorted({**old["tables"], **new["tables"]}.items()))}


def save(new: Document, out: Path) -> None:
    """Merge into ``out/results.json``, rewrite ``results.md`` and plot what is new."""
    out.mkdir(parents=True, exist_ok=True)
    merged = merge(load(out / "results.json"), new)
    (out / "results.json").write_text(
        json.dumps(merged, indent=1, ensure_ascii=False, default=str) + "\n"
    )
    for table in tables_of(new).values():
        if any(table.rounds.values()):
            plot(table, out / slug(table.name))
    names = {
        name for name, table in tables_of(merged).items() if (out / f"{slug(name)}.svg").exists()
    }
    text = (
        "# Benchmarks\n\nWritten by `tools/bench` from `results.json`; do not edit.\n\n"
        + markdown(merged, plots=names)
    )
    (out / "results.md").write_text(text)


# -- judging


class Verdict:
    """A bar and what was reached: ``ratio`` is None if one of the two was not measured."""

    def __init__(self, bar: Bar, ratio: float | None) -> None:
        self.bar, self.ratio = bar, ratio

    @property
    def goal(self) -> float:
        return self.bar.at_most if self.bar.at_most is not None else self.bar.at_least or 0.0

    @property
    def is_reached(self) -> bool | None:
        if self.ratio is None or math.isnan(self.ratio):
            return None
        return self.ratio <= self.goal if self.bar.at_most is not None else self.ratio >= self.goal

    @property
    def wanted(self) -> str:
        """``at least 0.90 times the rate of np.load(mmap)``."""
        bound = "at most" if self.bar.at_most is not None else "at least"
        what, _, unit = _words(
            self.bar.of or ("time_s" if self.bar.at_most is not None else "rate")
        ).partition(", ")
        if self.bar.reference is None:
            return f"{what} {bound} {self.goal:.3g} {unit}".rstrip()
        return f"{bound} {self.goal:.3g} times the {what} of {self.bar.reference}"

    @property
    def outcome(self) -> str:
        """``0.93: reached``; ``0.81: missed by 10 %``."""
        if self.is_reached is None:
            return "not measured"
        found = f"{self.ratio:.3g}"
        if self.is_reached:
            return f"{found}: reached"
        return f"{found}: missed" + (
            f" by {abs((self.ratio or 0.0) / self.goal - 1) * 100:.0f} %" if self.goal else ""
        )


def judge(table: Table) -> list[Verdict]:
    """Every bar of a table with the ratio of medians that was reached."""
    return [Verdict(bar, _reached(table, bar)) for bar in table.bars]


def _reached(table: Table, bar: Bar) -> float | None:
    mine = table.rounds.get(bar.competitor)
    if not mine:
        return None
    value = summarise(mine, bar.of).median
    if bar.reference is None:
        return value
    theirs = table.rounds.get(bar.reference)
    if not theirs:
        return None
    reference = summarise(theirs, bar.of).median
    # A rate is items per second: the ratio of rates is that of the times turned round.
    return (
        _ratio(reference, value)
        if bar.of is None and bar.at_least is not None
        else _ratio(value, reference)
    )


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.nan if a == 0 else math.inf


# -- Markdown


def markdown(document: Mapping[str, Any], *, plots: Iterable[str] = ()) -> str:
    """Every table with its facts, bars, and what did not run. ``plots``: names whose plot lies
    beside.
    """
    tables = tables_of(document)
    parts = ["## Goals", goals(document)] if any(table.bars for table in tables.values()) else []
    with_plot = set(plots)
    for name, table in tables.items():
        run = document["tables"][name]["run"]
        parts += [f"## {name}: {table.title}", _markdown_table(table)]
        parts += (
            [
                _list(
                    "Goals",
                    [f"{v.bar.competitor}: {v.wanted}: **{v.outcome}**" for v in judge(table)],
                )
            ]
            if table.bars
            else []
        )
        parts += (
            [_list("Did not run", [f"{peer}: {why}" for peer, why in table.missing.items()])]
            if table.missing
            else []
        )
        parts += [
            _list(
                "Conditions",
                [
                    f"{key}: {_fact(value)}"
                    for key, value in {**table.facts, **_conditions(run)}.items()
                ],
            )
        ]
        parts += [f"![{name}]({slug(name)}.svg)"] if name in with_plot else []
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    relation = (
        "rate" if table.unit.endswith("/s") else "time" if table.unit in TIMES else table.unit
    )
    head = [
        f"{table.unit}, median",
        "P90",
        "P99",
        f"{relation} relative to {table.reference}",
        "rounds",
    ]
    counted = [
        name
        for name in ("requests", "nbytes")
        if any(m.value(name) is not None for m in _first_of(table) if getattr(m, name) is not None)
    ]
    extras = sorted(
        {key for measured in _first_of(table) for key in measured.extra if key != table.of}
    )
    rows = []
    for competitor, rounds in table.rounds.items():
        if not rounds:
            continue
        summary = summarise(rounds, table.of)
        row = [
            competitor,
            *(_number(value) for value in in_unit_of(table, summary)),
            _relative(table, competitor),
            str(summary.rounds),
        ]
        row += [
            _number(summarise(rounds, name).median) if getattr(rounds[0], name) is not None else "–"
            for name in counted
        ]
        row += [
            _number(summarise(rounds, key).median)
            if all(key in one.extra for one in rounds)
            else "–"
            for key in extras
        ]
        rows.append(row)
    return _grid(
        [
            "",
            *head,
            *("bytes" if name == "nbytes" else name for name in counted),
            *map(_words, extras),
        ],
        rows,
    )


def _first_of(table: Table) -> list[Measured]:
    return [rounds[0] for rounds in table.rounds.values() if rounds]


def _relative(table: Table, competitor: str) -> str:
    reference = table.rounds.get(table.reference)
    if not reference:
        return "–"
    mine, theirs = (
        summarise(rounds, table.of).median for rounds in (table.rounds[competitor], reference)
    )
    ratio = (
        _ratio(theirs, mine)
        if table.of is None and table.unit.endswith("/s")
        else _ratio(mine, theirs)
    )
    return _number(ratio)


def _conditions(run: Mapping[str, Any]) -> dict[str, object]:
    about = run["machine"]
    return {
        "machine": f"{about['cores']} cores, {about['cpu']}, {about['memory_gib']} GiB, kernel "
        f"{about['kernel']}, {about['filesystem']}{_load(about)}",
        "versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        "run": f"{run['date']}, commit "
        f"{run['commit']}{', quick: smallest sizes, no figure to quote' if run['quick'] else ''}; "
        "rounds of the competitors interleaved; P90 and P99 of the time of a round",
    }


def _load(about: Mapping[str, Any]) -> str:
    """What else the machine did: figures of a busy one are compared with care."""
    load = about.get("load")
    return "" if load is None else f"; load average {load} at the end of the run"


def _fact(value: object) -> str:
    return (
        "; ".join(f"{key}: {one}" for key, one in value.items())
        if isinstance(value, Mapping)
        else str(value)
    )


def slug(name: str) -> str:
    """The name of a table as a file name: ``C1, 20 ms`` is ``c1-20-ms``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _list(title: str, items: Iterable[str]) -> str:
    return f"{title}:\n\n" + "\n".join(f"* {item}" for item in items)


def _grid(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = True) -> str:
    rule = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def _number(value: float) -> str:
    """Three digits, no exponent: 0.0043, 12.3, 1,204."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    if value == round(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def _words(name: str) -> str:
    """``pss_mib`` as ``pss, MiB``."""
    for suffix, unit in (
        ("_samples_per_s", "samples/s"),
        ("_mib", "MiB"),
        ("_s", "s"),
        ("_ms", "ms"),
        ("_percent", "%"),
        ("_us", "µs"),
        ("_bytes", "bytes"),
    ):
        if name.endswith(suffix):
            return f"{name.removesuffix(suffix).replace('_', ' ')}, {unit}"
    return name.replace("_", " ")


# -- README


def goals(document: Mapping[str, Any]) -> str:
    """One line per goal, with all competitors, for the head of the results."""
    rows = []
    for name, table in tables_of(document).items():
        goals: dict[str, list[Verdict]] = {}
        for verdict in judge(table):
            goals.setdefault(verdict.wanted, []).append(verdict)
        for wanted, verdicts in goals.items():
            measured = ", ".join(
                f"{one.bar.competitor} {_number(one.ratio)}"
                for one in verdicts
                if one.ratio is not None
            )
            missed = [one.bar.competitor for one in verdicts if one.is_reached is False]
            reached = (
                f"no: {', '.join(missed)}"
                if missed
                else "yes"
                if all(one.is_reached for one in verdicts)
                else "–"
            )
            rows.append(
                [
                    f"{name}: {table.title}",
                    wanted,
                    measured or "–",
                    reached,
                    _others(table, verdicts),
                ]
            )
    return _grid(
        ["what", "goal", "measured", "reached", "others, by the same measure"], rows, numbers=False
    )


def readme_block(document: Mapping[str, Any]) -> str:
    """The text between the markers in the README: what a user asks for, in plain words."""
    tables = tables_of(document)
    rows = []
    for row in HIGHLIGHTS:
        table = tables.get(row.table)
        if table is None or not table.rounds.get(row.competitor) or not table.rounds.get(row.than):
            continue
        at_least = 1.0 if row.is_rate else None
        bar = Bar(row.competitor, row.than, at_least, None if row.is_rate else 1.0)
        ratio = _reached(table, bar)
        if ratio is not None:
            better = "higher is better" if row.is_rate else "lower is better"
            rows.append([row.words, f"{_number(ratio)} times {row.shown}", better])
    if not rows:
        return "No results yet: run `tools/bench`."
    run = max((one["run"] for one in document["tables"].values()), key=lambda one: str(one["date"]))
    about = run["machine"]
    return "\n".join(
        [
            *(_picture(tables[PICTURED]) if PICTURED in tables else []),
            _grid(["what", "zarrcache", ""], rows, numbers=False),
            "",
            (
                f"Medians of interleaved rounds of `tools/bench` on {about['cores']} cores, "
                f"{run['date']}. "
                "[All results](docs/benchmarks/results.md), also where others are faster."
            ),
        ]
    )


def _picture(table: Table) -> list[str]:
    """The picture of the README, with its figures for those who do not see it."""
    said = "; ".join(
        f"{name} {', '.join(map(_number, values))}" for name, values in epoch_rates(table).items()
    )
    return [f"![Samples per second in epochs 1 to 3. {said}]({PICTURE})", ""]


def _others(table: Table, verdicts: Sequence[Verdict]) -> str:
    """The other competitors by the same measure, the best first."""
    bar = verdicts[0].bar
    if (
        bar.reference is None
        or bar.reference.startswith("zarrcache")
        or not table.rounds.get(bar.reference)
    ):
        return ""  # nothing to compare others with, or only ourselves
    named = {bar.reference, *(verdict.bar.competitor for verdict in verdicts)}
    found = []
    for competitor, rounds in table.rounds.items():
        if competitor in named or not rounds or competitor.startswith("zarrcache"):
            continue
        ratio = (
            _reached(table, Bar(competitor, bar.reference, bar.at_least, bar.at_most, bar.of))
            if _has(rounds, bar.of)
            else None
        )
        if ratio is not None:
            found.append((ratio, competitor))
    found.sort(reverse=bar.at_least is not None)
    return ", ".join(f"{competitor} {_number(ratio)}" for ratio, competitor in found)


def _has(rounds: Sequence[Measured], of: str | None) -> bool:
    return of is None or of in rounds[0].extra or getattr(rounds[0], of, None) is not None


def with_block(readme: str, block: str) -> str:
    """The README with ``block`` between the markers.

    Raises
    ------
    ValueError
        The markers are not there, once each.
    """
    if (
        readme.count(BEGIN) != 1
        or readme.count(END) != 1
        or readme.index(BEGIN) > readme.index(END)
    ):
        raise ValueError(
            f"README.md needs the line {BEGIN} and after it the line {END}, once each; the table "
            "goes between them."
        )
    head, _, rest = readme.partition(BEGIN)
    return f"{head}{BEGIN}\n{block}\n{END}{rest.partition(END)[2]}"


def write_readme(path: Path, document: Mapping[str, Any]) -> None:
    """Rewrite the table of the README, and draw its picture again."""
    path.write_text(with_block(path.read_text(), readme_block(document)))
    tables = tables_of(document)
    if PICTURED in tables:
        epochs(tables[PICTURED], path.parent / PICTURE)
