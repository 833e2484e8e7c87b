"""``python -m zarrcache``."""

from __future__ import annotations

from zarrcache.cli import main

if __name__ == "__main__":
    main()
