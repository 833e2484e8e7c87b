"""Entries from other nodes: the client, the server, and which node fetches for the cluster.

The public names are listed in ``__init__.pyi``; each is imported at its first use.
"""

from __future__ import annotations

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
