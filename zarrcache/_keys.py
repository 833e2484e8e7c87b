"""Names and digests of objects, cache entries, task ids, roles and eviction policies. No I/O."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import os
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, cast

from zarrcache.errors import ConfigError

__all__ = [
    "FLOAT32",
    "FORMAT_VERSION",
    "ROLES",
    "ArrayKey",
    "BlockKey",
    "Channel",
    "DensityType",
    "Eviction",
    "Missing",
    "ObjectInfo",
    "Role",
    "Units",
    "arrays_of",
    "cached_property",
    "check_density_type",
    "check_encoding",
    "check_task_id",
    "check_task_ids",
    "density_array",
    "density_name",
    "is_density",
    "is_digest",
    "is_url",
    "mantissa_bits",
    "safe_repr",
    "source_digest",
    "stored_array",
    "units_of",
]

#: The two sides of a sample: input and label.
Role = Literal["data", "label"]
ROLES: tuple[Literal["data"], Literal["label"]] = ("data", "label")
#: Eviction policies; zarrcache/disk/policy.py describes them. Defined here because the help of the
#: command line must not import pydantic.
Eviction = Literal["none", "least-recently-stored", "belady"]
#: Version of everything below ``<dir>/zarrcache-v1/``: in the path and in every digest. Headers of
#: entries have a version of their own (zarrcache/disk/entry.py).
FORMAT_VERSION = 1
#: The encoding of entries that hold the values themselves (``cache.arrays.encoding``).
FLOAT32 = "float32"
_PERSON = b"zarrcache-v%d" % FORMAT_VERSION

#: What the values of a density are. ``cell``: electrons per volume times the volume of the cell, as
#: VASP writes them; ``points``: electrons per grid point; ``volume``: electrons per cubic angstrom.
Units = Literal["cell", "points", "volume"]
#: Ends of `ArrayKey.array`. That of points is older than volume and part of digests.
_SUFFIXES: dict[Units, str] = {"cell": "", "points": " per point", "volume": " per volume"}
_ENCODED_AS = " as "

#: ``density_type``: a name; several, of the channels of a sample; or a mapping of both roles to
#: these. See `check_density_type`.
DensityType: TypeAlias = "str | Sequence[str] | Mapping[Role, str | Sequence[str]]"
#: How materials that lack a channel are handled: see ``ZarrS3Reader``.
Missing = Literal["error", "zero", "drop"]
_DENSITY = "charge_density_"
#: The names of ``density_type`` that stand for an array ``charge_density_{name}``. The last three
#: are those of a non-collinear CHGCAR.
_DENSITIES = ("total", "diff", "diff_x", "diff_y", "diff_z")
_ARRAY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=@-]*(/[A-Za-z0-9_][A-Za-z0-9_.+=@-]*)*")

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = 320
_REPR.maxlist = _REPR.maxdict = 10
_DIGEST = re.compile(r"[0-9a-f]{32}")
_BITS = re.compile(r"bits:([1-9][0-9]?)")
_TASK_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=@ -]{0,199}(?<! )")


if TYPE_CHECKING:
    from functools import cached_property  # noqa: TID251
else:

    class cached_property:
        """As in functools since Python 3.12: without a lock.

        That of 3.11 has a lock per property, for all objects. A child that is forked while another
        thread holds it would wait for it forever (tests/processes/test_cache_races.py).
        """

        def __init__(self, function: Any) -> None:
            self._function = function
            self.__doc__ = function.__doc__

        def __set_name__(self, owner: Any, name: str) -> None:
            self._name = name

        def __get__(self, instance: Any, owner: Any = None) -> Any:
            if instance is None:
                return self
            value = instance.__dict__[self._name] = self._function(instance)
            return value


@dataclass(frozen=True, slots=True, order=True)
class ObjectInfo:
    """One object as the origin lists it.

    Attributes
    ----------
    key : str
        Path below the origin's root, with ``/``; never absolute.
    size_bytes : int
    etag : str
        The version: S3's ETag without quotes, or ``mtime_ns-size`` of a local file.
    modified_s : float
        Last change by the origin's clock, seconds since 1970; 0.0 if unknown. Not part of digests.
    listed_s : float
        When it was listed, by the same clock; 0.0 if unknown.
    """

    key: str
    size_bytes: int
    etag: str
    modified_s: float = 0.0
    listed_s: float = field(default=0.0, compare=False, repr=False)


@dataclass(frozen=True)
class ArrayKey:
    """The full identity of an entry of the array tier.

    Attributes
    ----------
    origin : str
        Where ``url`` is resolved: the S3 endpoint, or ``file``. The same ``s3://bucket/prefix`` on
        two endpoints has two identities.
    url : str
        The store, for example ``s3://bucket/prefix/mp-1.zarr``.
    array : str
        The array's name in the store, for example ``charge_density_total``; with `` per point`` or
        `` per volume`` at its end, the entry holds the array in these units. `` as float16`` after
        that names the encoding; a reader gets an entry of its own encoding or none. Empty for a
        stored listing of ``url``.
    """

    origin: str
    url: str
    array: str

    @property
    def source_array(self) -> str:
        """The array's name in the store."""
        return self.array.partition(" ")[0]

    @property
    def units(self) -> Units:
        """Units of the values."""
        named = self.array.partition(_ENCODED_AS)[0]
        return next(
            (name for name, end in _SUFFIXES.items() if end and named.endswith(end)), "cell"
        )

    @property
    def encoding(self) -> str:
        """The encoding within whose error bound the entry holds the density."""
        return self.array.partition(_ENCODED_AS)[2] or FLOAT32

    @property
    def exact(self) -> ArrayKey | None:
        """The key of the same density in float32; None if this one is in float32."""
        array, mark, _ = self.array.partition(_ENCODED_AS)
        return ArrayKey(self.origin, self.url, array) if mark else None

    @cached_property
    def digest(self) -> str:
        """32 hex digits; the entry's name on disk and in the index."""
        return _digest("array", self.origin, self.url, self.array)


@dataclass(frozen=True)
class BlockKey:
    """The full identity of an entry of the byte tier: a version of an object, or a block of it.

    Attributes
    ----------
    origin, url : str
        As in :class:`ArrayKey`; ``url`` is the origin's root.
    object : ObjectInfo
    block : int or None
        Number of the block; None for the whole object.
    block_size : int
        Bytes per block. Part of the identity: another block size makes block 1 another range.
    """

    origin: str
    url: str
    object: ObjectInfo
    block: int | None = None
    block_size: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the whole object, or of the block."""
        if self.block is None:
            return self.object.size_bytes
        return min(self.block_size, self.object.size_bytes - self.block * self.block_size)

    @cached_property
    def digest(self) -> str:
        """32 hex digits; the entry's name on disk and in the index."""
        part = "" if self.block is None else f"{self.block}x{self.block_size}"
        version = f"{self.object.key}#{self.object.etag}#{self.object.size_bytes}#{part}"
        return _digest("object", self.origin, self.url, version)


class Channel(NamedTuple):
    """One array of the materials of one role.

    Attributes
    ----------
    role : {"data", "label"}
    array : str
        Its name in the store: ``charge_density_total``, for example.
    """

    role: Role
    array: str


def density_array(density_type: str) -> str:
    """Name of the array of a density in its store.

    ``charge_density_total`` for ``total``, likewise ``diff``; every other name is that of the
    array.
    """
    return f"{_DENSITY}{density_type}" if density_type in _DENSITIES else density_type


def density_name(array: str) -> str:
    """``total`` for the array ``charge_density_total``; other arrays have their own name."""
    return array.removeprefix(_DENSITY)


def is_density(array: str) -> bool:
    """Whether an array holds a charge or spin density, which has units."""
    return array.startswith(_DENSITY)


def check_density_type(value: object) -> Any:
    """``density_type`` in its simplest form: a name, a tuple of several, or a dict of both roles.

    Parameters
    ----------
    value : str, sequence of str, or mapping
        ``"total"``; ``["total", "diff"]``, also as ``"total,diff"`` from a variable; or
        ``{"data": "total", "label": ["total", "diff"]}``.

    Raises
    ------
    ValueError
        A name is not that of an array, or is there twice; or a mapping has other keys.
    """
    if not isinstance(value, Mapping):
        names = _density_names(value)
        return names[0] if len(names) == 1 else names
    if {*value} != {*ROLES}:
        raise ValueError(
            f"{safe_repr(dict(value))} has to have the keys data and label, and no other"
        )
    data, label = (check_density_type(_no_mapping(value[role])) for role in ROLES)
    return data if data == label else {"data": data, "label": label}


def _no_mapping(value: object) -> object:
    return safe_repr(value) if isinstance(value, Mapping) else value


def _density_names(value: object) -> tuple[str, ...]:
    if isinstance(value, str) and "," in value:
        value = [name.strip() for name in value.split(",")]
    given = [value] if not isinstance(value, Sequence) or isinstance(value, str) else [*value]
    if not given:
        raise ValueError("an empty list; give at least one name, such as total")
    names: list[str] = []
    for name in given:
        if not isinstance(name, str) or not _ARRAY.fullmatch(name):
            raise ValueError(
                f"{safe_repr(name)} is not the name of an array. Write total, diff, or the name "
                "of another array of the stores, without blanks"
            )
        near = difflib.get_close_matches(name.lower(), _DENSITIES[:2], n=1, cutoff=0.8)
        if near and name not in _DENSITIES:
            raise ValueError(f"{safe_repr(name)} looks like a misspelt {near[0]!r}; correct it")
        names.append(name)
    if len({*map(density_array, names)}) < len(names):
        raise ValueError(f"{safe_repr(names)} names an array twice; name each once")
    return tuple(names)


def arrays_of(density_type: Any) -> dict[Role, tuple[str, ...]]:
    """Names of the arrays of each role, in the order of the channels.

    Parameters
    ----------
    density_type : str, tuple or dict
        From `check_density_type`.
    """

    def arrays(names: str | Sequence[str]) -> tuple[str, ...]:
        return tuple(map(density_array, [names] if isinstance(names, str) else names))

    if isinstance(density_type, Mapping):
        return {role: arrays(density_type[role]) for role in ROLES}
    return dict.fromkeys(ROLES, arrays(density_type))


def units_of(normalize: object) -> Units:
    """Units that ``normalize`` of a reader, ``normalize_data`` of a config, stands for.

    Raises
    ------
    ConfigError
        It is a string other than ``points`` and ``volume``.
    """
    if not isinstance(normalize, str):
        return "points" if normalize else "cell"
    if normalize in ("points", "volume"):
        return cast("Units", normalize)
    raise ConfigError(
        f"normalize is {safe_repr(normalize)}; it has to be false (density times cell volume, as "
        "VASP writes it), true or points (divided by the number of grid points), or volume "
        "(electrons per cubic angstrom)."
    )


def stored_array(array: str, units: Units, encoding: str = FLOAT32) -> str:
    """`ArrayKey.array` of an array in these units. Only densities have units.

    Entries hold the divided values, because dividing 5 MB takes six times as long as the hit.

    Parameters
    ----------
    array : str
        Name in the store.
    units : {"cell", "points", "volume"}
    encoding : str
        ``cache.arrays.encoding``.

    Raises
    ------
    ConfigError
        The name contains a blank.
    """
    if " " in array:
        raise ConfigError(f"{array!r} is not the name of an array, because it contains a blank.")
    name = array + _SUFFIXES[units] if is_density(array) else array
    return name if encoding == FLOAT32 else f"{name}{_ENCODED_AS}{encoding}"


def mantissa_bits(encoding: str) -> int | None:
    """N of the encoding ``bits:N``; None for other encodings."""
    match = _BITS.fullmatch(encoding)
    return int(match[1]) if match else None


def check_encoding(encoding: object) -> str:
    """Return ``encoding`` if it is float32, float16, bfloat16, or bits:N with N from 1 to 22.

    Raises
    ------
    ValueError
        It is not.
    """
    if isinstance(encoding, str):
        if encoding in (FLOAT32, "float16", "bfloat16"):
            return encoding
        if 1 <= (mantissa_bits(encoding) or 0) <= 22:
            return encoding
    raise ValueError(
        f"{safe_repr(encoding)} is not an encoding. Write float32, float16, bfloat16, or bits:N "
        "with 1 to 22 mantissa bits, for example bits:12"
    )


def is_digest(text: object) -> bool:
    """Whether ``text`` is a digest. No other untrusted input becomes part of a file name."""
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a URL, also with one slash, as pathlib leaves it: ``s3:/bucket``."""
    return _URL.match(os.fspath(path)) is not None


def source_digest(objects: Iterable[ObjectInfo]) -> str:
    """Digest of a listing: key, size and ETag of every object, in any order.

    Equal digests mean that nothing has changed.
    """
    lines = sorted(f"{o.key}\0{o.size_bytes}\0{o.etag}" for o in objects)
    return _digest("source", *lines)


def safe_repr(value: object) -> str:
    """``repr`` of untrusted input for a message: shortened, and in ASCII against look-alikes."""
    return _REPR.repr(value).encode("ascii", "backslashreplace").decode()


def check_task_id(task_id: object) -> str:
    r"""Return ``task_id`` if it is a plain name; refuse anything that could leave its directory.

    Raises
    ------
    ConfigError
        Not a string, empty, with ``/``, ``\`` or ``..``, starting with a dot, or starting or ending
        with a blank.
    """
    if isinstance(task_id, int):
        raise ConfigError(
            f"task id {task_id!r} is not a plain name but a number. "
            f'Write "{task_id}" with quotes, or "mp-{task_id}" if the store is mp-{task_id}.zarr.'
        )
    if not isinstance(task_id, str) or not _TASK_ID.fullmatch(task_id) or ".." in task_id:
        raise ConfigError(
            f"task id {safe_repr(task_id)} is not a plain name. Letters, digits and ._+=@- are "
            "allowed, blanks only inside, no '/' and no '..'; correct it in the map, the split or "
            "the list of ids."
        )
    return task_id


def check_task_ids(task_ids: Sequence[object]) -> list[str]:
    """Apply :func:`check_task_id` to each id, in a third of the time: maps have 200,000 ids.

    Raises
    ------
    ConfigError
        As `check_task_id`, for the first invalid id.
    """
    with contextlib.suppress(TypeError):  # not all of them are strings
        texts = cast("Sequence[str]", task_ids)
        if all(map(_TASK_ID.fullmatch, texts)) and ".." not in "\n".join(texts):
            return list(texts)
    return [check_task_id(task_id) for task_id in task_ids]


def _digest(*parts: str) -> str:
    # Length-prefixed: ("ab", "c") and ("a", "bc") must not collide.
    # Names of a local directory may be any bytes, which Python decodes to surrogates.
    raws = [part.encode("utf-8", "surrogateescape") for part in parts]
    return hashlib.blake2b(
        b"".join([b"%d:%b" % (len(raw), raw) for raw in raws]), digest_size=16, person=_PERSON
    ).hexdigest()
