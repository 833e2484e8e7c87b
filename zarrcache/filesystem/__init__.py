"""The byte tier as an fsspec filesystem: ``zarrcache::s3://bucket/key``.

Registered through the ``fsspec.specs`` entry point, so that all code that takes an fsspec URL can
read through the cache.
"""

from __future__ import annotations

from zarrcache.filesystem.methods import ZarrCacheFileSystem

__all__ = ["ZarrCacheFileSystem"]
