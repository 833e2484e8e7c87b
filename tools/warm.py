#!/usr/bin/env python3
"""Fill the cache with every density of a config: ``zarrcache warm``."""

from __future__ import annotations

import sys

from zarrcache.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "warm")
    main()
