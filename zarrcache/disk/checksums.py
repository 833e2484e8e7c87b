"""CRC-32C of cached bytes; the only module that imports the ``crc32c`` library.

The library uses the CPU's CRC instructions and releases the GIL. For 8 MB outside the CPU cache it
takes 0.58 ms, google-crc32c (which Zarr requires) 0.60 ms and awscrt 0.48 ms, but awscrt is a 13 MB
client for AWS. A first hit also maps the file, which takes longer than any of them. google-crc32c
falls back to slow Python code where it has no wheel.

``crc32c(data, previous=0)`` is CRC-32C (Castagnoli, RFC 3720) of a contiguous buffer; ``previous``
is the CRC of the bytes before it, to continue from.
"""

from __future__ import annotations

from crc32c import crc32c

__all__ = ["crc32c"]
