"""The tests of zarrcache. A package, so that spawned processes can import functions of tests."""

from __future__ import annotations

import atexit
import gc

# At its end Python searches all modules for garbage: up to 0.4 s of CPU in each spawned process.
atexit.register(gc.freeze)
