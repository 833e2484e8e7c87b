"""CRC-32C of what lies in the cache. The only import of awscrt.

AWS's library, because it reads at the speed of the memory: 5 MB that is not in the CPU's cache take
0.41 ms, as long as adding them up; google-crc32c, the one that zarr brings, takes 0.66 ms and is
busy computing.  The numbers are the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from awscrt import checksums

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["crc32c"]


def crc32c(data: Buffer, previous: int = 0) -> int:
    """CRC-32C (Castagnoli, RFC 3720) of a contiguous buffer, or of what had the CRC ``previous``
    and this buffer behind it.
    """
    return int(checksums.crc32c(data, previous))
