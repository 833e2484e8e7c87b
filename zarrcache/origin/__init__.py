"""Origins of the data, S3 or a directory: list and fetch under one retry policy.

Origins for other storage implement `Origin` and are added with `register_origin`.
"""

from __future__ import annotations

from zarrcache._keys import ObjectInfo
from zarrcache.origin._origin import (
    BrowsableOrigin,
    Origin,
    OriginFactory,
    open_origin,
    register_origin,
)
from zarrcache.origin._requests import PAGE_OBJECTS, Received, report_progress, reporting_progress
from zarrcache.origin._s3 import S3Bucket
from zarrcache.origin._s3_errors import RangeIgnoredError, altered
from zarrcache.origin._s3_options import refuse_secrets, secret_names, split_s3_url
from zarrcache.origin._s3fs import make_s3fs

__all__ = [
    "PAGE_OBJECTS",
    "BrowsableOrigin",
    "ObjectInfo",
    "Origin",
    "OriginFactory",
    "RangeIgnoredError",
    "Received",
    "S3Bucket",
    "altered",
    "make_s3fs",
    "open_origin",
    "refuse_secrets",
    "register_origin",
    "report_progress",
    "reporting_progress",
    "secret_names",
    "split_s3_url",
]
