"""Train from S3 at the speed of the node's own SSD.

One Zarr reader for charge densities, with two local cache tiers beneath it:

>>> from zarrcache import ZarrS3Reader
>>> cache = {"dir": "/scratch/me", "limit": "200 GiB"}
>>> reader = ZarrS3Reader(
...     "s3://bucket/input", "s3://bucket/label", "map.json.gz", "GGA", True, 0.8, cache=cache
... )  # doctest: +SKIP
>>> train, test = reader.data_split()  # doctest: +SKIP

The public names are listed in ``__init__.pyi``; each is imported at first use, so
``import zarrcache`` loads neither torch nor zarr nor an S3 client.
"""

from __future__ import annotations

import lazy_loader

__version__ = "0.1.0"

__getattr__, _dir, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = [*_names, "__version__"]


def __dir__() -> list[str]:
    return [*_dir(), "__version__"]
