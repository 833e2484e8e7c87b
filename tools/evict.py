#!/usr/bin/env python3
"""Drop entries of the cache: ``zarrcache evict``."""

from __future__ import annotations

import sys

from zarrcache.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "evict")
    main()
