"""Train from S3 at the speed of the node's own SSD: one Zarr reader for charge densities, two local
tiers beneath it.

>>> from zarrcache import ZarrS3Reader
>>> reader = ZarrS3Reader(
...     "s3://bucket/input", "s3://bucket/label", "map.json.gz", "GGA", True, 0.8, cache={"dir": "/scratch/me", "limit": "200 GiB"}
... )  # doctest: +SKIP
>>> train, test = reader.data_split()  # doctest: +SKIP

Every public name resolves at its first use, so ``import zarrcache`` loads neither torch nor zarr
nor an S3 client.
"""

from __future__ import annotations

import lazy_loader

__version__ = "0.1.0"

# The public names are listed in __init__.pyi, once; each is imported at its first use.
__getattr__, _dir, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = [*_names, "__version__"]


def __dir__() -> list[str]:
    return [*_dir(), "__version__"]
