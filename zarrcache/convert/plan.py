"""Convert many density files to Zarr stores: plan first, then execute.

>>> plan = plan_convert("chgcars/", "s3://bucket/label")  # doctest: +SKIP
>>> report = plan.execute()  # doctest: +SKIP
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from zarrcache._units import whole_number
from zarrcache.convert.converter import Converter, ConvertResult, is_s3
from zarrcache.convert.density import check_name
from zarrcache.convert.durable import make_directory, sync_directory
from zarrcache.convert.formats import LeftOut, Naming, Sources, find_files, registered_formats
from zarrcache.convert.writer import DEFAULT_CHUNKS, check_layout, sweep_partials, witness_in
from zarrcache.errors import ConfigError, SchemaError, ZarrCacheError
from zarrcache.origin import refuse_secrets, split_s3_url
from zarrcache.parallel import Died, Engine, cores, spread

__all__ = ["ConvertPlan", "ConvertReport", "convert_directory", "plan_convert"]

logger = logging.getLogger(__name__)

#: Bytes of compressed files that one process converts while another starts and imports pymatgen
#: (0.5 to 1 s).
BYTES_PER_WORKER = 32 * 1024**2
#: Seconds that a process gets to finish its store after Ctrl-C; then it is killed, and the next run
#: converts that store.
_STOP_S = 3.0


@dataclass(frozen=True)
class ConvertReport:
    """Outcomes for all files, each list in the order of the file names."""

    converted: tuple[ConvertResult, ...]
    skipped: tuple[ConvertResult, ...]
    failed: tuple[ConvertResult, ...]

    @property
    def written_bytes(self) -> int:
        """Bytes of all stores written."""
        return sum(result.written_bytes for result in self.converted)


@dataclass(frozen=True)
class ConvertPlan:
    """The files to convert and those to skip. Planning writes nothing.

    A file is skipped only if its store is complete and was made from the same content. An
    incomplete store is converted again. A store of another file is not replaced without
    ``overwrite``; it is in ``refused``.

    Attributes
    ----------
    dst : str
        Directory or ``s3://`` URL of the stores.
    files : tuple of Path
        To convert.
    skipped : tuple of Path
        Converted already.
    workers : int
        Processes; 1 is this process itself.
    refused : tuple of ConvertResult
        Not converted: another file's store is there, a file gives no task id or has the name of a
        potential, or a directory cannot be read. They are ``failed`` in the report.
    left_out : tuple of LeftOut
        Files that resemble densities but are not converted, each with the reason.
    unrecorded : tuple of Path
        Those of ``skipped`` whose store does not say what it was made from: another program or an
        earlier version wrote it.
    """

    dst: str
    files: tuple[Path, ...]
    skipped: tuple[Path, ...]
    workers: int
    _convert: Converter = field(repr=False)
    _ids: Mapping[Path, str] = field(repr=False)
    refused: tuple[ConvertResult, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    unrecorded: tuple[Path, ...] = ()

    @property
    def task_ids(self) -> dict[Path, str]:
        """The task id of each file to convert."""
        return {path: self._ids[path] for path in self.files}

    @property
    def source_bytes(self) -> int:
        """Size on disk of the files to convert."""
        return sum(path.stat().st_size for path in self.files)

    def execute(
        self,
        progress: Callable[[ConvertResult], None] | None = None,
        *,
        engine: Engine | None = None,
    ) -> ConvertReport:
        """Convert the files.

        A file that cannot be read is named in the report, and the others are converted. Every store
        appears complete or not at all: after an interruption (Ctrl-C, kill, power failure) the same
        call resumes. Stores that were reported as converted or skipped survive a power failure.

        Parameters
        ----------
        progress : callable, optional
            Called in this process with each result as it arrives, except for skipped files.
        engine : Engine, optional
            Distributes the work, for example ``cluster.spread`` of
            :func:`zarrcache.parallel.open_cluster`; its machines must see the same files.
            Default: ``workers`` processes of this machine.

        Raises
        ------
        ConfigError
            The directory cannot be created, processes cannot start, pymatgen is missing, a machine
            does not see the same files, or ``s3_kwargs`` has secrets that an ``engine`` would send
            to other machines.
        OriginError
            The destination fails: disk full, refused, no answer. Finished stores are kept.
        """
        if engine is not None:
            refuse_secrets(self._convert.s3_kwargs)
        if not is_s3(self.dst):
            try:
                make_directory(Path(self.dst))
            except OSError as exc:
                raise ConfigError(
                    f"directory {self.dst} cannot be created ({exc.strerror}). Choose another "
                    "destination."
                ) from exc
            for path in sweep_partials(Path(self.dst)):
                logger.info("removed what a killed process left: %s", path)
        results = {}
        with closing(self._outcomes(engine)) as outcomes:
            for (path, _), outcome in outcomes:
                if isinstance(outcome, ZarrCacheError):
                    raise outcome
                results[path] = outcome
                if progress is not None:
                    progress(outcome)
        done = [results[path] for path in self.files]
        already = [
            self._convert.result(path, self._ids[path], skipped=True) for path in self.skipped
        ]
        if not is_s3(self.dst):
            sync_directory(Path(self.dst))  # names of stores that a killed run had just published
        return ConvertReport(
            converted=tuple(
                result for result in done if result.error is None and not result.skipped
            ),
            skipped=(*already, *(result for result in done if result.skipped)),
            failed=tuple(
                sorted(
                    (*self.refused, *(result for result in done if result.error is not None)),
                    key=lambda result: result.path,
                )
            ),
        )

    def _outcomes(
        self, engine: Engine | None
    ) -> Generator[tuple[tuple[Path, str], ConvertResult | ZarrCacheError]]:
        files = list(self.task_ids.items())
        if engine is None and self.workers == 1:
            for file in files:
                yield file, self._convert(file)
            return
        try:
            with ExitStack() as stack:
                if engine is None:
                    given = spread(self._convert, files, self.workers, stop_s=_STOP_S)
                else:
                    root = os.path.commonpath([path.parent for path in self.files] or [Path()])
                    shared = [(Path(root), root)]
                    if not is_s3(self.dst):
                        witness = stack.enter_context(witness_in(Path(self.dst)))
                        shared.append((witness, self.dst))
                    given = engine(replace(self._convert, shared=tuple(shared)), files)
                for file, outcome in stack.enter_context(closing(given)):
                    if isinstance(outcome, Died):
                        error = (
                            f"{file[0]}: two worker processes died while converting it "
                            f"({outcome}). Convert it alone, with more memory."
                        )
                        yield file, self._convert.result(*file, error=error)
                    else:
                        yield file, outcome
        finally:
            if not is_s3(self.dst):
                sweep_partials(Path(self.dst))  # left by a process killed after _STOP_S


def plan_convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    pattern: str | None = None,
    workers: int | None = None,
    chunks: int | Sequence[int] = DEFAULT_CHUNKS,
    zip: bool = False,
    zarr_format: Literal[2, 3] = 2,
    diff: bool = False,
    overwrite: bool = False,
    s3_kwargs: Mapping[str, Any] | None = None,
    strict: bool = True,
    id_from: str = "auto",
    prefer: str | None = None,
    units: Literal["cell", "volume"] = "cell",
    dtype: Literal["float32", "float64"] = "float32",
) -> ConvertPlan:
    """Find the files to convert, and those that are converted already.

    Parameters
    ----------
    src : str or path
        A density file, or the root of a tree with them: ``mp-1.CHGCAR``, ``CHGCAR_mp-1``,
        ``mp-1/CHGCAR.3static``, ``mp-1.json``, and the formats of ``register_format``; each perhaps
        compressed.
    dst : str or path
        Directory or ``s3://bucket/prefix``; the stores are named ``<task_id>.zarr``.
    pattern : str, optional
        Pattern of ``Path.glob`` below ``src``, for example ``"**/CHGCAR"``.
    workers : int, optional
        Processes. Default: min(usable cores, source size / 32 MiB).
    chunks : int or three ints
        Grid points along each axis, clipped to the grid.
    zip : bool
        ``<task_id>.zarr.zip``: one file, one request.
    zarr_format : 2 or 3
    diff : bool
        Also convert the spin density, if there is one.
    overwrite : bool
        Convert stores that exist already again.
    s3_kwargs : mapping, optional
        As for ``s3fs.S3FileSystem``.
    strict : bool
        Check the values of each charge density. False for other volumetric data.
    id_from : str
        Source of the task id. ``auto``: the file's name, or if that is VASP's own (``CHGCAR``,
        ``CHGCAR.relax2``), the nearest directory that is not a step (``relax``). ``name``,
        ``directory``, ``path`` (its parts joined with ``_``), or a regular expression for the path
        below ``src`` whose first group is the id.
    prefer : str, optional
        Pattern of ``Path.glob`` below ``src``. If several files have one id, the file that matches
        is converted, and the others are in ``left_out``.
    units : {"cell", "volume"}
        ``cell``: density times cell volume, as in the file. ``volume``: electrons per cubic
        angstrom, computed in float64 and rounded once; an attribute of the store states it.
    dtype : {"float32", "float64"}
        Of the arrays. With float64, readers compute every unit from the file's own values.

    Raises
    ------
    ConfigError
        No such files, two with the same task id, or an unusable destination or setting:
        ``s3_kwargs`` for a directory, for example.
    OriginError
        The bucket does not exist, or access is denied.
    """
    target = _destination_of(dst)
    if s3_kwargs and not is_s3(target):
        raise ConfigError(
            f"{target} is a directory of this machine, and there are settings for S3. Write "
            "s3://bucket/prefix, or leave the settings out."
        )
    sizes: tuple[int, ...] = (chunks,) * 3 if isinstance(chunks, int) else tuple(chunks)
    check_layout(sizes, zarr_format)
    for name, value, known in (
        ("units", units, ("cell", "volume")),
        ("dtype", dtype, ("float32", "float64")),
    ):
        if value not in known:
            raise ConfigError(f"{name} is {value!r}; it has to be {' or '.join(known)}.")
    if workers is not None:
        whole_number("workers", workers, least=1)
    if "://" in os.fspath(src):
        raise ConfigError(f"{src} is not on this machine. Download the files, and give their path.")
    root = Path(src).expanduser().absolute()
    naming = Naming(id_from, root.parent if os.path.isfile(root) else root)
    apart = None if is_s3(target) else Path(target)
    found = find_files(root, pattern, naming, prefer=prefer, apart=apart)
    convert = Converter(
        dst=target,
        chunks=sizes,
        zip=zip,
        zarr_format=zarr_format,
        diff=diff,
        overwrite=overwrite,
        s3_kwargs=dict(s3_kwargs or {}),
        strict=strict,
        formats=registered_formats(),
        units=units,
        dtype=dtype,
    )
    unusable = _unusable(found, strict=strict)
    ids = {path: task_id for path, task_id in found.files.items() if path not in unusable}
    verdicts = {} if overwrite else convert.verdicts(ids)
    convert.replace = frozenset(
        convert.name_of(ids[path]) for path, verdict in verdicts.items() if verdict.is_damaged
    )
    todo = tuple(path for path in ids if path not in verdicts or verdicts[path].is_damaged)
    refused = [ConvertResult(path, "", "", error=error) for path, error in unusable.items()]
    refused += [
        convert.result(path, ids[path], error=verdict.refusal)
        for path, verdict in verdicts.items()
        if verdict.refusal
    ]
    skipped = tuple(path for path, verdict in verdicts.items() if verdict.is_done)
    enough = min(cores(), -(-sum(path.stat().st_size for path in todo) // BYTES_PER_WORKER))
    return ConvertPlan(
        target,
        todo,
        skipped,
        max(1, min(workers or enough, len(todo))),
        convert,
        ids,
        refused=tuple(refused),
        left_out=found.left_out,
        unrecorded=tuple(path for path in skipped if verdicts[path].source is None),
    )


def _unusable(found: Sources, *, strict: bool) -> dict[Path, str]:
    """Errors of files and directories that, by their names, cannot be converted."""
    errors = found.nameless | {
        item.path: f"{item.path} {item.reason}: files in it are missing here. Make it readable "
        "(chmod u+rx)."
        for item in found.unreadable
    }
    for path in found.files if strict else ():
        try:
            check_name(path)
        except SchemaError as exc:
            errors[path] = str(exc)
    return errors


def _destination_of(dst: str | os.PathLike[str]) -> str:
    """The URL, or the absolute path, of the directory for the stores. Raises ConfigError."""
    target = os.fspath(dst).removeprefix("file://")
    if is_s3(target):
        split_s3_url(target)  # refuses a URL without a bucket
        target = target.rstrip("/")
    elif "://" in target or target.startswith("s3:/"):  # the second is what pathlib makes of a URL
        raise ConfigError(
            f"{target!r} has a URL scheme that is not supported. Write s3://bucket/prefix or a "
            "directory."
        )
    else:
        target = os.path.abspath(os.path.expanduser(target))
    if target.endswith((".zarr", ".zarr.zip")):
        raise ConfigError(
            f"{target} is the name of a store. Give the directory for the stores; they are named "
            "after the files."
        )
    if not is_s3(target) and os.path.lexists(target) and not os.path.isdir(target):
        raise ConfigError(f"{target} is not a directory. Give the directory for the stores.")
    return target


def convert_directory(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    progress: Callable[[ConvertResult], None] | None = None,
    engine: Engine | None = None,
    **options: Any,
) -> ConvertReport:
    """Convert a file or a directory of files: :func:`plan_convert`, then execute.

    >>> report = convert_directory("chgcars/", "s3://bucket/label", diff=True)  # doctest: +SKIP
    >>> for result in report.failed:  # doctest: +SKIP
    ...     print(result.error)
    """
    return plan_convert(src, dst, **options).execute(progress, engine=engine)
