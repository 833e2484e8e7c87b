"""``zarrcache plot``: three planes of a pair, in the terminal or as a PNG file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from zarrcache.cli.app import command, say
from zarrcache.cli.options import Config, check_output, data_config, output_file, write_output
from zarrcache.errors import ConfigError

__all__ = ["plot"]


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
        typer.Option(
            metavar="X,Y,Z", help="where the axes are cut, as shares of their lengths, 0 to 1"
        ),
    ] = "0.5,0.5,0.5",
) -> int:
    """Draw three planes of a pair: input, label, difference; of several channels the first.

    Reads through CONFIG's cache, and fetches what is not in it.
    """
    from zarrcache.cli.progress import show_panels
    from zarrcache.ops import as_png, draw_pair
    from zarrcache.registry import open_reader

    shares = _shares(at)
    if output is not None:
        if output.suffix.lower() != ".png":
            raise ConfigError(f"{output} does not end in .png, the only format of pictures.")
        check_output(output, "a PNG picture", b"\x89PNG")
    reader = open_reader(data_config(config, needs_cache=False))
    grids = []
    for role in ("data", "label"):
        values, gridsize = reader.load(task_id, role)
        grids.append(values.reshape(-1, *gridsize)[0])
    rows = draw_pair(grids[0], grids[1], shares)
    if output is None:
        show_panels(rows)
    else:
        write_output(output, as_png(rows))
        say(f"wrote {output}")
    if len(rows[0]) < 3:
        shapes = " and ".join("x".join(map(str, grid.shape)) for grid in grids)
        say(f"no difference: the grids of input and label are {shapes}.")
    return 0
