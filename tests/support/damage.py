"""Damage to files of a cache as disks and power failures cause it: one bit, or a truncation. The
seed is printed.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

__all__ = ["chance_of", "damage"]


def chance_of(seed: int | None) -> random.Random:
    """A random generator: repeatable with a seed, otherwise with a new seed, which is printed."""
    seed = int.from_bytes(os.urandom(4)) if seed is None else seed
    print(f"seed {seed}")
    return random.Random(seed)


def damage(path: Path, chance: random.Random) -> str:
    """Flip one bit of a file or, once in eight, truncate it; a description. The inode is new, so
    existing maps stay valid.
    """
    raw = bytearray(path.read_bytes())
    if chance.random() < 0.125:
        length = chance.randrange(len(raw))
        done = f"{path.name} of {len(raw)} bytes cut to {length}"
        del raw[length:]
    else:
        bit = chance.randrange(8 * len(raw))
        raw[bit // 8] ^= 1 << bit % 8
        done = f"bit {bit % 8} of byte {bit // 8} of {path.name}"
    mode = path.stat().st_mode
    path.unlink()
    path.write_bytes(raw)
    path.chmod(mode)
    return done
