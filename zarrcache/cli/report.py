"""``zarrcache report``: recorded epochs, cost and what-if as one HTML file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from zarrcache.cli.app import command, say
from zarrcache.cli.options import (
    PAGE,
    Config,
    check_output,
    data_config,
    number,
    output_file,
)
from zarrcache.errors import ConfigError, ZarrCacheError

__all__ = ["report"]


@command(resumable=False)
def report(
    config: Config,
    output: Annotated[Path, output_file("HTML file to write")] = Path("report.html"),
    nodes: Annotated[int, number(1, "nodes of the forecast")] = 1,
    epochs: Annotated[int, number(1, "epochs of the forecast")] = 50,
) -> int:
    """Write a page: recorded epochs, cost, what-if.

    Shows the epochs that LoaderMonitor or CacheMonitor recorded in CONFIG's cache. Caches nothing.
    Exit code 1 if the origin cannot be read; the page then has no forecast.
    """
    from zarrcache import ops
    from zarrcache.cli.progress import Meter
    from zarrcache.config import cache_of
    from zarrcache.disk import write_file

    source = data_config(config)
    check_output(output, *PAGE)
    recorded = ops.read_runs(cache_of(source))
    for note in recorded.notes:
        say(f"warning: {note}")
    forecast: ops.WhatIf | str
    try:
        with Meter("Measuring", "densities", 1) as meter:
            split = ops.measure_split(source, ranks=nodes, progress=meter.reach)
        with Meter("Forecasting", "runs", 1) as meter:
            forecast = ops.what_if(split, nodes=nodes, epochs=epochs, progress=meter.reach)
    except ConfigError:
        raise
    except ZarrCacheError as exc:
        forecast = str(exc)
        say(f"error: no forecast: {exc}", always=True)
    page = ops.report_page(source, recorded, forecast, now_s=time.time())
    write_file(output, page.encode())
    say(f"wrote {output}")
    return int(isinstance(forecast, str))
