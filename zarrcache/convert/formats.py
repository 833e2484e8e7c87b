r"""Input formats of ``zarrcache convert``: recognise density files, their task ids and parsers.

Add a format with one call::

    register_format(InputFormat("cube", r"(.+)\.cube", read_cube))

after which ``plan_convert`` and ``RhoRead`` find, name and read ``mp-1.cube`` and ``mp-1.cube.gz``.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from zarrcache._keys import check_task_id
from zarrcache.arrays import DensityFile, read_mp_json, read_vasp_text
from zarrcache.convert.parsers import RawDensity, read_npy
from zarrcache.errors import ConfigError

__all__ = [
    "InputFormat",
    "LeftOut",
    "Naming",
    "Sources",
    "find_files",
    "format_of",
    "is_density_name",
    "register_format",
    "registered_formats",
    "task_id_of",
]

_COMPRESSED = re.compile(r"\.(gz|bz2|xz|lzma)$", re.IGNORECASE)
#: CHG, LOCPOT, AECCAR2: chosen by an explicit pattern; the directory names the material.
_BARE_VASP_NAME = re.compile(r"[A-Z]{3,8}[0-9]?")
#: Files to list as left out, because a user may expect them to be converted.
_RESEMBLES_DENSITY = re.compile(r"CHG|AECCAR|LOCPOT|ELFCAR", re.IGNORECASE)
#: Words that name a step of a calculation instead of a material: ``CHGCAR.3static``,
#: ``Si/relax/CHGCAR``, ``mp-1/01_scf``. custodian and atomate number them on either side.
_STEP_WORDS = (
    "relax relaxed relaxation prerelax opt optimize optimized optimization ionic cell static scf "
    "nscf sc single singlepoint final preconverge converged uniform band bands bandstructure line "
    "dos charge chg chgcar density vasp run runs calc calculation output outputs job step stage "
    "double main std lda gga pbe pbesol scan r2scan hse hse06"
)
_STEP = re.compile(rf"\d{{0,3}}(?:{'|'.join(_STEP_WORDS.split())})\d{{0,3}}", re.IGNORECASE)
#: JSON files that workflow software leaves in the directory of a calculation.
_NO_DENSITY_JSON = frozenset(
    "custodian transformations metadata fw inputs outputs errors vasprun package".split()
)
#: A document that maps functionals to ids (``map_dir`` of a training config).
_MAP = re.compile(r".*_to_task_ids|map", re.IGNORECASE)
#: Ids with several files that an error names.
_MAX_SHOWN = 3
_MATERIAL = re.compile(r"[A-Za-z]+-\d+")


@dataclass(frozen=True)
class InputFormat:
    """Recognises and reads the files of one format.

    Attributes
    ----------
    name : str
    pattern : str
        Regular expression for the whole file name without ``.gz``, ``.bz2``, ``.xz`` or ``.lzma``,
        case-insensitive. Its first group that matches is the task id; without one, the directory's
        name is.
    read : callable
        Called with the path; returns a :class:`RawDensity`. It decompresses the file itself
        (``zopen`` of monty, which comes with pymatgen, does) and must be importable from worker
        processes: a function of a module, not of the main script.
    """

    name: str
    pattern: str
    read: Callable[[Path], RawDensity | DensityFile]

    def match(self, bare_name: str) -> re.Match[str] | None:
        """Match a file name without its compression suffix."""
        return re.fullmatch(self.pattern, bare_name, re.IGNORECASE)


_JSON = InputFormat("mp-json", r"(.+)\.json", read_mp_json)
#: ``mp-1.CHGCAR``, ``CHGCAR_mp-1``, ``CHGCAR``; perhaps with a step, ``mp-1_CHGCAR.static``.
_VASP = InputFormat(
    "vasp",
    r"(?:(?P<before>.+)[._-])?CHGCAR(?:[._-](?P<after>[A-Za-z0-9._-]+?))??(?:\.vasp)?",
    read_vasp_text,
)
#: ``dsgdb9nsd_000001/rho_22.npy``: the directory is the id.
_NPY = InputFormat("npy", r"rho(?:_\w+)?\.npy", read_npy)
_formats = [_JSON, _NPY, _VASP]


@dataclass(frozen=True, order=True)
class LeftOut:
    """A file that is not converted, and why: a clause, without a full stop."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Naming:
    """The rule that gives a source file its task id."""

    #: As in `plan_convert`. Without a group, a regular expression gives all that it matches.
    id_from: str = "auto"
    #: The directory that was searched.
    root: Path = Path("/")

    def __post_init__(self) -> None:
        if self.id_from in ("auto", "name", "directory", "path"):
            return
        try:
            re.compile(self.id_from)
        except re.error as exc:
            raise ConfigError(
                f"id_from {self.id_from!r} is not a regular expression: {exc}."
            ) from exc
        if self.id_from.isalpha():
            raise ConfigError(
                f"id_from {self.id_from!r} is unknown. Write auto, name, directory, path, or a "
                r"regular expression such as '(mp-\d+)'."
            )


@dataclass(frozen=True)
class Sources:
    """Result of a search for source files, everything sorted."""

    #: To convert, each with its task id.
    files: dict[Path, str]
    #: Files that give no task id, each with the error.
    nameless: dict[Path, str]
    #: Files that resemble densities but are not converted.
    left_out: tuple[LeftOut, ...] = ()
    #: Directories that could not be read, so files may be missing.
    unreadable: tuple[LeftOut, ...] = ()


def register_format(fmt: InputFormat) -> None:
    """Add an input format; the formats registered last are tried first.

    Raises
    ------
    ConfigError
        Another format has this name, or the pattern is not a regular expression.
    """
    if any(fmt.name == known.name and fmt != known for known in _formats):
        raise ConfigError(f"input format {fmt.name!r} is registered already. Choose another name.")
    try:
        re.compile(fmt.pattern)
    except re.error as exc:
        raise ConfigError(f"pattern {fmt.pattern!r} of format {fmt.name!r}: {exc}.") from exc
    if fmt not in _formats:
        _formats.insert(0, fmt)


def registered_formats() -> tuple[InputFormat, ...]:
    """Formats of this process, in the order in which they are tried."""
    return tuple(_formats)


def format_of(name: str, formats: Sequence[InputFormat] | None = None) -> InputFormat:
    """Format of a file name; VASP's text if no pattern matches."""
    bare = _COMPRESSED.sub("", name)
    return next((fmt for fmt in formats or _formats if fmt.match(bare)), _VASP)


def task_id_of(path: Path, naming: Naming | None = None) -> str:
    """Task id of a source file, from its path alone.

    ``mp-1.CHGCAR``, ``mp-1_CHGCAR.gz``, ``CHGCAR_mp-1`` and ``mp-1.json.gz`` give ``mp-1``; so do
    ``mp-1/CHGCAR``, ``mp-1/CHGCAR.3static`` and ``mp-1/relax/CHGCAR``.

    Raises
    ------
    ConfigError
        There is no id, or it cannot be a store's name.
    """
    naming = naming or Naming()
    found = _id_by(path.absolute(), naming)
    if not found:
        raise ConfigError(
            f"{path} gives no task id (id_from is {naming.id_from!r}). Rename the file, or choose "
            "another rule with --id-from: name, directory, path, or a regular expression."
        )
    try:
        return check_task_id(found)
    except ConfigError:
        raise ConfigError(
            f"{path} gives the task id {found!r}, which is not a plain name of letters, digits, "
            "._+=@- and blanks inside. Rename the file, or choose another rule with --id-from."
        ) from None


def _id_by(path: Path, naming: Naming) -> str:
    if naming.id_from == "auto":
        # The nearest directory that is not a step of a calculation.
        above = (directory.name for directory in path.parents if not is_step(directory.name))
        return _id_in_name(path) or next(above, "")
    if naming.id_from == "name":
        return _id_in_name(path, also_steps=True)
    if naming.id_from == "directory":
        return path.parent.name
    inside = path.relative_to(naming.root) if path.is_relative_to(naming.root) else path
    if naming.id_from == "path":
        parts = (*inside.parent.parts, _id_in_name(path, also_steps=True))
        return "_".join(filter(None, parts)) or path.parent.name
    match = re.search(naming.id_from, inside.as_posix())
    return next((group for group in match.groups() if group), match[0]) if match else ""


def _id_in_name(path: Path, *, also_steps: bool = False) -> str:
    """The id in a file's name; empty if the name says nothing of the material."""
    bare = _COMPRESSED.sub("", path.name)
    fmt = format_of(path.name)
    match = fmt.match(bare)
    if match is None:
        vasp, _, step = bare.partition(".")
        if not _BARE_VASP_NAME.fullmatch(vasp) or (step and (also_steps or not is_step(step))):
            return bare
        return ""
    found = [group for group in match.groups() if group]
    if fmt not in (_VASP, _JSON):
        return found[0] if found else ""
    if also_steps:
        return "_".join(found)
    before, after = (found[0], "") if fmt == _JSON else (match["before"], match["after"])
    if before and not is_step(before):
        return before
    if after and not is_step(after) and _is_id(after, path.parent.name):
        return after
    return ""


def is_step(name: str) -> bool:
    """Whether a name is a step of a calculation (``relax``, ``3static``, ``01_scf``)."""
    words = [word for word in re.split(r"[._-]", name) if word and not word.isdigit()]
    return bool(words) and all(_STEP.fullmatch(word) for word in words)


def _is_id(after: str, directory: str) -> bool:
    """Whether ``CHGCAR_<after>`` names a material: it has a digit or begins as a formula does.

    ``CHGCAR.1`` in ``mp-1/`` is a step, and ``CHGCAR.relax2.bak`` a copy of one.
    """
    if after.isdigit():
        return _MATERIAL.match(directory) is None
    name = "".join(word for word in after.split(".") if not is_step(word))
    return any(map(str.isdigit, name)) or name[:1].isupper()


def is_density_name(name: str) -> bool:
    """Whether a file of this name is converted when no pattern is given."""
    return _reason_against(name) is None


def _reason_against(name: str) -> str | None:
    """Say why a file of this name is not converted without a pattern; None if it is."""
    if name.startswith("."):
        return "a hidden file"
    bare = _COMPRESSED.sub("", name)
    matches = ((fmt, match) for fmt in _formats if (match := fmt.match(bare)))
    if (found := next(matches, None)) is None:
        return "not named like a charge density (CHGCAR, mp-1.CHGCAR, mp-1.json)"
    fmt, match = found
    if fmt == _JSON and (match[1].lower() in _NO_DENSITY_JSON or _MAP.fullmatch(match[1])):
        return "JSON that workflow software writes, not a density"
    after = match["after"] if fmt == _VASP else None
    if after and not is_step(after) and (match["before"] or not _is_id(after, "")):
        return f"{after!r} after CHGCAR is neither a material nor a step of a calculation"
    return None


def find_files(
    src: Path,
    pattern: str | None = None,
    naming: Naming | None = None,
    *,
    prefer: str | None = None,
    apart: Path | None = None,
) -> Sources:
    """Source files below ``src``, sorted by name; ``src`` itself if it is a file.

    Without a pattern: every file named like a charge density, in the whole tree. With a pattern:
    what ``Path.glob`` finds. Hidden directories, Zarr stores and ``apart`` (the destination) are
    not searched. Two files of one task id are an error, unless ``prefer`` matches one of them.
    """
    try:
        is_file, is_directory = src.is_file(), src.is_dir()
    except OSError as exc:  # no permission to look, a name that is too long
        raise ConfigError(
            f"{src} cannot be read ({exc.strerror}). Give a density file or a directory of them."
        ) from exc
    if is_file:
        return Sources(*_named([src], naming or Naming(root=src.parent)))
    if not is_directory:
        raise ConfigError(f"{src} does not exist. Give a density file or a directory of them.")
    naming = naming or Naming(root=src)
    unreadable: list[LeftOut] = []
    left_out: list[LeftOut] = []
    chosen = _glob(src, pattern) if pattern is not None else None
    deepest = None if pattern is None or "**" in pattern else len(Path(pattern).parts) - 1
    files = []
    for entry in _walk(src, deepest, apart, unreadable):
        path = Path(entry.path)
        if chosen is None:
            reason = _reason_against(entry.name) or _reason_against_kind(entry)
        elif path in chosen:
            reason = _reason_against_kind(entry)
        else:
            continue
        if reason is None:
            files.append(path)
        elif chosen is not None or _RESEMBLES_DENSITY.search(entry.name):
            left_out.append(LeftOut(path, reason))
    if unreadable and unreadable[0].path == src:
        raise ConfigError(f"{src} {unreadable[0].reason}. Make it readable (chmod u+rx).")
    if not files:
        raise _nothing_found(src, pattern, sorted(unreadable) + sorted(left_out))
    named, nameless = _named(sorted(files), naming)
    others = _not_preferred(named, naming, _glob(src, prefer) if prefer is not None else set())
    return Sources(
        {path: task_id for path, task_id in named.items() if path not in others},
        nameless,
        tuple(sorted((*left_out, *others.values()))),
        tuple(sorted(unreadable)),
    )


def _named(files: Sequence[Path], naming: Naming) -> tuple[dict[Path, str], dict[Path, str]]:
    """The task ids of files, and the errors of those that give none."""
    named, nameless = {}, {}
    for path in files:
        try:
            named[path] = task_id_of(path, naming)
        except ConfigError as exc:
            nameless[path] = str(exc)
    return named, nameless


def _glob(src: Path, pattern: str) -> set[Path]:
    try:
        return set(src.glob(pattern))
    except (ValueError, NotImplementedError) as exc:
        raise ConfigError(
            f"pattern {pattern!r} cannot be used ({exc}). Write for example '*.json.gz' or "
            "'**/CHGCAR'."
        ) from exc


def _walk(
    src: Path, deepest: int | None, apart: Path | None, unreadable: list[LeftOut]
) -> Iterator[os.DirEntry[str]]:
    """Everything in the tree except directories, links to directories followed once."""
    todo, seen = [(src, 0)], set()
    while todo:
        directory, depth = todo.pop()
        try:
            state = directory.stat()
            if (state.st_dev, state.st_ino) in seen:
                continue  # a link to a directory above
            seen.add((state.st_dev, state.st_ino))
            with os.scandir(directory) as entries:
                below = sorted(entries, key=lambda entry: entry.name)
        except OSError as exc:
            unreadable.append(LeftOut(directory, f"cannot be read ({exc.strerror})"))
            continue
        for entry in below:
            path = Path(entry.path)
            if not _is_directory(entry):
                yield entry
            elif (
                (deepest is None or depth < deepest)
                and not entry.name.startswith(".")
                and not entry.name.endswith(".zarr")
                and path != apart
            ):
                todo.append((path, depth + 1))


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:
        return False


def _reason_against_kind(entry: os.DirEntry[str]) -> str | None:
    try:
        mode = entry.stat().st_mode
    except OSError as exc:
        return "a broken link" if entry.is_symlink() else f"cannot be read ({exc.strerror})"
    return None if stat.S_ISREG(mode) else "not a regular file"


def _nothing_found(src: Path, pattern: str | None, others: Sequence[LeftOut]) -> ConfigError:
    if pattern is not None:
        hint, advice = f"no file matches {pattern!r}", "Give another pattern"
    else:
        hint = "no file is named *.CHGCAR, CHGCAR, *.CHGCAR.gz, *.json or *.json.gz"
        advice = "Rename them, or choose them with a pattern"
    seen = "; ".join(f"{item.path}: {item.reason}" for item in others[:5])
    swapped = " It holds Zarr stores: SRC comes before DST." if any(src.glob("*.zarr*")) else ""
    return ConfigError(
        f"No densities in {src}: {hint}{f' ({seen})' if seen else ''}.{swapped} {advice}, for "
        "example '*.json.gz' or '**/CHGCAR'."
    )


def _not_preferred(
    named: Mapping[Path, str], naming: Naming, preferred: Collection[Path]
) -> dict[Path, LeftOut]:
    """The files that are not converted because another one of the same id is preferred."""
    by_id: dict[str, list[Path]] = {}
    for path, task_id in named.items():
        by_id.setdefault(task_id, []).append(path)
    others, unclear = {}, {}
    for task_id, paths in by_id.items():
        chosen = [path for path in paths if path in preferred]
        if len(paths) > 1 and len(chosen) != 1:
            unclear[task_id] = chosen or paths
        others.update(
            {
                path: LeftOut(path, f"{task_id} is converted from {chosen[0]}")
                for path in paths
                if chosen and path != chosen[0]
            }
        )
    if unclear:
        raise _equal_ids(unclear, list(named), naming)
    return others


def _equal_ids(
    unclear: Mapping[str, Sequence[Path]], files: Sequence[Path], naming: Naming
) -> ConfigError:
    """The error for ids that have several files, with these files and a remedy that works."""
    shown = [
        f"{' and '.join(map(str, paths))} are {'both' if len(paths) == 2 else 'all'} {task_id}"
        for task_id, paths in list(unclear.items())[:_MAX_SHOWN]
    ]
    if len(unclear) > _MAX_SHOWN:
        shown.append(f"several files each for {len(unclear) - _MAX_SHOWN} more")
    if directories := _directories_apart(unclear.values(), naming.root):
        apart = " and ".join(map(str, directories))
        return ConfigError(f"{'; '.join(shown)}. Convert {apart} one by one, each to its own DST.")
    first, second = next(iter(unclear.values()))[:2]
    ways = [f"choose one of each (--prefer '{_pattern_of(first, second)}')"]
    by_path, _ = _named(files, replace(naming, id_from="path"))
    if len(set(by_path.values())) == len(by_path):
        ways.append("name them by their path (--id-from path)")
    return ConfigError(f"{'; '.join(shown)}. Move the others away, or {', or '.join(ways)}.")


def _directories_apart(groups: Collection[Sequence[Path]], root: Path) -> list[Path]:
    """The directories in ``root`` that keep the files of each group apart, such as input and label;
    none if they do not.
    """
    found: set[Path] = set()
    for paths in groups:
        tops = {root / path.relative_to(root).parts[0] for path in paths}
        if len(tops) < len(paths) or tops.intersection(paths):
            return []
        found |= tops
    return sorted(found)


def _pattern_of(first: Path, second: Path) -> str:
    """A pattern that chooses the first of two files."""
    if first.name != second.name:
        return f"**/{first.name}"
    pairs = zip(reversed(first.parts), reversed(second.parts), strict=False)
    return f"**/{next((one for one, other in pairs if one != other), first.name)}/**/{first.name}"
