"""A picture of each table, for docs/benchmarks."""

from __future__ import annotations

from pathlib import Path

from tests.bench.harness import Table, in_unit_of, summarise

__all__ = ["plot"]


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
