"""``zarrcache audit``: find bad pairs before a training."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from zarrcache._units import counted, format_bytes
from zarrcache.cli.app import command, say, say_refusal, show, show_json, show_some
from zarrcache.cli.options import (
    PAGE,
    Config,
    Ids,
    Json,
    check_output,
    data_config,
    read_ids,
    string,
)

__all__ = ["audit"]

_MOST = 40  # findings printed


@command(resumable=False)
def audit(
    config: Config,
    ids: Ids = None,
    html: Annotated[
        Path | None,
        string("FILE", "write a page with pictures of the worst 20 pairs; needs the extra plot"),
    ] = None,
    as_json: Json = False,
) -> int:
    """Find bad pairs: grids, electrons, duplicates, NaN, potentials.

    Reads every density of CONFIG through the cache. Exit code 1 if a pair is bad.
    """
    from zarrcache import ops
    from zarrcache.cli.progress import Meter
    from zarrcache.disk import write_file

    source = data_config(config, needs_cache=False)
    if html is not None:
        check_output(html, *PAGE)
    with Meter("Auditing", "pairs", 0) as meter:
        report = ops.audit(source, ids=read_ids(ids), progress=meter.reach)
    if html is not None:
        write_file(html, ops.audit_page(source, report).encode())
    refusal = ops.known_refusal(source)
    if as_json:
        show_json({**asdict(report), "counts": report.counts, "refusal": refusal})
    else:
        pairs = f"{counted(report.materials, 'pair')} ({format_bytes(report.nbytes)})"
        if not report.findings:
            show(f"Nothing is wrong with {'the values of ' if refusal else ''}{pairs}.")
        else:
            show(f"{pairs}:")
            for kind, materials in report.counts.items():
                show(f"{materials:>8,}  {kind}: {ops.KINDS[kind]}")
            show()
            show_some([str(found) for found in report.findings], _MOST)
    if html is not None:
        say(f"wrote {html}")
    say_refusal(refusal)
    return int(bool(report.findings or refusal))
