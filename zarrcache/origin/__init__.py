"""Where data comes from: S3 or a directory, listed and fetched under one retry policy."""

from __future__ import annotations

from zarrcache.origin._concurrent import PAGE_OBJECTS, SLOWEST_BYTES_PER_S, Received, pump
from zarrcache.origin._retry import RetryPolicy, TransientError
from zarrcache.origin._s3 import Origin, open_origin
from zarrcache.origin._s3_errors import RequestContext, S3Fault, to_error
from zarrcache.origin._s3_options import S3Options, split_s3_url
from zarrcache.origin._s3fs import S3fsEngine, make_s3fs

__all__ = [
    "PAGE_OBJECTS",
    "SLOWEST_BYTES_PER_S",
    "Origin",
    "Received",
    "RequestContext",
    "RetryPolicy",
    "S3Fault",
    "S3Options",
    "S3fsEngine",
    "TransientError",
    "make_s3fs",
    "open_origin",
    "pump",
    "split_s3_url",
    "to_error",
]
