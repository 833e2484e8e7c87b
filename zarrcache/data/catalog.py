"""Which materials a pair of directories has: one listing of each, kept for runs without the origin."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from zarrcache._keys import Role, stem_of
from zarrcache.cache import Cache
from zarrcache.data.splits import ids_of, read_map
from zarrcache.origin import Origin

__all__ = ["Catalog", "Present"]

logger = logging.getLogger(__name__)


class Present(NamedTuple):
    """Ids of one functional that both directories have, in the map's order, and those that one of
    them lacks.
    """

    ids: tuple[str, ...]
    missing: tuple[str, ...]


class Catalog:
    """Names of the stores of a pair of directories. Asks the origin when it is asked, once.

    Parameters
    ----------
    origins : mapping
        The directory of each role.
    cache : Cache
        Keep the listings, and say by ``revalidate`` whether a stored one will do.
    """

    def __init__(self, origins: Mapping[Role, Origin], cache: Cache) -> None:
        self._origins = origins
        self._cache = cache
        self._names: dict[Role, dict[str, str]] = {}
        self._present: dict[tuple[Path, str], Present] = {}

    def present(self, map_path: Path, functional: str) -> Present:
        """The ids of one functional; what is missing is logged once, with count and first ids.

        Raises
        ------
        ConfigError
            The map file cannot be read, or the functional is not in it.
        OriginError
            A directory cannot be listed.
        """
        key = map_path, functional
        if key not in self._present:
            wanted = ids_of(read_map(map_path), functional)
            data, label = self.names("data"), self.names("label")
            missing = tuple(
                task_id for task_id in wanted if task_id not in data or task_id not in label
            )
            if missing:
                first = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
                urls = self._origins["data"].url, self._origins["label"].url
                told = "%d of %d task ids of %s have no store in %s or %s and are left out: %s"
                logger.warning(told, len(missing), len(wanted), functional, *urls, first)
            self._present[key] = Present(
                tuple(task_id for task_id in wanted if task_id in data and task_id in label),
                missing,
            )
        return self._present[key]

    def names(self, role: Role) -> dict[str, str]:
        """File name of each store by its task id: ``mp-1.zarr``, or ``mp-1.zarr.zip`` where there
        is no such directory.
        """
        if role not in self._names:
            config = self._cache.config
            is_trusted = config is not None and config.revalidate == "never"
            stored = self._stored(role) if is_trusted else None
            self._names[role] = self._list(role) if stored is None else stored
        return self._names[role]

    def relist(self) -> None:
        """List both directories at the origin now, and keep the listings."""
        self._present.clear()
        self._names = {role: self._list(role) for role in self._origins}

    def relist_unless_known(self, task_ids: Iterable[str]) -> None:
        """List both directories, unless the stored listings name a store for each of
        ``task_ids``; these listings are then used as they are.
        """
        wanted = set(task_ids)
        known: dict[Role, dict[str, str]] = {}
        for role in self._origins:
            names = self._stored(role)
            if names is None or not names.keys() >= wanted:
                self.relist()
                return
            known[role] = names
        self._present.clear()
        self._names = known

    def _stored(self, role: Role) -> dict[str, str] | None:
        names = self._cache.stored_listing(self._origins[role], "")
        return names if isinstance(names, dict) else None

    def _list(self, role: Role) -> dict[str, str]:
        origin = self._origins[role]
        names: dict[str, str] = {}
        # so that mp-1.zarr comes after mp-1.zarr.zip and wins
        for name in sorted(origin.list_names(), reverse=True):
            stem = stem_of(name)
            if stem is not None:
                names[stem] = name
        self._cache.store_listing(origin, "", names)
        return names
