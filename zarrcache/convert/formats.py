r"""Input formats of ``zarrcache convert``: recognise density files, their task ids and parsers.

Add a format with one call::

    register_format(InputFormat("cube", r"(.+)\.cube", read_cube))

after which ``plan_convert`` and ``RhoRead`` find, name and read ``mp-1.cube`` and ``mp-1.cube.gz``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from zarrcache._keys import check_task_id
from zarrcache.convert.chgcar import RawDensity, read_mp_json, read_vasp_text
from zarrcache.errors import ConfigError

__all__ = [
    "InputFormat",
    "find_files",
    "format_of",
    "is_density_name",
    "register_format",
    "registered_formats",
    "task_id_of",
]

_COMPRESSED = re.compile(r"\.(gz|bz2|xz|lzma)$", re.IGNORECASE)
#: CHG, LOCPOT, AECCAR2: chosen by an explicit pattern; the directory names the material.
_BARE_VASP_NAME = re.compile(r"[A-Z]{3,8}[0-9]?|CHGCAR\.vasp")


@dataclass(frozen=True)
class InputFormat:
    """How files of one format are recognised and read.

    Attributes
    ----------
    name : str
    pattern : str
        Regular expression for the whole file name without ``.gz``, ``.bz2``, ``.xz`` or ``.lzma``,
        case-insensitive. Its first group that matches is the task id; without one, the directory's
        name is.
    read : callable
        Called with the path; returns a :class:`RawDensity`. It decompresses the file itself
        (``zopen`` of monty does) and must be importable from worker processes: a function of a
        module, not of the main script.
    """

    name: str
    pattern: str
    read: Callable[[Path], RawDensity]

    def match(self, bare_name: str) -> re.Match[str] | None:
        """Match a file name without its compression suffix."""
        return re.fullmatch(self.pattern, bare_name, re.IGNORECASE)


_VASP = InputFormat(
    "vasp",
    r"CHGCAR(?:\.vasp)?|(.+)[._-]CHGCAR(?:\.vasp)?|CHGCAR[._-]([A-Za-z0-9-]+)",
    read_vasp_text,
)
_formats = [InputFormat("mp-json", r"(.+)\.json", read_mp_json), _VASP]


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


def task_id_of(path: Path, formats: Sequence[InputFormat] | None = None) -> str:
    """Task id of a source file, from its name alone.

    ``mp-1.CHGCAR``, ``mp-1_CHGCAR.gz``, ``CHGCAR_mp-1`` and ``mp-1.json.gz`` give ``mp-1``; a plain
    ``CHGCAR`` gives its directory's name.

    Raises
    ------
    ConfigError
        The name that is left cannot be a store's name.
    """
    bare = _COMPRESSED.sub("", path.name)
    match = format_of(path.name, formats).match(bare)
    if match is not None and any(match.groups()):
        found = next(group for group in match.groups() if group)
    elif match is not None or _BARE_VASP_NAME.fullmatch(bare):
        found = path.absolute().parent.name
    else:
        found = bare
    try:
        return check_task_id(found)
    except ConfigError:
        raise ConfigError(
            f"{path} gives the task id {found!r}, which is not a plain name of letters, digits and "
            "._+=@-. Rename the file."
        ) from None


def is_density_name(name: str) -> bool:
    """Whether a file of this name is converted when no pattern is given."""
    bare = _COMPRESSED.sub("", name)
    return not name.startswith(".") and any(fmt.match(bare) for fmt in _formats)


def find_files(src: Path, pattern: str | None = None) -> list[Path]:
    """Source files below ``src``, sorted by name; ``src`` itself if it is a file.

    Without a pattern: every file of a known format in the directory, and a file named CHGCAR in
    each of its subdirectories. With a pattern: what ``Path.glob`` finds.

    Raises
    ------
    ConfigError
        ``src`` does not exist, nothing matches, or two files have the same task id.
    """
    if src.is_file():
        return [src]
    if not src.is_dir():
        raise ConfigError(f"{src} does not exist. Give a density file or a directory of them.")
    try:
        if pattern is not None:
            candidates: Iterable[Path] = src.glob(pattern)
        else:
            bare = ("CHGCAR", "CHGCAR.gz", "CHGCAR.bz2", "CHGCAR.xz")
            candidates = [
                *(p for p in src.iterdir() if is_density_name(p.name)),
                *(p for name in bare for p in src.glob(f"*/{name}")),
            ]
        files = sorted(
            p
            for p in candidates
            if p.is_file() and not any(part.endswith(".zarr") for part in p.relative_to(src).parts)
        )
    except (ValueError, NotImplementedError) as exc:
        raise ConfigError(
            f"pattern {pattern!r} cannot be used ({exc}). Write for example '*.json.gz' or "
            "'**/CHGCAR'."
        ) from exc
    if not files:
        hint = (
            f"no file matches {pattern!r}"
            if pattern is not None
            else "no file is named *.CHGCAR, CHGCAR, *.CHGCAR.gz, *.json or *.json.gz"
        )
        raise ConfigError(
            f"No densities in {src}: {hint}. Rename them, or choose them with a pattern, for "
            "example '*.json.gz' or '**/CHGCAR'."
        )
    _refuse_equal_ids(files)
    return files


def _refuse_equal_ids(files: Sequence[Path]) -> None:
    seen: dict[str, Path] = {}
    for path in files:
        try:
            task_id = task_id_of(path)
        except ConfigError:
            continue  # reported when the file is converted
        if task_id in seen:
            raise ConfigError(
                f"{seen[task_id]} and {path} are both {task_id}. Move one of them away, or choose "
                "one with a pattern."
            )
        seen[task_id] = path
