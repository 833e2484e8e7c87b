"""Convert one file to a store, or decide what to do with a file whose store exists."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zarrcache._keys import cached_property
from zarrcache.arrays import PymatgenMissingError
from zarrcache.convert.density import ChargeDensity, read_density
from zarrcache.convert.formats import InputFormat
from zarrcache.convert.provenance import Existing, source_of
from zarrcache.convert.writer import (
    StoreExistsError,
    encode_store,
    examine_store,
    publish_store,
    store_exists,
    zipped,
)
from zarrcache.errors import ConfigError, OriginError, ZarrCacheError
from zarrcache.parallel import Reserve, node_name

if TYPE_CHECKING:
    from zarrcache.convert.upload import S3Destination

__all__ = ["ConvertResult", "Converter", "is_s3"]

logger = logging.getLogger(__name__)

#: Stores that are examined at a time, mostly waiting for a server or a network file system.
_EXAMINE_THREADS = 16


@dataclass(frozen=True)
class ConvertResult:
    """Outcome for one file.

    Attributes
    ----------
    path : Path
    task_id : str
        Empty if the file does not give one.
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


@dataclass
class Converter:
    """Converts a file, given with its task id, per call.

    Picklable; each process opens its own S3 client at first use.
    """

    dst: str
    chunks: tuple[int, ...]
    zip: bool
    zarr_format: Literal[2, 3]
    diff: bool
    overwrite: bool
    s3_kwargs: dict[str, Any] = field(repr=False)
    strict: bool
    formats: tuple[InputFormat, ...]
    units: Literal["cell", "volume"]
    dtype: Literal["float32", "float64"]
    #: Names of incomplete stores, to be replaced.
    replace: frozenset[str] = frozenset()
    #: What another machine has to see, with the names for messages. Without the check, thousands of
    #: files would fail one by one, or stores would be written to a local disk.
    shared: tuple[tuple[Path, str], ...] = ()

    def __call__(
        self, file: tuple[Path, str], reserve: Reserve | None = None
    ) -> ConvertResult | ZarrCacheError:
        """Convert one file.

        An error of the file is in the result. An error of the destination, which would affect the
        next file too, is returned itself.
        """
        for needed, called in self.shared:
            if not needed.exists():
                return ConfigError(
                    f"{node_name()} does not see {called}. Sources and destination must be on a "
                    "file system that all machines of the cluster share; stores may also go to S3."
                )
        path, task_id = file
        result = functools.partial(self.result, path, task_id)
        try:
            density, objects = self._encoded(path, task_id)
        except PymatgenMissingError as exc:
            return exc  # all other files would fail in the same way
        except ZarrCacheError as exc:
            return result(error=str(exc))
        except OSError as exc:
            return result(error=f"{path} cannot be read ({exc.strerror or exc}).")
        except MemoryError:
            return result(
                error=f"{path} could not be converted, because this process gets no more memory. "
                "Use fewer --workers, or give the job more memory.",
            )
        except Exception as exc:
            # A file can make a parser fail in any way; the other files are still converted.
            logger.warning("%s could not be converted", path, exc_info=True)
            return result(
                error=f"{path} could not be converted: {type(exc).__name__}: {exc}. Please report "
                "this with the file.",
            )
        name = self.name_of(task_id)
        target = f"{self.dst}/{name}"
        warnings = density.warnings
        if name in self.replace:
            warnings = (*warnings, f"{target} was incomplete; it is converted again.")
        overwrite = self.overwrite or name in self.replace
        try:
            try:
                if self._destination is not None:
                    written = self._destination.upload(name, objects, overwrite=overwrite)
                else:
                    written = publish_store(Path(target), objects, overwrite=overwrite)
            except StoreExistsError:  # another process wrote it meanwhile
                verdict = self.verdicts({path: task_id}).get(path)
                if verdict is None or verdict.is_done:
                    return result(skipped=True)
                error = verdict.refusal or f"{target} is incomplete. Run the same command again."
                return result(error=error)
        except ConfigError as exc:
            return result(error=str(exc))
        except OriginError as exc:
            return exc
        except OSError as exc:
            return OriginError(
                f"{target} could not be written: {exc.strerror}. Make room or choose another "
                "destination; finished stores are kept."
            )
        return result(written_bytes=written, warnings=warnings)

    def _encoded(self, path: Path, task_id: str) -> tuple[ChargeDensity, dict[str, bytes]]:
        """Read and check one file, and encode its store in memory."""
        source = source_of(path)
        density = read_density(
            path,
            diff=self.diff,
            strict=self.strict,
            formats=self.formats,
            task_id=task_id,
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

    def result(self, path: Path, task_id: str, **fields: Any) -> ConvertResult:
        """A result with its target."""
        return ConvertResult(path, task_id, f"{self.dst}/{self.name_of(task_id)}", **fields)

    def name_of(self, task_id: str) -> str:
        """Name of the store of a material."""
        return task_id + self.suffix

    def verdicts(self, files: Mapping[Path, str]) -> dict[Path, Existing]:
        """Decide what to do with the files, given with their task ids, whose store exists.

        Raises
        ------
        ConfigError
            Some exist in the other form, which readers would continue to read.
        """
        names = {path: self.name_of(task_id) for path, task_id in files.items()}
        present = self._present(set(names.values()))
        there = {path: name for path, name in names.items() if name in present}
        with ThreadPoolExecutor(_EXAMINE_THREADS) as threads:
            verdicts = threads.map(self._judge, there.keys(), there.values())
            return dict(zip(there, verdicts, strict=True))

    def _judge(self, path: Path, name: str) -> Existing:
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
            return Existing("", refusal=f"{where} cannot be read ({exc.strerror or exc}).")
        hint = "Replace it with --overwrite, or choose another destination."
        error = ""
        if existing.units != self.units and not existing.problem:
            error = f"{target} was converted with --units {existing.units}. {hint}"
        elif existing.source is None:
            if existing.problem:
                error = (
                    f"{target} is incomplete ({existing.problem}) and does not name its source "
                    f"file, so it is not replaced. {hint}"
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
        return dataclasses.replace(existing, refusal=error)

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
        """Of the names of stores."""
        return ".zarr.zip" if self.zip else ".zarr"

    @cached_property
    def _destination(self) -> S3Destination | None:
        """The S3 client of this process; not pickled."""
        if not is_s3(self.dst):
            return None
        from zarrcache.convert.upload import S3Destination

        return S3Destination(self.dst, self.s3_kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_destination"}


def is_s3(dst: str) -> bool:
    """Whether stores go to S3, not to a directory."""
    return dst.startswith("s3://")
