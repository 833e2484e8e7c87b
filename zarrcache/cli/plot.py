"""``zarrcache plot``: three planes of a pair, in the terminal or as a PNG file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zarrcache._keys import ROLES, arrays_of, density_name, is_density, units_of
from zarrcache.cli.app import command, say, show
from zarrcache.cli.options import Config, check_output, data_config, output_file, string
from zarrcache.errors import ConfigError

__all__ = ["plot"]


_UNITS = {
    "cell": "density times cell volume (normalize_data: false)",
    "points": "electrons per grid point (normalize_data: true)",
    "volume": "electrons per cubic angstrom (normalize_data: volume)",
}


def _shares(text: str) -> tuple[float, float, float]:
    try:
        x, y, z = (float(part) for part in text.split(","))
    except ValueError:
        x = y = z = -1.0
    if not all(0 <= share <= 1 for share in (x, y, z)):
        raise ConfigError(f"--at {text!r} is not three numbers from 0 to 1: 0.5,0.5,0.5.")
    return x, y, z


@command(resumable=False)
def plot(
    config: Config,
    task_id: Annotated[str, typer.Argument(metavar="ID", help="task id of the pair")],
    output: Annotated[
        Path | None,
        output_file(
            "PNG file to write; needs the extra plot [default: the terminal]", metavar="FILE.png"
        ),
    ] = None,
    at: Annotated[
        str,
        string("X,Y,Z", "where the planes cut the axes, as shares of their lengths (0 to 1)"),
    ] = "0.5,0.5,0.5",
) -> int:
    """Draw three planes of a pair: input, label, difference; of several channels the first.

    Captions give each plane's place (x=12/24: index 12 of 24 planes) and its lowest and highest
    value.
    Reads through CONFIG's cache, and fetches densities that are not in it.
    """
    from zarrcache.cli.progress import show_panels
    from zarrcache.disk import write_file
    from zarrcache.ops import as_png, draw_pair
    from zarrcache.registry import open_reader

    shares = _shares(at)
    if output is not None:
        if output.suffix.lower() != ".png":
            raise ConfigError(f"{output} does not end in .png. Pictures are written as PNG only.")
        check_output(output, "a PNG picture", b"\x89PNG")
    settings = data_config(config, needs_cache=False)
    reader = open_reader(settings)
    grids = []
    for role in ROLES:
        values, gridsize = reader.load(task_id, role)
        grids.append(values.reshape(-1, *gridsize)[0])
    rows = draw_pair(grids[0], grids[1], shares)
    arrays = dict.fromkeys(arrays_of(settings.density_type)[role][0] for role in ROLES)
    units = _UNITS[units_of(settings.normalize_data)] if all(map(is_density, arrays)) else ""
    title = f"{task_id}\n{' and '.join(map(density_name, arrays))}{units and f': {units}'}"
    if output is None:
        show(title)
        show_panels(rows)
    else:
        write_file(output, as_png(rows, title))
        say(f"wrote {output}")
    if len(rows[0]) < 3:
        shapes = " and ".join("x".join(map(str, grid.shape)) for grid in grids)
        say(f"no difference: the grids of input and label are {shapes}.")
    return 0
