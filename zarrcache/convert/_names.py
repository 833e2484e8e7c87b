"""Which files are charge densities, and which material each one is: by their names alone, nothing
is opened.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from zarrcache._keys import check_task_id
from zarrcache.errors import ConfigError

__all__ = ["find_files", "is_density_name", "is_json_name", "task_id_of"]

_COMPRESSED = re.compile(r"\.(gz|bz2|xz|lzma)$", re.IGNORECASE)
_VASP_NAME = re.compile(
    r"CHGCAR(?:\.vasp)?|(?P<before>.+)[._-]CHGCAR(?:\.vasp)?|CHGCAR[._-](?P<after>[A-Za-z0-9-]+)",
    re.IGNORECASE,
)
# CHG, LOCPOT, AECCAR2: the directory says which material
_BARE_VASP_NAME = re.compile(r"[A-Z]{3,8}[0-9]?|CHGCAR\.vasp")


def task_id_of(path: Path) -> str:
    """Task id of a source file.

    ``mp-1.CHGCAR``, ``mp-1_CHGCAR.gz``, ``CHGCAR_mp-1`` and ``mp-1.json.gz`` give ``mp-1``; a plain
    ``CHGCAR`` gives its directory's name.

    Raises
    ------
    ConfigError
        The name that is left cannot be a store's name.
    """
    name = _COMPRESSED.sub("", path.name)
    match = _VASP_NAME.fullmatch(name)
    if is_json_name(name):
        found = name[: -len(".json")]
    elif match is not None and (match["before"] or match["after"]):
        found = match["before"] or match["after"]
    elif match is not None or _BARE_VASP_NAME.fullmatch(name):
        found = path.absolute().parent.name
    else:
        found = name
    try:
        return check_task_id(found)
    except ConfigError:
        raise ConfigError(
            f"{path} gives the task id {found!r}, which is not a plain name of letters, digits and "
            "._+=@-. Rename the file."
        ) from None


def is_density_name(name: str) -> bool:
    """Whether a file of this name is converted when no pattern is given: a CHGCAR or a JSON file,
    perhaps compressed.
    """
    return not name.startswith(".") and (
        is_json_name(name) or _VASP_NAME.fullmatch(_COMPRESSED.sub("", name)) is not None
    )


def is_json_name(name: str) -> bool:
    """Whether a file of this name is JSON, perhaps compressed."""
    return _COMPRESSED.sub("", name).lower().endswith(".json")


def find_files(src: Path, pattern: str | None = None) -> list[Path]:
    """Source files below ``src``, sorted by name; ``src`` itself if it is a file.

    Without a pattern: every CHGCAR and JSON file in the directory, and a file named CHGCAR in each
    directory in it. With a pattern: whatever ``Path.glob`` finds.

    Raises
    ------
    ConfigError
        ``src`` is not there, nothing matches, or two files have the same task id.
    """
    if src.is_file():
        return [src]
    if not src.is_dir():
        raise ConfigError(f"{src} is not there. Give a density file or a directory of them.")
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
    _refuse_twins(files)
    return files


def _refuse_twins(files: Sequence[Path]) -> None:
    seen: dict[str, Path] = {}
    for path in files:
        try:
            task_id = task_id_of(path)
        except ConfigError:
            continue  # it fails on its own, by name, when its turn comes
        if task_id in seen:
            raise ConfigError(
                f"{seen[task_id]} and {path} are both {task_id}. Move one of them away, or choose "
                "one with a pattern."
            )
        seen[task_id] = path
