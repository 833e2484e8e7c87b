"""Train from S3 at the speed of the node's own SSD: one Zarr reader for charge densities, two local tiers beneath it.

>>> from zarrcache import ZarrS3Reader
>>> reader = ZarrS3Reader(
...     "s3://bucket/input", "s3://bucket/label", "map.json.gz", "GGA", True, 0.8, cache={"dir": "/scratch/me", "limit": "200 GiB"}
... )  # doctest: +SKIP
>>> train, test = reader.data_split()  # doctest: +SKIP

Every public name resolves at its first use, so ``import zarrcache`` loads neither torch nor zarr nor an S3 client.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zarrcache.chgcar import RhoRead
    from zarrcache.config import CacheConfig, DataConfig
    from zarrcache.convert import convert_directory
    from zarrcache.dataset import RhoData, ZarrDataset, collate
    from zarrcache.errors import (
        ConfigError,
        CorruptEntryError,
        IncompleteArrayError,
        LockTimeoutError,
        OriginAccessError,
        OriginError,
        OriginNotFoundError,
        OriginUnavailableError,
        SchemaError,
        ZarrCacheError,
    )
    from zarrcache.evicting import plan_evict
    from zarrcache.lookahead import Lookahead
    from zarrcache.reader import ZarrS3Reader
    from zarrcache.registry import get_dataset, load_data, register_data
    from zarrcache.sampler import NodeSampler
    from zarrcache.stats import Stats
    from zarrcache.store import open_group, open_store
    from zarrcache.verifying import verify
    from zarrcache.warming import plan_warm
    from zarrcache.world import World

__all__ = [
    "CacheConfig",
    "ConfigError",
    "CorruptEntryError",
    "DataConfig",
    "IncompleteArrayError",
    "LockTimeoutError",
    "Lookahead",
    "NodeSampler",
    "OriginAccessError",
    "OriginError",
    "OriginNotFoundError",
    "OriginUnavailableError",
    "RhoData",
    "RhoRead",
    "SchemaError",
    "Stats",
    "World",
    "ZarrCacheError",
    "ZarrDataset",
    "ZarrS3Reader",
    "__version__",
    "collate",
    "convert_directory",
    "get_dataset",
    "load_data",
    "open_group",
    "open_store",
    "plan_evict",
    "plan_warm",
    "register_data",
    "verify",
]

__version__ = "0.1.0"

#: Module of each public name. A test keeps it equal to the imports above, which type checkers and editors read.
_HOME = {
    "chgcar": ("RhoRead",),
    "config": ("CacheConfig", "DataConfig"),
    "convert": ("convert_directory",),
    "dataset": ("RhoData", "ZarrDataset", "collate"),
    "errors": (
        "ConfigError",
        "CorruptEntryError",
        "IncompleteArrayError",
        "LockTimeoutError",
        "OriginAccessError",
        "OriginError",
        "OriginNotFoundError",
        "OriginUnavailableError",
        "SchemaError",
        "ZarrCacheError",
    ),
    "evicting": ("plan_evict",),
    "lookahead": ("Lookahead",),
    "reader": ("ZarrS3Reader",),
    "registry": ("get_dataset", "load_data", "register_data"),
    "sampler": ("NodeSampler",),
    "stats": ("Stats",),
    "store": ("open_group", "open_store"),
    "verifying": ("verify",),
    "warming": ("plan_warm",),
    "world": ("World",),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import the module of a public name at its first use (PEP 562)."""
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
