"""Settings: the users' training keys and the ``cache:`` block, validated once, then frozen.

The comments of ``configs/s3_cached.yaml`` explain each key. The pages and the JSON schema are made
from them.

Sizes are ``200 GiB``, ``4 MiB``, ``1.5 GB`` or a number of bytes; durations ``60 s``, ``5 min``,
``30 d`` or a number of seconds. ``$VAR``, ``${VAR}`` and ``${VAR:-default}`` expand in every
string, in ``s3_kwargs`` only those with braces. The only environment variable of zarrcache,
``ZARRCACHE_DIR``, overrides ``cache.dir``.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from zarrcache._keys import (
    FLOAT32,
    Eviction,
    Missing,
    check_density_type,
    check_encoding,
    is_url,
    safe_repr,
)
from zarrcache._units import Percent, bytes_or_percent, parse_bytes, parse_seconds
from zarrcache.config.block import Block
from zarrcache.config.files import (
    VARIABLE_IN_BRACES,
    YamlLoader,
    as_dict,
    datasets_of,
    datasets_of_configs,
    expand,
    plain,
    read_datasets,
)
from zarrcache.errors import ConfigError

__all__ = [
    "SMALL_LIMIT_BYTES",
    "ArrayTierConfig",
    "ByteTierConfig",
    "CacheConfig",
    "DataConfig",
    "FetchConfig",
    "LoaderConfig",
    "PriceConfig",
    "RetryConfig",
    "YamlLoader",
    "cache_of",
    "datasets_of_configs",
    "naming",
    "plain",
]

logger = logging.getLogger(__name__)

#: Loaders of this package; others are known only once their module is imported.
_LOADERS = ("zarr_s3_data", "mp_zarr_s3_data", "chgcar_data")


_NUMBER_OR_TEXT = WithJsonSchema({"type": ["number", "string"]})
#: A smaller ``cache.limit`` is probably a number without its unit.
SMALL_LIMIT_BYTES = 2**20
_MOST_IN_FLIGHT = 1024
_AUTO_OR_COUNT = WithJsonSchema(
    {"anyOf": [{"type": "integer", "minimum": 1, "maximum": _MOST_IN_FLIGHT}, {"const": "auto"}]}
)
_TEXTS = WithJsonSchema({"type": ["array", "string"], "items": {"type": "string"}})
_NAME = {"type": "string", "pattern": "^[A-Za-z0-9_${]"}
_NAMES = {"anyOf": [_NAME, {"type": "array", "items": _NAME, "minItems": 1}]}
_DENSITY_TYPE = WithJsonSchema(
    {
        "anyOf": [
            *_NAMES["anyOf"],
            {
                "type": "object",
                "properties": {"data": _NAMES, "label": _NAMES},
                "required": ["data", "label"],
                "additionalProperties": False,
            },
        ]
    }
)
Bytes = Annotated[int, BeforeValidator(parse_bytes), _NUMBER_OR_TEXT]
Seconds = Annotated[float, BeforeValidator(parse_seconds), _NUMBER_OR_TEXT]


def _not_truth(value: object) -> object:
    """Refuse what YAML calls true (``yes``, ``on``), which pydantic takes for 1."""
    if isinstance(value, bool):
        raise ValueError(f"{value} is not a whole number")
    return value


Whole = Annotated[int, BeforeValidator(_not_truth)]


def _concurrency(value: object) -> object:
    number = int(value) if isinstance(value, str) and value.strip().isdecimal() else value
    if number == "auto" or (type(number) is int and 1 <= number <= _MOST_IN_FLIGHT):
        return number
    raise ValueError(
        f"{safe_repr(value)} is not a number of requests. Write auto, or a whole number from 1 to "
        f"{_MOST_IN_FLIGHT}"
    )


def _train_fraction(value: object) -> object:
    """Convert ``"0.8"``, as from a variable, to a number; refuse what no split can use."""
    number: object = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            number = int(value) if value.strip().isdecimal() else float(value)
    if (isinstance(number, float) and 0 < number <= 1) or (type(number) is int and number > 1):
        return number
    if type(number) is int and number == 1:  # scikit-learn reads it as one training material
        raise ValueError("1 may mean all materials or one. Write 1.0 for all of them")
    raise ValueError(
        f"{safe_repr(value)} is not a share of the materials. Write a number above 0 and up to "
        "1.0, for example 0.8, or a whole number of training materials"
    )


def _normalization(value: object) -> object:
    """Convert what YAML or a variable calls true or false; keep the names of units."""
    if value in ("points", "volume"):
        return value
    try:
        return TypeAdapter(bool).validate_python(value)
    except ValidationError:
        raise ValueError(f"{safe_repr(value)} is not one of true, false, points, volume") from None


Concurrency = Annotated[int | Literal["auto"], BeforeValidator(_concurrency), _AUTO_OR_COUNT]


class RetryConfig(Block):
    """Retries of transient errors."""

    attempts: Whole = Field(5, ge=1, le=100)
    timeout: Seconds = Field(60.0, gt=0)


class FetchConfig(Block):
    """Requests to S3: engine, concurrency, timeouts."""

    engine: Literal["auto", "obstore", "s3fs"] = "auto"
    etag: Literal["auto", "md5", "opaque"] = "auto"
    concurrency: Concurrency = "auto"
    memory: Bytes = Field(512 * 1024**2, gt=0)
    connect_timeout: Seconds = Field(5.0, gt=0)
    read_timeout: Seconds = Field(15.0, gt=0)


class ByteTierConfig(Block):
    """The byte tier: objects, and blocks of large objects, exactly as the origin stores them."""

    enabled: bool = True
    block_size: Bytes = Field(4 * 1024**2, ge=64 * 1024)


class ArrayTierConfig(Block):
    """The array tier: decoded whole arrays."""

    enabled: bool = True
    encoding: Annotated[str, BeforeValidator(check_encoding)] = FLOAT32


class PriceConfig(Block):
    """Prices of the origin's requests and bytes, for ``zarrcache plan``.

    The defaults are those of S3 Standard in us-east-1, read from the same region.
    """

    currency: str = "USD"
    dated: str = "2025-12"
    list_per_1000: float = Field(0.005, ge=0)
    get_per_1000: float = Field(0.0004, ge=0)
    transfer_per_gib: float = Field(0.0, ge=0)


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Begin the message of a ConfigError with the file that holds the settings."""
    try:
        yield
    except ConfigError as exc:
        text = str(exc)
        apart = "\n" if "\n" in text else " "
        raise ConfigError(f"{where}:{apart}{text}") from None


def _or_none(value: object) -> object:
    """Convert an empty string, as from an empty variable, to None."""
    return None if value == "" else value


def _path_as_text(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


PathText = Annotated[str, BeforeValidator(_path_as_text)]


def _listed(value: object) -> object:
    """Split a string, as from a job script, at commas or blanks; keep a list as it is."""
    return (
        tuple(value.replace(",", " ").split())
        if isinstance(value, str)
        else ()
        if value is None
        else value
    )


def _peer_url(text: str) -> str:
    with contextlib.suppress(ValueError):
        url = urlsplit(text)
        is_bare = not (url.path.strip("/") or url.query or url.fragment or "@" in url.netloc)
        if url.scheme == "http" and url.hostname and url.port and is_bare:
            return f"http://{url.netloc.lower()}"
    raise ValueError(
        f"{safe_repr(text)} is not the address of a peer. Write http://host:port, for example "
        "http://node1:7070"
    )


class CacheConfig(Block):
    """The ``cache:`` block.

    >>> CacheConfig(dir="/scratch/me", limit="200 GiB")
    >>> CacheConfig.from_yaml("configs/s3_cached.yaml")

    Raises
    ------
    ConfigError
        Unknown key (the message has the nearest), or a size or duration that does not parse.
    """

    _prefix: ClassVar[str] = "cache."

    dir: Path
    limit: Bytes = Field(200 * 1024**3, gt=0)
    min_free: Annotated[int | Percent, BeforeValidator(bytes_or_percent), _NUMBER_OR_TEXT] = (
        Percent(5)
    )
    eviction: Eviction = "none"
    lookahead: Bytes = Field(2 * 1024**3, ge=0)
    revalidate: Literal["never", "run", "epoch"] = "never"
    verify: Literal["first", "always", "never"] = "first"
    lock: Annotated[Path | None, BeforeValidator(_or_none)] = None
    missing_chunks: Literal["error", "fill"] = "error"
    bytes: ByteTierConfig = ByteTierConfig()
    arrays: ArrayTierConfig = ArrayTierConfig()
    retry: RetryConfig = RetryConfig()
    fetch: FetchConfig = FetchConfig()
    prices: PriceConfig = PriceConfig()
    shared: bool = False
    lower: Annotated[Path | None, BeforeValidator(_or_none)] = None
    peers: Annotated[tuple[str, ...], BeforeValidator(_listed), _TEXTS] = ()
    advertise: Annotated[str | None, BeforeValidator(_or_none)] = None
    peer_token_file: Annotated[Path | None, BeforeValidator(_or_none)] = None
    allow_network_fs: bool = False

    def __init__(self, **data: Any) -> None:
        override = os.environ.get("ZARRCACHE_DIR")
        if override:
            data["dir"] = override
        elif "dir" not in data:
            raise ConfigError(
                "cache.dir is missing. Give a directory on the node's own disk, for example dir: "
                "${SLURM_TMPDIR:-/tmp}/zarrcache."
            )
        super().__init__(**{k: expand(v) for k, v in data.items()})

    @field_validator("dir", "lock", "lower", "peer_token_file")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        if value is None:
            return None
        if is_url(value):
            raise ValueError(f"{safe_repr(str(value))} is a URL; write a path of this machine")
        try:
            return Path(os.path.abspath(value.expanduser()))
        except RuntimeError as exc:
            raise ValueError(
                f"{safe_repr(str(value))} begins with ~, but this machine has no such user. Write "
                "the whole path."
            ) from exc

    @field_validator("peers")
    @classmethod
    def _peer_urls(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(map(_peer_url, value)))

    @field_validator("advertise")
    @classmethod
    def _own_url(cls, value: str | None) -> str | None:
        return None if value is None else _peer_url(value)

    @model_validator(mode="after")
    def _is_not_below_itself(self) -> CacheConfig:
        if self.lower == self.dir:
            raise ValueError(
                "cache.lower is cache.dir itself; give the directory of another cache, or remove it"
            )
        return self

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> CacheConfig:
        """Read the ``cache:`` block of a training config, or a file with the keys of that block."""
        keys = next(iter(read_datasets(path).values()))
        with naming(f"config file {os.fspath(path)}"):
            return cls.of(keys.get("cache", keys))

    @classmethod
    def of(cls, value: CacheConfig | Mapping[str, Any]) -> CacheConfig:
        """Return a config unchanged, or make one from a mapping or namespace."""
        if isinstance(value, cls):
            return value
        if isinstance(value, (str, os.PathLike)):
            path = os.fspath(value)
            raise ConfigError(f"cache is the path {path!r}. Give the keys: {{'dir': {path!r}}}.")
        return cls(**as_dict(value, "cache"))


def _precision(value: object) -> object:
    """Drop what is meant for Lightning's Trainer: ``precision: 32``, ``precision: bf16-mixed``."""
    return value if value in ("f32", "f16", "bf16") else None


class LoaderConfig(Block):
    """The keys of a training config that describe its loaders, for a data module.

    None stands for a key that is not given. Other keys are ignored.
    """

    model_config = ConfigDict(extra="ignore")

    batch_size: Whole | None = Field(None, ge=1)
    train_workers: Whole | None = Field(None, ge=0)
    val_workers: Whole | None = Field(None, ge=0)
    pin_memory: bool | None = None
    precision: Annotated[Literal["f32", "f16", "bf16"] | None, BeforeValidator(_precision)] = None
    augmentation: bool | None = None
    augment_on: Literal["cpu", "device"] | None = None
    split_file: Annotated[PathText | None, BeforeValidator(_or_none)] = None
    val_frac: float | None = None
    random_seed: Whole | None = None
    assignment: Literal["global", "node"] | None = None
    shuffle: bool | None = None
    drop_last: bool | None = None
    downsample_data: Whole | None = Field(None, ge=1)
    downsample_label: Whole | None = Field(None, ge=1)
    persistent_workers: bool | None = None
    multiprocessing_context: Literal["fork", "forkserver", "spawn"] | None = None

    def __init__(self, **data: Any) -> None:
        foreign = sorted(_FOREIGN_LOADER_KEYS.keys() & data.keys())
        if foreign:
            logger.warning(
                "the config has %s, which data modules ignore; the key is %s.",
                " and ".join(foreign),
                " and ".join(_FOREIGN_LOADER_KEYS[key] for key in foreign),
            )
        fields = type(self).model_fields.keys()
        others = _LOADER_KEYS | DataConfig.model_fields.keys()
        _check_unknown(data.keys() - others, fields - data.keys())
        super().__init__(**{key: expand(data[key]) for key in fields & data.keys()})


#: Keys of older training scripts, and those of data modules.
_FOREIGN_LOADER_KEYS = {
    "data_augmentation": "augmentation",
    "data_precision": "precision",
    "nbatch": "batch_size",
    "num_workers": "train_workers, val_workers",
}
_LOADER_KEYS = LoaderConfig.model_fields.keys() | _FOREIGN_LOADER_KEYS.keys()


def _check_unknown(keys: Set[str], absent: Set[str]) -> None:
    """Refuse keys that misspell a setting, which would silently not be used.

    A key that is merely similar to a setting may be the training's own, so it is only named in a
    warning. A setting that is given is not misspelt elsewhere: only ``absent`` ones are compared.
    """
    wrong = []
    for key in sorted(keys - absent):
        name = key.lower().replace("-", "_")
        near = difflib.get_close_matches(name, sorted(absent), n=1, cutoff=0.7)
        if not near:
            continue
        (meant,) = near
        # Not `resources` for source, `data_name` for dataset_name.
        is_alike = name[:1] == meant[:1] and abs(len(name) - len(meant)) <= 2
        if is_alike and difflib.get_close_matches(name, near, cutoff=0.8):
            wrong.append(
                f"{key} is not a setting. Did you mean {meant!r}? If it is a key of your own, give "
                f"{meant} too."
            )
        else:
            logger.warning(
                "the config has the key %r; if it is meant for zarrcache, did you mean %r?",
                key,
                meant,
            )
    if wrong:
        raise ConfigError("\n".join(wrong))


class DataConfig(Block):
    """The keys of a training config that describe the data.

    Other keys are ignored, unless one misspells a setting.

    >>> DataConfig.from_yaml("configs/s3_cached.yaml").functional
    'GGA'
    """

    model_config = ConfigDict(extra="ignore")
    _remedies: ClassVar[Mapping[str, str]] = {
        "data_dir": "Give the directory or s3:// URL of the input densities.",
        "label_dir": "Give the directory or s3:// URL of the label densities; it may equal "
        "data_dir.",
        "map_dir": "Give a map of task ids, as `zarrcache map` writes it, or a list of them "
        "(.txt).",
        "functional": "Give a key of the map file, for example GGA.",
    }

    dataset_name: str = "zarr_s3_data"
    data_dir: PathText
    label_dir: PathText
    map_dir: PathText
    functional: str
    density_type: Annotated[Any, BeforeValidator(check_density_type), _DENSITY_TYPE] = "total"
    missing: Missing = "error"
    normalize_data: Annotated[
        bool | Literal["points", "volume"], BeforeValidator(_normalization)
    ] = True
    train_fraction: Annotated[float | int, BeforeValidator(_train_fraction)] = 0.8
    random_state: Whole = Field(42, ge=0, lt=2**32)
    split_file: Annotated[PathText | None, BeforeValidator(_or_none)] = None
    s3_kwargs: dict[str, Any] | None = Field(None, repr=False)
    source: str | tuple[str, ...] = "auto"
    cache: CacheConfig | None = None

    def __init__(self, **data: Any) -> None:
        fields = type(self).model_fields.keys()
        _check_unknown(data.keys() - _LOADER_KEYS, fields - data.keys())
        known = {key: data[key] for key in fields & data.keys()}
        if "functional" not in known and str(known.get("map_dir")).endswith(".txt"):
            known["functional"] = Path(known["map_dir"]).name  # a file list; a name for messages
        secret = known.pop("s3_kwargs", None)
        cache = known.pop("cache", None)
        known = {key: expand(value) for key, value in known.items()}
        try:
            known["s3_kwargs"] = expand(secret, VARIABLE_IN_BRACES)
        except ConfigError:  # which quotes the value
            raise ConfigError(
                "s3_kwargs holds a ${ that is not a variable, or one that is not set. Write "
                "${NAME} or ${NAME:-default}."
            ) from None
        known["cache"] = None if cache is None else CacheConfig.of(cache)
        super().__init__(**known)

    @field_validator("dataset_name")
    @classmethod
    def _loader(cls, value: str) -> str:
        near = difflib.get_close_matches(value, _LOADERS, n=1, cutoff=0.65)
        if near and value not in _LOADERS:  # only a warning, because it may be registered later
            logger.warning(
                "dataset_name is %r; did you mean %r? get_dataset refuses unknown names.",
                value,
                near[0],
            )
        return value

    def check_stores(self) -> None:
        """Raise ConfigError if the config names the loader that uses no cache."""
        if self.dataset_name == "chgcar_data":
            raise ConfigError(
                "dataset_name is chgcar_data, which parses files at every read and caches nothing. "
                "Set dataset_name: zarr_s3_data: it reads json.gz and CHGCAR files too, through "
                "the cache. Deeper trees and your own formats need `zarrcache convert` first."
            )

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> DataConfig:
        """Read a training config: its keys, or those of the data block of a Hydra config.

        ``config.yaml#NAME`` is one dataset of a config with several.
        """
        return cls._only(read_datasets(path), f"config file {os.fspath(path)}")

    @classmethod
    def of(cls, cfg: object) -> DataConfig:
        """Return a DataConfig unchanged, or make one from a mapping or namespace."""
        if isinstance(cfg, cls):
            return cfg
        if isinstance(cfg, (str, os.PathLike)):
            path = os.fspath(cfg)
            raise ConfigError(
                f"cfg is the path {safe_repr(path)}. Read the file: DataConfig.from_yaml({path!r})."
            )
        return cls._only(datasets_of(as_dict(cfg, "cfg")), "cfg")

    @classmethod
    def _only(cls, named: Mapping[str, dict[str, Any]], where: str) -> DataConfig:
        if len(named) > 1:
            first = next(iter(named))
            file = where.removeprefix("config file ")
            remedy = f" Name one of them: {file}#{first}." if file != where else ""
            raise ConfigError(
                f"{where} has {len(named)} datasets: {', '.join(map(repr, named))}.{remedy}"
            )
        (keys,) = named.values()
        if where == "cfg":
            return cls(**keys)
        with naming(where):
            return cls(**keys)


def cache_of(config: DataConfig | CacheConfig) -> CacheConfig:
    """The cache block of a config. One without, or that reads files which are not cached, is an
    error.
    """
    if isinstance(config, CacheConfig):
        return config
    if not isinstance(config, DataConfig):
        raise ConfigError(
            f"a config is DataConfig.from_yaml(path) or CacheConfig.from_yaml(path), not "
            f"{safe_repr(config)}."
        )
    config.check_stores()
    if config.cache is None:
        raise ConfigError("The config has no cache block. `zarrcache init` writes an example.")
    return config.cache
