"""Find the source of each task id among the names of a directory.

A source holds one density: a Zarr store (a directory or a zip file), a file as VASP or the
Materials Project wrote it, or a directory with a CHGCAR or numpy files. Several kinds may lie side
by side, also of one material.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, cast

from zarrcache._keys import safe_repr
from zarrcache.errors import ConfigError

__all__ = [
    "KINDS",
    "Kind",
    "choose",
    "ends_of",
    "is_fetched_whole",
    "is_file",
    "is_object",
    "is_unconverted",
    "kind_of",
    "kinds_of",
    "names_of",
    "several_sources",
    "sources_of",
    "stem_of",
]

#: Kind of a source, given by the end of its name.
Kind = Literal["zarr", "zarr.zip", "json.gz", "CHGCAR", "directory"]
_PACKED = ("", ".gz", ".bz2", ".xz", ".lzma")
#: Every kind and its suffixes, the preferred ones first.
_SUFFIXES: dict[Kind, tuple[str, ...]] = {
    "zarr": (".zarr",),
    "zarr.zip": (".zarr.zip",),
    "json.gz": (".json.gz", ".json", ".json.bz2", ".json.xz", ".json.lzma"),
    "CHGCAR": tuple(
        name + packed for name in (".CHGCAR", "_CHGCAR", ".chgcar") for packed in _PACKED
    ),
    "directory": ("",),  # one per material, with a CHGCAR or rho_22.npy in it
}
KINDS: tuple[Kind, ...] = tuple(_SUFFIXES)
_KIND_OF: dict[str, Kind] = {
    suffix: kind for kind, suffixes in _SUFFIXES.items() for suffix in suffixes
}
_RANKS = {suffix: number for number, suffix in enumerate(_KIND_OF)}
#: Lengths of the suffixes: names are cut instead of compared with each suffix.
_LENGTHS = sorted({len(suffix) for suffix in _KIND_OF if suffix}, reverse=True)
#: Any name without a suffix may be a directory with a density. With ``auto``, only those of QM9 are
#: taken for one.
_MOLECULE = re.compile(r"dsgdb9nsd_\d+")


def _suffix_of(name: str) -> str | None:
    for length in _LENGTHS:
        if len(name) > length and name[-length:] in _KIND_OF:
            return name[-length:]
    return None if "." in name else ""


def kind_of(name: str) -> Kind | None:
    """Kind of a source by its name; None if no source has such a name."""
    suffix = _suffix_of(name)
    return None if suffix is None else _KIND_OF[suffix]


def stem_of(name: str) -> str | None:
    """Task id of a source's name: ``mp-1`` for ``mp-1.zarr`` and ``mp-1.json.gz``; or None."""
    suffix = _suffix_of(name)
    return None if suffix is None else name[: len(name) - len(suffix)]


def is_object(store: str) -> bool:
    """Whether a source is one object, not a directory of objects."""
    return kind_of(store) in ("zarr.zip", "json.gz", "CHGCAR")


def is_unconverted(store: str) -> bool:
    """Whether a source is not a Zarr store: it is read as a whole or not at all."""
    return kind_of(store) in ("json.gz", "CHGCAR", "directory")


def is_fetched_whole(store: str) -> bool:
    """Whether the size of its grid is known only after all of a source is fetched."""
    return is_object(store) or is_unconverted(store)


def is_file(store: str) -> bool:
    """Whether a source is a file that VASP or the Materials Project wrote, not a Zarr store."""
    return kind_of(store) in ("json.gz", "CHGCAR")


def sources_of(names: Iterable[str]) -> dict[str, str | list[str]]:
    """The sources of each task id among the names of a directory.

    Returns
    -------
    dict
        The name of the one source, or a list of several, the preferred ones first. A list per id
        would double the memory and the size on disk of 200,000 ids.
    """
    found: dict[str, str | list[str]] = {}
    for name in names:
        stem = stem_of(name)
        if stem is not None:
            others = found.setdefault(stem, name)
            if isinstance(others, list):
                others.append(name)
            elif others != name:
                found[stem] = [others, name]
    for several in found.values():
        if isinstance(several, list):
            several.sort(key=lambda name: (_RANKS[_suffix_of(name) or ""], name))
    return found


def choose(sources: Mapping[str, str | list[str]], kinds: Sequence[Kind] = KINDS) -> dict[str, str]:
    """The name of the source of each task id that is read.

    Parameters
    ----------
    sources : mapping
        From `sources_of`.
    kinds : sequence of str
        Those that are read, the preferred ones first. Of one kind, a plain file is preferred to a
        compressed one, and among those ``.gz``, ``.bz2``, ``.xz``.
    """
    if tuple(kinds) == KINDS:
        return {
            stem: name
            for stem, names in sources.items()
            if stem != (name := names if isinstance(names, str) else names[0])
            or _MOLECULE.fullmatch(name)
        }
    chosen = {}
    for stem, names in sources.items():
        here = [names] if isinstance(names, str) else names
        wanted = [name for name in here if kind_of(name) in kinds]
        if wanted:
            chosen[stem] = min(wanted, key=lambda name: kinds.index(cast("Kind", kind_of(name))))
    return chosen


def several_sources(
    url: str, sources: Mapping[str, str | list[str]], kinds: Sequence[Kind] = KINDS
) -> str:
    """A sentence on the task ids of a directory that have several sources; empty if none has.

    Also empty if ``source`` of the config names kinds, because then it says what is preferred.

    Parameters
    ----------
    url : str
        The directory, for the message.
    sources, kinds
        As for `choose`.
    """
    if tuple(kinds) != KINDS or list not in map(type, sources.values()):
        return ""
    several = {
        stem: names
        for stem, every in sources.items()
        if isinstance(every, list)
        and len(names := [name for name in every if choose({stem: name})]) > 1
    }
    if not several:
        return ""
    stem, (read, *others) = next(iter(several.items()))
    advice = "Set source to the kinds to read, the preferred ones first, or remove the others."
    if any(kind_of(name) == kind_of(read) for name in others):
        advice = (
            f"Remove the others: source cannot choose among files of one kind, {kind_of(read)}."
        )
    ids = "1 id has" if len(several) == 1 else f"{len(several)} ids have"
    return (
        f"{ids} several sources in {url}. Of {stem}, {read} is read, not {' or '.join(others)}. "
        f"{advice}"
    )


def names_of(task_id: str, kinds: Sequence[Kind] = KINDS) -> list[str]:
    """The usual names of a source of this task id, the preferred ones first."""
    every = [task_id + suffix for kind in kinds for suffix in _SUFFIXES[kind][: len(_PACKED)]]
    return [name for name in every if choose({task_id: name}, kinds)]


def ends_of(kinds: Sequence[Kind]) -> str:
    """The ends of the names of these kinds, for messages."""
    ends = [f".{kind}" for kind in kinds if kind != "directory"]
    return ", ".join(
        [*ends, *(["a directory with CHGCAR or rho_22.npy"] if "directory" in kinds else [])]
    )


def kinds_of(source: object) -> tuple[Kind, ...]:
    """The kinds that ``source`` of a training config names.

    Parameters
    ----------
    source : str or sequence of str
        ``auto``, which is all kinds; one kind; or several, the preferred ones first.

    Raises
    ------
    ConfigError
        An unknown kind; the message lists all.
    """
    if source in ("auto", None):
        return KINDS
    wanted = [source] if isinstance(source, str) else source
    if not isinstance(wanted, Sequence) or not wanted or not set(map(str, wanted)) <= set(KINDS):
        raise ConfigError(
            f"source is {safe_repr(source)}. Write auto, one of {', '.join(KINDS)}, or a list of "
            "these, the preferred ones first."
        )
    return cast("tuple[Kind, ...]", tuple(dict.fromkeys(map(str, wanted))))
