"""Convert many density files to Zarr stores: plan first, then execute.

>>> plan = plan_convert("chgcars/", "s3://bucket/label")  # doctest: +SKIP
>>> report = plan.execute()  # doctest: +SKIP
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zarrcache._units import whole_number
from zarrcache.convert.density import read_density
from zarrcache.convert.formats import InputFormat, find_files, registered_formats, task_id_of
from zarrcache.convert.writer import (
    StoreExistsError,
    check_layout,
    encode_store,
    publish_store,
    store_exists,
    sweep_partials,
    witness_in,
    zipped,
)
from zarrcache.errors import ConfigError, OriginError, ZarrCacheError
from zarrcache.origin import split_s3_url
from zarrcache.parallel import Died, Engine, Reserve, cores, node_name, spread

if TYPE_CHECKING:
    from zarrcache.convert.upload import S3Destination

__all__ = ["ConvertPlan", "ConvertReport", "ConvertResult", "convert_directory", "plan_convert"]

logger = logging.getLogger(__name__)

#: Bytes that one process converts while another starts and imports pymatgen (2 s).
BYTES_PER_WORKER = 8 * 1024**2
#: Seconds that a process gets to finish its store after Ctrl-C; then it is killed, and the next run
#: converts that store.
_STOP_S = 3.0


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
        The store existed already.
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
    """

    dst: str
    files: tuple[Path, ...]
    skipped: tuple[Path, ...]
    workers: int
    _convert: _Converter = field(repr=False)

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
        appears complete or not at all: after an interruption (Ctrl-C, kill) the same call resumes.

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
            The directory cannot be created, processes cannot start, or a machine does not see the
            same files.
        OriginError
            The destination fails: disk full, refused, no answer. Finished stores are kept.
        """
        if not _is_s3(self.dst):
            try:
                os.makedirs(self.dst, exist_ok=True)
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
        return ConvertReport(
            converted=tuple(
                result for result in done if result.error is None and not result.skipped
            ),
            skipped=(*already, *(result for result in done if result.skipped)),
            failed=tuple(result for result in done if result.error is not None),
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
                    outcomes = stack.enter_context(
                        closing(spread(self._convert, self.files, self.workers, stop_s=_STOP_S))
                    )
                else:
                    witness = (
                        None
                        if _is_s3(self.dst)
                        else stack.enter_context(witness_in(Path(self.dst)))
                    )
                    root = (
                        Path(os.path.commonpath([path.parent for path in self.files]))
                        if self.files
                        else Path()
                    )
                    outcomes = stack.enter_context(
                        closing(engine(_Elsewhere(self._convert, root, witness), self.files))
                    )
                for path, outcome in outcomes:
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
    chunks: int | Sequence[int] = (16, 16, 16),
    zip: bool = False,
    zarr_format: Literal[2, 3] = 2,
    diff: bool = False,
    overwrite: bool = False,
    s3_kwargs: Mapping[str, Any] | None = None,
    strict: bool = True,
) -> ConvertPlan:
    """Find the files to convert, and those that are converted already.

    Parameters
    ----------
    src : str or path
        A density file, or a directory of them: ``mp-1.CHGCAR``, ``CHGCAR_mp-1``, ``mp-1/CHGCAR``,
        ``mp-1.json``, and the formats of ``register_format``; each perhaps compressed.
    dst : str or path
        Directory or ``s3://bucket/prefix``; the stores are named ``<task_id>.zarr``.
    pattern : str, optional
        Pattern of ``Path.glob`` below ``src``, for example ``"**/CHGCAR"``.
    workers : int, optional
        Processes. Default: min(usable cores, source size / 8 MiB).
    chunks : int or three ints
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

    Raises
    ------
    ConfigError
        No such files, two with the same task id, or an unusable destination or setting.
    OriginError
        The bucket does not exist, or access is denied.
    """
    target = os.fspath(dst).removeprefix("file://")
    if _is_s3(target):
        split_s3_url(target)  # refuses a URL without a bucket
        target = target.rstrip("/")
    elif "://" in target:
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
    sizes: tuple[int, ...] = (chunks,) * 3 if isinstance(chunks, int) else tuple(chunks)
    check_layout(sizes, zarr_format)
    if workers is not None:
        whole_number("workers", workers, least=1)
    files = find_files(Path(src).expanduser().absolute(), pattern)
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
    )
    names = {path: convert.name_of(path) for path in files}
    present = convert.present(set(names.values()) - {""})
    todo = tuple(path for path in files if overwrite or names[path] not in present)
    skipped = tuple(path for path in files if path not in set(todo))
    enough = min(cores(), -(-sum(path.stat().st_size for path in todo) // BYTES_PER_WORKER))
    return ConvertPlan(target, todo, skipped, max(1, min(workers or enough, len(todo))), convert)


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

    def __call__(
        self, path: Path, reserve: Reserve | None = None
    ) -> ConvertResult | ZarrCacheError:
        """Convert one file.

        An error of the file is in the result. An error of the destination, which would affect the
        next file too, is returned itself.
        """
        try:
            task_id = task_id_of(path, self.formats)
            density = read_density(path, diff=self.diff, strict=self.strict, formats=self.formats)
            objects = encode_store(
                density.total,
                density.diff,
                density.structure,
                density.metadata,
                chunks=self.chunks,
                zarr_format=self.zarr_format,
            )
            if self.zip:
                objects = {"": zipped(objects)}
        except (ZarrCacheError, OSError) as exc:
            return self.result(path, error=str(exc))
        except Exception as exc:
            # A file can make a parser fail in any way; the other files are still converted.
            logger.warning("%s could not be converted", path, exc_info=True)
            return self.result(
                path,
                error=f"{path} could not be converted: {type(exc).__name__}: {exc}. Please report "
                "this with the file.",
            )
        target = f"{self.dst}/{task_id}{self.suffix}"
        try:
            if self._destination is not None:
                written = self._destination.upload(
                    f"{task_id}{self.suffix}", objects, overwrite=self.overwrite
                )
            else:
                written = publish_store(Path(target), objects, overwrite=self.overwrite)
        except StoreExistsError:  # another process wrote it meanwhile
            return self.result(path, skipped=True)
        except ConfigError as exc:
            return self.result(path, error=str(exc))
        except OriginError as exc:
            return exc
        except OSError as exc:
            return OriginError(
                f"{target} could not be written: {exc.strerror}. Make room or choose another "
                "destination; finished stores are kept."
            )
        return self.result(path, written_bytes=written, warnings=density.warnings)

    def result(self, path: Path, **fields: Any) -> ConvertResult:
        """A result for ``path`` with its task id and target."""
        name = self.name_of(path)
        return ConvertResult(
            path, name.removesuffix(self.suffix), f"{self.dst}/{name}" if name else "", **fields
        )

    def name_of(self, path: Path) -> str:
        """Store name of ``path``; empty if the file name gives none (an error of that file)."""
        try:
            return task_id_of(path, self.formats) + self.suffix
        except ConfigError:
            return ""

    def present(self, names: set[str]) -> set[str]:
        """Those of these stores that exist already.

        Raises
        ------
        ConfigError
            Some exist in the other form, which readers would continue to read.
        """
        other = ".zarr" if self.zip else ".zarr.zip"
        twins = {name.removesuffix(self.suffix) + other for name in names}
        if self._destination is not None:
            found = self._destination.finished((names | twins) & self._destination.names())
        else:
            found = {name for name in names | twins if store_exists(Path(self.dst, name))}
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
