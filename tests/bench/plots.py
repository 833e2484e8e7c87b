"""A picture of each table, for docs/benchmarks."""

from __future__ import annotations

from pathlib import Path

from tests.bench.harness import Table, in_unit_of, summarise

__all__ = ["epoch_rates", "epochs", "plot"]


def plot(table: Table, path: Path) -> None:
    """``path.png`` and ``path.svg``: a bar for each median, a dot for each round; logarithmic where
    they differ much.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = table.name  # the same picture from the same rounds
    mpl.rcParams["svg.fonttype"] = (
        "none"  # letters as letters: a tenth of the size, and they can be searched for
    )
    from matplotlib import pyplot as plt

    names = [name for name, rounds in table.rounds.items() if rounds]
    medians = [in_unit_of(table, summarise(table.rounds[name], table.of))[0] for name in names]
    figure, axes = plt.subplots(figsize=(8, 1.1 + 0.34 * len(names)), layout="constrained")
    colours = [
        "#c44e52"
        if name.startswith("zarrcache")
        else "#8c8c8c"
        if name == table.reference
        else "#4c72b0"
        for name in names
    ]
    axes.barh(names, medians, color=colours, height=0.6)
    for name in names:
        values = [in_unit_of(table, summarise([one], table.of))[0] for one in table.rounds[name]]
        axes.plot(values, [name] * len(values), ".", color="black", markersize=3, alpha=0.5)
    if min(medians) > 0 and max(medians) / min(medians) > 30:
        axes.set_xscale("log")
    axes.invert_yaxis()
    axes.set_xlabel(f"{table.unit} ({'more' if table.unit.endswith('/s') else 'less'} is better)")
    axes.set_title(f"{table.name}: {table.title}", loc="left", fontsize="medium", wrap=True)
    axes.spines[["top", "right"]].set_visible(False)
    for suffix, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
        figure.savefig(path.with_name(path.name + suffix), dpi=120, metadata=metadata)
    plt.close(figure)


def epoch_rates(table: Table) -> dict[str, list[float]]:
    """Median samples per second of epochs 1, 2, ... of every loader of E1, the fastest first."""
    found = {}
    for name, rounds in table.rounds.items():
        if rounds:
            keys = sorted(key for key in rounds[0].extra if key.endswith("_samples_per_s"))
            found[name] = [summarise(rounds, key).median for key in keys]
    return dict(sorted(found.items(), key=lambda pair: -pair[1][-1]))


def epochs(table: Table, path: Path) -> None:
    """The picture of the README: a line per loader over the epochs, on a logarithmic scale, named
    at its end. Its background is its own, so that it reads on dark pages too.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = table.name
    mpl.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    rates = epoch_rates(table)
    numbers = range(1, 1 + max(map(len, rates.values())))
    figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained", facecolor="#fbfbfd")
    axes.set_facecolor("#fbfbfd")
    axes.set_yscale("log")
    greys = ("#3b6ea5", "#6a8f3c", "#8a5a9e", "#b7791f", "#5f6b7a", "#2a8c82")
    others = iter(greys * (1 + len(rates) // len(greys)))
    places = _apart([values[-1] for values in rates.values()], 1.28)
    for (name, values), place in zip(rates.items(), places, strict=True):
        is_ours = name.startswith("zarrcache")
        colour = "#c0392b" if is_ours else next(others)
        axes.plot(numbers, values, "o-", color=colour, lw=2.8 if is_ours else 1.6, ms=5)
        axes.annotate(
            f"{name}: {_rate(values[-1])}",
            (numbers[-1], values[-1]),
            (numbers[-1] + 0.08, place),
            color=colour,
            va="center",
            fontsize=10,
            fontweight="bold" if is_ours else "normal",
        )
    axes.set_xlim(0.9, numbers[-1] + 1.15)
    axes.set_xticks(list(numbers), [f"epoch {number}" for number in numbers])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_ylabel("samples per second (higher is better)")
    axes.set_title(
        f"{table.title[:1].upper()}{table.title[1:]}", loc="left", fontsize="medium", wrap=True
    )
    axes.grid(axis="y", color="#d8dbe2", lw=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None}, facecolor=figure.get_facecolor())
    plt.close(figure)


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _apart(values: list[float], factor: float) -> list[float]:
    """``values``, the largest first, moved so that neighbours differ by ``factor`` or more."""
    places: list[float] = []
    for value in values:
        places.append(min(value, places[-1] / factor) if places else value)
    return places
