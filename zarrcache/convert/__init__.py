"""Convert CHGCAR and Materials Project files to Zarr stores, in a directory or on S3.

The public names are listed in ``__init__.pyi``; each is imported at first use.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
