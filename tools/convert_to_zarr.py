#!/usr/bin/env python3
"""Convert CHGCAR and Materials Project files to Zarr stores: ``zarrcache convert``."""

from __future__ import annotations

import sys

from zarrcache.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "convert")
    main()
