"""Convert many density files to Zarr stores: plan first, then execute.

>>> plan = plan_convert("chgcars/", "s3://bucket/label")  # doctest: +SKIP
>>> report = plan.execute()  # doctest: +SKIP
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zarrcache._units import whole_number
from zarrcache.arrays import PymatgenMissingError
from zarrcache.convert.density import ChargeDensity, read_density
from zarrcache.convert.durable import make_directory, sync_directory
from zarrcache.convert.formats import (
    InputFormat,
    LeftOut,
    Naming,
    find_files,
    registered_formats,
    task_id_of,
)
from zarrcache.convert.provenance import Existing, source_of
from zarrcache.convert.writer import (
    DEFAULT_CHUNKS,
    StoreExistsError,
    check_layout,
    encode_store,
    examine_store,
    publish_store,
    store_exists,
    sweep_partials,
    witness_in,
    zipped,
)
from zarrcache.errors import ConfigError, OriginError, ZarrCacheError
from zarrcache.origin import refuse_secrets, split_s3_url
from zarrcache.parallel import Died, Engine, Reserve, cores, node_name, spread

if TYPE_CHECKING:
    from zarrcache.convert.upload import S3Destination

__all__ = ["ConvertPlan", "ConvertReport", "ConvertResult", "convert_directory", "plan_convert"]

logger = logging.getLogger(__name__)

#: Bytes of compressed files that one process converts while another starts and imports pymatgen
#: (0.5 to 1 s).
BYTES_PER_WORKER = 32 * 1024**2
#: Seconds that a process gets to finish its store after Ctrl-C; then it is killed, and the next run
#: converts that store.
_STOP_S = 3.0
#: Stores that are examined at a time, mostly waiting for a server or a network file system.
_EXAMINE_THREADS = 16


@dataclass(frozen=True)
class ConvertResult:
    """Outcome for one file.

    Attributes
    ----------
    path : Path
    task_id : str
        Empty if the file's name does not give one.
    target : str
        Path or URL of the store; empty without a task id.
    written_bytes : int
    warnings : tuple of str
        Suspicious findings; the store was written nevertheless.
    error : str or None
        The reason why there is no store.
    skipped : bool
        A whole store of the same file existed already.
    """

    path: Path
    task_id: str
    target: str
    written_bytes: int = 0
    warnings: tuple[str, ...] = ()
    error: str | None = None
    skipped: bool = False


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

    A file is skipped only if its store is whole and was made from the same content. A store that is
    not whole is converted again. A store of another file is not replaced without ``overwrite``; it
    is in ``refused``.

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
        Not converted: another file's store is there, a file gives no task id, or a directory
        cannot be read. They are ``failed`` in the report.
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
    _convert: _Converter = field(repr=False)
    refused: tuple[ConvertResult, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    unrecorded: tuple[Path, ...] = ()

    @property
    def task_ids(self) -> dict[Path, str]:
        """The task id of each file to convert."""
        return {path: self._convert.result(path).task_id for path in self.files}

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
        if not _is_s3(self.dst):
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
            for path, outcome in outcomes:
                if isinstance(outcome, ZarrCacheError):
                    raise outcome
                results[path] = outcome
                if progress is not None:
                    progress(outcome)
        done = [results[path] for path in self.files]
        already = [self._convert.result(path, skipped=True) for path in self.skipped]
        if not _is_s3(self.dst):
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
    ) -> Generator[tuple[Path, ConvertResult | ZarrCacheError]]:
        if engine is None and self.workers == 1:
            for path in self.files:
                yield path, self._convert(path)
            return
        try:
            with ExitStack() as stack:
                if engine is None:
                    given = spread(self._convert, self.files, self.workers, stop_s=_STOP_S)
                else:
                    witness = None
                    if not _is_s3(self.dst):
                        witness = stack.enter_context(witness_in(Path(self.dst)))
                    directories = [path.parent for path in self.files] or [Path()]
                    root = Path(os.path.commonpath(directories))
                    given = engine(_Elsewhere(self._convert, root, witness), self.files)
                for path, outcome in stack.enter_context(closing(given)):
                    if isinstance(outcome, Died):
                        error = (
                            f"{path}: two worker processes died while converting it ({outcome}). "
                            "Convert it alone, with more memory."
                        )
                        yield path, self._convert.result(path, error=error)
                    else:
                        yield path, outcome
        finally:
            if not _is_s3(self.dst):
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
        Pattern of ``Path.glob`` below ``src``. Of several files with one id, the one that matches
        is converted, and the others are in ``left_out``.
    units : {"cell", "volume"}
        ``cell``: density times cell volume, as in the file. ``volume``: electrons per cubic
        angstrom, computed in float64 and rounded once; the store says so in its attributes.
    dtype : {"float32", "float64"}
        Of the arrays. With float64, readers compute every unit from the file's own values.

    Raises
    ------
    ConfigError
        No such files, two with the same task id, or an unusable destination or setting.
    OriginError
        The bucket does not exist, or access is denied.
    """
    target = _destination_of(dst)
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
    apart = None if _is_s3(target) else Path(target)
    found = find_files(root, pattern, naming, prefer=prefer, apart=apart)
    convert = _Converter(
        target,
        sizes,
        zip,
        zarr_format,
        diff,
        overwrite,
        dict(s3_kwargs or {}),
        strict,
        registered_formats(),
        naming,
        units,
        dtype,
    )
    nameless = convert.without_id(found.files)
    named = [path for path in found.files if path not in nameless]
    verdicts = {} if overwrite else convert.verdicts(named)
    convert.replace = frozenset(
        convert.name_of(path) for path, verdict in verdicts.items() if verdict.is_damaged
    )
    todo = tuple(path for path in named if path not in verdicts or verdicts[path].is_damaged)
    refused = [
        ConvertResult(
            item.path,
            task_id="",
            target="",
            error=f"{item.path} {item.reason}: files in it are missing here. Make it readable "
            "(chmod u+rx).",
        )
        for item in found.unreadable
    ]
    refused += [convert.result(path, error=error) for path, error in nameless.items()]
    refused += [convert.result(path, error=v.error) for path, v in verdicts.items() if v.error]
    skipped = tuple(path for path, verdict in verdicts.items() if verdict.is_done)
    enough = min(cores(), -(-sum(path.stat().st_size for path in todo) // BYTES_PER_WORKER))
    return ConvertPlan(
        target,
        todo,
        skipped,
        max(1, min(workers or enough, len(todo))),
        convert,
        refused=tuple(refused),
        left_out=found.left_out,
        unrecorded=tuple(path for path in skipped if verdicts[path].existing.source is None),
    )


def _destination_of(dst: str | os.PathLike[str]) -> str:
    """The URL, or the absolute path, of the directory for the stores. Raises ConfigError."""
    target = os.fspath(dst).removeprefix("file://")
    if _is_s3(target):
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
    if not _is_s3(target) and os.path.lexists(target) and not os.path.isdir(target):
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


@dataclass
class _Converter:
    """Converts one file per call. Picklable; each process opens its own S3 client at first use."""

    dst: str
    chunks: tuple[int, ...]
    zip: bool
    zarr_format: Literal[2, 3]
    diff: bool
    overwrite: bool
    s3_kwargs: dict[str, Any] = field(repr=False)
    strict: bool
    formats: tuple[InputFormat, ...]
    naming: Naming
    units: Literal["cell", "volume"]
    dtype: Literal["float32", "float64"]
    #: Names of stores that are not whole, to be replaced.
    replace: frozenset[str] = frozenset()

    def __call__(
        self, path: Path, reserve: Reserve | None = None
    ) -> ConvertResult | ZarrCacheError:
        """Convert one file.

        An error of the file is in the result. An error of the destination, which would affect the
        next file too, is returned itself.
        """
        try:
            density, objects = self._encoded(path)
        except PymatgenMissingError as exc:
            return exc  # all other files would fail in the same way
        except ZarrCacheError as exc:
            return self.result(path, error=str(exc))
        except OSError as exc:
            return self.result(path, error=f"{path} cannot be read ({exc.strerror or exc}).")
        except MemoryError:
            return self.result(
                path,
                error=f"{path} could not be converted, because this process gets no more memory. "
                "Use fewer --workers, or give the job more memory.",
            )
        except Exception as exc:
            # A file can make a parser fail in any way; the other files are still converted.
            logger.warning("%s could not be converted", path, exc_info=True)
            return self.result(
                path,
                error=f"{path} could not be converted: {type(exc).__name__}: {exc}. Please report "
                "this with the file.",
            )
        name = f"{density.task_id}{self.suffix}"
        target = f"{self.dst}/{name}"
        warnings = density.warnings
        if name in self.replace:
            warnings = (*warnings, f"{target} was not whole; it is converted again.")
        overwrite = self.overwrite or name in self.replace
        try:
            try:
                if self._destination is not None:
                    written = self._destination.upload(name, objects, overwrite=overwrite)
                else:
                    written = publish_store(Path(target), objects, overwrite=overwrite)
            except StoreExistsError:  # another process wrote it meanwhile
                return self._found_meanwhile(path, target)
        except ConfigError as exc:
            return self.result(path, error=str(exc))
        except OriginError as exc:
            return exc
        except OSError as exc:
            return OriginError(
                f"{target} could not be written: {exc.strerror}. Make room or choose another "
                "destination; finished stores are kept."
            )
        return self.result(path, written_bytes=written, warnings=warnings)

    def _encoded(self, path: Path) -> tuple[ChargeDensity, dict[str, bytes]]:
        """Read and check one file, and encode its store in memory."""
        source = source_of(path)
        density = read_density(
            path,
            diff=self.diff,
            strict=self.strict,
            formats=self.formats,
            task_id=task_id_of(path, self.formats, self.naming),
            units=self.units,
            dtype=self.dtype,
        )
        objects = encode_store(
            density.total,
            density.diff,
            density.structure,
            density.metadata,
            chunks=self.chunks,
            zarr_format=self.zarr_format,
            source=source,
            diff_wanted=self.diff,
            units=self.units,
            dtype=self.dtype,
        )
        return density, {"": zipped(objects)} if self.zip else objects

    def _found_meanwhile(self, path: Path, target: str) -> ConvertResult:
        verdict = self.verdicts([path]).get(path)
        if verdict is None or verdict.is_done:
            return self.result(path, skipped=True)
        error = verdict.error or f"{target} is not whole. Run the same command again."
        return self.result(path, error=error)

    def result(self, path: Path, **fields: Any) -> ConvertResult:
        """A result for ``path`` with its task id and target."""
        name = self.name_of(path)
        return ConvertResult(
            path, name.removesuffix(self.suffix), f"{self.dst}/{name}" if name else "", **fields
        )

    def without_id(self, paths: Sequence[Path]) -> dict[Path, str]:
        """Files that give no task id, each with the error."""
        errors = {}
        for path in paths:
            try:
                task_id_of(path, self.formats, self.naming)
            except ConfigError as exc:
                errors[path] = str(exc)
        return errors

    def name_of(self, path: Path) -> str:
        """Store name of ``path``; empty if the file name gives none (an error of that file)."""
        try:
            return task_id_of(path, self.formats, self.naming) + self.suffix
        except ConfigError:
            return ""

    def verdicts(self, paths: Sequence[Path]) -> dict[Path, _Verdict]:
        """Decide what to do with the files whose store exists.

        Raises
        ------
        ConfigError
            Some exist in the other form, which readers would continue to read.
        """
        names = {path: self.name_of(path) for path in paths}
        present = self._present(set(names.values()) - {""})
        there = {path: name for path, name in names.items() if name in present}
        with ThreadPoolExecutor(_EXAMINE_THREADS) as threads:
            verdicts = threads.map(self._judge, there.keys(), there.values())
            return dict(zip(there, verdicts, strict=True))

    def _judge(self, path: Path, name: str) -> _Verdict:
        target = f"{self.dst}/{name}"
        try:
            existing = (
                examine_store(Path(target))
                if self._destination is None
                else self._destination.examine(name)
            )
            is_same = existing.source is not None and existing.source.is_of(path)
        except OriginError:
            raise
        except OSError as exc:
            where = exc.filename or target
            return _Verdict(Existing(""), f"{where} cannot be read ({exc.strerror or exc}).")
        hint = "Replace it with --overwrite, or choose another destination."
        error = None
        if existing.units != self.units and not existing.problem:
            error = f"{target} was converted with --units {existing.units}. {hint}"
        elif existing.source is None:
            if existing.problem:
                error = (
                    f"{target} is not whole ({existing.problem}) and does not say what it was made "
                    f"from, so it is not replaced. {hint}"
                )
        elif not is_same:
            error = (
                f"{target} was made from another file ({existing.source.name}, "
                f"{existing.source.bytes} bytes, sha256 {existing.source.sha256[:16]}...) than "
                f"{path}, so it is not replaced. {hint}"
            )
        elif self.diff and not existing.has_diff and not existing.problem:
            error = f"{target} was converted without --diff. {hint}"
        elif existing.dtype != self.dtype and not existing.problem:
            error = f"{target} was converted with --dtype {existing.dtype}. {hint}"
        return _Verdict(existing, error)

    def _present(self, names: set[str]) -> set[str]:
        """The names of stores that exist already. Raises as :meth:`verdicts`."""
        other = ".zarr" if self.zip else ".zarr.zip"
        twins = {name.removesuffix(self.suffix) + other for name in names}
        if self._destination is not None:
            found = self._destination.finished((names | twins) & self._destination.names())
        else:
            try:
                found = {name for name in names | twins if store_exists(Path(self.dst, name))}
            except OSError as exc:
                raise ConfigError(
                    f"destination {self.dst} cannot be read ({exc.strerror}). Give a directory "
                    "that you may read and write."
                ) from exc
        if both := sorted(found & twins):
            raise ConfigError(
                f"{self.dst} holds {len(both)} of these stores as {other} ({', '.join(both[:3])}); "
                f"beside a {self.suffix} it is ambiguous which one is read. Remove them, choose "
                f"another destination, or convert {'without' if self.zip else 'with'} zip."
            )
        return found

    @property
    def suffix(self) -> str:
        return ".zarr.zip" if self.zip else ".zarr"

    @functools.cached_property
    def _destination(self) -> S3Destination | None:
        """The S3 client of this process; not pickled."""
        if not _is_s3(self.dst):
            return None
        from zarrcache.convert.upload import S3Destination

        return S3Destination(self.dst, self.s3_kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_destination"}


@dataclass(frozen=True)
class _Verdict:
    """The decision for a file whose store exists: skip it, convert it again, or fail."""

    existing: Existing
    error: str | None

    @property
    def is_damaged(self) -> bool:
        return self.error is None and bool(self.existing.problem)

    @property
    def is_done(self) -> bool:
        return self.error is None and not self.existing.problem


@dataclass(frozen=True)
class _Elsewhere:
    """Runs the converter on another machine, after a check that it sees the same files.

    Without it, thousands of files would fail one by one, or stores would be written to a local
    disk.
    """

    convert: _Converter
    root: Path
    witness: Path | None

    def __call__(
        self, path: Path, reserve: Reserve | None = None
    ) -> ConvertResult | ZarrCacheError:
        for needed, name in ((self.root, self.root), (self.witness, self.convert.dst)):
            if needed is not None and not needed.exists():
                return ConfigError(
                    f"{node_name()} does not see {name}. Sources and destination must be on a file "
                    "system that all machines of the cluster share; stores may also go to S3."
                )
        return self.convert(path, reserve)


def _is_s3(dst: str) -> bool:
    return dst.startswith("s3://")
