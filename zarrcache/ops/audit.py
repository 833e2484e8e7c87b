"""Look for bad pairs before a training (``zarrcache audit``).

Every density of a config is read once, through the cache. The bounds below are those of real VASP
files: full densities have a whole number of electrons within 1e-4, and their negative values (the
ripple of the plane waves in a vacuum, the core of a pseudopotential) sum up to at most 0.13 % of
the electrons.
"""

from __future__ import annotations

import base64
import functools
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zarrcache._keys import ROLES, Channel, Role, density_array, density_name, units_of
from zarrcache._units import counted, format_bytes
from zarrcache.config import DataConfig
from zarrcache.data import ZarrS3Reader, crc_of, open_reader
from zarrcache.errors import ZarrCacheError
from zarrcache.ops.figures import as_png, draw_pair
from zarrcache.ops.pages import page, table
from zarrcache.ops.selection import all_pairs, concurrently

__all__ = ["KINDS", "AuditReport", "Finding", "audit", "audit_page"]

#: What can be wrong, worst first, and what it means for a training.
KINDS = {
    "unreadable": "cannot be read: absent chunks, a wrong number of electrons, damage",
    "not finite": "values that are NaN or infinite",
    "potential": "mostly negative: a potential (LOCPOT), not a density",
    "constant": "all values are equal",
    "grids": "input and label have grids that no downsampling makes equal",
    "electrons": "input and label have different numbers of electrons",
    "valence": "more electrons than protons, or fewer than valence electrons, in the structure",
    "fraction": "the label's number of electrons is not whole",
    "negative": "negative values beyond those of plane waves",
    "duplicate": "the same values as another material",
}

#: Electrons by which input and label may differ: rounding of files, and of regridded inputs.
_ELECTRONS, _ELECTRONS_RATIO = 0.05, 5e-4
#: Distance of a label's electrons from a whole number, per electron and at least.
_FRACTION, _FRACTION_RATIO = 0.02, 1e-4
#: Sum of the negative values over the sum of all. Real densities have at most 0.0013.
_NEGATIVE_RATIO = 0.01
#: A potential is negative almost everywhere, or its mean is.
_POTENTIAL_RATIO = 0.2
#: Electrons that a positively charged cell may lack, as a share of its valence.
_CHARGE_RATIO = 0.1
#: Sizes of noble gases, at which the periods end.
_NOBLE = (0, 2, 10, 18, 36, 54, 86, 118)
_PICTURES = 20
_LEGEND = (
    '<p class="faint">Planes through the middle of each axis. Input and label share a scale; blue '
    "to red is label minus input.</p>"
)


@dataclass(frozen=True)
class Finding:
    """A problem of a material."""

    #: A key of `KINDS`.
    kind: str
    task_id: str
    #: ``data``, ``label``, or empty if it is about both.
    role: str
    #: One sentence with the numbers.
    what: str
    #: Larger is worse, among findings of one kind.
    severity: float = 0.0

    def __str__(self) -> str:
        of = f" ({self.role})" if self.role else ""
        return f"{self.kind}: {self.task_id}{of}: {self.what}"


@dataclass(frozen=True)
class AuditReport:
    """The result of an audit: the pairs that were examined, and their size in memory."""

    materials: int
    nbytes: int
    #: Worst kinds first.
    findings: tuple[Finding, ...]

    @property
    def counts(self) -> dict[str, int]:
        """Number of materials by kind, for the kinds that occur."""
        found: dict[str, set[str]] = defaultdict(set)
        for finding in self.findings:
            found[finding.kind].add(finding.task_id)
        return {kind: len(found[kind]) for kind in KINDS if kind in found}

    def worst(self, most: int) -> list[str]:
        """Task ids of the worst materials, each once."""
        return list(dict.fromkeys(finding.task_id for finding in self.findings))[:most]


@dataclass(slots=True)
class _Density:
    """The values of a density that an audit keeps."""

    gridsize: tuple[int, ...]
    nbytes: int
    electrons: float | None  # None if unknown
    fingerprint: tuple[object, ...] | None  # None if it is no sign of a duplicate


@dataclass(slots=True)
class _Pair:
    task_id: str
    densities: dict[Channel, _Density] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)


def audit(
    config: DataConfig,
    *,
    ids: Sequence[str] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> AuditReport:
    """Read all pairs of a config, or those of ``ids``, and report what is wrong with them.

    A density that cannot be read is a finding. ``progress`` gets the number of pairs examined so
    far, and their total.
    """
    reader = open_reader(config)
    task_ids = all_pairs(reader) if ids is None else list(dict.fromkeys(ids))
    if reader.if_missing != "error":
        # Of all at once, which is stored once. What cannot be read is a finding below.
        lacking = reader.absences.find(task_ids, skip_unreadable=True)
        if reader.if_missing == "drop":
            kept = [task_id for task_id in task_ids if task_id not in lacking]
            task_ids = kept or [*reader.decide(task_ids).ids]  # which raises: all lack one
    findings: list[Finding] = []
    by_values: dict[tuple[Channel, tuple[object, ...]], list[str]] = defaultdict(list)
    nbytes = 0
    # numpy and the file system release the GIL; one thread per core reads at the disk's speed.
    threads = min(8, 2 * (os.cpu_count() or 1))
    examine = functools.partial(_examine, reader)
    with concurrently(examine, task_ids, progress, threads=threads) as pairs:
        for pair in pairs:
            findings += pair.findings
            for channel, density in pair.densities.items():
                nbytes += density.nbytes
                if density.fingerprint is not None:
                    by_values[channel, density.fingerprint].append(pair.task_id)
    for (channel, _), (first, *others) in by_values.items():
        what = f"it has the values of {first}"
        findings += [Finding("duplicate", other, channel.role, what) for other in others]
    rank = list(KINDS)
    findings.sort(key=lambda found: (rank.index(found.kind), -found.severity, found.task_id))
    return AuditReport(len(task_ids), nbytes, tuple(findings))


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


def _examine(reader: ZarrS3Reader, task_id: str) -> _Pair:
    pair = _Pair(task_id)
    for channel in reader.reads:
        try:
            found = reader.load_channel(task_id, *channel)
        except ZarrCacheError as exc:
            pair.findings.append(Finding("unreadable", task_id, channel.role, str(exc)))
            continue
        if found is not None:  # else it is filled with zeros
            _density(reader, pair, channel, *found)
    sides = [
        [density for channel, density in pair.densities.items() if channel.role == role]
        for role in ROLES
    ]
    for role, side in zip(ROLES, sides, strict=True):
        for other in side[1:]:
            if other.gridsize != side[0].gridsize:
                grids = " and ".join("x".join(map(str, one.gridsize)) for one in (side[0], other))
                pair.findings.append(
                    Finding("grids", task_id, role, f"the grids of its channels are {grids}")
                )
    if all(sides):
        pair.findings += _compare(task_id, *map(_known_electrons_first, sides))
    return pair


def _known_electrons_first(channels: Sequence[_Density]) -> _Density:
    """The total density among the channels of one role, which stands for all."""
    return next((one for one in channels if one.electrons is not None), channels[0])


def _density(
    reader: ZarrS3Reader,
    pair: _Pair,
    channel: Channel,
    values: NDArray[np.float32],
    gridsize: Any,
) -> None:
    """Examine one density by itself."""
    role, array = channel
    is_total = array == density_array("total")
    prefix = "" if len(reader.arrays[role]) == 1 else f"{density_name(array)}: "
    points = int(np.prod(gridsize))
    total = float(values.sum(dtype=np.float64))

    def found(kind: str, what: str, severity: float = 0.0) -> None:
        pair.findings.append(Finding(kind, pair.task_id, role, prefix + what, severity))

    density = pair.densities[channel] = _Density(
        tuple(gridsize), values.nbytes, None, (tuple(gridsize), crc_of(values), total)
    )
    if not np.isfinite(total):
        bad = points - int(np.count_nonzero(np.isfinite(values)))
        if bad:
            found("not finite", f"{bad} of {points} values are NaN or infinite", bad / points)
            return
    low, high = float(values.min()), float(values.max())
    if low == high == 0 and len(reader.arrays[role]) > 1 and not is_total:
        density.fingerprint = None  # a spin density of a material without spin
        return
    if low == high:
        found("constant", f"all {points} values are {low:g}")
        return
    if not is_total:
        return  # a spin density has both signs, and any sum
    negative = float(np.minimum(values, 0).sum(dtype=np.float64))
    share = -negative / max(abs(total), 1e-300)
    if total <= 0 or share > _POTENTIAL_RATIO:
        found("potential", f"its mean is {total / points:.4g}, its minimum {low:.4g}", share)
        return
    if share > _NEGATIVE_RATIO:
        found("negative", f"negative values sum up to {share:.1%} of the density", share)
    structure = _structure(reader, pair.task_id, role)
    density.electrons = electrons = _electrons(reader, pair.task_id, role, total, points)
    if electrons is None:
        return
    off = abs(electrons - round(electrons))
    if role == "label" and off > max(_FRACTION, _FRACTION_RATIO * electrons):
        found("fraction", f"it has {electrons:.4f} electrons", off)
    if structure is not None:
        protons, valence = _protons_and_valence(structure)
        if protons and not (1 - _CHARGE_RATIO) * valence - 0.5 <= electrons <= protons + 0.5:
            found(
                "valence",
                f"it has {electrons:.2f} electrons; its structure has {valence:g} valence "
                f"electrons and {protons:g} protons",
                abs(electrons - valence),
            )


def _compare(task_id: str, data: _Density, label: _Density) -> Iterator[Finding]:
    """Compare input and label of a pair."""
    ratios = {max(pair) / min(pair) for pair in zip(data.gridsize, label.gridsize, strict=True)}
    is_coarser = {one < other for one, other in zip(data.gridsize, label.gridsize, strict=True)}
    if len(ratios) > 1 or ratios.pop() % 1 or len(is_coarser) > 1:
        grids = " and ".join("x".join(map(str, one.gridsize)) for one in (data, label))
        yield Finding("grids", task_id, "", f"the grids of input and label are {grids}")
    if data.electrons is not None and label.electrons is not None:
        apart = abs(data.electrons - label.electrons)
        if apart > _ELECTRONS + _ELECTRONS_RATIO * label.electrons:
            yield Finding(
                "electrons",
                task_id,
                "",
                f"input has {data.electrons:.2f} electrons, label {label.electrons:.2f}",
                apart / max(label.electrons, 1e-300),
            )


def _electrons(
    reader: ZarrS3Reader, task_id: str, role: Role, total: float, points: int
) -> float | None:
    """Number of electrons of a total density in the reader's units; None without a volume."""
    units = units_of(reader.normalize)
    if units == "volume":
        try:
            return total / points * reader.volume(task_id, role)
        except ZarrCacheError:
            return None
    return total if units == "points" else total / points


def _structure(reader: ZarrS3Reader, task_id: str, role: Role) -> Mapping[str, Any] | None:
    try:
        return reader.structure(task_id, role)
    except ZarrCacheError:  # stores need not have one
        return None


def _protons_and_valence(structure: Mapping[str, Any]) -> tuple[float, float]:
    """Protons of a structure, and the fewest valence electrons of a potential for its atoms."""
    protons = valence = 0.0
    for site in structure.get("sites", ()):
        for species in site.get("species", ()):
            number = _NUMBERS.get(str(species.get("element")), 0)
            if not number:
                return 0.0, 0.0  # a made-up element: nothing is known
            amount = float(species.get("occu", 1))
            protons += amount * number
            valence += amount * _least_valence(number)
    return protons, valence


def _least_valence(number: int) -> int:
    """Electrons outside the closed shells of an atom."""
    period = next(n for n, end in enumerate(_NOBLE) if number <= end)
    outside, length = number - _NOBLE[period - 1], _NOBLE[period] - _NOBLE[period - 1]
    if length == 32 and 2 < outside <= 17:  # lanthanides, actinides: f electrons may be in the core
        return 2
    if outside > length - 6 and length > 8:  # beyond the d (and f) shell
        return outside - (length - 8)
    return outside - 14 if length == 32 and outside > 17 else outside


_SYMBOLS = (
    "H He Li Be B C N O F Ne Na Mg Al Si P S Cl Ar K Ca Sc Ti V Cr Mn Fe Co Ni Cu Zn Ga Ge As Se "
    "Br Kr Rb Sr Y Zr Nb Mo Tc Ru Rh Pd Ag Cd In Sn Sb Te I Xe Cs Ba La Ce Pr Nd Pm Sm Eu Gd Tb Dy "
    "Ho Er Tm Yb Lu Hf Ta W Re Os Ir Pt Au Hg Tl Pb Bi Po At Rn Fr Ra Ac Th Pa U Np Pu Am Cm Bk Cf "
    "Es Fm Md No Lr Rf Db Sg Bh Hs Mt Ds Rg Cn Nh Fl Mc Lv Ts Og"
)
_NUMBERS = {symbol: number for number, symbol in enumerate(_SYMBOLS.split(), 1)}
