"""Torch datasets, samplers, look-ahead, and the transfer from DataLoader workers.

The public names are listed in ``__init__.pyi``; each is imported at first use. They need
PyTorch, the extra ``train``.
"""

from __future__ import annotations

from typing import Any

import lazy_loader

from zarrcache.errors import ConfigError

_import, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> Any:
    try:
        return _import(name)
    except ModuleNotFoundError as exc:
        if (exc.name or "").partition(".")[0] != "torch":
            raise
        raise ConfigError(
            f"{name} needs PyTorch ({exc}). Install it: pip install 'zarrcache[train]'"
        ) from exc
