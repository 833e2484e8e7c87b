"""What the benchmarks make of their rounds: order, percentiles, ratios, goals, merging, the
README's table. Nothing is measured here.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.bench import report
from tests.bench.harness import (
    Bar,
    Measured,
    Table,
    in_unit_of,
    interleave,
    orders,
    percentile,
    summarise,
)


def _rounds(*seconds: float, items: int = 1, **extra: float) -> list[Measured]:
    return [Measured(one, items, extra=extra) for one in seconds]


def _table(name: str = "W1", **changed: object) -> Table:
    fields: dict[str, object] = {
        "name": name,
        "title": "warm epoch",
        "unit": "samples/s",
        "reference": "floor",
        "rounds": {
            "floor": _rounds(1.0, 2.0, 4.0, items=10),
            "zarrcache": _rounds(2.5, 2.0, 2.0, items=10),
            "slow": _rounds(20.0, items=10),
        },
        "facts": {"page cache": "warm", "requests": {"floor": "1 LIST", "slow": "2 LIST"}},
    }
    return Table(**{**fields, **changed})  # type: ignore[arg-type]


def _document(*tables: Table) -> report.Document:
    return report.document(tables, quick=False, workdir=Path(__file__).parent)


def test_competitors_take_turns_and_the_order_moves_on() -> None:
    """A B C, C A B, B C A; the warm-up counts for nothing."""
    assert list(orders(["A", "B", "C"], 4)) == [
        ["A", "B", "C"],
        ["C", "A", "B"],
        ["B", "C", "A"],
        ["A", "B", "C"],
    ]
    ran: list[str] = []
    competitors = {
        name: lambda name=name: ran.append(name) or Measured(float(len(ran))) for name in "AB"
    }
    found = interleave(competitors, 2, warmup=1)
    assert ran == ["A", "B", "B", "A", "A", "B"]
    assert {name: [one.seconds for one in measured] for name, measured in found.items()} == {
        "A": [4.0, 5.0],
        "B": [3.0, 6.0],
    }


def test_an_error_says_whose_round_it_was() -> None:
    """The traceback alone does not: every competitor runs through the same line."""

    def broken() -> Measured:
        raise OSError("gone")

    with pytest.raises(OSError, match="gone") as caught:
        interleave({"zarr": broken}, 1)
    assert caught.value.__notes__ == ["in round 0 of 'zarr'"]


@pytest.mark.parametrize(
    ("percent", "expected"), [(0, 1.0), (50, 2.5), (90, 3.7), (99, 3.97), (100, 4.0)]
)
def test_percentiles_lie_between_the_two_nearest(percent: float, expected: float) -> None:
    """Of 4, 1, 3, 2, as numpy has them."""
    assert percentile([4.0, 1.0, 3.0, 2.0], percent) == pytest.approx(expected)


def test_one_round_is_all_of_its_percentiles() -> None:
    """A run of one round is no reason to fail."""
    summary = summarise(_rounds(3.0, items=2))
    assert (summary.median, summary.p90, summary.p99, summary.rounds) == (1.5, 1.5, 1.5, 1)


def test_percentiles_of_a_rate_are_the_slow_end() -> None:
    """The P99 of samples/s is what the slowest rounds had, not the fastest."""
    assert in_unit_of(_table(), summarise(_rounds(1.0, 1.0, 2.0, items=10))) == pytest.approx(
        (10.0, 10 / 1.8, 10 / 1.98)
    )


@pytest.mark.parametrize(
    ("bar", "ratio", "reached"),
    [
        (Bar("zarrcache", "floor", at_least=0.9), 1.0, True),
        (Bar("slow", "floor", at_least=0.2), 0.1, False),
        (Bar("slow", "floor", at_most=10.0), 10.0, True),
        (Bar("slow", "zarrcache", at_most=1.5), 10.0, False),
        (Bar("slow", None, at_most=3.0), 2.0, True),
        (Bar("absent", "floor", at_most=1.0), None, None),
        (Bar("zarrcache", "absent", at_least=1.0), None, None),
    ],
)
def test_goals_are_ratios_of_medians(bar: Bar, ratio: float | None, reached: bool | None) -> None:
    """``at_least`` compares rates, ``at_most`` times; without a reference it is the figure itself;
    who did not run reached nothing.
    """
    (verdict,) = report.judge(_table(bars=[bar]))
    assert (verdict.ratio, verdict.is_reached) == (ratio, reached)


def test_goals_of_other_figures() -> None:
    """Memory, and requests that have to be an exact number; a reference of nothing is no division
    by zero.
    """
    found = {
        "floor": _rounds(1.0, own_mib=100.0, grown_mib=0.0),
        "zarrcache": [Measured(1.0, requests=345, extra={"own_mib": 110.0, "grown_mib": 1.0})],
    }
    bars = [
        Bar("zarrcache", "floor", at_most=1.2, of="own_mib"),
        Bar("zarrcache", "floor", at_most=1.2, of="grown_mib"),
        Bar("zarrcache", None, at_most=345, of="requests"),
        Bar("zarrcache", None, at_least=346, of="requests"),
    ]
    verdicts = report.judge(_table(rounds=found, bars=bars, unit="MiB", of="own_mib"))
    assert [verdict.is_reached for verdict in verdicts] == [True, False, True, False]
    assert verdicts[0].ratio == pytest.approx(1.1)
    assert [verdict.wanted for verdict in verdicts] == [
        "at most 1.2 times the own of floor",
        "at most 1.2 times the grown of floor",
        "requests at most 345",
        "requests at least 346",
    ]


def test_a_bar_is_one_goal() -> None:
    """Both bounds, none, or a rate without a reference: a mistake of the benchmark's author."""
    for bounds in ({}, {"at_least": 1.0, "at_most": 1.0}):
        with pytest.raises(ValueError, match="needs one of"):
            Bar("zarrcache", "floor", **bounds)
    with pytest.raises(ValueError, match="no reference"):
        Bar("zarrcache", None, at_least=1.0)


def test_a_table_survives_json() -> None:
    """What is shown later is computed from what was written."""
    before = _table(
        bars=[Bar("zarrcache", "floor", at_least=0.9)], missing={"LitData": "not installed"}
    )
    after = report.tables_of(json.loads(json.dumps(_document(before))))["W1"]
    assert after == before


def test_markdown_says_everything_that_belongs_to_a_figure() -> None:
    """Median, P90, P99, ratio, requests, bytes, rounds, goals, what did not run, conditions,
    versions.
    """
    found = {
        "floor": _rounds(1.0, 2.0, 4.0, items=10),
        "zarrcache": [Measured(5.0, 10, requests=344, nbytes=5_000_000, extra={"cpu_ms": 2.5})],
    }
    text = report.markdown(
        _document(
            _table(
                rounds=found,
                bars=[Bar("zarrcache", "floor", at_least=0.9)],
                missing={"LitData": "not installed"},
            )
        )
    )
    assert "| floor | 5 | 2.78 | 2.53 | 1 | 3 | – | – | – |" in text
    assert "| zarrcache | 2 | 2 | 2 | 0.400 | 1 | 344 | 5,000,000 | 2.50 |" in text
    assert "zarrcache: at least 0.9 times the rate of floor: **0.4: missed by 56 %**" in text
    for expected in (
        "LitData: not installed",
        "page cache: warm",
        "requests: floor: 1 LIST; slow: 2 LIST",
        "numpy ",
        "cores, ",
        "kernel ",
    ):
        assert expected in text


def test_markdown_names_neither_machine_nor_directory(tmp_path: Path) -> None:
    """Results are committed."""
    import socket

    text = json.dumps(report.document([_table()], quick=False, workdir=tmp_path))
    assert str(tmp_path) not in text
    assert str(Path.home()) + "/" not in text
    assert json.dumps(socket.gethostname()) not in text


def test_a_partial_run_replaces_its_tables_alone() -> None:
    """``tools/bench warm`` leaves the cold figures as they were measured."""
    old = _document(_table("W1"), _table("C1"))
    old["tables"]["C1"]["run"]["date"] = "2026-01-01"
    new = _document(_table("W1", title="measured again"))
    merged = report.merge(old, new)
    assert list(merged["tables"]) == ["C1", "W1"]
    assert merged["tables"]["C1"] == old["tables"]["C1"]
    assert merged["tables"]["W1"] == new["tables"]["W1"]


def test_results_are_merged_on_disk_with_their_plots(tmp_path: Path) -> None:
    """JSON, Markdown, PNG and SVG; a second run keeps what the first one left."""
    pytest.importorskip(
        "matplotlib", reason="matplotlib is part of the extra: pip install -e '.[bench]'"
    )
    report.save(_document(_table("C1, 20 ms")), tmp_path)
    report.save(_document(_table("W1")), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "c1-20-ms.png",
        "c1-20-ms.svg",
        "results.json",
        "results.md",
        "w1.png",
        "w1.svg",
    ]
    assert list(report.load(tmp_path / "results.json")["tables"]) == ["C1, 20 ms", "W1"]
    text = (tmp_path / "results.md").read_text()
    assert "![C1, 20 ms](c1-20-ms.svg)" in text
    assert "![W1](w1.svg)" in text


def test_results_of_another_format_are_refused(tmp_path: Path) -> None:
    """By name, with what to do; none at all are an empty document."""
    path = tmp_path / "results.json"
    assert report.load(path)["tables"] == {}
    path.write_text('{"format": 99, "tables": {}}')
    with pytest.raises(ValueError, match=r"results\.json has the format 99.*run tools/bench again"):
        report.load(path)


def test_the_results_begin_with_a_line_per_goal_with_the_peers_by_the_same_measure() -> None:
    """Those who have one goal share a line; the peers stand best first, without the reference."""
    found = {
        **_table().rounds,
        "zarrcache too": _rounds(4.0, items=10),
        "middling": _rounds(5.0, items=10),
    }
    bars = [
        Bar("zarrcache", "floor", at_least=0.9),
        Bar("zarrcache too", "floor", at_least=0.9),
        Bar("zarrcache", None, at_most=1.0),
    ]
    block = report.goals(_document(_table(rounds=found, bars=bars)))
    goal = (
        "| W1: warm epoch | at least 0.9 times the rate of floor "
        "| zarrcache 1, zarrcache too 0.500 | no: zarrcache too "
    )
    assert goal + "| middling 0.400, slow 0.100 |" in block
    assert "| W1: warm epoch | time at most 1 s | zarrcache 0.200 | yes |  |" in block
    assert block in report.markdown(_document(_table(rounds=found, bars=bars)))


def test_the_readme_gets_the_rows_that_have_results_in_plain_words() -> None:
    """A ratio of rates or of times, and which way is better."""
    first, cold = report.HIGHLIGHTS[0], report.HIGHLIGHTS[2]
    tables = [
        _table(
            row.table,
            rounds={
                row.than: _rounds(4.0, items=10),
                row.competitor: _rounds(1.0, items=10),
            },
        )
        for row in (first, cold)
    ]
    block = report.readme_block(_document(*tables))
    assert f"| {first.words} | 4 times {first.shown} | higher is better |" in block
    assert f"| {cold.words} | 0.250 times {cold.shown} | lower is better |" in block
    assert block.count("is better") == 2
    assert "docs/benchmarks/results.md" in block
    assert report.readme_block({"format": 1, "tables": {}}) == "No results yet: run `tools/bench`."


def test_the_block_goes_between_the_markers() -> None:
    """Everything else of the README stays, and writing twice is writing once."""
    readme = f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nthe rest\n"
    written = report.with_block(readme, "new")
    assert written == f"# Title\n\n{report.BEGIN}\nnew\n{report.END}\n\nthe rest\n"
    assert report.with_block(written, "new") == written


@pytest.mark.parametrize(
    "readme",
    [
        "",
        f"{report.BEGIN}\n",
        f"{report.END}\n{report.BEGIN}\n",
        f"{report.BEGIN}\n{report.BEGIN}\n{report.END}\n",
    ],
)
def test_a_readme_without_its_markers_is_left_alone(readme: str) -> None:
    """The message says which lines are wanted."""
    with pytest.raises(ValueError, match=r"README\.md needs the line <!-- bench:begin -->"):
        report.with_block(readme, "new")


def _three_epochs() -> Table:
    """Two loaders over three epochs, as E1 has them."""
    rates = {"zarrcache": (5.0, 200.0, 210.0), "zarr + s3fs": (1.0, 1.1, 1.05)}
    rounds = {
        name: _rounds(1.0, **{f"epoch_{n}_samples_per_s": rate for n, rate in enumerate(found, 1)})
        for name, found in rates.items()
    }
    return _table("E1", rounds=rounds, reference="zarr + s3fs")


def test_the_picture_of_the_readme_says_its_figures_in_words_too(tmp_path: Path) -> None:
    """Below the picture's address and in it: each loader by name, with its last rate."""
    a1 = _table("A1", rounds={"np.load": _rounds(2.0), "zarrcache ZarrDataset": _rounds(1.0)})
    (tmp_path / "docs" / "images").mkdir(parents=True)
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\n{report.END}\n")
    report.write_readme(readme, _document(a1, _three_epochs()))
    [line] = [line for line in readme.read_text().splitlines() if line.startswith("![")]
    assert "zarrcache 5, 200, 210; zarr + s3fs 1, 1.10, 1.05](docs/images/epochs.svg)" in line
    picture = (tmp_path / "docs" / "images" / "epochs.svg").read_text()
    assert "zarrcache: 210" in picture
    assert "zarr + s3fs: 1.1" in picture or "zarr + s3fs: 1.0" in picture
