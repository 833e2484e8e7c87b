"""``PairReader``: which materials a pair of directories has, and how they are split.

The base of every reader, whatever its files are.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from zarrcache._keys import Role, density_array
from zarrcache.data.sequences import Density, SplitSets, split_sets
from zarrcache.data.splits import ids_of, read_map, split_ids

__all__ = ["PairReader"]

logger = logging.getLogger(__name__)


class _Present(NamedTuple):
    """Ids of a functional with input and label, in the map's order, and those without."""

    ids: tuple[str, ...]
    missing: tuple[str, ...]


class PairReader(ABC):
    """Pairs of charge densities (input and label), one per material, in two directories.

    Parameters
    ----------
    data_dir, label_dir : str or Path
    map_dir : path
        JSON or JSON.gz file ``{functional: [task_id, ...]}``.
    functional : str
    normalize : bool
        Divide by the number of grid points; the values then sum up to the number of electrons.
    train_fraction : float
        0 to 1, or a number of materials: ``train_size`` of scikit-learn's ``train_test_split``.
    random_state : int
    density_type : str
        ``total`` or ``diff``.
    """

    #: What holds a density, for messages.
    _unit: ClassVar[str]

    def __init__(
        self,
        data_dir: str | Path,
        label_dir: str | Path,
        map_dir: str | os.PathLike[str],
        functional: str,
        normalize: bool,
        train_fraction: float,
        random_state: int,
        density_type: str,
    ) -> None:
        self.data_dir = data_dir
        self.label_dir = label_dir
        self.map_dir = Path(map_dir)
        self.functional = functional
        self.normalize = normalize
        self.tf = train_fraction
        self.rs = random_state
        self.density_type = density_type
        self._known_ids: dict[tuple[Path, str], _Present] = {}

    @abstractmethod
    def store_names(self, role: Role) -> Mapping[str, Any]:
        """What one directory has, by task id: the name or the path of each store or file."""

    @abstractmethod
    def load(self, task_id: str, role: Role) -> Density:
        """Load one charge density."""

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({str(self.data_dir)!r}, {str(self.label_dir)!r}, "
            f"{self.functional!r}, {self.density_type!r})"
        )

    @property
    def array(self) -> str:
        """Name of the array that is read of each store."""
        return density_array(self.density_type)

    @property
    def task_ids(self) -> list[str]:
        """Ids of the functional that both directories have, in the map's order.

        Raises
        ------
        ConfigError
            The map file cannot be read, or the functional is not in it.
        OriginError
            A directory cannot be listed.
        """
        return list(self._present().ids)

    @property
    def missing(self) -> tuple[str, ...]:
        """Ids of the functional without input or label. They are left out of the split."""
        return self._present().missing

    def split_task_ids(self) -> tuple[list[str], list[str]]:
        """Training and test ids, in the order of ``data_split()``."""
        return split_ids(self._present().ids, self.tf, self.rs)

    def data_split(self) -> tuple[SplitSets, SplitSets]:
        """Split into training and test sets; nothing is loaded yet.

        Returns
        -------
        (train, test)
            Each ``(data, label, gs_data, gs_label)``: sequences that load on indexing, flat float32
            arrays and grid sizes.

        Raises
        ------
        ConfigError
            A ``ValueError``: unknown functional, too few materials.
        OriginError
            A directory cannot be listed.
        """
        train, test = self.split_task_ids()
        return split_sets(self, train), split_sets(self, test)

    def _present(self) -> _Present:
        """What the map and both directories have; a change of either attribute is followed."""
        key = self.map_dir, self.functional
        if key not in self._known_ids:
            wanted = ids_of(read_map(self.map_dir), self.functional)
            data, label = self.store_names("data"), self.store_names("label")
            missing = tuple(id_ for id_ in wanted if id_ not in data or id_ not in label)
            if missing:
                logger.warning(
                    "%d of %d task ids of %s have no %s in %s or %s and are left out: %s",
                    len(missing),
                    len(wanted),
                    self.functional,
                    self._unit,
                    *self._urls(),
                    ", ".join(missing[:5]) + (", …" if len(missing) > 5 else ""),
                )
            ids = tuple(id_ for id_ in wanted if id_ in data and id_ in label)
            self._known_ids[key] = _Present(ids, missing)
        return self._known_ids[key]

    def _urls(self) -> tuple[str, str]:
        """Where input and label lie, for messages."""
        return str(self.data_dir), str(self.label_dir)
