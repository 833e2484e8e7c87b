"""Self-contained HTML pages: no script, no font and no picture is fetched from elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

from zarrcache._keys import ROLES
from zarrcache._units import counted, format_bytes
from zarrcache.config import DataConfig
from zarrcache.data import open_reader
from zarrcache.errors import ZarrCacheError
from zarrcache.ops.audit import KINDS, AuditReport
from zarrcache.ops.figures import as_png, draw_pair

__all__ = ["audit_page", "page", "table"]

#: Light and dark, as the reader's system is set.
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --faint: #6b7280;
  --line: #d8dee4; --shade: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --paper: #0d1117;
  --faint: #9198a1; --line: #30363d; --shade: #161b22; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
p.faint, figcaption { color: var(--faint); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; padding: .35rem .7rem; border-bottom: 1px solid var(--line);
  vertical-align: top; }
th { background: var(--shade); }
table.numbers { font-size: .9rem; } table.numbers th { vertical-align: bottom; }
table.numbers td, table.numbers th { text-align: right; white-space: nowrap;
  font-variant-numeric: tabular-nums; }
table.numbers td:first-child, table.numbers th:first-child { text-align: left; }
figure { margin: 1.2rem 0; } img, svg { max-width: 100%; height: auto; }
code { background: var(--shade); padding: .1rem .3rem; border-radius: .2rem; }
"""

_PICTURES = 20
_LEGEND = (
    '<p class="faint">Planes through the middle of each axis. Input and label share a scale; blue '
    "to red is label minus input.</p>"
)


def page(title: str, body: str, style: str = "") -> str:
    """A whole document around ``body``, which is HTML already."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # A browser then loads nothing from elsewhere, and runs nothing.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "style-src 'unsafe-inline'; img-src data:\">"
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{body}\n</body></html>\n"
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: bool = False) -> str:
    """A table of text; with ``numbers`` all columns but the first are aligned to the right."""
    names = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = (f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    kind = ' class="numbers"' if numbers else ""
    return (
        f'<div class="wide"><table{kind}><thead><tr>{names}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def audit_page(config: DataConfig, report: AuditReport) -> str:
    """The report of an audit, with three planes of each of the worst 20 pairs."""
    pairs = (
        f"<p>{report.materials:,} pairs ({format_bytes(report.nbytes)}) of "
        f"<code>{escape(config.functional)}</code>: input <code>{escape(config.data_dir)}</code>, "
        f"label <code>{escape(config.label_dir)}</code>.</p>"
    )
    if not report.findings:
        return page("Audit: nothing is wrong", pairs)
    rows = [(kind, f"{count:,}", KINDS[kind]) for kind, count in report.counts.items()]
    findings = [
        (found.kind, found.task_id, found.role or "pair", found.what) for found in report.findings
    ]
    worst = report.worst(_PICTURES)
    parts = [
        pairs,
        table(("kind", "materials", "what it is"), rows),
        "<h2>Findings</h2>",
        table(("kind", "id", "of", "what"), findings),
        f"<h2>The worst {len(worst)}</h2>",
        _LEGEND,
    ]
    reader = open_reader(config)
    for task_id in worst:
        what = "; ".join(
            f"{found.role or 'pair'}: {found.what}"
            for found in report.findings
            if found.task_id == task_id
        )
        try:
            loaded = [reader.load(task_id, role) for role in ROLES]
            grids = [values.reshape(-1, *gridsize)[0] for values, gridsize in loaded]
            data = base64.b64encode(as_png(draw_pair(*grids))).decode()
            picture = f'<img alt="planes of {escape(task_id)}" src="data:image/png;base64,{data}">'
        except ZarrCacheError as exc:
            picture = f"<p>no picture: {escape(str(exc))}</p>"
        parts.append(
            f"<figure>{picture}<figcaption><b>{escape(task_id)}</b>: {escape(what)}</figcaption>"
            "</figure>"
        )
    return page(f"Audit: {counted(len(findings), 'finding')}", "\n".join(parts))
